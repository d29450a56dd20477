"""saefast: sparse autoencoders with huge dictionaries, without the (batch, latents) matrix.

The public names below are imported when first used, so `import saefast` costs nothing beyond Python itself.
"""

import importlib
from typing import TYPE_CHECKING, Any

from saefast.version import __version__

if TYPE_CHECKING:
    from saefast.engines.config import TrainConfig, preset
    from saefast.formats.opening import load, save
    from saefast.integrations.accelerate import accelerate, restore
    from saefast.integrations.hooks import encode, replace
    from saefast.integrations.recorded import RecordedCodes
    from saefast.integrations.recording import record
    from saefast.integrations.steering import Steering, steer
    from saefast.models.calibration import as_jumprelu
    from saefast.models.config import SAEConfig
    from saefast.models.sae import SAE, SAEOutput
    from saefast.training.api import train
    from saefast.training.finetune import finetune
    from saefast.training.finetune_config import FinetuneConfig


__all__ = [
    "SAE",
    "FinetuneConfig",
    "RecordedCodes",
    "SAEConfig",
    "SAEOutput",
    "Steering",
    "TrainConfig",
    "__version__",
    "accelerate",
    "as_jumprelu",
    "encode",
    "finetune",
    "load",
    "preset",
    "record",
    "replace",
    "restore",
    "save",
    "steer",
    "train",
]

# Where each public name is from.
_HOME = {
    "SAE": "saefast.models",
    "SAEConfig": "saefast.models",
    "SAEOutput": "saefast.models",
    "as_jumprelu": "saefast.models",
    "load": "saefast.formats",
    "save": "saefast.formats",
    "TrainConfig": "saefast.engines",
    "preset": "saefast.engines",
    "train": "saefast.training",
    "finetune": "saefast.training",
    "encode": "saefast.integrations.hooks",
    "replace": "saefast.integrations.hooks",
    "RecordedCodes": "saefast.integrations.recorded",
    "record": "saefast.integrations.recording",
    "Steering": "saefast.integrations.steering",
    "steer": "saefast.integrations.steering",
    "FinetuneConfig": "saefast.training",
    "accelerate": "saefast.integrations.accelerate",
    "restore": "saefast.integrations.accelerate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
