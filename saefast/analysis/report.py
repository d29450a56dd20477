"""What is written down about a run: pictures of training and densities, and its telling latents as HTML and Markdown.

The page is the template features.html beside this file; the picture of the latents is plots.draw_features.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from saefast.analysis.evaluation import Evaluation
from saefast.analysis.feature_table import Feature, FeatureTable, Snippet
from saefast.analysis.plots import draw_curves, draw_density
from saefast.errors import InputError
from saefast.files import replacing
from saefast.formats.opening import load
from saefast.training.progress import read_metrics

CURVES, DENSITY = "curves.png", "density.png"
FEATURES, PAGE = "features", "features.html"


def draw_run(folder: Path, result: Evaluation) -> list[Path]:
    """curves.png (where metrics.jsonl is) and density.png. -> the files written.

    Raises:
        InputError: matplotlib is not installed.
    """
    config = load(folder, verify=False).config
    written = []
    try:
        lines = read_metrics(folder)
    except InputError:
        lines = []
    if lines:
        title = f"{config.n_latents:,} latents, L0 = {result.metrics['l0']:.1f}, d_in = {config.d_in}"
        draw_curves(lines, folder / CURVES, title)
        written.append(folder / CURVES)
    sparsity = result.accumulated.sparsity
    draw_density(sparsity.counts, sparsity.n_rows, folder / DENSITY)
    return [*written, folder / DENSITY]


def write_features(folder: Path, table: FeatureTable, title: str) -> list[Path]:
    """features.html (self-contained) and features.md. -> the files written."""
    texts = {".html": to_html(table, title), ".md": to_markdown(table, title)}
    for ending, text in texts.items():
        with replacing(folder / f"{FEATURES}{ending}") as temporary:
            # A path that is no UTF-8 is shown as well as it can be.
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    return [folder / f"{FEATURES}{ending}" for ending in texts]


def to_markdown(table: FeatureTable, title: str) -> str:
    """One table row a latent; the strongest token of each context is bold."""
    lines = [
        f"# {title}", "", table.about, "", "| latent | fires on | tokens | in context |", "|---|---|---|---|"
    ]  # fmt: skip
    for feature in table.features:
        tokens = ", ".join(f"`{_cell(t.text)}` {t.share:.0%}" for t in feature.tokens[:6])
        contexts = "<br>".join(_bold(snippet) for snippet in feature.snippets[:3])
        lines.append(f"| {feature.latent} | {feature.density:.3%} | {tokens} | {contexts} |")
    return "\n".join([*lines, ""])


def _bold(snippet: Snippet) -> str:
    words = [_cell(text) for text in snippet.texts]
    peak = words[snippet.peak]
    lead = len(peak) - len(peak.lstrip())
    words[snippet.peak] = f"{peak[:lead]}**{peak[lead:]}**"
    return "…" + "".join(words).strip() + "…"


def _cell(text: str) -> str:
    """Text that breaks neither a Markdown table nor its emphasis."""
    for sign in "\\|`*_<>":
        text = text.replace(sign, {"|": "&#124;", "<": "&lt;", ">": "&gt;", "`": "&#96;"}.get(sign, "\\" + sign))
    return text.replace("\n", " ")


class Piece(NamedTuple):
    """A token of a context on the page: the space before it, its text, and how strongly it is shaded (0 to 1)."""

    space: str
    text: str
    act: float
    shade: float
    peak: bool


def to_html(table: FeatureTable, title: str) -> str:
    """A page that needs nothing but itself: tokens are shaded by how strongly the latent fires on them."""
    # torch requires jinja2, so it is there.
    import jinja2

    # Autoescaping: tokens are other people's text.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(PAGE).render(table=table, title=title, pieces=pieces)


def pieces(snippet: Snippet, max_act: float) -> Iterator[Piece]:
    """The tokens of a context; an act of max_act has shade 1."""
    for place, (text, act) in enumerate(snippet):
        word = text.lstrip()
        shade = min(act / max_act, 1.0) if act > 0 and max_act > 0 else 0.0
        yield Piece(text[: len(text) - len(word)], word, act, shade, place == snippet.peak)


def summary(features: Sequence[Feature]) -> str:
    """One line a latent, for a terminal."""
    lines = []
    for feature in features:
        tokens = ", ".join(f"{t.text.strip()} {t.share:.0%}" for t in feature.tokens[:5])
        lines.append(f"  latent {feature.latent:>6}  {feature.density:7.3%}  {tokens}")
    return "\n".join(lines)
