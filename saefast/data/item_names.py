"""Names of what rows are of, where that is no text: the file of an image, a stretch of sound. They lead from a row back
to it.

    folder/items/names-00000.safetensors    of n items: names (total,) uint8 in UTF-8, offsets (n + 1,) int64
"""

from bisect import bisect_right
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch

from saefast.data.shardfile import Column, map_tensor, read_header, write_file
from saefast.errors import InputError
from saefast.schema import Count

ITEMS = "items"


# What the rows of a folder may be of besides text, in words.
_KINDS = {"images": "rows of images", "audio": "rows of audio"}
# What a position is called.
_UNITS = {"text": "tokens", "images": "patches", "audio": "frames"}


def what_of(kind: str) -> str:
    return _KINDS.get(kind, "rows of inputs that are no text")


def unit_of(kind: str) -> str:
    return _UNITS.get(kind, "positions")


class ItemsEntry(TypedDict):
    """index.json: a file of names."""

    file: str
    first_seq: Count
    n_seq: Count
    sha256: str


class ItemNames:
    """The name of each item of a shard folder, by its number; files are read when they are needed.

    A file below the folder that was harvested, with "#t=start,end" in seconds behind it where the item is a stretch of
    a file (W3C Media Fragments 1.0); of what was given by hand the name that was given, else its number.
    """

    def __init__(self, folder: Path, parts: list[dict[str, Any]]) -> None:
        self._folder, self._parts = folder, parts
        self._read: dict[int, list[str]] = {}

    def __len__(self) -> int:
        return sum(int(part["n_seq"]) for part in self._parts)

    def __getitem__(self, seq: int) -> str:
        if not 0 <= seq < len(self):
            raise InputError(f"item {seq} is not in {self._folder}, which has {len(self)}")
        number = bisect_right([int(part["first_seq"]) for part in self._parts], seq) - 1
        part = self._parts[number]
        if number not in self._read:
            self._read[number] = read_names(self._folder / part["file"], part["n_seq"])
        return self._read[number][seq - int(part["first_seq"])]


def write_names(folder: Path, number: int, first: int, names: list[str]) -> dict[str, Any]:
    """Writes the names of items first, first + 1, ... -> their entry in the index."""
    coded = [name.encode("utf-8", "surrogateescape") for name in names]
    lengths = torch.tensor([0, *map(len, coded)], dtype=torch.int64, device="cpu")
    flat = torch.from_numpy(np.frombuffer(b"".join(coded) or b"\0", dtype=np.uint8).copy())
    file = f"{ITEMS}/names-{number:05d}.safetensors"
    digest = write_file(folder / file, {"names": Column.of(flat), "offsets": Column.of(lengths.cumsum(0))})
    return {"file": file, "first_seq": first, "n_seq": len(names), "sha256": digest.sha256}


def read_names(path: Path, n: int) -> list[str]:
    """The names in a file that the index says has n. Raises InputError for any other file."""
    entries = read_header(path)
    wanted = {"names": torch.uint8, "offsets": torch.int64}
    if any(name not in entries or entries[name].dtype != dtype for name, dtype in wanted.items()):
        raise InputError(f"{path} holds {', '.join(entries)}: expected names uint8 and offsets int64")
    flat, offsets = (map_tensor(path, entries[name]) for name in wanted)
    if flat.dim() != 1 or offsets.shape != (n + 1,):
        raise InputError(f"{path} holds names {tuple(flat.shape)} and offsets {tuple(offsets.shape)} for {n} items")
    places = offsets.tolist()
    if places[0] != 0 or places[-1] > len(flat) or any(start > stop for start, stop in pairwise(places)):
        raise InputError(f"{path} is damaged: its offsets do not rise from 0 to its {len(flat)} bytes")
    whole = flat.numpy().tobytes()
    return [whole[start:stop].decode("utf-8", "surrogateescape") for start, stop in pairwise(places)]
