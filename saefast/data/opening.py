"""open_source makes a Source of anything that a user may train from: folders, files, arrays, iterables."""

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from saefast.data.foreign import read_foreign
from saefast.data.iterable_batches import is_empty, masked_in, tensors_of
from saefast.data.iterable_source import IterableSource
from saefast.data.mapped_source import MappedSource, Rows, joined_rows
from saefast.data.masks import MASK, check_length, mask_of
from saefast.data.segments import SUFFIXES, Segment, from_array, from_file, from_shard
from saefast.data.several_folders import open_side_by_side
from saefast.data.shard_buffer import ShardBuffer
from saefast.data.shards import ShardFolder
from saefast.data.shuffled_iterable import SHUFFLE_ROWS, ShuffledIterable
from saefast.data.source import TARGET, Names, Source, X, side_by_side
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
    hooks: Names | None = None,
    key: str | None = None,
    keys: Names | None = None,
    d_in: int | None = None,
    d_out: int | None = None,
    skip_bad_shards: bool = False,
    verify: bool = False,
    shuffle: Shuffle = "auto",
    shuffle_rows: int = SHUFFLE_ROWS,
) -> Source:
    """A Source over `data`, which is one of

    - a shard folder (`hook` says which of its hooks; needed when there are several). Held out are the sequences that
      the harvest held out, and `heldout` means nothing; skip_bad_shards and verify as in ShardFolder. shuffle="mapped"
      draws from the whole folder at random, "buffer" streams it through a reservoir (ShardBuffer), for folders larger
      than memory; "auto" takes the buffer for folders over a quarter of this machine's memory, and for all where
      there is a GPU, which it keeps fed;
    - a tuple of shard folders, one for each of several models that read the same text: x has the rows of all of them at
      the same tokens side by side, hooks={"x": [hook of the first, hook of the second]};
    - a .npy, .pt or .safetensors file (`key` picks one of several tensors), or a folder of them, mapped where the
      format allows;
    - a folder of activations cached by SAELens, by science-of-finetuning's dictionary_learning or by llamascopium
      (foreign.py; `hook` as above);
    - a tensor or numpy array (..., d_in). For files and arrays the last `heldout` of the rows is held out, in one
      piece, because neighbouring rows tend to be of one text;
    - a list or tuple of tensors (B, d_in), which are the rows of one array;
    - any other iterable of tensors (B, d_in), or a function that returns one: see IterableSource. Rows are drawn from
      a reservoir of shuffle_rows of them (ShuffledIterable), 0 leaves them in the order in which they come;
    - a Source, which is passed through.

    The source has one tensor, "x". Several, of the same rows, come from

    - `hooks` of a shard folder or a folder cached elsewhere, `keys` of a file: {"x": "layers.3.mlp.in", "target":
      "layers.3.mlp.out"} gives each tensor its name, a list leaves them their own; {"x": ["layers.1", "layers.2"]} has
      both side by side in the columns of x;
    - a mapping of arrays and files, {"x": ..., "target": ...}, row for row of the same tokens; a tuple of them lies
      side by side;
    - an iterable of such mappings of tensors.

    In a mapping, "mask" is no tensor but says which rows count: booleans, or 0 and 1 as in a tokenizer's
    attention_mask, one a row, in the shape of x without its last dimension. The others are left out before rows are
    held out, shuffled or counted; see docs/masks.md.

    Raises InputError in one line for what cannot be trained on, for a hook or key where nothing has that name, and for
    tensors of one source that differ in their number of rows; `d_in` and `d_out`, if given, are the widths that x and
    target must have.
    """
    if not 0 <= heldout < 1:
        raise InputError(f"heldout is {heldout}, expected a share of at least 0 and less than 1")
    picks = Picks(_picked("hook", hook, hooks), _picked("key", key, keys))
    if shuffle_rows < 0:
        raise InputError(f"shuffle_rows is {shuffle_rows}, expected at least 0")
    source = _open(data, heldout, picks, skip_bad_shards, verify, shuffle_rows)
    if isinstance(source, MappedSource) and source.others and shuffle == "buffer":
        raise InputError("shuffle is 'buffer', which streams one folder: rows of several are drawn with 'mapped'")
    if isinstance(source, MappedSource) and source.folder is not None and _streams(source, shuffle):
        source = ShardBuffer(source)
    if d_in is not None and source.d_in != d_in:
        where = f" in {X!r}" if len(source.widths) > 1 else ""
        raise InputError(f"{source.source_name} has rows of {source.d_in} columns{where}, expected d_in = {d_in}")
    if d_out is not None and source.widths.get(TARGET, d_out) != d_out:
        found = source.widths[TARGET]
        raise InputError(f"{source.source_name} has rows of {found} columns in {TARGET!r}, expected d_out = {d_out}")
    return source


class Picks(NamedTuple):
    """Which hooks, or which keys of a file, each of the source's tensors is, side by side; None is the only one."""

    hook: Mapping[str, tuple[str | None, ...]]
    key: Mapping[str, tuple[str | None, ...]]


