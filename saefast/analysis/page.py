"""Pages of latents that need no server and nothing from the network: a folder with an index, or one page of a few.

A page is a template beside this file, filled. It holds its own style (the explorer's, and page.css) and script
(page.js), and its Content-Security-Policy names their digests: whatever the data holds, nothing else runs or loads.
"""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saefast.analysis.excerpts import Bin, bins
from saefast.analysis.export_folder import whole_folder
from saefast.errors import InputError
from saefast.files import replacing
from saefast.latents import numbers
from saefast.latents.database import Example, Latent, LatentsDB, LogitWeight, Relative, TokenShare
from saefast.latents.schema import BINS
from saefast.latents.steps import Advance, nothing
from saefast.readable import visible

PAGE, FEATURES, INDEX = "page", "features", "index.html"
FOLDER = Path(__file__).resolve().parent
# Colours, type and the shades of activations: one look for all pages.
LOOK = FOLDER.parent / "explorer" / "static" / "base.css"
# Of the contexts of a latent on a page of a few.
CONTEXTS = 6


class Group(NamedTuple):
    """Examples from one interval of activations, or the strongest."""

    of: Bin
    examples: list[Example]


class Shown(NamedTuple):
    """A latent with all that its page shows. `bars`: heights of the histogram, 0 to 1, and counts."""

    latent: Latent
    tokens: list[TokenShare]
    groups: list[Group]
    bars: list[tuple[float, int]]
    raised: list[LogitWeight]
    lowered: list[LogitWeight]
    neighbours: list[Relative]
    cofiring: list[Relative]

    @property
    def name(self) -> str:
        return name_of(self.latent)

    @property
    def strongest(self) -> list[Example]:
        return self.groups[0].examples if self.groups else []


def name_of(latent: Latent | Relative) -> str:
    """What a person calls it, else its tokens, else its number."""
    return visible(latent.label or latent.title) or f"latent {latent.latent}"


def shown(db: LatentsDB, latent: Latent) -> Shown:
    """Reads all that a latent's page shows."""
    parts = bins(db, latent)
    groups: dict[int, list[Example]] = {}
    for example in db.examples(latent.latent):
        groups.setdefault(example.part, []).append(example)
    counts = db.histogram(latent.latent)
    # Most firings are weak: a bar is as high as the logarithm of its count.
    heights = np.log1p(counts) / max(np.log1p(counts.max()), 1e-9)
    raised, lowered = db.logit_weights(latent.latent)
    return Shown(
        latent,
        [token for token in db.tokens_of(latent.latent) if token.own],
        [Group(parts[part], examples) for part, examples in sorted(groups.items())],
        list(zip(heights.round(3).tolist(), counts.tolist(), strict=True)),
        raised,
        lowered,
        db.neighbours(latent.latent),
        db.cofiring(latent.latent),
    )


def write_page(
    db: LatentsDB, out: str | Path, latents: Sequence[int], title: str = "", advance: Advance = nothing
) -> int:
    """Writes a folder to share: index.html, a table with a search over titles, and latents/{n}.html for each latent.

    Args:
        latents: in the order of the table and of the links from one to the next.
        title: above the table; the default says of what SAE it is.
        advance: called with latents.

    Returns:
        How many latents were written.

    Raises:
        InputError: a latent that is not there, none at all, or `out` is taken.
    """
    chosen = [db.latent(latent) for latent in dict.fromkeys(latents)]
    if not chosen:
        raise InputError(f"no latent is asked for: a {PAGE} needs one or more of 0 to {db.n_latents - 1}")
    title = title or title_of(db)
    known = {latent.latent for latent in chosen}
    with whole_folder(out, PAGE, db) as folder:
        (folder / "latents").mkdir()
        _write(folder / INDEX, "page_index.html", db=db, title=title, latents=chosen)
        places = zip([None, *chosen[:-1]], chosen, [*chosen[1:], None], strict=True)
        for before, latent, after in places:
            values = {"one": shown(db, latent), "before": before, "after": after, "known": known}
            _write(folder / "latents" / f"{latent.latent}.html", "page_latent.html", db=db, title=title, **values)
            advance(1)
    return len(chosen)


def title_of(db: LatentsDB) -> str:
    """The model and the hook that the SAE is of."""
    sae = db.meta["sae"]
    return " ".join(str(sae[name]) for name in ("model", "hook") if sae.get(name)) or "latents"


def write_features(
    folder: Path, db: LatentsDB, features: Sequence[Shown], title: str, contexts: int = CONTEXTS
) -> list[Path]:
    """features.html, one page of all, and features.md. -> the files written."""
    texts = {
        ".html": to_html(db, features, title, contexts),
        ".md": to_markdown(features, title, about(db, len(features))),
    }
    for ending, text in texts.items():
        with replacing(folder / f"{FEATURES}{ending}") as temporary:
            # A path that is no UTF-8 is shown as well as it can be.
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return [folder / f"{FEATURES}{ending}" for ending in texts]


def to_html(db: LatentsDB, features: Sequence[Shown], title: str, contexts: int = CONTEXTS) -> str:
    """One page of some latents, each with its tokens and so many of its strongest contexts."""
    values = {"about": about(db, len(features)), "contexts": contexts}
    return _filled("page_few.html", db=db, title=title, features=features, **values)


