"""Segment, what every file or array of activations becomes: a 2-D tensor of rows, mapped where the format allows it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saefast.data.shardfile import map_tensor, read_header
from saefast.data.shards import Shard
from saefast.data.source import Device
from saefast.errors import InputError
from saefast.files import no_pipe

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SUFFIXES = (".npy", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class Segment:
    """Rows (n, d) that lie together: scale (n,) where they are int8 codes, seq and pos (n,) where they are known."""

    name: str
    rows: Tensor
    scale: Tensor | None = None
    seq: Tensor | None = None
    pos: Tensor | None = None
    first: int = 0

    def part(self, start: int, stop: int) -> "Segment":
        """Rows start to stop, which still know their number in the file."""
        scale, seq, pos = (None if t is None else t[start:stop] for t in (self.scale, self.seq, self.pos))
        return Segment(self.name, self.rows[start:stop], scale, seq, pos, self.first + start)

    def where(self, mask: Tensor) -> "Segment":
        """A copy of the rows for which mask (n,) bool says so, which no longer know their number in the file."""
        here = mask.to(self.rows.device)
        scale, seq, pos = (None if t is None else t[mask.to(t.device)] for t in (self.scale, self.seq, self.pos))
        return Segment(f"{self.name} without masked rows,", self.rows[here], scale, seq, pos)

    def read(self, device: Device, dtype: torch.dtype) -> Tensor:
        """The rows as numbers (n, d); they cross to the device as they are stored and are widened there."""
        rows = self.rows.to(device).to(dtype)
        return rows if self.scale is None else rows * self.scale.to(device)[:, None].to(dtype)


def from_shard(shard: Shard) -> Segment:
    return Segment(str(shard.path), shard.acts, shard.scale, shard.seq, shard.pos)


def from_array(name: str, array: Any) -> Segment:
    """A segment of a tensor or numpy array (..., d): leading dimensions are flattened, nothing else is copied.

    Raises InputError for other types, fewer than two dimensions, no rows, or a dtype that is not floating point.
    """
    if isinstance(array, np.ndarray):
        if array.dtype.kind != "f" or array.dtype.itemsize > 8:
            raise InputError(f"{name} has dtype {array.dtype}, expected float16, float32 or float64")
        native = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
        # torch has no negative strides.
        tensor = torch.from_numpy(native if min(native.strides, default=0) >= 0 else native.copy())
    elif isinstance(array, Tensor):
        tensor = array.detach()
    else:
        raise InputError(f"{name} is a {type(array).__name__}, expected a tensor or numpy array of shape (rows, d_in)")
    if tensor.layout != torch.strided or tensor.dtype not in FLOATS:
        raise InputError(
            f"{name} has dtype {tensor.dtype} ({tensor.layout}), expected dense bfloat16, float16, float32 or float64"
        )
    if tensor.device.type == "meta":
        raise InputError(f"{name} is on the meta device, where tensors have no values: load its data first")
    if tensor.dim() < 2:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}, expected (rows, d_in)")
    if tensor.numel() == 0:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}: it is empty")
    return Segment(name, tensor.reshape(-1, tensor.shape[-1]).contiguous())


def from_file(path: Path, key: str | None = None) -> Segment:
    """A segment of a .npy, .pt, .pth or .safetensors file. `key` picks one of several tensors.

    Raises InputError for a missing, unreadable or truncated file, a key where there is nothing to pick from, and as
    from_array does.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path} has an unknown ending, expected one of {', '.join(SUFFIXES)}, or a shard folder")
    if not path.is_file():
        raise InputError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty (0 bytes)")
    if path.suffix == ".npy":
        _no_key(path, key)
        return from_array(str(path), _open_npy(path))
    if path.suffix == ".safetensors":
        entries = read_header(path)
        name = _pick(path, {k: e.shape for k, e in entries.items()}, key)
        return from_array(str(path), map_tensor(path, entries[name]))
    value = open_pt(path)
    if isinstance(value, dict):
        tensors = {k: v for k, v in value.items() if isinstance(v, Tensor)}
        value = tensors[_pick(path, {k: tuple(v.shape) for k, v in tensors.items()}, key)]
    else:
        _no_key(path, key)
    return from_array(str(path), value)


def _no_key(path: Path, key: str | None) -> None:
    if key is not None:
        raise InputError(f"{path} holds one array and no names: leave out key {key!r}")


def _pick(path: Path, shapes: dict[str, tuple[int, ...]], key: str | None) -> str:
    seen = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "none"
    if key is not None:
        if key not in shapes:
            raise InputError(f"{path} has no tensor {key!r}; its tensors: {seen}")
        return key
    if len(shapes) == 1:
        return next(iter(shapes))
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    if len(matrices) != 1:
        raise InputError(f"{path} holds {len(matrices)} 2-D tensors, say which with key; its tensors: {seen}")
    return matrices[0]


def _open_npy(path: Path) -> np.ndarray:
    # Mode "c" maps the file copy-on-write: torch gets a writable view, and the file is never touched.
    try:
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except Exception as error:  # a damaged header may be any text, and numpy's parser raises many kinds of errors
        raise InputError(f"{path} cannot be read as .npy, is it truncated? ({_line(error)})") from None


def open_pt(path: Path) -> Any:
    no_pipe(path)
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            # Files of before torch 1.6 are no zip archives and cannot be mapped.
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(
            f"{path} cannot be read by torch.load(weights_only=True): truncated, or not plain tensors ({_line(error)})"
        ) from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
