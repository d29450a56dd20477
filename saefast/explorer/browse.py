"""*latents*: the table of all latents, a page at a time, and what a search found."""

import functools
import re
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from saefast.explorer.listing import ROWS, SHOWN, SORTS, SPANS, Listing
from saefast.explorer.shading import marked_spans
from saefast.explorer.state import Explorer
from saefast.latents.search import search

# A histogram in a row: columns, and height of the tallest.
BARS, HEIGHT = 25, 18
# Latents and contexts that a search shows.
HITS = 50


def routes(explorer: Explorer) -> list[BaseRoute]:
    if explorer.latents is None:
        return []

    # Latents do not change while they are shown; labels do.
    @functools.cache
    def counts() -> tuple[int, int]:
        ((dead, dense),) = explorer.db.query(
            "SELECT count(*) FILTER (WHERE dead), count(*) FILTER (WHERE dense) FROM latents"
        )
        return dead, dense

    def page(request: Request) -> Response:
        text = request.query_params.get("q", "").strip()
        if text:
            return _found(explorer, request, text)
        return _table(explorer, request, *counts())

    return [Route("/", page)]


def _table(explorer: Explorer, request: Request, dead: int, dense: int) -> Response:
    db, listing = explorer.db, Listing.of(request.query_params)
    rows, total = listing.found(db, min((listing.page - 1) * ROWS, db.n_latents), ROWS)
    last = max(-(-total // ROWS), 1)
    if listing.page > last:
        return RedirectResponse(listing.on(last).address(), 303)
    values: dict[str, Any] = {
        "listing": listing,
        "rows": rows,
        "total": total,
        "last": last,
        "first": (listing.page - 1) * ROWS,
        "bars": {row.latent: bars(db.histogram(row.latent)) for row in rows if not row.dead},
        "sorts": SORTS,
        "shown": SHOWN,
        "spans": SPANS,
        "dead": dead / max(db.n_latents, 1),
        "dense": dense,
        "labelled": db.query("SELECT count(*) FROM labels")[0][0],
    }
    return explorer.page(request, "browse.html", here="latents", **values)


def _found(explorer: Explorer, request: Request, text: str) -> Response:
    db = explorer.db
    # #5 is a latent; 5 may be a word too.
    if re.fullmatch("#[0-9]{1,18}", text) and int(text[1:]) < db.n_latents:
        return RedirectResponse(f"/latent/{int(text[1:])}", 303)
    found = search(db, text, HITS)
    rows = {row.latent: row for row in db.latents([hit.latent for hit in found.hits])}
    shown: dict[str, Any] = {
        "q": text,
        "found": found,
        "hits": [(hit, rows[hit.latent]) for hit in found.hits if hit.latent in rows],
        "bars": {row.latent: bars(db.histogram(row.latent)) for row in rows.values() if not row.dead},
        "matches": [(match, marked_spans(match.context, match.spans)) for match in found.matches],
    }
    return explorer.page(request, "found.html", here="latents", **shown)


def bars(counts: np.ndarray) -> str:
    """A histogram as the path of an SVG, BARS wide and HEIGHT high: roots of counts, so that few firings show."""
    columns = np.sqrt(counts.reshape(BARS, -1).sum(1))
    if not columns.any():
        return ""
    tops = HEIGHT * (1 - columns / columns.max())
    steps = "".join(f"V{top:.1f}h1" for top in tops)
    return f"M0 {HEIGHT}{steps}V{HEIGHT}Z"
