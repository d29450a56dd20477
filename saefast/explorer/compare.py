"""The view of two runs side by side: latents that are alike, those that only one has, and the figures of both.

Sorted and paged here; `Matching` does the arithmetic in the background.
"""

import functools
import itertools
import json
import math
import os
import shlex
import threading
from pathlib import Path
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from saefast.errors import InputError
from saefast.explorer.curves import finite
from saefast.explorer.matching import Matching
from saefast.explorer.pairing import Columns, List, Pairing
from saefast.explorer.shading import Run, shaded
from saefast.explorer.state import Explorer, as_json
from saefast.explorer.training import EVALUATION
from saefast.latents.database import Example, Latent, LatentsDB, acts_in
from saefast.latents.matched import ALIKE
from saefast.latents.schema import LATENTS_DB

PAGE = 20
# Contexts of a latent that are shown, and pieces of them before and after the strongest.
CONTEXTS, BEFORE, AFTER = 2, 18, 10
# Entries of the folder around the run that are looked at, and runs in it that are shown.
MOST_ENTRIES, MOST_RUNS = 5000, 40

SORTS = {
    "cosine": "cosine, the clearest first",
    "reverse": "cosine, the least clear first",
    "score": "most telling first",
    "density": "most frequent first",
}


class Ask(NamedTuple):
    """What a page is asked for. alike: the cosine from which two latents are alike; page: from 1."""

    list: List
    sort: str
    alike: float
    page: int

    def address(self, **other: Any) -> str:
        """Of a page that differs in something; a page of another list is its first."""
        asked = self._replace(**({"page": 1} | other))
        return f"/compare?list={asked.list}&sort={asked.sort}&alike={asked.alike:g}&page={asked.page}"


class Cell(NamedTuple):
    """A latent of one run in a row. latent is None where the run has no latents.db. contexts: runs of text each."""

    number: int
    latent: Latent | None
    contexts: list[list[Run]]


def routes(explorer: Explorer) -> list[BaseRoute]:
    made = functools.cache(_matching)
    lock = threading.Lock()

    def matching() -> Pairing | None:
        # Two requests at once must not begin the work twice.
        with lock:
            return None if explorer.other is None else made(explorer.run, explorer.db, explorer.other)

    def page(request: Request) -> Response:
        explorer.db  # noqa: B018 -- without latents.db there is nothing to compare
        try:
            found = matching()
        except InputError as error:
            return explorer.page(request, "compare.html", shown=None, why=str(error), siblings=[])
        if found is None:
            return explorer.page(request, "compare.html", shown=None, why="", siblings=siblings(explorer.run))
        found.matching.begin()
        why = found.matching.error
        return explorer.page(request, "compare.html", shown=_shown(request, found), why=why, siblings=[])

    def state(request: Request) -> Response:
        pairing = matching()
        return as_json(state_of(None if pairing is None else pairing.matching))

    return [Route("/compare", page), Route("/compare/state", state)]


def _matching(run: Path, db: LatentsDB, other: Path) -> Pairing:
    """Raises InputError where there is no other run, or its latents.db cannot be read."""
    if not other.is_dir():
        raise InputError(f"There is no folder {other}: saefast explore takes the folders of two runs.")
    path = other / LATENTS_DB
    return Pairing(Matching(run, db, other, LatentsDB(path) if path.exists() else None))


def state_of(matching: Matching | None) -> dict[str, Any]:
    """is: "ready", "working", "failed", or "none" where there is no other run."""
    if matching is None:
        return {"is": "none"}
    now = "ready" if matching.found is not None else "failed" if matching.error else "working"
    return {"is": now, "done": matching.done, "of": matching.of, "error": matching.error}


def _shown(request: Request, pairing: Pairing) -> dict[str, Any]:
    """What the template shows of two runs."""
    matching = pairing.matching
    shown: dict[str, Any] = {"matching": matching, "facts": facts(pairing), "found": matching.found}
    if matching.found is None:
        return shown
    ask = asked(request)
    lists = pairing.lists(ask.alike)
    rows = pairing.sorted(ask.alike, ask.list, ask.sort)
    pages = max(math.ceil(len(rows.a) / PAGE), 1)
    ask = ask._replace(page=min(ask.page, pages))
    here = slice((ask.page - 1) * PAGE, ask.page * PAGE)
    cells_a = cells(matching.db, rows.a[here].tolist())
    cells_b = cells(matching.other_db, rows.b[here].tolist())
    return shown | {
        "ask": ask,
        "sorts": SORTS,
        "counts": {name: len(some.a) for name, some in lists.items()},
        "parts": pairing.parts(ask.alike),
        "histograms": pairing.histograms(),
        "rows": list(zip(cells_a, cells_b, rows.cosine[here].tolist(), strict=True)),
        "pages": pages,
    }


def asked(request: Request) -> Ask:
    """The query; what it does not say, or says in a way that is not ours, is as at first."""
    query = request.query_params
    lists: dict[str | None, List] = {"a": "a", "b": "b"}
    chosen, sort, page = lists.get(query.get("list"), "pairs"), query.get("sort"), query.get("page", "")
    alike = _between(query.get("alike", ""), 0.3, 0.99)
    return Ask(
        chosen,
        sort if sort in SORTS else "cosine" if chosen == "pairs" else "score",
        ALIKE if alike is None else round(alike, 2),
        int(page) if page.isascii() and page.isdigit() and 0 < len(page) < 10 and int(page) > 0 else 1,
    )


