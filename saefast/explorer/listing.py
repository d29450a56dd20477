"""Which latents the table shows, in which order, and where in it one is: all of it in the address, so that a page can
be shared and the back button works."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from urllib.parse import urlencode

from starlette.exceptions import HTTPException

from saefast.latents.database import Latent, LatentsDB, Sort

# Rows of a page of the table.
ROWS = 50
# By what latents are sorted: its name in the address, what it is called, and whether its largest come first.
SORTS: dict[Sort, tuple[str, bool]] = {
    "telling": ("most telling", True),
    "score": ("score", True),
    "density": ("density", True),
    "max_act": ("max activation", True),
    "mean_act": ("mean activation", True),
    "latent": ("number", False),
}
# Which latents are shown: what it is called, and what LatentsDB.page takes for it.
SHOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "all": ("all", {}),
    "alive": ("alive", {"dead": False}),
    "dead": ("dead", {"dead": True}),
    "dense": ("dense", {"dense": True}),
    "sparse": ("neither dead nor dense", {"dead": False, "dense": False}),
    "labelled": ("labelled", {"labelled": True}),
}


class Span(NamedTuple):
    """A range that latents are filtered by. unit: what a number in the address is multiplied by."""

    name: str
    column: Sort
    about: str
    unit: float


SPANS = (
    Span("density", "density", "density, %", 0.01),
    Span("max", "max_act", "max activation", 1.0),
    Span("mean", "mean_act", "mean activation", 1.0),
    Span("score", "score", "score", 1.0),
)


class Around(NamedTuple):
    """The latents before and after one, with their places in the listing; None at its ends."""

    before: tuple[int, int] | None
    after: tuple[int, int] | None
    at: int
    total: int


@dataclass(frozen=True)
class Listing:
    """What the table is asked for.

    Attributes:
        sort: one of SORTS. reverse: against the order that SORTS says. shown: one of SHOWN.
        spans: bounds by the name of a Span, as they were written; page: from 1.
    """

    sort: Sort = "telling"
    reverse: bool = False
    shown: str = "all"
    spans: tuple[tuple[str, float | None, float | None], ...] = ()
    page: int = 1

    @classmethod
    def of(cls, query: Mapping[str, str]) -> "Listing":
        """What an address asks for. Raises HTTPException (400), in words, for what it cannot ask for."""
        sort, shown, order = query.get("sort", "telling"), query.get("show", "all"), query.get("order", "")
        if sort not in SORTS:
            raise HTTPException(400, f"sort is {sort[:40]!r}: expected one of {', '.join(SORTS)}.")
        if shown not in SHOWN:
            raise HTTPException(400, f"show is {shown[:40]!r}: expected one of {', '.join(SHOWN)}.")
        if order not in ("", "reverse"):
            raise HTTPException(400, f"order is {order[:40]!r}: expected reverse, or nothing.")
        bounds = [(s.name, _number(query, f"{s.name}_from"), _number(query, f"{s.name}_to")) for s in SPANS]
        spans = tuple(bound for bound in bounds if bound[1:] != (None, None))
        return cls(sort, order == "reverse", shown, spans, whole(query, "page", 1) or 1)

    def address(self, path: str = "/", **more: Any) -> str:
        """Where a page shows this; `more` is added to the query."""
        asked: dict[str, Any] = {}
        if self.sort != "telling":
            asked["sort"] = self.sort
        if self.reverse:
            asked["order"] = "reverse"
        if self.shown != "all":
            asked["show"] = self.shown
        for name, low, high in self.spans:
            asked |= {f"{name}_{end}": _plain(v) for end, v in (("from", low), ("to", high)) if v is not None}
        if self.page > 1:
            asked["page"] = self.page
        asked |= more
        return f"{path}?{urlencode(asked)}" if asked else path

    def sorted_by(self, sort: Sort) -> "Listing":
        """By another column from its first page, or the other way round where it is by that one."""
        return replace(self, sort=sort, reverse=sort == self.sort and not self.reverse, page=1)

    def on(self, page: int) -> "Listing":
        return replace(self, page=page)

    @property
    def descending(self) -> bool:
        return SORTS[self.sort][1] != self.reverse

    def bounds(self, name: str) -> tuple[str, str]:
        """Of a Span, as its fields show them."""
        found = next((bound for bound in self.spans if bound[0] == name), (name, None, None))
        return _plain(found[1]), _plain(found[2])

    def found(self, db: LatentsDB, offset: int, limit: int) -> tuple[list[Latent], int]:
        """Some latents of it, and how many there are in all."""
        columns = {span.name: span for span in SPANS}
        within = {
            columns[name].column: (
                -math.inf if low is None else low * columns[name].unit,
                math.inf if high is None else high * columns[name].unit,
            )
            for name, low, high in self.spans
        }
        _, filters = SHOWN[self.shown]
        return db.page(self.sort, self.descending, offset, limit, within=within, **filters)

    def around(self, db: LatentsDB, latent: int, at: int) -> Around | None:
        """What stands beside a latent that was opened from place `at` of it; None where it does not stand there."""
        first = max(at - 1, 0)
        rows, total = self.found(db, first, 3)
        ids = [row.latent for row in rows]
        place = at - first
        if place >= len(ids) or ids[place] != latent:
            return None
        before = (ids[place - 1], at - 1) if place else None
        after = (ids[place + 1], at + 1) if place + 1 < len(ids) else None
        return Around(before, after, at, total)


def whole(query: Mapping[str, str], name: str, least: int) -> int | None:
    """A whole number in an address, None where there is none. Raises HTTPException (400), in words, for all else."""
    text = query.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and int(text) >= least):
        raise HTTPException(400, f"{name} is {text[:40]!r}: expected a whole number from {least} on.")
    return int(text)


def _number(query: Mapping[str, str], name: str) -> float | None:
    text = query.get(name, "").strip()
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise HTTPException(400, f"{name} is {text[:40]!r}: expected a number.")
    return value


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.10g}"
