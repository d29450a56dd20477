"""Which device to work on, and how much it holds."""

import os
from pathlib import Path

import torch

from saefast.errors import InputError

_CONTAINER = Path("/sys/fs/cgroup/memory.max")


def pick_device(name: str) -> torch.device:
    """The device that a name stands for; "auto" is the GPU if there is one.

    Raises:
        InputError: one that is not there, or "meta", whose tensors have no values.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = require_device(name)
    if device.type == "meta":
        raise InputError("device is 'meta', whose tensors have no values: try 'auto'")
    return device


def require_device(name: str | torch.device) -> torch.device:
    """The device of a name, "meta" included. Raises InputError for one that is not there."""
    try:
        device = torch.device(name)
        torch.empty(0, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        shown = ascii(str(name))
        raise InputError(f"device is {shown}, which is not there ({reason}): try 'auto', or 'cpu'") from None
    return device


def require_memory(device: torch.device | str, needed: int, what: str) -> None:
    """Raises InputError where `needed` bytes are more than the whole of a device's memory, free or not."""
    place = torch.device(device)
    held = _memory_of(place)
    if held is not None and needed > held:
        raise InputError(
            f"{what} needs at least {needed / 1e9:,.1f} GB, {place} has {held / 1e9:,.1f} GB: ask for less "
            "(`saefast plan` says what fits)"
        )


def _memory_of(device: torch.device) -> int | None:
    """Bytes of a device's memory, or the part that this process may use; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    held = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:  # a container's share, in cgroup v2
        return min(held, int(_CONTAINER.read_text(encoding="ascii")))
    except (OSError, ValueError):  # there is none, or it says "max"
        return held
