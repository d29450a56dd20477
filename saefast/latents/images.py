"""Images small enough to show, as the model saw them, and where on them the positions of its sequences are.

What an image processor makes of a file (turned, resized, cropped) is made a picture again, so that patches lie where
the model has them. Without the processor the whole file is shown, and a word says so.
"""

import importlib.util
import io
import math
import sqlite3
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from saefast.data.shards import ShardFolder
from saefast.errors import InputError
from saefast.files import usable
from saefast.harvest.image_folder import image_of, processed, tensors_of
from saefast.harvest.items import Unreadable
from saefast.harvest.language_models import load_processor
from saefast.harvest.workers import in_order, workers_for
from saefast.latents.spool import Spool
from saefast.latents.steps import Advance, nothing

# The longest side of an image, in pixels, and how many images are kept at most: those of the strongest examples.
LONGEST, MOST = 224, 20_000
# Positions that may stand before the patches (a CLS token, registers) where rows of them are kept.
_IN_FRONT = 16
# Smaller ones than this lose more by compression than they gain.
_SMALL = 64


class Thumbnail(NamedTuple):
    """A small image: a whole file of type `mime`. size: (height, width) of what the model saw of it, in pixels, None
    where the model's processor did not make it."""

    mime: str
    data: bytes
    size: tuple[int, int] | None


def write_images(
    db: sqlite3.Connection, spool: Spool, folder: ShardFolder, processor: Any = None, advance: Advance = nothing
) -> dict[str, Any]:
    """Fills the table `images` for sequences with examples, which are in the database already.

    Args:
        spool: of the rows; their positions say where patches begin.
        folder: the harvest that the rows are of, of kind "images" or not.
        processor: the model's own image processor, or a folder or name that it loads from; None is the model's name,
            and does without where that does not load.
        advance: is told how many images more are done.

    Returns:
        For `meta`. "grid": {"rows", "columns", "first"}, position `first` being the patch at the top left; None where
        it is not known. "images": {"shown", "missing", "whole", "why"}, whole: whether files are shown as they are and
        not as the model saw them, why: what is to be said of them, None where that is nothing.
    """
    if folder.kind != "images":
        return _nothing_shown(f"the rows are of {folder.kind}, which leave no files to show")
    if importlib.util.find_spec("PIL") is None:
        return _nothing_shown("images are read with Pillow, which is not installed: pip install pillow")
    processor, why = _processor(folder, processor)
    wanted = _wanted(db)
    sizes: set[tuple[int, int] | None] = set()
    missing = 0
    jobs = (_Job(_file(folder, number), processor) for _, number in wanted)
    workers = workers_for(torch.device("cpu"))
    for (sequence, _), found in zip(wanted, in_order(_thumbnail, jobs, workers), strict=True):
        if found is None:
            missing += 1
        else:
            sizes.add(found.size)
            db.execute("INSERT INTO images VALUES (?, ?, ?)", (sequence, found.mime, found.data))
        advance(1)
    why = why or (_whole_said(processor) if None in sizes else None)
    grid = grid_of(spool, sizes.pop() or (1, 1)) if len(sizes) == 1 else None
    whole = processor is None or why is not None
    return {"grid": grid, "images": {"shown": len(wanted) - missing, "missing": missing, "whole": whole, "why": why}}


def _nothing_shown(why: str) -> dict[str, Any]:
    return {"grid": None, "images": {"shown": 0, "missing": 0, "whole": False, "why": why}}


def _whole_said(processor: Any) -> str:
    return f"what the {type(processor).__name__} makes of an image is no picture: whole files are shown"


def _processor(folder: ShardFolder, given: Any) -> tuple[Any, str | None]:
    """The image processor of the harvest's model; None and why."""
    if isinstance(given, str | Path):
        return load_processor(given, "AutoImageProcessor"), None
    if given is not None:
        return given, None
    name, revision = folder.index.get("model"), folder.index.get("revision")
    try:
        return load_processor(name, "AutoImageProcessor", revision=revision), None
    except InputError as error:
        return None, f"whole files are shown, not what the model saw of them: {error}"


