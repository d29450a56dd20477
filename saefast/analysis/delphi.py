"""delphi (EleutherAI): its cache of latents, from which it explains them and scores the explanations.

    latents/{hook}/{start}_{end}.safetensors    locations (n, 3) row, position, latent - start; activations (n,) fp16;
                                                tokens (rows, width) int64. start to end inclusive
    latents/{hook}/config.json                  CacheConfig, and model_name
    log/hookpoint_firing_counts.pt              {hook: (L,) int64}

Its own is written by delphi/latents/cache.py and read by delphi/latents/loader.py (0.1.3). tokens has rows of one width
there and the reader knows no padding: it cuts all tokens, end to end, into windows of 32, each an example or a
counter-example, and divides by their number. So sequences are laid end to end here, too, as delphi's own tokens are,
and what does not fill the last row is left out.
"""

import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from safetensors.numpy import save_file

from saefast.analysis.excerpts import dataset, require_text
from saefast.analysis.export_folder import whole_folder
from saefast.analysis.export_names import Names
from saefast.errors import InputError
from saefast.files import write_json
from saefast.latents.database import LatentsDB
from saefast.latents.steps import Advance, nothing

DELPHI = "delphi"
# ConstructorConfig.example_ctx_len, which divides a row; CacheConfig.cache_ctx_len, a row where sequences differ in
# length; CacheConfig.n_splits.
WINDOW, WIDTH, SPLITS = 32, 256, 5
# Entries of a split where there are more than SPLITS splits: the reader holds one at a time, 24 bytes an entry.
MOST_ENTRIES = 1 << 24
# Numbers that 16 bits hold.
SMALL = 1 << 16
# What its writer takes for an activation; the largest number that fp16 has.
LEAST, LARGEST = 1e-5, 65504.0


class Layout(NamedTuple):
    """Tokens of all sequences end to end, as rows of `width`."""

    rows: int
    width: int
    left_out: int


def write_delphi(
    db: LatentsDB,
    out: str | Path,
    latents: Sequence[int],
    names: Names,
    advance: Advance = nothing,
) -> int:
    """Writes the cache in one pass over the codes, a sequence at a time, and then split by split.

    Args:
        latents: those whose activations are written; the splits are of all.
        advance: called with rows.

    Returns:
        How many activations were written.

    Raises:
        InputError: no tokens, fewer than WINDOW of them, no name for the model or the hook, `out` is taken.
    """
    require_text(db, DELPHI)
    hook, model = _folder_name(names.hook), names.model
    layout = lay_out(db)
    wanted = None
    if len(latents) < db.n_latents:
        wanted = np.zeros(db.n_latents, bool)
        wanted[list(latents)] = True
    with whole_folder(out, DELPHI, db) as folder:
        place, log = folder / "latents" / hook, folder / "log"
        place.mkdir(parents=True)
        log.mkdir()
        tokens = _tokens(db, layout)
        splits = _splits(db, place, layout)
        counts = _write_codes(db, splits, layout, wanted, advance)
        for split in splits:
            split.finish(tokens)
        write_json(place / "config.json", _config(db, layout, len(splits), model))
        torch.save({hook: torch.from_numpy(counts)}, log / "hookpoint_firing_counts.pt")
    if layout.left_out:
        told = f"{layout.left_out} tokens are left out: they do not fill a row of {layout.width}"
        warnings.warn(told, RuntimeWarning, stacklevel=2)
    return sum(split.n for split in splits)


def _folder_name(hook: str) -> str:
    if "/" in hook or hook in (".", ".."):
        raise InputError(f"the hook {hook!a} is no name of a folder: delphi reads its cache from one of that name")
    return hook


