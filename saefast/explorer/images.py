"""Contexts that are images: the patches that a latent fires on, where they are; and the images themselves."""

from typing import NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from saefast.explorer.state import Explorer
from saefast.latents.database import Example, LatentsDB

# What a file is sent as: never as anything that could run.
TYPES = ("image/webp", "image/png", "image/jpeg")
# Images beside a latent in a list.
IN_A_ROW = 4


class Patch(NamedTuple):
    """A patch that a latent fires on: column and row from the top left; share: of the latent's largest activation."""

    column: int
    row: int
    act: float
    share: float
    peak: bool


class Picture(NamedTuple):
    """An image that a latent fires in.

    name: of its file. shown: whether there is a picture of it. columns, rows: of its patches, 0 where it is not known
    how they lie. outside: position and activation where it fires on what is no patch, such as a CLS token, and
    everywhere where it is not known how patches lie.
    """

    sequence: int
    name: str
    shown: bool
    columns: int
    rows: int
    patches: list[Patch]
    outside: list[tuple[int, float]]


def routes(explorer: Explorer) -> list[BaseRoute]:
    """The images. Templates find `picture_of` and `images_of`."""
    if explorer.latents is None:
        return []
    db = explorer.latents

    def image(request: Request) -> Response:
        sequence = request.path_params["sequence"]
        found = db.image(sequence) if sequence < 1 << 31 else None
        if found is None or found[0] not in TYPES:
            raise HTTPException(404, f"There is no image of sequence {sequence}.")
        return Response(found[1], media_type=found[0])

    explorer.templates.globals["picture_of"] = lambda example, most: picture_of(db, example, most)
    explorer.templates.globals["images_of"] = lambda latent: images_of(db, latent)
    return [Route("/image/{sequence:int}", image)]


def picture_of(db: LatentsDB, example: Example, most: float) -> Picture:
    """An example as it is drawn; most: the latent's largest activation."""
    sequence, grid = example.context.sequence, db.meta.get("grid") or {"rows": 0, "columns": 0, "first": 0}
    rows, columns, first = (int(grid[name]) for name in ("rows", "columns", "first"))
    patches: list[Patch] = []
    outside: list[tuple[int, float]] = []
    for place in example.acts.nonzero()[0].tolist():
        act, at = float(example.acts[place]), example.context.start + place - first
        if 0 <= at < rows * columns:
            patches.append(Patch(at % columns, at // columns, act, min(act / most, 1), place == example.peak))
        else:
            outside.append((at + first, act))
    name = db.sequence(sequence).name
    shown = bool(db.query("SELECT 1 FROM images WHERE sequence = ?", (sequence,)))
    return Picture(sequence, name or f"image {sequence}", shown, columns, rows, patches, outside)


def images_of(db: LatentsDB, latent: int) -> list[int]:
    """Sequences of the images that a latent fires in most, as many as stand in a row of a list; none for text."""
    if db.meta.get("kind") != "images":
        return []
    found = db.query(
        "SELECT sequence FROM examples JOIN contexts USING (context) JOIN images USING (sequence) "
        "WHERE latent = ? AND part = 0 ORDER BY rank LIMIT ?",
        (latent, IN_A_ROW),
    )
    return [sequence for (sequence,) in found]
