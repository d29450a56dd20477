"""One update of an SAE from one batch: fused (sparse, by hand) or autograd (dense, the readable form)."""

from saefast.engines.autograd import AutogradEngine
from saefast.engines.config import TrainConfig, preset
from saefast.engines.engine import Engine, StepStats
from saefast.engines.fused import FusedEngine

__all__ = ["AutogradEngine", "Engine", "FusedEngine", "StepStats", "TrainConfig", "preset"]
