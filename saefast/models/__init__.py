"""What an SAE is: its config, parameters and file, and how its weights begin."""

from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, SAEOutput, load

__all__ = ["SAE", "SAEConfig", "SAEOutput", "load"]
