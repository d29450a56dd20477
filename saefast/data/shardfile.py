"""One safetensors file of activations: the first tensor starts on a page, everything is checked before it is mapped.

The layout is plain safetensors (an 8-byte length, a JSON header, the data). The header is padded with spaces to a
multiple of 4096 bytes, so that the data region can be read with O_DIRECT; `safetensors.torch.load_file` opens it all
the same.
"""

import hashlib
import json
import math
import mmap
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.files import SEAL, no_pipe, parse_json, replacing, usable
from saefast.schema import Count, check

PAGE = 4096
# A shard's checksums come per block, so that damage is reported with its place in the file.
BLOCK = 1 << 24
# Bytes copied from a GPU at a time, so that the host never holds a second copy of a training state or an SAE.
_PIECE_BYTES = 1 << 28
# Pages that could be written to count as taken at once where this is not said: a file larger than memory would not map.
# Python names the flag from 3.13 on.
_NOT_RESERVED = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
# The header of a shard is a few hundred bytes; a foreign file with thousands of tensors has a few megabytes.
_LARGEST_HEADER = 100 << 20

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


METADATA = "__metadata__"
# What stands in a sealed file's digest while the digest is made.
_BLANK = "0" * 64


class TensorInfo(TypedDict):
    """What a header says of a tensor: two offsets into the data behind the header."""

    dtype: str
    shape: list[Count]
    data_offsets: list[Count]


Header = TypedDict("Header", {"__metadata__": dict[str, str]}, total=False)


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its dtype and shape, and the absolute byte range it lies in."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass
class Digest:
    """sha256 of a whole file and the crc32 of each of its 16 MiB blocks."""

    sha256: str
    blocks: list[int]


@dataclass
class Column:
    """A tensor to be written: dtype and shape at once, its rows in pieces, so that it never lies in memory whole."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "Column":
        return cls(tensor.dtype, tuple(tensor.shape), _pieces(tensor))


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.detach().reshape(-1)
    for piece in flat.split(max(_PIECE_BYTES // tensor.element_size(), 1)):
        yield piece.cpu()


def read_header(path: Path) -> dict[str, Entry]:
    """Tensors of a safetensors file by name. Raises InputError naming the file, and the offset it is cut short at."""
    raw, size = _raw_header(path)
    header: dict[str, Any] = check(parse_json(raw, f"{path}: its header"), dict[str, Any], f"{path}: its header")
    header.pop(METADATA, None)
    infos: dict[str, TensorInfo] = check(header, dict[str, TensorInfo], f"{path}: its header")
    entries = {}
    for name, info in infos.items():
        dtype, shape, offsets = DTYPES.get(info["dtype"]), tuple(info["shape"]), info["data_offsets"]
        if dtype is None:
            continue
        length = offsets[1] - offsets[0] if len(offsets) == 2 else -1
        # The product without zeros too: torch multiplies dimensions of an empty tensor as well.
        if length != math.prod(shape) * dtype.itemsize or math.prod(n for n in shape if n) >= 2**60:
            raise InputError(f"{path}: the header gives tensor {name} {length} bytes for shape {shape}")
        entries[name] = Entry(dtype, shape, 8 + len(raw) + offsets[0], 8 + len(raw) + offsets[1])
    for name, entry in entries.items():
        if entry.end > size:
            raise InputError(
                f"{path} is truncated at byte {size}: tensor {name} reaches to byte {entry.end};"
                " copy or harvest it again"
            )
    return entries


def read_metadata(path: Path) -> dict[str, str]:
    """The strings in a safetensors file's header, its digest among them. Raises InputError as `read_header` does."""
    raw, _ = _raw_header(path)
    header: Header = check(parse_json(raw, f"{path}: its header"), Header, f"{path}: its header")
    return header.get("__metadata__", {})


def _raw_header(path: Path) -> tuple[bytes, int]:
    """The header's JSON, undecoded, and the size of the file."""
    try:
        with no_pipe(usable(path)).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise InputError(f"{path} is truncated or no safetensors file: {size} bytes, header of {length}")
            return file.read(length), size
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def verify_seal(path: Path, before: set[str]) -> bool:
    """Whether a file carries its own digest (`write_file(sealed=True)`), which is then compared with its bytes.

    Args:
        path: a safetensors file.
        before: the keys of the metadata that such files had before they were sealed. A file without a digest and with
            other keys is a sealed one whose digest was damaged.

    Raises:
        InputError: any byte of the file differs from what was written.
    """
    facts = read_metadata(path)
    if SEAL not in facts and facts.keys() == before:
        return False
    raw, _ = _raw_header(path)
    kept = facts.get(SEAL, "")
    found = hashlib.sha256()
    with path.open("rb") as file:
        found.update(file.read(8) + file.read(len(raw)).replace(_seal_entry(kept), _seal_entry(_BLANK), 1))
        while data := file.read(BLOCK):
            found.update(data)
    if found.hexdigest() != kept:
        raise InputError(f"{path} is damaged: its digest is not the one written; copy or make it again")
    return True


