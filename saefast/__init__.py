"""saefast: sparse autoencoders with huge dictionaries, without the (batch, latents) matrix.

The public names below are imported when first used, so `import saefast` costs nothing beyond Python itself.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saefast.recipe import TrainConfig, preset
    from saefast.sae import SAE, SAEConfig, SAEOutput, load
    from saefast.train import train

__version__ = "0.1.0"
__all__ = ["SAE", "SAEConfig", "SAEOutput", "TrainConfig", "__version__", "load", "preset", "train"]

_HOME = {
    "SAE": "saefast.sae",
    "SAEConfig": "saefast.sae",
    "SAEOutput": "saefast.sae",
    "load": "saefast.sae",
    "TrainConfig": "saefast.recipe",
    "preset": "saefast.recipe",
    "train": "saefast.train",
}


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the module saefast.train binds it here and would hide the function of the same name.
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
