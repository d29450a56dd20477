"""select_kth on every backend against a sort, and its Triton kernel."""

import interp
import pytest
import torch
from torch import Tensor

from saefast import extension
from saefast.errors import InputError
from saefast.kernels import tuning
from saefast.ops import native, reference, triton_select_kth
from saefast.ops.select_kth import select_kth

interp.speed_up()
HIGHEST = 2**31 - 1
BACKENDS = {"kernel": triton_select_kth.select_kth, "plain": reference.select_kth, "op": select_kth}
if extension.available():
    BACKENDS["cpp"] = native.select_kth


def by_sorting(keys: Tensor, k: int) -> int:
    return int(keys.sort(descending=True).values[k - 1]) if k <= len(keys) else 0


def keys_of(kind: str, n: int) -> Tensor:
    """Keys of every size of digit, few or many of them equal."""
    spread = torch.randint(0, HIGHEST, (n,), dtype=torch.int32) >> torch.randint(0, 31, (n,), dtype=torch.int32)
    kinds = {
        "any": spread,
        "few values": spread % 3,
        "all equal": torch.full((n,), 123_456_789, dtype=torch.int32),
        "all highest": torch.full((n,), HIGHEST, dtype=torch.int32),
        "zeros and highest": (spread % 2) * HIGHEST,
        "floats": reference.positive_keys(torch.randn(n)),
    }
    return kinds[kind]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["any", "few values", "all equal", "all highest", "zeros and highest", "floats"])
@pytest.mark.parametrize("n", [0, 1, 7, 700])
def test_the_kth_is_a_sorts(backend: str, kind: str, n: int, device: torch.device) -> None:
    if backend == "cpp" and device.type != "cpu":
        pytest.skip("C++ serves the CPU")
    keys = keys_of(kind, n).to(device)
    for k in (1, 2, n // 3, n - 1, n, n + 1, 10 * n + 5):
        if k >= 1:
            found = BACKENDS[backend](keys, k)
            assert found.shape == ()
            assert found.dtype == torch.int32
            assert found.device.type == device.type
            assert int(found) == by_sorting(keys, k), k


def test_several_programs_count_together(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SELECT_KEYS", 64)
    keys = keys_of("any", 1000).to(device)
    for k in (1, 63, 64, 65, 999, 1000, 1001):
        assert int(triton_select_kth.select_kth(keys, k)) == by_sorting(keys, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keys_are_in_the_order_of_positive_floats(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    ordered = torch.tensor([tiny / 4, tiny, 0.5, 1.0, 1.0 + 2**-20, 3e38, torch.inf, torch.nan], dtype=dtype)
    keys = reference.positive_keys(ordered)
    assert (keys.diff() > 0).all()
    assert keys[0] > 0
    none = torch.tensor([0.0, -0.0, -tiny, -1.0, -torch.inf], dtype=dtype)
    assert (reference.positive_keys(none) == 0).all()
    assert reference.positive_keys(-ordered[-1:]) == keys[-1]


def test_int64_keys() -> None:
    keys = torch.tensor([5, 2**60, 2**60 + 1, 0])
    assert [int(select_kth(keys, k)) for k in (1, 2, 3, 4, 5)] == [2**60 + 1, 2**60, 5, 0, 0]


@pytest.mark.parametrize(
    ("keys", "k", "message"),
    [
        (torch.zeros(3), 1, "keys is torch.float32"),
        (torch.zeros(3, 1, dtype=torch.int32), 1, r"of shape \(3, 1\)"),
        (torch.zeros(3, dtype=torch.int32), 0, "k is 0"),
    ],
)
def test_what_cannot_be_served_is_refused(keys: Tensor, k: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        select_kth(keys, k)
