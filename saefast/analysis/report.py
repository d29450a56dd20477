"""Pictures of how a run went and of how often its latents fire."""

from pathlib import Path

from saefast.analysis.evaluation import Evaluation
from saefast.analysis.plots import draw_curves, draw_density
from saefast.errors import InputError
from saefast.formats.opening import load
from saefast.training.progress import read_metrics

CURVES, DENSITY = "curves.png", "density.png"


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
