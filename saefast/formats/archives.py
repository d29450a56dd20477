"""What lies in .npz and .pt files, both of them zip archives: names, shapes, dtypes first, values when asked for."""

import contextlib
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saefast.data.shardfile import map_bytes
from saefast.errors import InputError

# A state dict's pickle names a few tensors, and each takes some hundred bytes.
_LARGEST_PICKLE = 64 << 20
_DEEPEST = 4
# No byte of a deflated file stands for more bytes than this.
_DENSEST = 1040
_DTYPES = {
    "f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "i1": torch.int8, "i2": torch.int16,
    "i4": torch.int32, "i8": torch.int64, "u1": torch.uint8, "b1": torch.bool,
}  # fmt: skip


class Entry(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Held(NamedTuple):
    """What a file holds by some name. entry: None where that is no tensor. read(): the value."""

    entry: Entry | None
    read: Callable[[], Any]


def read_npz(path: Path) -> dict[str, Held]:
    """The arrays of an .npz file. Those of dtypes that torch has not, and Python objects, are left out.

    Raises:
        InputError: damaged, or an array that is larger than its file.
    """
    found = {}
    with _reading(path, "an .npz file"), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.filename.endswith(".npy"):
                continue
            held = _npy(path, archive, info)
            if held is not None:
                found[info.filename.removesuffix(".npy")] = held
    return found


def _npy(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Held | None:
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, by_column, dtype = read(file)
        start = file.tell()
    kind = _DTYPES.get(dtype.str[1:]) if dtype.isnative else None
    if kind is None:
        return None
    length = math.prod(shape) * dtype.itemsize
    largest = path.stat().st_size * (1 if info.compress_type == zipfile.ZIP_STORED else _DENSEST)
    if min(shape, default=0) < 0 or start + length != info.file_size or length > largest:
        raise InputError(f"{path}: {info.filename} has shape {shape} by its header, and another size in the file")
    if info.compress_type != zipfile.ZIP_STORED or not length:
        return Held(Entry(shape, kind), lambda: _unpacked(path, info.filename))
    offset = _data_offset(path, info) + start

    def mapped() -> Tensor:
        # An archive puts files at any address; processors that saefast runs on read numbers from there all the same.
        flat = map_bytes(path, offset, offset + length).view(kind)
        return flat.view(shape[::-1]).permute(*range(len(shape))[::-1]) if by_column else flat.view(shape)

    return Held(Entry(shape, kind), mapped)


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where in the archive the bytes of a file begin: behind a header that has its name, and more, once again."""
    with path.open("rb") as file:
        file.seek(info.header_offset + 26)
        lengths = file.read(4)
    found = info.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    if found + info.file_size > path.stat().st_size:
        raise InputError(f"{path} is cut short: {info.filename} reaches beyond its end")
    return found


def _unpacked(path: Path, name: str) -> Tensor:
    with _reading(path, "an .npz file"), np.load(path, allow_pickle=False) as arrays:
        return torch.from_numpy(np.asarray(arrays[name.removesuffix(".npy")], order="C"))


def read_pt(path: Path) -> dict[str, Held]:
    """What torch.save wrote: a dictionary of tensors, numbers and text, nested ones under names joined by "/".

    The file is read by torch's own reader for weights alone, which makes nothing else of it, and mapped.

    Raises:
        InputError: not written by torch.save, or before version 1.6; of anything but a dictionary; with other objects
            in it; damaged, or with a tensor that is larger than the file.
    """
    with _reading(path, "a file of torch.save"):
        _check_zip(path)
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}: expected a dictionary of tensors (a state_dict)")
    size = path.stat().st_size
    found = {}
    for name, item in _leaves(value, "", _DEEPEST):
        if not isinstance(item, Tensor):
            found[name] = Held(None, lambda item=item: item)  # type: ignore[misc]
        elif item.layout == torch.strided and item.device.type == "cpu" and not item.is_quantized:
            if item.numel() * item.element_size() > size:
                raise InputError(f"{path}: {name} has shape {tuple(item.shape)}, more than {size:,} bytes hold")
            entry = Entry(tuple(item.shape), item.dtype)
            found[name] = Held(entry, lambda item=item: item.detach())  # type: ignore[misc]
    return found


def _check_zip(path: Path) -> None:
    """Raises InputError for an archive whose records are not stored as they are, which torch would read as garbage."""
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{path} is no zip archive: it was cut short, or torch.save of before version 1.6 wrote it; load it with "
            "torch.load(weights_only=True) and save it again"
        )
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            pickled = info.filename.endswith(".pkl")
            if info.compress_type != zipfile.ZIP_STORED or (pickled and info.file_size > _LARGEST_PICKLE):
                raise InputError(f"{path}: {info.filename} is compressed or too large: torch.save did not write this")


def _leaves(value: Any, name: str, deeper: int) -> Iterator[tuple[str, Any]]:
    """What is in nested dictionaries, with the names that lead to it; a dictionary without tensors is one thing."""
    if isinstance(value, dict):
        if name and _is_plain(value):
            yield name, value
        elif deeper:
            for key, item in value.items():
                if isinstance(key, str):
                    yield from _leaves(item, f"{name}/{key}" if name else key, deeper - 1)
    elif isinstance(value, Tensor) or _is_plain(value):
        yield name, value


def _is_plain(value: Any, deeper: int = 8) -> bool:
    """Whether a value is numbers and text, and lists and dictionaries of them."""
    if isinstance(value, dict):
        return deeper > 0 and all(isinstance(k, str) and _is_plain(v, deeper - 1) for k, v in value.items())
    if isinstance(value, list | tuple):
        return deeper > 0 and all(_is_plain(item, deeper - 1) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


@contextlib.contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Makes one line of whatever the readers of archives raise: a damaged file may bring up any of their errors."""
    try:
        yield
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|instantiate \w+) (\S+)", str(error))
        named = f" ({found[1].strip(chr(39))})" if found else ""
        raise InputError(
            f"{path} holds Python objects{named} or is damaged: expected tensors, numbers and text alone, and nothing "
            "else is read; save the state_dict of what it holds"
        ) from None
    except Exception as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise InputError(f"{path} cannot be read as {what}: it was cut short or damaged ({reason})") from None