def _wanted(db: sqlite3.Connection) -> list[tuple[int, int]]:
    """Sequences with examples and their numbers in the harvest, those of the strongest first, at most MOST."""
    return db.execute(
        "SELECT sequence, source_sequence FROM examples JOIN contexts USING (context) JOIN sequences USING (sequence) "
        "GROUP BY sequence ORDER BY min(part), min(rank), sequence LIMIT ?",
        (MOST,),
    ).fetchall()


def _file(folder: ShardFolder, number: int) -> Path | None:
    """Where the image of a sequence was when it was harvested; None for a name that leads out of the folder."""
    name = PurePosixPath(folder.item(number))
    if ".." in name.parts or name.is_absolute():
        return None
    root = _root(folder)
    return root if root.is_file() else root / name


def _root(folder: ShardFolder) -> Path:
    """What was harvested. A path that is not absolute was so from wherever the harvest began: mostly here, or where
    the harvest's own folder lies below."""
    given = usable(folder.index.get("data") or ".")
    places = [Path.cwd(), *folder.path.resolve().parents]
    return next((place / given for place in places if (place / given).exists()), given)


class _Job(NamedTuple):
    file: Path | None
    processor: Any


def _thumbnail(job: _Job) -> Thumbnail | None:
    """None where there is no such file any more, or it is no image."""
    if job.file is None:
        return None
    try:
        image = image_of(job.file.read_bytes())
    # Pillow's formats have errors of their own.
    except Exception:
        return None
    seen = None if job.processor is None else as_seen(job.processor, image)
    return _small(image, None) if seen is None else _small(seen, (seen.height, seen.width))


def as_seen(processor: Any, image: Any) -> Any:
    """What an image processor makes of an image, as an image of Pillow; None where that is none."""
    try:
        made = tensors_of(processed(processor, images=image))
    except Unreadable:
        return None
    pixels = made.get((getattr(processor, "model_input_names", None) or ["pixel_values"])[0])
    if pixels is None or pixels.dim() != 4 or pixels.shape[:2] != (1, 3):
        return None
    from PIL import Image

    values = pixels[0].float()
    if getattr(processor, "do_normalize", False):
        mean, std = (_colours(getattr(processor, f"image_{name}")) for name in ("mean", "std"))
        values = values * std + mean
    if getattr(processor, "do_rescale", True):
        values = values / float(getattr(processor, "rescale_factor", None) or 1 / 255)
    if getattr(processor, "do_flip_channel_order", False):
        values = values.flip(0)
    return Image.fromarray(values.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def _colours(values: Any) -> torch.Tensor:
    """(3, 1, 1) of one number or three."""
    given = [float(value) for value in values] if hasattr(values, "__iter__") else [float(values)] * 3
    return torch.tensor(given, dtype=torch.float32, device="cpu")[:, None, None]


def _small(image: Any, size: tuple[int, int] | None) -> Thumbnail:
    from PIL import features

    image.thumbnail((LONGEST, LONGEST))
    png = max(image.size) <= _SMALL or not features.check("webp")
    file = io.BytesIO()
    image.save(file, **({"format": "PNG"} if png else {"format": "WEBP", "quality": 82}))
    return Thumbnail("image/png" if png else "image/webp", file.getvalue(), size)


def grid_of(spool: Spool, size: tuple[int, int]) -> dict[str, int] | None:
    """How patches lie on images that are all of one size (height, width), from the positions that have rows.

    The last position is the patch at the bottom right, and those that stand before the patches have no rows, unless a
    harvest kept them: then as few as leave a grid of the images' shape do. None where no grid fits.
    """
    if not spool.n_rows:
        return None
    lowest, n = int(spool.position.min()), int(spool.position.max()) + 1
    firsts = [lowest] if lowest else range(min(_IN_FRONT + 1, n))
    return next((grid for first in firsts for grid in _grids(n - first, size, first)), None)


def _grids(n: int, size: tuple[int, int], first: int) -> Iterator[dict[str, int]]:
    """The grid of n patches in the shape of an image, if there is one."""
    height, width = size
    rows = round(math.sqrt(n * height / width))
    if rows and n % rows == 0 and rows == round(n // rows * height / width):
        yield {"rows": rows, "columns": n // rows, "first": first}
