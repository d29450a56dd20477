"""Which device to work on."""

import torch

from saefast.errors import InputError


def pick_device(name: str) -> torch.device:
    """The device that a name stands for; "auto" is the GPU if there is one.

    Raises:
        InputError: one that is not there, or "meta", whose tensors have no values.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = (str(error).splitlines() or [repr(error)])[0]
        raise InputError(f"device is {name!r}, which is not there ({reason}): try 'auto'") from None
    if device.type == "meta":
        raise InputError("device is 'meta', whose tensors have no values: try 'auto'")
    return device
