"""The view of all latents at once: decoder rows in two dimensions, drawn by a script from one binary answer."""

import functools
import hashlib
from typing import Any, NamedTuple

import numpy as np
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from saefast.errors import InputError
from saefast.explorer.state import Explorer, as_json
from saefast.latents.database import Latent, LatentsDB
from saefast.latents.numbers import share
from saefast.latents.search import search as search_text
from saefast.readable import visible

# Columns of the answer, one after the other, little-endian: what the script takes them for.
COLUMNS = (("map", "<f4"), ("density", "<f4"), ("cluster", "<i2"))
# Latents that may be asked for at once, and that a search marks on the map.
MOST_IDS, MOST_FOUND = 200, 100


class Points(NamedTuple):
    """columns: which of COLUMNS `data` holds. digest: of data, so that a browser keeps it for as long as it is true."""

    data: bytes
    columns: list[str]
    digest: str


def routes(explorer: Explorer) -> list[BaseRoute]:
    # The file is read once: the database is open for as long as this is served, and columns are some megabytes.
    @functools.cache
    def read() -> Points:
        return points_of(explorer.db)

    def page(request: Request) -> Response:
        db = explorer.db
        method = in_words(db.meta.get("map") or {})
        return explorer.page(request, "map.html", points=read(), method=method, names=names(db))

    def points(request: Request) -> Response:
        found = read()
        # The address has the digest, so that what a browser has kept under it is never out of date.
        known = request.query_params.get("digest") == found.digest
        headers = {"ETag": f'"{found.digest}"', "Cache-Control": f"private, {_FOREVER if known else 'no-cache'}"}
        if f'"{found.digest}"' in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(found.data, media_type="application/octet-stream", headers=headers)

    def latents(request: Request) -> Response:
        ids = _ids(request.query_params.get("ids", ""))
        return as_json({"latents": [brief(latent) for latent in explorer.db.latents(ids)]})

    def search(request: Request) -> Response:
        found, how = marked(explorer.db, request.query_params.get("q", "").strip())
        return as_json({"latents": [brief(latent) | {"score": score} for latent, score in found], "how": how})

    return [
        Route("/map", page),
        Route("/map/points", points),
        Route("/map/latents", latents),
        Route("/map/search", search),
    ]


_FOREVER = "max-age=31536000, immutable"


def points_of(db: LatentsDB) -> Points:
    """Raises InputError where a column is not of all latents."""
    parts, columns = [], []
    for name, dtype in COLUMNS:
        array = db.array(name)
        if array is None:
            continue
        shape = (db.n_latents, 2) if name == "map" else (db.n_latents,)
        if array.shape != shape:
            raise InputError(f"{db.path} is damaged: {name} has shape {array.shape}, expected {shape}")
        parts.append(np.ascontiguousarray(array, np.dtype(dtype)).tobytes())
        columns.append(name)
    data = b"".join(parts)
    return Points(data, columns, hashlib.sha256(data).hexdigest()[:32])


def brief(latent: Latent) -> dict[str, Any]:
    """What is shown of a latent under the pointer."""
    return {
        "latent": latent.latent,
        "title": visible(latent.title),
        "label": visible(latent.label),
        "density": latent.density,
        "max_act": latent.max_act,
        "dead": latent.dead,
    }


def marked(db: LatentsDB, text: str) -> tuple[list[tuple[Latent, float]], str]:
    """The latents that a search marks with the score that they have in it, and what was found, in a sentence."""
    if not text:
        return [], ""
    found = search_text(db, text, MOST_FOUND)
    # Those that are named, by number or label, are what was looked for, whatever they fire on.
    scores = {hit.latent: 1.0 if hit.why in ("number", "label") else hit.score for hit in found.hits}
    return [(latent, scores[latent.latent]) for latent in db.latents(list(scores))], found.how


def names(db: LatentsDB) -> list[str]:
    """Of the clusters, in the order of their numbers; those of no words are called by these."""
    found = db.meta.get("clusters")
    found = found if isinstance(found, list) else []
    return [visible(str(name)) if name else f"cluster {number}" for number, name in enumerate(found)]


def in_words(facts: dict[str, Any]) -> str:
    """How the map was made, from meta["map"]."""
    method = str(facts.get("method", ""))
    if method.lower() == "umap":
        return (
            "Each latent lies near those with the most similar decoder rows (UMAP). What is near is alike; how far "
            "apart distant groups lie means little."
        )
    if method.lower() == "pca":
        variance = facts.get("variance")
        held = f", which hold {share(float(variance))} of it" if isinstance(variance, (int, float)) else ""
        return (
            f"Decoder rows along their two directions of most variance (PCA){held}. What lies together need not be "
            "alike: pip install umap-learn and a new pass make a map of neighbours."
        )
    return f"Decoder rows in two dimensions ({method})." if method else "Decoder rows in two dimensions."


def _ids(text: str) -> list[int]:
    """Numbers between commas. Raises HTTPException (400) for anything else."""
    parts = text.split(",") if text else []
    if len(parts) > MOST_IDS or not all(part.isascii() and part.isdigit() and len(part) < 16 for part in parts):
        raise HTTPException(400, f"ids are at most {MOST_IDS} numbers of latents with commas between them.")
    return [int(part) for part in parts]
