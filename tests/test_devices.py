"""The table of GPUs: found by the names that people and drivers use, with figures that fit one another."""

import pytest

from saefast.devices import DEVICES, MATRIX_REACHED, TRAFFIC_REACHED, find


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("RTX 4090", "rtx4090"),
        ("rtx-4090", "rtx4090"),
        ("rtx4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("L4", "l4"),
        ("NVIDIA L40", None),  # another card than the L4 and the L40S
        ("NVIDIA B200", "b200"),
        ("GB200", None),
        ("Tesla T4", None),
        ("", None),
    ],
)
def test_names_of_people_and_drivers(name: str, key: str | None) -> None:
    assert find(name) == key


def test_the_measured_device_is_what_the_shares_of_data_sheets_come_from() -> None:
    h200 = DEVICES["h200"]
    assert h200.flops / 989e12 == pytest.approx(MATRIX_REACHED, abs=0.005)
    assert h200.bandwidth / 4.8e12 == pytest.approx(TRAFFIC_REACHED, abs=0.005)


@pytest.mark.parametrize("key", DEVICES)
def test_figures_are_in_their_units(key: str) -> None:
    device = DEVICES[key]
    assert 20e9 < device.memory < 200e9
    # A bf16 matrix product of a tensor core is faster than plain fp32 arithmetic, everywhere in this table.
    assert 10e12 < device.flops_fp32 < device.flops < 2.3e15
    # The ridge: operations a byte at which a large product is bound by arithmetic.
    assert 100 < device.flops / device.bandwidth < 500
    assert device.source
