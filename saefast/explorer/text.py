"""*text*: a text that somebody types, read by the model: latents of each token, and all of the text shaded by one."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from saefast.errors import InputError
from saefast.explorer.guard import form
from saefast.explorer.loading import Loading, NotReady
from saefast.explorer.state import Explorer, as_json
from saefast.latents.database import Latent, LatentsDB
from saefast.readable import visible

if TYPE_CHECKING:
    from saefast.explorer.reader import ReadText, TextReader

# Latents that are looked up in one statement: SQLite takes no more than 32,766 values.
_AT_A_TIME = 30_000


def routes(explorer: Explorer) -> list[BaseRoute]:
    """The page at /text; the text that is posted to /text/read; and how far the model has been loaded."""
    reader: Loading[TextReader] = Loading(lambda: _reader(explorer))
    # One text at a time: a forward pass takes all cores, and as much memory as there may be.
    one = anyio.CapacityLimiter(1)

    def page(request: Request) -> Response:
        why = _why_no_text(explorer.db)
        if not why:
            reader.start()
        chosen = request.query_params.get("latent", "")
        latent = explorer.latent(int(chosen)) if chosen.isascii() and chosen.isdecimal() else None
        example = strongest(explorer.db, latent) if latent else ""
        return explorer.page(request, "text.html", here="text", why=why, chosen=latent, example=example)

    async def state(request: Request) -> Response:
        return as_json({"state": reader.state, "why": reader.why})

    async def read(request: Request) -> Response:
        fields = await form(request, explorer.form_key)
        try:
            found = reader.get()
        except NotReady:
            reader.start()
            return as_json({"state": reader.state, "why": reader.why, "error": "The model is not loaded yet."}, 503)
        text = fields.get("text", "").replace("\r\n", "\n")
        return await anyio.to_thread.run_sync(_answer, explorer.db, found, text, limiter=one)

    return [
        Route("/text", page),
        Route("/text/state", state),
        Route("/text/read", read, methods=["POST"]),
    ]


def _reader(explorer: Explorer) -> "TextReader":
    """The model of the harvest that latents.db is of.

    Raises:
        InputError: as TextReader; a latents.db of other weights than the run has now.
    """
    from saefast.explorer.reader import TextReader

    meta = explorer.db.meta
    folder = meta.get("rows", {}).get("folder")
    data = explorer.data or (folder if folder and Path(folder).is_dir() else None)
    reader = TextReader(explorer.run, data, explorer.model)
    if reader.digest != meta["sae"]["digest"]:
        raise InputError(
            f"{explorer.db.path} is of other weights than the run has now: end saefast explore, and saefast features "
            f"{explorer.run} makes it anew"
        )
    return reader


def _why_no_text(db: LatentsDB) -> str:
    """Why no text can be read with this run's model; "" where it can."""
    kind = db.meta.get("kind", "text")
    return "" if kind == "text" else f"The rows of this run are of {kind}, not of text: its model reads none."


def strongest(db: LatentsDB, latent: Latent) -> str:
    """The text that a latent fires in most strongly; "" where there is none."""
    found = db.query(
        "SELECT text FROM examples JOIN contexts USING (context) WHERE latent = ? AND part = 0 ORDER BY rank LIMIT 1",
        (latent.latent,),
    )
    return str(found[0][0]).strip() if found else ""


def _answer(db: LatentsDB, reader: "TextReader", text: str) -> Response:
    """What the page's script gets: `described`, and names of tokens without a code, by their places."""
    found = reader.read(text)
    names = {i: visible(reader.name(int(found.tokens[i]))) for i in np.flatnonzero(~found.kept).tolist()}
    return as_json(described(db, found) | {"names": names})


def described(db: LatentsDB, read: "ReadText") -> dict[str, Any]:
    """A text that was read, as the page's script takes it.

    Lists over tokens: texts, kept (0 or 1), and row_ptr, one longer; starts: of sequences; left_out: tokens not read.
    The code: acts, and place, which latent of `latents` each is of. `latents` are all that fire, the most telling
    first, each a mapping: latent, title, label, density, most (its largest activation in latents.db, here where it has
    never fired there), rarity (the digits of 1 / density, 0 where it has never fired there), n (tokens that it fires
    on), peak (the token where it is strongest) and act (there).
    """
    ids, place = np.unique(read.idx, return_inverse=True)
    token, entry = _strongest(read, place, len(ids))
    peaks = zip(np.bincount(place).tolist(), token.tolist(), _short(read.acts[entry]), strict=True)
    latents = [
        _facts(fact, int(db.meta["n_rows"])) | {"n": n, "peak": peak, "act": act}
        for fact, (n, peak, act) in zip(latents_of(db, ids.tolist()), peaks, strict=True)
    ]
    for latent in latents:
        latent["most"] = latent["most"] or latent["act"]
    told = np.array([min(latent["act"] / latent["most"], 1) * latent["rarity"] for latent in latents])
    ranked = np.lexsort((ids, -told))
    return {
        "texts": [visible(text, lines=True) for text in read.texts],
        "kept": read.kept.astype(int).tolist(),
        "starts": read.starts,
        "left_out": read.left_out,
        "row_ptr": read.row_ptr.tolist(),
        "place": np.argsort(ranked)[place].tolist(),
        "acts": _short(read.acts),
        "latents": [latents[i] for i in ranked.tolist()],
    }


def _facts(latent: Latent, n_rows: int) -> dict[str, Any]:
    """What is known of a latent before it fires here.

    What tells most of a text is the share of a latent's largest activation times its rarity: a dense latent says little
    however strong it is, and one that has never fired nothing that could be read.
    """
    return {
        "latent": latent.latent,
        "title": latent.title,
        "label": latent.label,
        "density": latent.density,
        "most": latent.max_act,
        "rarity": -math.log10(max(latent.density, 1 / max(n_rows, 1))) if latent.max_act else 0.0,
    }


def _short(acts: np.ndarray) -> list[float]:
    """Activations to six digits, which is what float32 has."""
    return [float(f"{act:.6g}") for act in acts.tolist()]


def _strongest(read: "ReadText", place: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each of n latents: the token that it is strongest on, and the entry."""
    token = np.repeat(np.arange(len(read.tokens)), np.diff(read.row_ptr))
    entries = np.lexsort((token, -read.acts, place))
    first = entries[np.searchsorted(place[entries], np.arange(n))]
    return token[first], first


def latents_of(db: LatentsDB, ids: list[int]) -> list[Latent]:
    """Any number of latents, in that order."""
    return [
        latent for start in range(0, len(ids), _AT_A_TIME) for latent in db.latents(ids[start : start + _AT_A_TIME])
    ]
