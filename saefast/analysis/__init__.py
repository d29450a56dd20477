"""What a trained SAE has learnt: evaluation, its most telling latents, report and plots."""

from saefast.analysis.evaluation import Evaluation, evaluate, evaluate_run
from saefast.analysis.exports import export
from saefast.analysis.report import draw_run

__all__ = ["Evaluation", "draw_run", "evaluate", "evaluate_run", "export"]
