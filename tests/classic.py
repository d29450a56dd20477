"""Training as it was before the data chose how it begins: drawn weights, momentum, AuxK for the dead.

For tests of AuxK, of rows that drift and are settled, and of what steps with dead latents cost: the preset "saefast"
begins in the data, has little momentum and resamples what is dead, so that these would find little to do.
"""

from typing import Any

# Fields of TrainConfig, and with one of SAEConfig.
CLASSIC_TRAIN: dict[str, Any] = dict(
    beta1=0.9, lr_warmup_steps=0, lr_decay_share=0.2, fit_encoder=False, resample_every=0, auxk_coef=1 / 32
)
CLASSIC: dict[str, Any] = CLASSIC_TRAIN | dict(init="tied")
