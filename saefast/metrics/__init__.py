"""How good an SAE is: streaming float64 metrics, and a language model with an SAE spliced in."""

from saefast.metrics.language_model import lm_scores, spliced
from saefast.metrics.streaming import Metric, Reconstruction, SAEMetrics, Sparsity, density_histogram

__all__ = ["Metric", "Reconstruction", "SAEMetrics", "Sparsity", "density_histogram", "lm_scores", "spliced"]
