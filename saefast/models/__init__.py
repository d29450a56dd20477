"""What an SAE is: its config, parameters, file and first weights; one file per architecture, and a registry."""

from saefast.models.calibration import as_jumprelu
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, SAEOutput, load

__all__ = ["SAE", "SAEConfig", "SAEOutput", "as_jumprelu", "load"]
