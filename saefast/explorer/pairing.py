"""What the matching of two runs comes to: pairs, latents that only one has, in some order, and histograms.

Of 131k latents each takes some tens of milliseconds, so that what was asked for lately is kept.
"""

import functools
from typing import Any, Literal, NamedTuple

import numpy as np

from saefast.explorer.matching import Matching
from saefast.latents.database import LatentsDB
from saefast.latents.matched import Matched, Side

BINS = 50
# Cosines and orders that lists are kept of.
KEPT = 12

List = Literal["pairs", "a", "b"]
LISTS: tuple[List, ...] = ("pairs", "a", "b")


class Columns:
    """Of all latents of a run: density (L,) float32, dead (L,) bool; score (L,) float64, NaN where there is none."""

    def __init__(self, db: LatentsDB) -> None:
        self._db = db
        density = db.array("density")
        self.density = self._column("density").astype(np.float32) if density is None else density
        self.dead = self.density == 0

    @functools.cached_property
    def score(self) -> np.ndarray:
        return self._column("score")

    def _column(self, name: Literal["score", "density"]) -> np.ndarray:
        rows = self._db.query(f"SELECT {name} FROM latents ORDER BY latent")
        return np.array([value for (value,) in rows], np.float64)


class Rows(NamedTuple):
    """Latents of a list side by side: ids of a and b, (n,) int64 each, and their cosines."""

    a: np.ndarray
    b: np.ndarray
    cosine: np.ndarray


class Parts(NamedTuple):
    """What becomes of the latents of one run, in numbers; see `parts_of`."""

    paired: int
    alike: int
    only: int
    dead: int


class Pairing:
    """Lists of two runs, for pages. All but `columns` are to be asked for once the matching is found."""

    def __init__(self, matching: Matching) -> None:
        self.matching = matching
        self.columns = functools.cache(self._columns)
        self.lists = functools.lru_cache(KEPT)(self._lists)
        self.parts = functools.lru_cache(KEPT)(self._parts)
        self.sorted = functools.lru_cache(KEPT)(self._sorted)
        self.histograms = functools.cache(self._histograms)

    @property
    def found(self) -> Matched:
        assert self.matching.found is not None
        return self.matching.found

    def _columns(self, side: Side) -> Columns | None:
        """None where the run has no latents.db."""
        db = self.matching.db if side == "a" else self.matching.other_db
        return None if db is None else Columns(db)

    def _lists(self, alike: float) -> dict[List, Rows]:
        return {name: rows_of(self.found, name, alike, self.columns("a"), self.columns("b")) for name in LISTS}

    def _parts(self, alike: float) -> tuple[Parts, Parts]:
        a, b = (parts_of(self.found, side, alike, self.columns(side)) for side in ("a", "b"))
        return a, b

    def _sorted(self, alike: float, name: List, sort: str) -> Rows:
        return in_order(self.lists(alike)[name], name, sort, self.columns("b" if name == "b" else "a"))

    def _histograms(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return bars(self.found, "a"), bars(self.found, "b")


def rows_of(found: Matched, which: List, alike: float, a: Columns | None, b: Columns | None) -> Rows:
    """The latents of a list; of those that only one run has, the dead are left out."""
    if which == "pairs":
        pairs = found.mutual(alike)
        return Rows(pairs[:, 0], pairs[:, 1], found.a_cosine[pairs[:, 0]])
    mine, best, cosine = (a, found.a_best, found.a_cosine) if which == "a" else (b, found.b_best, found.b_cosine)
    ids = found.only(which, alike)
    ids = ids if mine is None else ids[~mine.dead[ids]]
    others = best[ids].astype(np.int64)
    return Rows(ids, others, cosine[ids]) if which == "a" else Rows(others, ids, cosine[ids])


def in_order(rows: Rows, name: List, sort: str, columns: Columns | None) -> Rows:
    """Rows in the order asked for; as they are where the run has no latents.db to sort by.

    columns: of the run whose latents come first in this list.
    """
    ids = rows.b if name == "b" else rows.a
    if sort == "reverse":
        order = np.arange(len(ids))[::-1]
    elif sort == "cosine" or columns is None:
        return rows
    else:
        values = columns.score if sort == "score" else columns.density
        # NaN, which is no score, comes last.
        order = np.argsort(-values[ids], kind="stable")
    return Rows(rows.a[order], rows.b[order], rows.cosine[order])


def parts_of(found: Matched, side: Side, alike: float, columns: Columns | None) -> Parts:
    """Latents that are paired; that are alike to one that is paired with another; that only this run has; dead ones."""
    cosine = found.a_cosine if side == "a" else found.b_cosine
    paired = found.mutual(alike)
    only = found.only(side, alike)
    dead = 0 if columns is None else int(columns.dead[only].sum())
    nothing = int(((found.a_best if side == "a" else found.b_best) < 0).sum())
    rest = len(cosine) - len(paired) - len(only) - nothing
    return Parts(len(paired), rest, len(only) - dead, dead + nothing)


def bars(found: Matched, side: Side) -> dict[str, Any]:
    """The histogram of best cosines as places in a picture of BINS by 100, and the control's as a line of steps."""
    counts, control = found.histogram(side, BINS)
    best, cosine, by_chance = (
        (found.a_best, found.a_cosine, found.a_control)
        if side == "a"
        else (found.b_best, found.b_cosine, found.b_control)
    )
    share, chance = (c / max(int(c.sum()), 1) for c in (counts, control))
    most = max(float(share.max()), float(chance.max()), 1e-9)
    steps = [(i + end, 100 - 96 * float(value) / most) for i, value in enumerate(chance) for end in (0, 1)]
    return {
        "bars": [(i, 96 * float(value) / most, int(n)) for i, (value, n) in enumerate(zip(share, counts, strict=True))],
        "control": " ".join(f"{x},{y:.2f}" for x, y in steps),
        # The cosine that one of a hundred random rows reaches.
        "chance": float(np.quantile(by_chance, 0.99)) if len(by_chance) else None,
        "median": float(np.median(cosine[best >= 0])) if (best >= 0).any() else None,
    }