def lay_out(db: LatentsDB) -> Layout:
    """Rows as the sequences, where these are of one length that windows divide; WIDTH else, or less of a short text."""
    ((total, shortest, longest),) = db.query("SELECT sum(n), min(n), max(n) FROM sequences")
    if total < WINDOW:
        raise InputError(f"{db.path} is of {total} tokens: delphi needs {WINDOW} or more")
    width = longest if shortest == longest and longest % WINDOW == 0 else min(WIDTH, total // WINDOW * WINDOW)
    return Layout(total // width, width, total % width)


def _config(db: LatentsDB, layout: Layout, n_splits: int, model: str) -> dict[str, str | int]:
    return {
        "dataset_repo": dataset(db), "dataset_split": "", "dataset_name": "", "dataset_column": "text", "batch_size": 1,
        "cache_ctx_len": layout.width, "n_tokens": layout.rows * layout.width, "n_splits": n_splits,
        "model_name": model,
    }  # fmt: skip


class _Split:
    """The activations of latents start to stop (exclusive), in two files until it is known how many they are."""

    def __init__(self, place: Path, start: int, stop: int, layout: Layout) -> None:
        self.start, self.stop = start, stop
        self.path = place / f"{start}_{stop - 1}.safetensors"
        # The writer's choice: half the bytes where all numbers fit.
        small = max(stop - start, layout.rows, layout.width) <= SMALL
        self.dtype = np.dtype("<u2" if small else "<u4")
        self.n = 0
        self._files = [(place / f"{start}.{name}").open("w+b") for name in ("locations", "activations")]

    def add(self, locations: np.ndarray, acts: np.ndarray) -> None:
        """locations (n, 3) int64 with the latents' own numbers; acts (n,) float32."""
        self._files[0].write((locations - [0, 0, self.start]).astype(self.dtype).tobytes())
        self._files[1].write(np.minimum(acts, LARGEST).astype("<f2").tobytes())
        self.n += len(acts)

    def finish(self, tokens: np.ndarray) -> None:
        """Writes the split's file; the two go."""
        locations, activations = (self._taken(file) for file in self._files)
        split = {"locations": locations.view(self.dtype).reshape(-1, 3), "activations": activations.view("<f2")}
        save_file({**split, "tokens": tokens}, self.path)

    @staticmethod
    def _taken(file: IO[bytes]) -> np.ndarray:
        file.seek(0)
        data = np.frombuffer(file.read(), np.uint8)
        file.close()
        Path(file.name).unlink()
        return data


def _splits(db: LatentsDB, place: Path, layout: Layout) -> list[_Split]:
    ((entries,),) = db.query("SELECT sum(n_fired) FROM latents")
    n = min(max(SPLITS, -(-entries // MOST_ENTRIES)), db.n_latents)
    edges = [db.n_latents * i // n for i in range(n + 1)]
    return [_Split(place, start, stop, layout) for start, stop in pairwise(edges)]


def _write_codes(
    db: LatentsDB, splits: list[_Split], layout: Layout, wanted: np.ndarray | None, advance: Advance
) -> np.ndarray:
    """Hands each activation to its split. -> (L,) int64 how often each latent fires."""
    counts = np.zeros(db.n_latents, np.int64)
    begins, last = _begins(db), layout.rows * layout.width
    for row, codes in db.all_codes():
        # In a split, a latent's activations stand in the order of the tokens: its reader counts on that.
        place = begins[row.sequence] + codes.positions.astype(np.int64)
        inside = (place < last) & (codes.acts > 0)
        counts += np.bincount(codes.latents[inside], minlength=db.n_latents)
        kept = inside & (codes.acts > LEAST)
        if wanted is not None:
            kept &= wanted[codes.latents]
        locations = np.stack([place // layout.width, place % layout.width, codes.latents], 1)[kept]
        acts = codes.acts[kept]
        edges = np.searchsorted(locations[:, 2], [split.start for split in splits] + [db.n_latents])
        for split, (start, stop) in zip(splits, pairwise(edges.tolist()), strict=True):
            split.add(locations[start:stop], acts[start:stop])
        advance(row.n)
    return counts


def _begins(db: LatentsDB) -> dict[int, int]:
    """Where each sequence begins when they lie end to end."""
    begins, at = {}, 0
    for sequence, n in db.query("SELECT sequence, n FROM sequences ORDER BY sequence"):
        begins[sequence] = at
        at += n
    return begins


def _tokens(db: LatentsDB, layout: Layout) -> np.ndarray:
    """(rows, width) int64."""
    rows = db.query("SELECT sequence, n, tokens FROM sequences ORDER BY sequence")
    parts = [np.frombuffer(tokens, "<i4") for _, _, tokens in rows]
    for (sequence, n, _), ids in zip(rows, parts, strict=True):
        if len(ids) != n:
            raise InputError(f"sequence {sequence} of {db.path} has {len(ids)} tokens of {n}: {DELPHI} needs all")
    return np.concatenate(parts)[: layout.rows * layout.width].astype(np.int64).reshape(layout.rows, layout.width)
