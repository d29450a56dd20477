"""What can come of a case, in words that the tables use, and which of them are faults."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from attack.pool import CRASH, HANG
from torch import Tensor

SAME, REFUSED, FELL_BACK, NO_DIGEST, WORKS = "same", "refused", "fell back", "changed, no digest", "works"
SILENT, VAGUE, TRACEBACK, ALTERED, LITTER = "silent change", "vague", "traceback", "altered", "litter"
GROWTH = "growth"
# In the order of the table. same: as if nothing had happened. refused: InputError in one line that names the file. fell
# back: another part or checkpoint was used, and a warning says so. changed, no digest: another result, where the format
# has no digest that could tell. works: an odd argument that means something.
GOOD = (SAME, WORKS, REFUSED, FELL_BACK, NO_DIGEST)
# silent change: another result although a digest covers the bytes. vague: refused in several lines, or without naming
# the file. altered: somebody else's file was changed. litter: files left over that belong to nobody. growth: of memory,
# threads or open files.
FAULTS = (SILENT, VAGUE, TRACEBACK, CRASH, HANG, ALTERED, LITTER, GROWTH)
LONGEST_LINE = 800


def refusal(error: Exception, place: Path | None = None) -> tuple[str, str]:
    """REFUSED, or VAGUE where the message is not one line, or does not name the place it is about."""
    text = str(error)
    if not text.strip() or "\n" in text or len(text) > LONGEST_LINE:
        return VAGUE, f"{len(text)} characters in {len(text.splitlines())} lines: {text[:300]!r}"
    if place is not None and str(place) not in text:
        return VAGUE, f"does not name {place}: {text!r}"
    return REFUSED, text


def digest(value: Any) -> str:
    """One for equal values, NaN equal to NaN: tensors by dtype, shape and bytes, containers by what is in them."""
    found = hashlib.sha256()
    _add(value, found)
    return found.hexdigest()[:16]


def _add(value: Any, to: "hashlib._Hash") -> None:
    if isinstance(value, Tensor):
        value = (str(value.dtype), tuple(value.shape), _bytes(value))
    if isinstance(value, np.ndarray):
        value = (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, Mapping):
        value = [(key, value[key]) for key in value]
    if isinstance(value, list | tuple):
        to.update(f"[{len(value)}".encode())
        for item in value:
            _add(item, to)
    else:
        to.update(value if isinstance(value, bytes) else repr(value).encode("utf-8", "backslashreplace"))


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def frame_of(error: BaseException) -> str:
    """The exception and the innermost line of saefast that it came through: what tells one fault from another."""
    place = ""
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "/saefast/" in name:
            place = f"{name.rpartition('/saefast/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__} at {place}: {text}"
