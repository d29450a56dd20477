"""All that latents.db is written as, by name: pages to share, and what other people's tools read."""

import re
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Literal

from saefast.analysis.delphi import DELPHI, write_delphi
from saefast.analysis.export_names import Names
from saefast.analysis.neuronpedia import FOLDER, UPLOAD, write_folder, write_upload
from saefast.analysis.page import PAGE, write_page
from saefast.analysis.saedashboard import SAEDASHBOARD, write_saedashboard
from saefast.errors import InputError
from saefast.latents.database import LatentsDB, Sort
from saefast.latents.steps import Advance, nothing
from saefast.typed import typed

Kind = Literal["page", "neuronpedia", "neuronpedia-folder", "saedashboard", "delphi"]
_WRITERS: dict[str, Callable[[LatentsDB, str | Path, Sequence[int], Names, Advance], int]] = {
    UPLOAD: write_upload,
    FOLDER: write_folder,
    SAEDASHBOARD: write_saedashboard,
    DELPHI: write_delphi,
}
# Of these, all latents are written where none are asked for; a page shows a hundred.
_SHOWN = 100


@typed
def export(
    db: LatentsDB,
    kind: Kind,
    out: str | Path,
    latents: Sequence[int] | None = None,
    names: Names | None = None,
    advance: Advance = nothing,
) -> str:
    """Writes a folder, whole or not at all.

    Args:
        kind: "page", pages that need no server; "neuronpedia", the bodies of calls of its server; "neuronpedia-folder",
            what it imports; "saedashboard", its batches; "delphi", its cache of activations.
        out: a new or empty folder, or one with an earlier export of this kind, which is replaced.
        latents: which; None is all of them, of a page the hundred most telling.
        names: what to call the model, the layer and the SAE; None is as the SAE says.
        advance: called with how many more latents are done, rows for "delphi".

    Returns:
        What was written, in words.

    Raises:
        InputError: an unknown kind; a latent that is not there; what the kind needs and latents.db or the SAE's
            metadata do not hold; `out` holds something else.
    """
    if latents is None:
        latents = telling(db, _SHOWN) if kind == PAGE else range(db.n_latents)
    for latent in latents:
        if not isinstance(latent, Integral) or not 0 <= latent < db.n_latents:
            raise InputError(f"there is no latent {latent!a}: expected 0 to {db.n_latents - 1}")
    chosen = list(dict.fromkeys(map(int, latents)))
    if kind == PAGE:
        return f"{write_page(db, out, chosen, advance=advance):,} latents in {Path(out) / 'index.html'}"
    n = _WRITERS[kind](db, out, chosen, names or Names(db), advance)
    return f"{n:,} {'activations' if kind == DELPHI else 'latents'} in {out}"


def telling(db: LatentsDB, n: int) -> list[int]:
    """The n most telling latents, the best first, and those with the highest score where there are not as many.

    Where rows have no tokens, and nothing says what a latent tells, those that fire most strongly.
    """
    sort: Sort = "max_act" if db.meta["score"] is None else "telling"
    return [latent.latent for latent in db.page(sort, limit=n, dead=False)[0]]


def parse_latents(text: str, n_latents: int) -> list[int]:
    """The latents that "5,17,8000-8010" names, each once, in that order.

    Raises:
        InputError: anything else, or a latent that is not there.
    """
    found: dict[int, None] = {}
    for part in re.split(r"[,\s]+", text.strip().strip(",")):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part, re.ASCII)
        if match is None:
            raise InputError(f"latents is {text!a}: expected numbers and ranges, such as 5,17,8000-8010")
        first = int(match[1])
        last = int(match[2] or first)
        if first > last:
            raise InputError(f"latents is {text!a}: expected the smaller number first in {part}")
        if last >= n_latents:
            raise InputError(f"there is no latent {last}: expected 0 to {n_latents - 1}")
        found.update(dict.fromkeys(range(first, last + 1)))
    return list(found)
