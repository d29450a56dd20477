"""Recording: the sparse codes of a running model's tokens, streamed to disk as `saefast.integrations.recorded` says.

In memory lie the codes of one forward pass and of one shard that is being filled. A shard is written in all of its
files, each whole or not at all, and then named in the index, which is renamed into place: whatever ends a recording,
the folder holds the same rows in every file, and none in part.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from saefast.data.shardfile import Column, write_file
from saefast.data.shards import folder_of
from saefast.errors import InputError
from saefast.files import create_sealed_json, usable, write_sealed_json
from saefast.integrations.passes import Chosen, Pass, Passes
from saefast.integrations.recorded import DTYPES, FORMAT, INDEX, TOKENS, VERSION, Index, read_index
from saefast.integrations.sites import Hooks, Site, at_sites, find_sites
from saefast.models.sae import SAE
from saefast.typed import typed

ROWS_PER_SHARD = 1 << 16
# Of all SAEs together; a shard has no more, unless a single row has.
MOST_ENTRIES = 1 << 23


class _CSR(NamedTuple):
    """Entries of n rows on the CPU: counts (n,) int64, idx (m,) int32 ascending in a row, acts (m,)."""

    counts: Tensor
    idx: Tensor
    acts: Tensor

    def rows(self, start: int, stop: int) -> "_CSR":
        before, inside = int(self.counts[:start].sum()), int(self.counts[start:stop].sum())
        where = slice(before, before + inside)
        return _CSR(self.counts[start:stop], self.idx[where], self.acts[where])


class _Piece(NamedTuple):
    """Rows that came together. tokens: ids, seq and pos (n,) int32. codes: by hook."""

    tokens: dict[str, Tensor]
    codes: dict[str, _CSR]

    @property
    def entries(self) -> Tensor:
        """(n,) int64: of all hooks."""
        return torch.stack([code.counts for code in self.codes.values()]).sum(0)

    def rows(self, start: int, stop: int) -> "_Piece":
        tokens = {name: column[start:stop] for name, column in self.tokens.items()}
        return _Piece(tokens, {hook: code.rows(start, stop) for hook, code in self.codes.items()})


class Recorder:
    """What `record` gives: rows and sequences, so far; folder."""

    def __init__(self, folder: Path, index: Index, rows_per_shard: int) -> None:
        self.folder, self._index, self._rows_per_shard = folder, index, rows_per_shard
        self._folders = {TOKENS: TOKENS} | {sae["hook"]: sae["folder"] for sae in index["saes"]}
        self._dtype = DTYPES[index["dtype"]]
        self._waiting: list[_Piece] = []
        self._counts = [0, 0]

    @property
    def rows(self) -> int:
        return self._index["rows"] + sum(len(piece.tokens["ids"]) for piece in self._waiting)

    @property
    def sequences(self) -> int:
        return self._index["sequences"]

    def _add(self, piece: _Piece, sequences: int) -> None:
        """Takes in rows, and writes the shards that are full."""
        self._index["sequences"] = max(self._index["sequences"], sequences)
        totals = piece.entries.cumsum(0)
        start, n = 0, len(totals)
        while start < n:
            room = self._rows_per_shard - self._counts[0]
            before = int(totals[start - 1]) if start else 0
            fit = int(torch.searchsorted(totals, before + MOST_ENTRIES - self._counts[1], right=True)) - start
            take = min(n - start, room, max(fit, 0 if self._counts[0] else 1))
            if take:
                # One assignment, so that an interrupt finds all hooks with these rows or none.
                self._waiting = [*self._waiting, piece.rows(start, start + take)]
                self._counts = [self._counts[0] + take, self._counts[1] + int(totals[start + take - 1]) - before]
            start += take
            if self._counts[0] >= self._rows_per_shard or start < n:
                self._flush()

    def _flush(self) -> None:
        """Writes the rows that wait as a shard, and names it."""
        if not self._waiting:
            return
        pieces = self._waiting
        number = f"{len(self._index['shards']):05d}.safetensors"
        digests = {TOKENS: self._write(TOKENS, number, {
            name: [piece.tokens[name] for piece in pieces] for name in ("ids", "seq", "pos")
        })}  # fmt: skip
        entries = {}
        for hook in self._folders:
            if hook != TOKENS:
                codes = [piece.codes[hook] for piece in pieces]
                row_ptr = torch.cat([codes[0].counts.new_zeros(1), *(code.counts for code in codes)]).cumsum(0)
                entries[hook] = int(row_ptr[-1])
                columns = {"row_ptr": [row_ptr], "idx": [c.idx for c in codes], "acts": [c.acts for c in codes]}
                digests[hook] = self._write(hook, number, columns)
        rows = sum(len(piece.tokens["ids"]) for piece in pieces)
        shard: Any = {"file": number, "rows": rows, "entries": entries, "sha256": digests}
        index: Any = {**self._index, "shards": [*self._index["shards"], shard], "rows": self._index["rows"] + rows}
        write_sealed_json(self.folder / INDEX, index)
        self._index, self._waiting, self._counts = index, [], [0, 0]

    def _write(self, name: str, file: str, columns: Mapping[str, Sequence[Tensor]]) -> str:
        whole = {
            column: Column(parts[0].dtype, (sum(map(len, parts)),), parts) for column, parts in columns.items()
        }  # fmt: skip
        return write_file(self.folder / self._folders[name] / file, whole, sealed=True).sha256

    def _end(self, complete: bool) -> None:
        """Writes what waits. After an interrupt it may be named already. Of a recording that broke off without a row
        nothing stays."""
        rows = read_index(self.folder)["rows"]
        if rows == self._index["rows"]:
            self._flush()
            rows = self._index["rows"]
        if complete:
            self._index["complete"] = True
            write_sealed_json(self.folder / INDEX, dict(self._index))
        elif not rows:
            (self.folder / INDEX).unlink()
            with contextlib.suppress(OSError):  # what else lies there was there before
                self.folder.rmdir()


@typed
@contextlib.contextmanager
def record(
    model: Any,
    saes: SAE | Mapping | list | tuple,
    folder: str | Path,
    *,
    dtype: Literal["float32", "float16", "bfloat16", "float64"] = "float32",
    positions: Any = "all",
    skip_ids: Iterable = (),
    hook: Hooks | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
) -> Iterator[Recorder]:
    """While open, the codes of every token that the model reads go to a folder; `saefast.RecordedCodes` reads it.

    A row is a token, the same one in all hooks. Padding has no row. In `generate`, tokens that follow a prompt belong
    to its sequences, by the order of the rows of a batch (which beam search exchanges as it goes).

    Args:
        model, saes, hook: as for `saefast.encode`.
        folder: a new one, or an empty one.
        dtype: of the activations.
        positions, skip_ids: the tokens that get a row; see `saefast.integrations.passes.Chosen`.
        rows_per_shard: a shard is written at this many rows, or before, at 8 million entries.

    Raises:
        InputError: as `saefast.encode`; a folder that is not empty; while the model runs, activations that are NaN or
            inf, a model with an encoder and a decoder, or a mask that does not tell padding.
    """
    if rows_per_shard < 1:
        raise InputError(f"rows_per_shard is {rows_per_shard}: expected at least 1")
    sites, chosen = find_sites(model, saes, hook), Chosen(positions, skip_ids)
    passes = Passes(model)
    if passes.two_stacks:
        raise InputError(
            f"{type(model).__name__} is an encoder with a decoder, each with tokens of its own, so rows would not be "
            "of the same ones: use saefast.encode"
        )
    recorder = _begin(usable(folder), sites, dtype, rows_per_shard, str(getattr(model, "name_or_path", "") or ""))
    parts: dict[str, _CSR] = {}
    under_way = [0]

    def read(site: Site, x: Tensor, now: Pass, number: int) -> None:
        if under_way[0] != number:
            # A pass that broke off leaves nothing.
            under_way[0] = number
            parts.clear()
        where = chosen.where(now, x.device)
        parts[site.name] = _encoded(site, x[where], DTYPES[dtype])
        if len(parts) == len(sites):
            # Of a pass that does not say what it reads the sequences are new ones.
            first = now.first_seq if now is passes.current else recorder.sequences
            recorder._add(_Piece(_tokens(now, where, first), dict(parts)), first + now.batch)
            parts.clear()

    complete = False
    try:
        with at_sites(model, sites, read, passes=passes):
            yield recorder
        complete = True
    finally:
        recorder._end(complete)


def _begin(folder: Path, sites: Sequence[Site], dtype: str, rows_per_shard: int, model: str) -> Recorder:
    saes = [
        {"hook": site.name, "folder": folder_of(site.name), "reads": [*map(str, site.reads)],
         "n_latents": site.sae.config.n_latents, "d_in": site.sae.config.d_in}
        for site in sites
    ]  # fmt: skip
    folders = [TOKENS, *(str(sae["folder"]) for sae in saes)]
    if len(set(folders)) < len(folders):
        raise InputError(f"saes are at {', '.join(folders[1:])}: two would be in one folder; name them otherwise")
    index: Any = {"format": FORMAT, "version": VERSION, "complete": False, "model": model, "dtype": dtype, "saes": saes,
                  "shards": [], "rows": 0, "sequences": 0}  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = not any(folder.iterdir()) and create_sealed_json(folder / INDEX, index)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error}): choose another folder") from error
    if not free:
        raise InputError(f"{folder} is not empty: codes are recorded into a new folder; choose another, or delete it")
    return Recorder(folder, index, rows_per_shard)


@torch.no_grad()
def _encoded(site: Site, rows: Tensor, dtype: torch.dtype) -> _CSR:
    """The code of rows (n, d_in)."""
    acts, idx = (tensor.cpu() for tensor in site.sae.encode_sparse(rows))
    stored = acts.to(dtype)
    if not stored.isfinite().all():
        row = int((~stored.isfinite()).any(1).nonzero()[0])
        kept = acts[row].isfinite().all()
        what = f"more than {dtype} holds: record in float32" if kept else "NaN or inf: the model gives such rows"
        raise InputError(f"{site.name} has an activation of {what} (row {row} of this pass)")
    order = idx.argsort(dim=1)
    stored, idx = stored.gather(1, order), idx.gather(1, order)
    there = stored != 0
    return _CSR(there.sum(1), idx[there].int(), stored[there])


def _tokens(now: Pass, where: Tensor, first: int) -> dict[str, Tensor]:
    """ids, seq and pos (n,) int32 of the chosen tokens, on the CPU. first: the number of the first sequence."""
    seq = torch.arange(first, first + now.batch, device=where.device)[:, None].expand_as(where)
    ids = torch.full_like(where, -1, dtype=torch.int64) if now.ids is None else now.ids.to(where.device)
    columns = {"ids": ids, "seq": seq, "pos": now.positions(where.device)}
    return {name: column[where].int().cpu() for name, column in columns.items()}
