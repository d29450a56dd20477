"""One update of an SAE from one batch: fused (sparse, by hand) or autograd (dense, the readable statement)."""

from saefast.engines.autograd import AutogradStep
from saefast.engines.config import TrainConfig, preset
from saefast.engines.engine import Engine, StepStats
from saefast.engines.fused import FusedStep

__all__ = ["AutogradStep", "Engine", "FusedStep", "StepStats", "TrainConfig", "preset"]