def _picked(what: str, one: str | None, several: Names | None) -> dict[str, tuple[str | None, ...]]:
    if several is None:
        return {X: (one,)}
    if one is not None:
        raise InputError(f"{what} is {one!r} and {what}s is given too: name all of them in {what}s")
    names = {} if isinstance(several, str) else side_by_side(several)
    given = [name for tensor, parts in names.items() for name in (tensor, *(parts or (None,)))]
    if not names or not all(isinstance(name, str) for name in given):
        raise InputError(f"{what}s is {several!a}: expected a list of {what}s, or {{'x': {what}, 'target': {what}}}")
    return dict(names)


def are_folders(data: Any) -> bool:
    """Whether this names several folders, whose rows are to lie side by side."""
    return isinstance(data, tuple) and len(data) > 1 and all(isinstance(path, str | Path) for path in data)


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
    if source.others or shuffle != "auto":
        return shuffle == "buffer"
    stored = sum(rows.nbytes for rows in source.train.values())
    large = stored > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 4
    return available() and (large or torch.cuda.is_available())


def _open(data: Any, heldout: float, picks: Picks, skip_bad_shards: bool, verify: bool, shuffle_rows: int) -> Source:
    if isinstance(data, Source):
        _refuse(data.source_name, hook=picks.hook, key=picks.key)
        return data
    if isinstance(data, str | Path):
        path = usable(data)
        if (path / "index.json").is_file():
            _refuse(path, key=picks.key)
            return _from_shards(ShardFolder(path, skip_bad_shards=skip_bad_shards, verify=verify), picks.hook)
        return _from_segments(str(path), _from_path(path, picks), heldout)
    if are_folders(data):
        _refuse("a tuple of folders", key=picks.key)
        if set(picks.hook) != {X}:
            raise InputError(f"hooks names {', '.join(picks.hook)}: several folders have the tensor {X!r} alone")
        folders = [ShardFolder(usable(path), skip_bad_shards=skip_bad_shards, verify=verify) for path in data]
        return open_side_by_side(folders, list(picks.hook[X] * (len(folders) if len(picks.hook[X]) == 1 else 1)))
    _refuse("what is given", hook=picks.hook, key=picks.key)
    if isinstance(data, Mapping):
        return _from_mapping(data, heldout)
    if isinstance(data, torch.Tensor | np.ndarray):
        return _from_segments("the array", {X: [[from_array("the array", data)]]}, heldout)
    if isinstance(data, list | tuple) and data and shuffle_rows:
        return _from_list(data, heldout)
    if isinstance(data, Iterable) or callable(data):
        source = IterableSource(data, heldout)
        return ShuffledIterable(source, shuffle_rows) if shuffle_rows else source
    raise InputError(
        f"a {type(data).__name__} is nothing to train on,"
        " expected a path, an array, a mapping of these, or an iterable of (B, d_in) tensors"
    )


def _from_list(data: list[Any] | tuple[Any, ...], heldout: float) -> MappedSource:
    """A source of the rows of batches that are all there: no order of theirs has to be kept, and none held twice."""
    tensors: dict[str, list[Segment]] = {}
    masked = 0
    for number, item in enumerate(data):
        if is_empty(item):
            continue
        name = f"batch {number} of the iterable"
        batch = tensors_of(name, item)
        masked += masked_in(item)
        for tensor, rows in batch.items():
            if len(rows):
                tensors.setdefault(tensor, []).append(Segment(name, rows))
    if not tensors:
        left_out = f" ({masked} rows are left out by masks)" if masked else ""
        raise InputError(f"the iterable is empty: no batch with rows is in it{left_out}")
    parts = {tensor: [segments] for tensor, segments in tensors.items()}
    return _from_segments("the iterable", parts, heldout, rows_masked=masked)


def _from_mapping(data: Mapping[Any, Any], heldout: float) -> MappedSource:
    """A source of the arrays and files of a mapping, one tensor each."""
    if not data or not all(isinstance(name, str) for name in data):
        raise InputError(f"a mapping with the keys {list(data)!a}: expected names of tensors, {X!r} and {TARGET!r}")
    places = {
        name: value if isinstance(value, tuple) and value else (value,) for name, value in data.items() if name != MASK
    }
    if not places:
        raise InputError(f"a mapping with a mask and nothing else: expected {X!r} beside it")
    mask = mask_of(MASK, data[MASK]).cpu() if MASK in data else None
    tensors = {name: [_part_of_mapping(name, value) for value in values] for name, values in places.items()}
    shown = [
        str(usable(value)) if isinstance(value, str | Path) else f"the array {name!r}"
        for name, values in places.items()
        for value in values
    ]
    return _from_segments(", ".join(shown), tensors, heldout, mask)