def about(db: LatentsDB, n: int) -> str:
    """What some latents were chosen from and how, in a few sentences."""
    rows, score = db.meta["rows"], db.meta["score"]
    return (
        f"{n:,} of {db.n_latents:,} latents (L0 = {db.meta['l0']:.1f}), judged on {db.meta['n_rows']:,} "
        f"{db.meta['unit']} of {visible(str(rows['source']))}. A percentage is the share of a latent's activation that "
        f"falls on a token. Contexts are the strongest, with repeats left out.{f' {score}' if score else ''}"
    )


def to_markdown(features: Sequence[Shown], title: str, about: str) -> str:
    """One table row a latent; the strongest token of each context is bold."""
    lines = [
        f"# {title}", "", about, "", "| latent | fires on | tokens | in context |", "|---|---|---|---|"
    ]  # fmt: skip
    for one in features:
        tokens = ", ".join(f"`{_cell(t.text)}` {t.share:.0%}" for t in one.tokens[:6])
        contexts = "<br>".join(_bold(example) for example in one.strongest[:3])
        lines.append(f"| {one.latent.latent} | {one.latent.density:.3%} | {tokens} | {contexts} |")
    return "\n".join([*lines, ""])


def _bold(example: Example) -> str:
    words = [_cell(piece) for piece in example.context.pieces]
    peak = words[example.peak]
    lead = len(peak) - len(peak.lstrip())
    if peak.strip():
        words[example.peak] = f"{peak[:lead]}**{peak[lead:].rstrip()}**{' ' * (peak != peak.rstrip())}"
    return "".join(words).strip()


def _cell(text: str) -> str:
    """Text that breaks neither a Markdown table nor its emphasis."""
    text = visible(text)
    for sign in "&\\|`*_<>":
        known = {"&": "&amp;", "|": "&#124;", "<": "&lt;", ">": "&gt;", "`": "&#96;"}
        text = text.replace(sign, known.get(sign, "\\" + sign))
    return text


def summary(features: Sequence[Shown]) -> str:
    """One line a latent, for a terminal."""
    lines = []
    for one in features:
        tokens = ", ".join(f"{visible(t.text).strip()} {t.share:.0%}" for t in one.tokens[:5])
        lines.append(f"  latent {one.latent.latent:>6}  {one.latent.density:7.3%}  {tokens}")
    return "\n".join(lines)


class Piece(NamedTuple):
    """A position of a context on a page: the space before its text, its text, its activation, and whether it peaks."""

    space: str
    text: str
    act: float
    peak: bool


def pieces(example: Example) -> list[Piece]:
    """What a context is made of, without the line ends and spaces around it on which the latent does not fire."""
    found = []
    for place, (piece, act) in enumerate(zip(example.context.pieces, example.acts.tolist(), strict=True)):
        text = visible(piece, lines=True)
        word = text.lstrip()
        # White space alone is shaded too where a latent fires on it.
        space = text[: len(text) - len(word)] if word else ""
        found.append(Piece(space, word or text, act, place == example.peak))
    kept = [place for place, piece in enumerate(found) if piece.act > 0 or piece.text.strip()]
    if not kept:
        return []
    found = found[kept[0] : kept[-1] + 1]
    found[0] = found[0]._replace(space="")
    if found[-1].act <= 0:
        found[-1] = found[-1]._replace(text=found[-1].text.rstrip())
    return found


def name_of_sequence(db: LatentsDB, example: Example) -> str:
    """What stands for a context that has neither text nor picture: the file of an image, or where the rows lie."""
    row = db.sequence(example.context.sequence)
    return visible(row.name or f"sequence {row.source_sequence}, position {example.context.start + example.peak}")


class Picture(NamedTuple):
    """An image, as a data: address that holds all of it, under a grid of columns × rows.

    patches: (column, row, activation) of those that the latent fires on. columns: 0 where it is not known how they lie.
    """

    address: str
    columns: int
    rows: int
    patches: list[tuple[int, int, float]]


def picture(db: LatentsDB, example: Example) -> Picture | None:
    """The image that a context is; None of a text, and of an image that is not kept."""
    kept = db.image(example.context.sequence)
    if kept is None:
        return None
    mime, data = kept
    address = f"data:{mime};base64,{base64.b64encode(data).decode()}"
    grid = db.meta.get("grid")
    if grid is None:
        return Picture(address, 0, 0, [])
    columns, rows = int(grid["columns"]), int(grid["rows"])
    # What comes before the patches, a class token, is of no place in the image.
    places = np.arange(example.context.start, example.context.stop) - int(grid["first"])
    fired = (example.acts > 0) & (places >= 0) & (places < columns * rows)
    where, acts = places[fired].tolist(), example.acts[fired].tolist()
    patches = [(place % columns, place // columns, act) for place, act in zip(where, acts, strict=True)]
    return Picture(address, columns, rows, patches)


def _write(path: Path, template: str, **values: Any) -> None:
    path.write_text(_filled(template, **values), encoding="utf-8", errors="backslashreplace")


def _filled(template: str, **values: Any) -> str:
    style, script = _style(), _text(FOLDER / "page.js")
    policy = f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}; img-src data:"
    policy += "; base-uri 'none'; form-action 'none'"
    text: str = _environment().get_template(template).render(style=style, script=script, policy=policy, **values)
    return text


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@cache
def _style() -> str:
    return _text(LOOK) + _text(FOLDER / "page.css")


@cache
def _environment() -> Any:
    # torch requires jinja2, so it is there.
    import jinja2

    # Autoescaping: tokens are other people's text.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER, encoding="utf-8"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {**numbers.FILTERS, "visible": visible}
    environment.globals |= {"pieces": pieces, "picture": picture, "name_of": name_of, "BINS": BINS}
    environment.globals["name_of_sequence"] = name_of_sequence
    return environment
