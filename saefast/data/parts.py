"""Several shard folders, each harvested from a part of one text, under one index: nothing is copied."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from saefast.data.activation_stats import ActivationStats
from saefast.data.shardfile import Column, write_file
from saefast.data.shards import SPLITS, STATS, VERSION, ShardFolder, check_index
from saefast.errors import InputError
from saefast.files import write_sealed_json

# What is each part's own; all else in their indexes must be equal.
_OWN = {"n_rows", "splits", "tokens", "shards", "cursor", "complete", "end", "dropped", "hooks", "sha256"}


def join_parts(folder: Path, parts: Sequence[str], *, cursor: dict[str, Any], end: str) -> dict[str, Any]:
    """Writes the index and the statistics of all parts into the folder they are in; the index.

    Whoever joins the same parts writes the same bytes, and each file is renamed into place, so that several processes
    may do it at once.

    Args:
        parts: paths of shard folders inside `folder`, in the order of the text; their sequences, numbered from 0 in
            each, are numbered on from part to part.
        cursor, end: of the whole, see ShardWriter.commit.

    Raises:
        InputError: a part is damaged, or was harvested with other settings than the first.
    """
    opened = [ShardFolder(folder / part) for part in parts]
    for other in opened[1:]:
        _same(opened[0], other)
    index = {key: value for key, value in opened[0].index.items() if key not in _OWN} | {"version": VERSION}
    index |= {"hooks": _hooks(opened), "tokens": [], "shards": []}
    first_seq = 0
    for part, found in zip(parts, opened, strict=True):
        index["shards"] += [{**shard, "part": part, "first_seq": first_seq} for shard in found.index["shards"]]
        index["tokens"] += [
            {**entry, "file": f"{part}/{entry['file']}", "first_seq": first_seq + entry["first_seq"]}
            for entry in found.index["tokens"]
        ]
        first_seq += found.n_sequences
    index |= _counts(opened) | {"cursor": cursor, "complete": True, "end": end}
    if not index["n_rows"]:
        raise InputError(f"{folder}: no row was kept, {sum(index['dropped'].values())} tokens dropped")
    if first_seq >= 2**31:
        raise InputError(f"{folder} has {first_seq} sequences, expected less than 2**31: use a longer ctx_len")
    check_index(folder / "index.json", index)
    _write_stats(folder, opened, index["hooks"])
    write_sealed_json(folder / "index.json", index)
    return index


def _same(first: ShardFolder, other: ShardFolder) -> None:
    mine, its = ({key: value for key, value in found.index.items() if key not in _OWN} for found in (first, other))
    keys = [key for key in [*mine, *its] if mine.get(key) != its.get(key)]
    names = [[(hook["name"], hook["hf_name"]) for hook in found.index["hooks"]] for found in (first, other)]
    if names[0] != names[1]:
        keys.append("hooks")
    if keys:
        raise InputError(
            f"{other.path} was not harvested as {first.path} was: {', '.join(dict.fromkeys(keys))} differ;"
            " delete one of them, and the same command harvests it again"
        )


def _hooks(opened: Sequence[ShardFolder]) -> list[dict[str, Any]]:
    """The hooks with their widths, which a part without rows does not know."""
    hooks = []
    for places in zip(*(found.index["hooks"] for found in opened), strict=True):
        widths = {place["d"] for place in places} - {None}
        if len(widths) > 1:
            name, folder = places[0]["name"], opened[0].path.parent
            raise InputError(f"{folder}: the parts hold rows of hook {name} with widths {sorted(widths)}")
        hooks.append({**places[0], "d": next(iter(widths), None)})
    return hooks


def _counts(opened: Sequence[ShardFolder]) -> dict[str, Any]:
    splits = {split: sum(found.index["splits"][split] for found in opened) for split in SPLITS}
    dropped = [found.index.get("dropped", {}) for found in opened]
    reasons = dict.fromkeys(reason for counts in dropped for reason in counts)
    return {
        "splits": splits,
        "n_rows": sum(splits.values()),
        "dropped": {reason: sum(counts.get(reason, 0) for counts in dropped) for reason in reasons},
    }


def _write_stats(folder: Path, opened: Sequence[ShardFolder], hooks: Sequence[dict[str, Any]]) -> None:
    """Sums of the parts' sums, in float64 and in their order."""
    tensors: dict[str, Tensor] = {}
    for name in (hook["name"] for hook in hooks):
        total: ActivationStats | None = None
        for part in opened:
            if part.index["splits"]["train"]:
                stats = part.stats(name)
                total = stats if total is None else _sum(total, stats)
        if total is not None:
            tensors |= total.tensors(name)
    if tensors:
        write_file(folder / STATS, {name: Column.of(tensor) for name, tensor in tensors.items()}, sealed=True)


def _sum(one: ActivationStats, other: ActivationStats) -> ActivationStats:
    without = one.products is None or other.products is None
    return ActivationStats(
        one.count + other.count,
        one.sum + other.sum,
        one.sum_sq_norm + other.sum_sq_norm,
        one.sum_norm + other.sum_norm,
        None if without else one.products + other.products,  # type: ignore[operator]
    )
