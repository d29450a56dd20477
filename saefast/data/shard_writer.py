"""Writes a shard folder so that a kill at any moment leaves it valid, and a later writer goes on from there.

Rows are spooled to a hidden file; `commit` shuffles them into shards, adds tokens and stats, and last of all renames
a new index.json into place. What the index does not name does not exist: the next writer clears it away.
"""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from saefast.data.activation_stats import ActivationStats
from saefast.data.item_names import ITEMS, write_names
from saefast.data.shardfile import Column, Digest, write_file
from saefast.data.shards import (
    ACT_DTYPES,
    FORMAT,
    ROWS_PER_SHARD,
    SPLITS,
    STATS,
    VERSION_OF_ONE,
    ShardFolder,
    check_index,
    dequantise,
    folder_of,
    quantise,
    read_index,
)
from saefast.errors import InputError
from saefast.files import usable, write_sealed_json

# Bytes shuffled and hashed at a time: much more leaves the cache, much less is all start and stop of threads.
_PIECE = 8 << 20


class ShardWriter:
    """Writes a shard folder; a lock file keeps a second writer out.

    hooks: name and hf_name of each hook. settings: all that determines the rows (model, text, context length, ...);
    it is stored in the index, and a folder begun with other settings raises InputError. rows_per_shard: a train shard
    is full at this many rows. shuffle_seed: None keeps the rows of a shard in the order they came.
    """

    def __init__(
        self,
        folder: str | Path,
        hooks: list[dict[str, str]],
        dtype: str = "bfloat16",
        *,
        settings: dict[str, Any] | None = None,
        rows_per_shard: int = ROWS_PER_SHARD,
        shuffle_seed: int | None = 0,
        products: bool | None = None,
    ) -> None:
        if dtype not in ACT_DTYPES:
            raise InputError(f"dtype {dtype!r} is unknown: choose from {', '.join(ACT_DTYPES)}")
        if rows_per_shard < 1:
            raise InputError(f"rows_per_shard is {rows_per_shard}, expected at least 1")
        self.folder, self.dtype, self.shuffle_seed = usable(folder), ACT_DTYPES[dtype], shuffle_seed
        self.products = products
        self._lock = _lock(self.folder)
        try:
            self.index = self._begin(hooks, dtype, settings or {}, rows_per_shard)
            self._clear_leftovers()
            self._stats = self._load_stats()
        except BaseException:
            self._unlock()
            raise
        self._spools: dict[str, _Spool] = {}
        self._sequences: list[tuple[int, list[int]]] = []
        self._names: list[str] = []
        self._next_sequence = sum(part["n_seq"] for part in [*self.index["tokens"], *self.index.get(ITEMS, [])])

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def cursor(self) -> dict[str, Any] | None:
        """What the last commit was given: where to go on. None in a new folder."""
        cursor = self.index.get("cursor")
        return dict(cursor) if cursor else None

    @property
    def hooks(self) -> list[str]:
        return [hook["name"] for hook in self.index["hooks"]]

    def add_sequences(self, first: int, documents: list[int], ids: list[list[int]]) -> None:
        """Token ids of sequences first, first + 1, ..., and the document each is from; known ones are ignored."""
        for number, (document, sequence) in enumerate(zip(documents, ids, strict=True), start=first):
            if number == self._next_sequence + len(self._sequences):
                self._sequences.append((document, sequence))

    def add_items(self, first: int, names: list[str]) -> None:
        """Names of items first, first + 1, ..., in the place of tokens; known ones are ignored."""
        for number, name in enumerate(names, start=first):
            if number == self._next_sequence + len(self._names):
                self._names.append(name)

    def room(self, split: str = "train") -> int:
        """Rows that still fit into the shard being filled."""
        waiting = self._spools[split].rows if split in self._spools else 0
        return int(self.index["rows_per_shard"]) - waiting

    @property
    def waiting(self) -> int:
        """Rows taken in since the last commit."""
        return sum(spool.rows for spool in self._spools.values())

    def add(self, split: str, rows: dict[str, Tensor], seq: Tensor, pos: Tensor) -> None:
        """rows: per hook (n, d), the same n for all; seq (n,) int, pos (n,) int."""
        for hook in self.index["hooks"]:
            d = rows[hook["name"]].shape[1]
            if hook["d"] is None:
                hook["d"] = d
            elif hook["d"] != d:
                raise InputError(f"hook {hook['name']}: {d} columns, the folder holds {hook['d']}")
        if split not in self._spools:
            self._spools[split] = _Spool(self.folder / ".spool", split, self.hooks, self.dtype)
        self._spools[split].add(rows, seq, pos)

    def commit(self, cursor: dict[str, Any], complete: bool = False, **extra: Any) -> None:
        """Turns everything taken in so far into shards and renames the index. `extra` goes into the index.

        After an exception here the writer is of no further use; the folder is as the commit before left it.
        """
        shards, tokens = list(self.index["shards"]), list(self.index["tokens"])
        for split in SPLITS:
            if split in self._spools and self._spools[split].rows:
                number = sum(shard["split"] == split for shard in shards)
                shards.append(self._write_shard(split, number))
        if self._sequences:
            tokens.append(self._write_tokens(len(tokens)))
        if self._names:
            items = self.index.get(ITEMS, [])
            extra[ITEMS] = [*items, write_names(self.folder, len(items), self._next_sequence, self._names)]
        self._write_stats()
        splits = {split: sum(s["rows"] for s in shards if s["split"] == split) for split in SPLITS}
        self.index |= {"shards": shards, "tokens": tokens, "splits": splits, "n_rows": sum(splits.values())}
        self.index |= {"cursor": cursor, "complete": complete, **extra}
        write_sealed_json(self.folder / "index.json", self.index)
        for spool in self._spools.values():
            spool.close()
        self._next_sequence += len(self._sequences) + len(self._names)
        self._spools, self._sequences, self._names = {}, [], []

    def close(self) -> None:
        """Drops what was not committed."""
        for spool in self._spools.values():
            spool.close()
        self._spools = {}
        shutil.rmtree(self.folder / ".spool", ignore_errors=True)
        self._unlock()

    def _unlock(self) -> None:
        with contextlib.suppress(OSError):
            (self.folder / ".lock").unlink()
            # Nothing was committed: an empty folder would only be in the way.
            if not (self.folder / "index.json").exists():
                self.folder.rmdir()
        self._lock.close()

    def _begin(
        self, hooks: list[dict[str, str]], dtype: str, settings: dict[str, Any], rows_per_shard: int
    ) -> dict[str, Any]:
        fresh: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION_OF_ONE,
            "complete": False,
            "settings": settings,
            "dtype": dtype,
            "hooks": [{**hook, "d": None} for hook in hooks],
            "n_rows": 0,
            "rows_per_shard": rows_per_shard,
            "shuffle": {"kind": "none" if self.shuffle_seed is None else "shard", "seed": self.shuffle_seed},
            "splits": dict.fromkeys(SPLITS, 0),
            "tokens": [],
            "shards": [],
        }
        check_index(self.folder / "index.json", fresh)
        if not (self.folder / "index.json").exists():
            return fresh
        index = read_index(self.folder)
        if index["version"] != VERSION_OF_ONE:
            raise InputError(
                f"{self.folder} was harvested in parts, by several processes: go on with --data-parallel, or choose"
                " another folder"
            )
        _same_settings(self.folder, index, fresh)
        return index

    def _clear_leftovers(self) -> None:
        shutil.rmtree(self.folder / ".spool", ignore_errors=True)
        shards = [self.folder / "tokens", self.folder / ITEMS, *(self.folder / folder_of(hook) for hook in self.hooks)]
        leftovers = [self.folder.glob(f".{name}.*.tmp") for name in ("index.json", STATS)]
        for leftover in chain(*leftovers, *(place.glob(".*.safetensors.*.tmp") for place in shards)):
            leftover.unlink()

    def _load_stats(self) -> dict[str, ActivationStats]:
        """Statistics of what is committed; counted anew where a kill came between the two renames of a commit."""
        if not self.index["shards"]:
            return {}
        folder = ShardFolder(self.folder)
        stats = {}
        for hook in self.hooks:
            try:
                stats[hook] = folder.stats(hook)
                stale = stats[hook].count != self.index["splits"]["train"]
            except InputError:
                stale = True
            if stale:
                stats[hook] = _recount(folder, hook, self.products)
        return stats

    def _write_shard(self, split: str, number: int) -> dict[str, Any]:
        spool = self._spools[split]
        name = f"{'' if split == 'train' else split + '-'}{number:05d}.safetensors"
        order = self._order(split, number, spool.rows)
        sums: dict[str, Digest] = {}
        for hook in self.index["hooks"]:
            if split == "train" and hook["name"] not in self._stats:
                self._stats[hook["name"]] = ActivationStats.empty(hook["d"], self.products)
            stats = self._stats[hook["name"]] if split == "train" else None
            columns = spool.columns(hook["name"], hook["d"], order, stats)
            sums[hook["name"]] = write_file(self.folder / folder_of(hook["name"]) / name, columns)
        return {
            "file": name,
            "rows": spool.rows,
            "split": split,
            "sha256": {hook: digest.sha256 for hook, digest in sums.items()},
            "crc32": {hook: digest.blocks for hook, digest in sums.items()},
        }

    def _order(self, split: str, number: int, rows: int) -> Tensor:
        if self.shuffle_seed is None:
            return torch.arange(rows, device="cpu")
        generator = np.random.Generator(np.random.PCG64([self.shuffle_seed, SPLITS.index(split), number]))
        return torch.from_numpy(generator.permutation(rows))

    def _write_tokens(self, number: int) -> dict[str, Any]:
        lengths, documents = (
            torch.tensor(numbers, dtype=torch.int64, device="cpu")
            for numbers in ([0, *(len(ids) for _, ids in self._sequences)], [doc for doc, _ in self._sequences])
        )
        flat = np.concatenate([np.asarray(ids, dtype=np.int32) for _, ids in self._sequences])
        name = f"tokens/{number:05d}.safetensors"
        columns = {
            "ids": Column.of(torch.from_numpy(flat)),
            "offsets": Column.of(lengths.cumsum(0)),
            "doc": Column.of(documents),
        }
        digest = write_file(self.folder / name, columns)
        first, count = self._next_sequence, len(self._sequences)
        return {"file": name, "first_seq": first, "n_seq": count, "sha256": digest.sha256}

    def _write_stats(self) -> None:
        tensors: dict[str, Tensor] = {}
        for hook, stats in self._stats.items():
            tensors |= stats.tensors(hook)
        if tensors:
            columns = {name: Column.of(tensor) for name, tensor in tensors.items()}
            write_file(self.folder / STATS, columns, sealed=True)


