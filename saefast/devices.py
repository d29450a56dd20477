"""What GPUs can do: memory, arithmetic and bandwidth, one figure for all of saefast."""

import re
from typing import NamedTuple

# The share of a data sheet's rates that large matrix products and copies reach: the H200's measured figures over its
# data sheet's (790 of 989 TFLOP/s, 50 of 67, 4.3 of 4.8 TB/s). Used for devices that were not measured.
MATRIX_REACHED, FP32_REACHED, TRAFFIC_REACHED = 0.80, 0.75, 0.90


class Device(NamedTuple):
    """A device's memory in bytes, and the rates that large operations reach on it.

    flops, flops_fp32: of a matrix product in bf16, and in fp32 as torch multiplies it by default, in FLOP/s. bandwidth:
    of a copy, in bytes/s, counting what is read and what is written. source: where the figures are from. busy: share of
    the cores that other processes had while it was measured.
    """

    memory: float
    flops: float
    flops_fp32: float
    bandwidth: float
    source: str
    busy: float = 0.0


def _from_sheet(gigabytes: float, bf16: float, fp32: float, gigabytes_a_second: float, product: str) -> Device:
    """From NVIDIA's data sheet: TFLOP/s of dense bf16 with fp32 sums, and of plain fp32."""
    return Device(
        gigabytes * 1e9,
        MATRIX_REACHED * bf16 * 1e12,
        FP32_REACHED * fp32 * 1e12,
        TRAFFIC_REACHED * gigabytes_a_second * 1e9,
        f"NVIDIA's data sheet of the {product}",
    )


DEVICES: dict[str, Device] = {
    "b200": _from_sheet(180, 2250, 75, 8000, "HGX B200"),
    "h200": Device(143_771 * 2**20, 790e12, 50e12, 4.3e12, "measured on an H200 SXM"),
    "h100": Device(80e9, 700e12, 50e12, 3.0e12, "published measurements of the H100 SXM"),
    "a100": _from_sheet(80, 312, 19.5, 2039, "A100 80GB SXM"),
    "l40s": _from_sheet(48, 362, 91.6, 864, "L40S"),
    "l4": _from_sheet(24, 121, 30.3, 300, "L4"),
    "rtx4090": _from_sheet(24, 165, 82.6, 1008, "GeForce RTX 4090"),
}


def find(name: str) -> str | None:
    """The key in DEVICES that a person or a driver means by a name ("RTX 4090", "NVIDIA A100-SXM4-80GB"), or None."""
    # Whole words, so that an L40 is no L4; "RTX 4090", "RTX-4090" and "rtx4090" are one.
    words = re.sub(r"\brtx[\s_-]*(\d)", r"rtx\1", name.lower())
    return next((key for key in re.split(r"[^a-z0-9]+", words) if key in DEVICES), None)