def _seal_entry(digest: str) -> bytes:
    # A damaged digest may hold half a surrogate pair, which JSON can say and plain UTF-8 cannot.
    return f'"{SEAL}":"{digest}"'.encode(errors="surrogatepass")


def map_tensor(path: Path, entry: Entry) -> Tensor:
    """The tensor as a view of the mapped file: nothing is read until touched, nothing written ever reaches the file."""
    if math.prod(entry.shape) == 0:
        return torch.zeros(entry.shape, dtype=entry.dtype, device="cpu")
    flat = map_bytes(path, entry.start, entry.end)
    if entry.start % entry.dtype.itemsize:
        flat = flat.clone()
    return flat.view(entry.dtype).view(entry.shape)


def map_bytes(path: Path, start: int, end: int) -> Tensor:
    """At least one byte of a file, (end - start,) uint8, as `map_tensor`; it may be larger than memory."""
    first = start - start % mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        mapped = mmap.mmap(
            file.fileno(),
            end - first,
            flags=mmap.MAP_PRIVATE | _NOT_RESERVED,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=first,
        )
    return torch.frombuffer(mapped, dtype=torch.uint8, count=end - start, offset=start - first)


def write_file(
    path: Path, columns: Mapping[str, Column], metadata: Mapping[str, str] | None = None, *, sealed: bool = False
) -> Digest:
    """Writes the columns in the given order to a temporary file, flushes it to disk and renames it.

    Where a tensor would start at an address its dtype cannot be read from, a few bytes named `_pad` come first.

    Args:
        sealed: the header's metadata gets "sha256": the digest of the whole file as it is with 64 zeros in its place,
            so that every byte is covered and the file stays plain safetensors. It is the sha256 returned, too.
    """
    header, padding = _layout(columns, ({SEAL: _BLANK} if sealed else {}) | dict(metadata or {}))
    with replacing(path) as temporary, temporary.open("wb") as file:
        out = _Hashing(file)
        out.write(len(header).to_bytes(8, "little") + header)
        for name, column in columns.items():
            out.write(bytes(padding.get(name, 0)))
            written = 0
            for piece in column.pieces:
                written += out.write_tensor(piece, column.dtype)
            if written != math.prod(column.shape) * column.dtype.itemsize:
                raise RuntimeError(f"{path}: {written} bytes written for {name} of shape {column.shape}")
        digest = out.digest()
        if sealed:
            file.seek(8 + header.index(_seal_entry(_BLANK)))
            file.write(_seal_entry(digest.sha256))
        file.flush()
    return digest


def _layout(columns: Mapping[str, Column], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int]]:
    """The padded JSON header, and how many bytes of padding each column needs before it."""
    entries: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    padding, offset = {}, 0
    for name, column in columns.items():
        gap = -offset % column.dtype.itemsize
        if gap:
            padding[name] = gap
            pad = f"_pad_{name}"
            entries[pad] = {"dtype": "U8", "shape": [gap], "data_offsets": [offset, offset + gap]}
        start = offset + gap
        offset = start + math.prod(column.shape) * column.dtype.itemsize
        entries[name] = {
            "dtype": _NAMES[column.dtype],
            "shape": list(column.shape),
            "data_offsets": [start, offset],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text.ljust(len(text) + -(len(text) + 8) % PAGE), padding


@dataclass
class _Hashing:
    """Writes to a file and digests what it writes."""

    file: BinaryIO | None
    sha: "hashlib._Hash" = field(default_factory=hashlib.sha256)
    blocks: list[int] = field(default_factory=list)
    crc: int = 0
    filled: int = 0

    def write(self, data: bytes | memoryview) -> int:
        if self.file is not None:
            self.file.write(data)
        self.sha.update(data)
        view = memoryview(data)
        while len(view):
            part = view[: BLOCK - self.filled]
            self.crc = zlib.crc32(part, self.crc)
            self.filled += len(part)
            if self.filled == BLOCK:
                self._close_block()
            view = view[len(part) :]
        return len(data)

    def write_tensor(self, tensor: Tensor, dtype: torch.dtype) -> int:
        if tensor.dtype != dtype:
            raise RuntimeError(f"a piece of dtype {tensor.dtype} in a column of {dtype}")
        flat = tensor.contiguous().view(-1)
        return self.write(flat.view(torch.uint8).numpy().data) if flat.numel() else 0

    def _close_block(self) -> None:
        self.blocks.append(self.crc)
        self.crc = self.filled = 0

    def digest(self) -> Digest:
        if self.filled:
            self._close_block()
        return Digest(self.sha.hexdigest(), self.blocks)


def digest_file(path: Path) -> Digest:
    """Digest of a file as it lies on disk now."""
    out = _Hashing(None)
    with path.open("rb") as file:
        while data := file.read(BLOCK):
            out.write(data)
    return out.digest()
