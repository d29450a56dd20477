"""The forms that the encoder's tiles have on a GPU, a way to make every setting take one, and operands."""

import pytest
import torch

from saefast.kernels import tuning
from saefast.ops import triton_launch

FORMS = ("pointer", "descriptor", "chunked")


def force(monkeypatch, device, form):
    """Makes every setting of the device's architecture take a form; returns the method that leads to it."""
    arch = triton_launch.architecture(device)
    if form == "descriptor" and 0 < arch < 90:
        pytest.skip("no TMA on this device")
    per_sm = int(form == "descriptor")
    forced = {
        key: tuple(config._replace(per_sm=per_sm) for config in pair)
        for key, pair in tuning.TILES.items()
        if key[0] == arch and key[1] != "ieee"
    }
    monkeypatch.setattr(tuning, "TILES", tuning.TILES | forced)
    if device.type == "cpu":
        small = dict.fromkeys(("half", "tf32"), tuning.Tiles(16, 128, 64, 4, 1, 0))
        monkeypatch.setattr(tuning, "POINTER_TILES", small)
        monkeypatch.setattr(tuning, "LEAN_TILES", {k: v._replace(per_sm=1) for k, v in small.items()})
    return "chunked" if form == "chunked" else "fused"


def integers(*shape, low=-3, high=4, dtype=torch.float16):
    return torch.randint(low, high, shape).to(dtype)


def misaligned(t):
    """The same rows, one element off every 16-byte boundary."""
    memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    moved = memory[1:].view(t.shape)
    return moved.copy_(t)


def sliced(t):
    """(1, D) cut from a wider row: contiguous as torch sees it, with a stride that is no multiple of 16 bytes."""
    wide = torch.zeros(1, t.shape[1] + 3, dtype=t.dtype, device=t.device)
    wide[:, : t.shape[1]] = t[:1]
    return wide[:, : t.shape[1]]