def _between(text: str, low: float, high: float) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if low <= value <= high else None


def cells(db: LatentsDB | None, ids: list[int]) -> list[Cell]:
    if db is None:
        return [Cell(number, None, []) for number in ids]
    known = {latent.latent: latent for latent in db.latents(ids)}
    return [Cell(i, known.get(i), contexts(db, known[i]) if i in known else []) for i in ids]


def contexts(db: LatentsDB, latent: Latent) -> list[list[Run]]:
    """The strongest contexts of a latent, what lies around the strongest token of each."""
    found = db.query(
        "SELECT context, position, act FROM examples WHERE latent = ? AND part = 0 ORDER BY rank LIMIT ?",
        (latent.latent, CONTEXTS),
    )
    return [_runs(db, latent, *row) for row in found]


def _runs(db: LatentsDB, latent: Latent, number: int, position: int, act: float) -> list[Run]:
    context = db.context(number)
    if not any(context.pieces):
        # An image, or rows of nothing that can be written.
        name = db.sequence(context.sequence).name or f"sequence {context.sequence}"
        return [Run(f"{name}, position {position}", "", "")]
    acts = acts_in(context, db.codes(context.sequence), latent.latent)
    peak = position - context.start
    first, last = max(peak - BEFORE, 0), min(peak + AFTER + 1, len(context.pieces))
    near = context._replace(start=context.start + first, stop=context.start + last, pieces=context.pieces[first:last])
    runs = shaded(Example(0, act, peak - first, acts[first:last], near), latent.max_act)
    cut = Run("…", "", "")
    return [cut] * (first > 0) + runs + [cut] * (last < len(context.pieces))


class Fact(NamedTuple):
    """A figure of both runs, None where it is not known. how: the filter that writes it, "" for text."""

    label: str
    a: Any
    b: Any
    how: str


def facts(pairing: Pairing) -> list[Fact]:
    matching = pairing.matching
    a = _figures(matching.run, matching.db, pairing.columns("a"))
    b = _figures(matching.other, matching.other_db, pairing.columns("b"))
    kinds = (
        ("hook", "hook", ""),
        ("architecture", "architecture", ""),
        ("n_latents", "latents", "count"),
        ("k", "k", "count"),
        ("l0", "L0", "act"),
        ("dead", "dead", "share"),
        ("rows", "on rows", "count"),
        ("data", "of", ""),
        ("fvu", "held-out FVU", "act"),
        ("fvu_ordinary", "of ordinary rows", "act"),
        ("loss_recovered", "loss recovered", "act"),
    )
    return [Fact(label, a.get(name), b.get(name), how) for name, label, how in kinds if name in a or name in b]


def _figures(run: Path, db: LatentsDB | None, columns: Columns | None) -> dict[str, Any]:
    """What is known of a run, from its latents.db, or its config where it has none, and its eval.json."""
    if db is None or columns is None:
        config = _json(run / "config.json")
        names = {"n_latents": "n_latents", "k": "k", "activation": "architecture"}
        found = {ours: config[theirs] for theirs, ours in names.items() if isinstance(config.get(theirs), (int, str))}
    else:
        meta, sae = db.meta, db.meta["sae"]
        found = {name: sae[name] for name in ("hook", "architecture", "k") if sae.get(name) is not None}
        found |= {"n_latents": db.n_latents, "l0": meta["l0"], "rows": meta["n_rows"]}
        found |= {"dead": float(columns.dead.mean())}
        found |= {"data": str(meta["rows"].get("data", ""))}
    evaluated = _json(run / EVALUATION)
    for part in ("metrics", "lm"):
        values = evaluated.get(part)
        for name in ("fvu", "fvu_ordinary", "loss_recovered"):
            value = finite(values.get(name)) if isinstance(values, dict) else None
            found |= {} if value is None else {name: value}
    return found


def _json(path: Path) -> dict[str, Any]:
    """The object of a file; an empty one where there is none."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


class Sibling(NamedTuple):
    """A run beside this one. command: what shows the two side by side."""

    name: str
    n_latents: int
    about: str
    command: str


def siblings(run: Path) -> list[Sibling]:
    """Runs with a latents.db in the folder around a run, by name; those that cannot be read are left out."""
    try:
        with os.scandir(run.parent) as entries:
            paths = [Path(entry.path) for entry in itertools.islice(entries, MOST_ENTRIES)]
    except OSError:
        return []
    found: list[Sibling] = []
    for path in sorted(paths):
        if path.resolve() == run.resolve() or not (path / LATENTS_DB).is_file() or len(found) == MOST_RUNS:
            continue
        try:
            db = LatentsDB(path / LATENTS_DB)
            about = ", ".join(str(db.meta["sae"].get(name) or "") for name in ("architecture", "hook"))
        except (InputError, KeyError, AttributeError, ValueError):
            continue
        command = shlex.join(["saefast", "explore", str(run), str(path)])
        found.append(Sibling(path.name, db.n_latents, about.strip(", "), command))
    return found