def _part_of_mapping(name: str, value: Any) -> list[Segment]:
    """The rows of an array or a file that a mapping names."""
    if isinstance(value, str | Path):
        path = usable(value)
        if (path / "index.json").is_file():
            raise InputError(
                f"{name}: {path} is a shard folder, which has a row order of its own: open that folder "
                "alone, and name its hooks with hooks={...}"
            )
        return _from_path(path, Picks({X: (None,)}, {X: (None,)}))[X][0]
    if isinstance(value, torch.Tensor | np.ndarray):
        return [from_array(f"the array {name!r}", value)]
    raise InputError(
        f"{name} is a {type(value).__name__}: expected an array or a path, or a tuple of them to lie side by side; for "
        "batches as they come, give one iterable of mappings of tensors"
    )


def _from_path(path: Path, picks: Picks) -> dict[str, list[list[Segment]]]:
    """Of each tensor, the segments of what lies side by side in it."""
    if path.is_dir():
        foreign = {name: [read_foreign(path, hook) for hook in hooks] for name, hooks in picks.hook.items()}
        found = {name: [part for part in parts if part is not None] for name, parts in foreign.items()}
        if any(found.values()):
            _refuse(path, key=picks.key)
            return found
    files = _files(path)
    segments = {name: [[from_file(file, key) for file in files] for key in keys] for name, keys in picks.key.items()}
    _refuse(path, hook=picks.hook)
    return segments


def _refuse(data: object, **picked: Mapping[str, tuple[str | None, ...]]) -> None:
    """Raises InputError for a hook or key that would pick nothing: to ignore it would train on something else."""
    for what, names in picked.items():
        if names != {X: (None,)}:
            alone = {tensor: given[0] if len(given) == 1 else given for tensor, given in names.items()}
            given = alone[X] if set(alone) == {X} else alone
            raise InputError(f"{what} is {given!a}, but {data} has no {what}s to choose from: leave it out")


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    if not files:
        raise InputError(f"{path} holds no index.json and no {', '.join(SUFFIXES)} file; is its harvest unfinished?")
    if len({file.suffix for file in files}) > 1:
        raise InputError(f"{path} holds files of several kinds ({files[0].name}, {files[-1].name}): name one file")
    return files


def _from_segments(
    name: str,
    tensors: Mapping[str, list[list[Segment]]],
    heldout: float,
    mask: torch.Tensor | None = None,
    rows_masked: int = 0,
) -> MappedSource:
    parts = {tensor: [Rows(_of_one_width(part)) for part in parts] for tensor, parts in tensors.items()}
    first, n_rows = next((tensor, len(found[0])) for tensor, found in parts.items())
    for tensor, found in ((tensor, part) for tensor, rows in parts.items() for part in rows):
        if len(found) != n_rows:
            raise InputError(
                f"{name}: {tensor!r} has {len(found)} rows, {first!r} has {n_rows}: row i of each must be of one token"
            )
    if mask is not None:
        check_length(name, mask, n_rows)
        rows_masked, n_rows = int((~mask).sum()), int(mask.sum())
        if not n_rows:
            raise InputError(
                f"{name}: the mask leaves out all {len(mask)} rows: expected True, or 1, where a row counts"
            )
        parts = {tensor: [part.kept(mask.numpy()) for part in found] for tensor, found in parts.items()}
    n = math.ceil(n_rows * heldout)
    if n >= n_rows:
        raise InputError(f"{name} has {n_rows} rows: none is left to train on when {n} are held out")
    split = {tensor: joined_rows(found).split_tail(n) for tensor, found in parts.items()}
    train, held = ({tensor: halves[i] for tensor, halves in split.items()} for i in range(2))
    return MappedSource(name, train, held, rows_masked=rows_masked)


def _of_one_width(segments: list[Segment]) -> list[Segment]:
    width = segments[0].rows.shape[1]
    for segment in segments[1:]:
        if segment.rows.shape[1] != width:
            raise InputError(f"{segment.name} has {segment.rows.shape[1]} columns, {segments[0].name} has {width}")
    return segments


def _from_shards(folder: ShardFolder, picked: Mapping[str, tuple[str | None, ...]]) -> MappedSource:
    hooks = {tensor: tuple(map(folder.hook, names)) for tensor, names in picked.items()}
    train, held = (_rows_of_shards(folder, hooks, split) for split in ("train", "heldout"))
    if not len(next(iter(train.values()))):
        left_out = f" ({len(folder.skipped)} bad shards left out)" if folder.skipped else ""
        raise InputError(f"{folder.path} holds no rows to train on{left_out}: run the harvest again, it goes on")
    shown = ", ".join(hook for names in hooks.values() for hook in names)
    return MappedSource(f"{folder.path} ({shown})", train, held, folder, hooks)


def _rows_of_shards(folder: ShardFolder, hooks: Mapping[str, tuple[str, ...]], split: str) -> dict[str, Rows]:
    """The rows of each hook, which are in one order: those of a shard that is bad in one hook are left out of all."""
    infos = folder.shards_of_all(split, [hook for names in hooks.values() for hook in names])
    return {
        tensor: joined_rows([Rows([from_shard(folder.open(info, hook)) for info in infos]) for hook in names])
        for tensor, names in hooks.items()
    }
