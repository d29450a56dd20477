"""The report of a run: pictures of training and densities, and its most telling latents as HTML, Markdown, PNG."""

import html
from collections.abc import Sequence
from pathlib import Path

from saefast.analysis.evaluation import Evaluation
from saefast.analysis.feature_table import Feature, FeatureTable, Snippet
from saefast.analysis.plots import draw_curves, draw_density
from saefast.errors import InputError
from saefast.files import replacing
from saefast.models.sae import load
from saefast.training.progress import read_metrics

CURVES, DENSITY = "curves.png", "density.png"
FEATURES = "features"


def draw_run(folder: Path, result: Evaluation) -> list[Path]:
    """curves.png (where metrics.jsonl is) and density.png. -> the files written.

    Raises:
        InputError: matplotlib is not installed.
    """
    config = load(folder).config
    written = []
    try:
        lines = read_metrics(folder)
    except InputError:
        lines = []
    if lines:
        title = f"{config.n_latents:,} latents, k = {config.k}, d_in = {config.d_in}"
        draw_curves(lines, folder / CURVES, title)
        written.append(folder / CURVES)
    sparsity = result.accumulated.sparsity
    draw_density(sparsity.counts, sparsity.n_rows, folder / DENSITY, config.k)
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


_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.55 system-ui, sans-serif; color: #22272e; background: #f5f6f8; margin: 0 auto; max-width: 1080px;
  padding: 2rem 1rem; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } p.about { color: #57606a; margin: 0 0 1.6rem; }
section { background: #fff; border: 1px solid #e1e4e8; border-radius: 10px; padding: 1rem 1.2rem; margin: 0 0 1rem; }
h2 { font-size: 1.05rem; margin: 0; display: inline-block; } h2 small { color: #8b949e; font-weight: 400; }
.facts { float: right; color: #57606a; font-size: .85rem; }
.tokens { margin: .5rem 0 .6rem; } .token { display: inline-block; margin: 0 .5rem .3rem 0; padding: .05rem .5rem;
  border-radius: 999px; background: #eef2f7; font: 13px ui-monospace, monospace; } .token i { color: #8b949e;
  font-style: normal; }
.context { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; border-top: 1px solid #f0f2f4;
  padding: .25rem 0; } .context b { font-weight: 700; }
.context span { border-radius: 3px; padding: .1rem 0; }
.context em { float: right; color: #8b949e; font-style: normal; }
"""


def to_html(table: FeatureTable, title: str) -> str:
    """A page that needs nothing but itself: tokens are shaded by how strongly the latent fires on them."""
    sections = "\n".join(_section(feature) for feature in table.features)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_CSS}</style></head>\n<body>'
        f'<h1>{html.escape(title)}</h1><p class="about">{html.escape(table.about)}</p>\n{sections}\n</body></html>\n'
    )


def _section(feature: Feature) -> str:
    tokens = "".join(
        f'<span class="token" title="fires on {t.covered:.0%} of its occurrences">'
        f"{html.escape(t.text)} <i>{t.share:.0%}</i></span>"
        for t in feature.tokens
    )
    contexts = "\n".join(_context(snippet, feature.max_act) for snippet in feature.snippets)
    facts = f"fires on {feature.density:.3%} of tokens · {feature.n_fired:,} times · max {feature.max_act:.2f}"
    return (
        f"<section><h2>{html.escape(feature.title)} <small>latent {feature.latent}</small></h2>"
        f'<span class="facts">{facts}</span><div class="tokens">{tokens}</div>\n{contexts}</section>'
    )


def _context(snippet: Snippet, max_act: float) -> str:
    words = "".join(_shade(text, act, max_act, i == snippet.peak) for i, (text, act) in enumerate(snippet))
    return f'<div class="context"><em>{snippet.acts[snippet.peak]:.2f}</em>{words}</div>'


def _shade(text: str, act: float, max_act: float, peak: bool) -> str:
    word = html.escape(text)
    if act <= 0:
        return word
    lead = len(word) - len(word.lstrip())
    inner = f"<b>{word[lead:]}</b>" if peak else word[lead:]
    strength = min(act / max_act, 1.0) if max_act > 0 else 0.0
    style = f"background: rgba(255, 159, 28, {0.15 + 0.75 * strength:.2f})"
    return f'{word[:lead]}<span style="{style}" title="{act:.2f}">{inner}</span>'


def summary(features: Sequence[Feature]) -> str:
    """One line a latent, for a terminal."""
    lines = []
    for feature in features:
        tokens = ", ".join(f"{t.text.strip()} {t.share:.0%}" for t in feature.tokens[:5])
        lines.append(f"  latent {feature.latent:>6}  {feature.density:7.3%}  {tokens}")
    return "\n".join(lines)