class _Spool:
    """Rows of one split on their way into a shard: activations in a file per hook, the rest in memory."""

    def __init__(self, folder: Path, split: str, hooks: list[str], dtype: torch.dtype) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.dtype, self.rows = dtype, 0
        self.paths = {hook: folder / f"{split}-{number}" for number, hook in enumerate(hooks)}
        self.files: dict[str, BinaryIO] = {hook: path.open("wb") for hook, path in self.paths.items()}
        self.scales: dict[str, list[Tensor]] = {hook: [] for hook in hooks}
        self.seq: list[Tensor] = []
        self.pos: list[Tensor] = []

    def add(self, rows: dict[str, Tensor], seq: Tensor, pos: Tensor) -> None:
        for hook, file in self.files.items():
            part = rows[hook].detach().cpu()
            if self.dtype == torch.int8:
                part, scale = quantise(part)
                self.scales[hook].append(scale)
            flat = part.to(self.dtype).contiguous().view(-1)
            file.write(flat.view(torch.uint8).numpy().data)
        self.seq.append(seq.to(torch.int32))
        self.pos.append(pos.to(torch.int16))
        self.rows += len(seq)

    def columns(self, hook: str, d: int, order: Tensor, stats: ActivationStats | None) -> dict[str, Column]:
        self.files[hook].flush()
        raw = np.memmap(self.paths[hook], dtype=np.uint8, mode="r+")
        acts = torch.from_numpy(raw).view(self.dtype).view(self.rows, d)
        scale = torch.cat(self.scales[hook]) if self.dtype == torch.int8 else None
        out = {"acts": Column(self.dtype, (self.rows, d), _shuffled(acts, scale, order, stats))}
        if scale is not None:
            out["scale"] = Column.of(scale[order])
        out["seq"] = Column.of(torch.cat(self.seq)[order])
        out["pos"] = Column.of(torch.cat(self.pos)[order])
        return out

    def close(self) -> None:
        for hook, file in self.files.items():
            file.close()
            self.paths[hook].unlink(missing_ok=True)


