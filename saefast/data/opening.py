"""open_source: whatever a user has becomes a Source to train from."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from saefast.data.foreign import read_foreign
from saefast.data.iterable_source import IterableSource
from saefast.data.mapped_source import MappedSource, Rows
from saefast.data.segments import SUFFIXES, Segment, from_array, from_file, from_shard
from saefast.data.shard_buffer import ShardBuffer
from saefast.data.shards import ShardFolder
from saefast.data.source import Source
from saefast.errors import InputError
from saefast.extension import available
from saefast.files import usable
from saefast.typed import typed

Shuffle = Literal["auto", "buffer", "mapped"]
# The share of a file's rows that is held out.
HELDOUT = 0.05


@typed
def open_source(
    data: Any,
    *,
    heldout: float = HELDOUT,
    hook: str | None = None,
    key: str | None = None,
    d_in: int | None = None,
    skip_bad_shards: bool = False,
    verify: bool = False,
    shuffle: Shuffle = "auto",
) -> Source:
    """A Source over `data`, which is one of

    - a shard folder (`hook` says which of its hooks; needed when there are several). Held out are the sequences that
      the harvest held out, whatever `heldout` says; skip_bad_shards and verify as in ShardFolder. shuffle="mapped"
      draws from the whole folder at random, "buffer" streams it through a reservoir (ShardBuffer), for folders larger
      than memory; "auto" takes the buffer for folders over a quarter of this machine's memory, and for all where
      there is a GPU, which it keeps fed;
    - a .npy, .pt or .safetensors file (`key` picks one of several tensors), or a folder of them, mapped where the
      format allows;
    - a folder of activations cached by SAELens, by science-of-finetuning's dictionary_learning or by llamascopium
      (foreign.py; `hook` as above);
    - a tensor or numpy array (..., d_in). For files and arrays the last `heldout` of the rows is held out, in one
      piece, because neighbouring rows tend to be of one text;
    - an iterable of tensors (B, d_in), or a function that returns one: see IterableSource;
    - a Source, which is passed through.

    Raises InputError in one line for what cannot be trained on, and for a hook or key where nothing has that name;
    `d_in`, if given, is the width it must have.
    """
    if not 0 <= heldout < 1:
        raise InputError(f"heldout is {heldout}, expected a share of at least 0 and less than 1")
    source = _open(data, heldout, hook, key, skip_bad_shards, verify)
    if isinstance(source, MappedSource) and source.folder is not None and _streams(source, shuffle):
        source = ShardBuffer(source)
    if d_in is not None and source.d_in != d_in:
        raise InputError(f"{source.source_name} has rows of {source.d_in} columns, expected d_in = {d_in}")
    return source


def has_hooks(data: Any) -> bool:
    """Whether `hook` means something for this data: a shard folder, or a folder of another library's cache."""
    if not isinstance(data, str | Path):
        return False
    path = usable(data)
    cached = ("*.arrow", "*/*chunk-*")
    return (path / "index.json").is_file() or any(next(path.glob(pattern), None) for pattern in cached)


def _streams(source: MappedSource, shuffle: Shuffle) -> bool:
    """Whether a shard folder is streamed through a reservoir rather than drawn from at random."""
    if shuffle not in get_args(Shuffle):
        raise InputError(f"shuffle is {shuffle!r}, expected one of {', '.join(get_args(Shuffle))}")
    if shuffle != "auto":
        return shuffle == "buffer"
    stored = sum(segment.rows.nbytes for segment in source.train.segments)
    large = stored > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4
    return available() and (large or torch.cuda.is_available())


def _open(data: Any, heldout: float, hook: str | None, key: str | None, skip_bad_shards: bool, verify: bool) -> Source:
    if isinstance(data, Source):
        _refuse(data.source_name, hook=hook, key=key)
        return data
    if isinstance(data, str | Path):
        path = usable(data)
        if (path / "index.json").is_file():
            _refuse(path, key=key)
            return _from_shards(ShardFolder(path, skip_bad_shards=skip_bad_shards, verify=verify), hook)
        return _from_segments(str(path), _from_path(path, hook, key), heldout)
    _refuse("what is given", hook=hook, key=key)
    if isinstance(data, torch.Tensor | np.ndarray):
        return _from_segments("the array", [from_array("the array", data)], heldout)
    if isinstance(data, Iterable) or callable(data):
        return IterableSource(data, heldout)
    raise InputError(
        f"a {type(data).__name__} is nothing to train on,"
        " expected a path, an array, or an iterable of (B, d_in) tensors"
    )


def _from_path(path: Path, hook: str | None, key: str | None) -> list[Segment]:
    foreign = read_foreign(path, hook) if path.is_dir() else None
    if foreign is not None:
        _refuse(path, key=key)
        return foreign
    segments = [from_file(file, key) for file in _files(path)]
    _refuse(path, hook=hook)
    return segments


def _refuse(data: object, **names: str | None) -> None:
    """Raises InputError for a hook or key that would pick nothing: to ignore it would train on something else."""
    for name, value in names.items():
        if value is not None:
            raise InputError(f"{name} is {value!a}, but {data} has no {name}s to choose from: leave it out")


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if not files:
        raise InputError(f"{path} holds no index.json and no {', '.join(SUFFIXES)} file; is its harvest unfinished?")
    if len({file.suffix for file in files}) > 1:
        raise InputError(f"{path} holds files of several kinds ({files[0].name}, {files[-1].name}): name one file")
    return files


def _from_segments(name: str, segments: list[Segment], heldout: float) -> MappedSource:
    d_in = segments[0].rows.shape[1]
    for segment in segments[1:]:
        if segment.rows.shape[1] != d_in:
            raise InputError(f"{segment.name} has {segment.rows.shape[1]} columns, {segments[0].name} has {d_in}")
    rows = Rows(segments)
    n = math.ceil(len(rows) * heldout)
    if n >= len(rows):
        raise InputError(f"{name} has {len(rows)} rows: none is left to train on when {n} are held out")
    return MappedSource(name, *rows.split_tail(n))


def _from_shards(folder: ShardFolder, hook: str | None) -> MappedSource:
    name = folder.hook(hook)
    train, held = (
        Rows([from_shard(folder.open(info, name)) for info in folder.shards(split, name)])
        for split in ("train", "heldout")
    )
    if not len(train):
        left_out = f" ({len(folder.skipped)} bad shards left out)" if folder.skipped else ""
        raise InputError(f"{folder.path} holds no rows to train on{left_out}: run the harvest again, it goes on")
    return MappedSource(f"{folder.path} ({name})", train, held, folder, name)