def _shuffled(acts: Tensor, scale: Tensor | None, order: Tensor, stats: ActivationStats | None) -> Iterator[Tensor]:
    for part in order.split(_piece(acts)):
        rows = acts.index_select(0, part)
        if stats is not None:
            stats.add(rows if scale is None else dequantise(rows, scale[part]))
        yield rows


def _piece(acts: Tensor) -> int:
    return max(_PIECE // (acts.shape[1] * acts.element_size()), 1)


def _recount(folder: ShardFolder, hook: str, products: bool | None) -> ActivationStats:
    stats = ActivationStats.empty(folder.d(hook), products)
    for info in folder.shards("train", hook):
        shard = folder.open(info, hook)
        for part in torch.arange(info.rows, device="cpu").split(_piece(shard.acts)):
            rows = shard.acts[part]
            stats.add(rows if shard.scale is None else dequantise(rows, shard.scale[part]))
    return stats


def _same_settings(folder: Path, index: dict[str, Any], fresh: dict[str, Any]) -> None:
    kept = {hook["name"]: hook["hf_name"] for hook in index["hooks"]}
    asked = {hook["name"]: hook["hf_name"] for hook in fresh["hooks"]}
    if kept != asked:
        begun, wanted = map(_named, (kept, asked)) if kept.keys() == asked.keys() else (kept, asked)
        raise InputError(
            f"{folder} was begun with hooks {', '.join(begun)}, now {', '.join(wanted)} are asked for:"
            " choose another folder"
        )
    keys = ("dtype", "rows_per_shard", "shuffle")
    before = {**{key: index.get(key) for key in keys}, **index.get("settings", {})}
    now = {**{key: fresh[key] for key in keys}, **fresh["settings"]}
    for key in before | now:
        if before.get(key) != (value := now.get(key)):
            raise InputError(
                f"{folder} was begun with {key} = {before.get(key)!r}, now {value!r} is asked for:"
                " choose another folder, or delete it"
            )


def _named(hooks: dict[str, str]) -> list[str]:
    """Hooks whose names alone do not tell them apart from others."""
    return [f"{name} (the module {path})" for name, path in hooks.items()]


def clear_finished(folder: Path) -> None:
    """Removes what a writer that was killed after its last commit leaves: rows that are in shards too, and its lock."""
    if not any((folder / name).exists() for name in (".spool", ".lock")):
        return
    # If the folder cannot be written, or another process clears it, nothing has to be done.
    with contextlib.suppress(InputError, OSError), _lock(folder):
        shutil.rmtree(folder / ".spool", ignore_errors=True)
        (folder / ".lock").unlink()


def _lock(folder: Path) -> BinaryIO:
    """An exclusive lock that the system frees when this process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("wb")
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise InputError(f"{folder} is being written by another harvest: wait, or choose another folder") from None
    if not (folder / ".lock").exists() or os.fstat(file.fileno()).st_ino != (folder / ".lock").stat().st_ino:
        # The writer before removed the file between our opening and locking it.
        file.close()
        return _lock(folder)
    return file
