"""The thresholds of an SAE that decides over each latent by one, for formats of JumpReLU SAEs."""

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.models.sae import SAE


def thresholds(sae: SAE, target: str) -> Tensor:
    """(n_latents,) in the weights' dtype: above which activations, as the SAE measures them, are on. ReLU's are 0.

    Args:
        target: whose format it is.

    Raises:
        InputError: a batchtopk whose threshold has not been set.
    """
    activation, b_enc = sae.config.activation, sae.b_enc.detach()
    if activation == "relu":
        return torch.zeros_like(b_enc)
    if activation == "batchtopk":
        threshold = sae.get_buffer("threshold")
        if threshold < 0:
            raise InputError(
                f"the SAE is a batchtopk without a threshold yet, which is what {target} would serve it by: train it "
                "to its end, or let `saefast calibrate` find one"
            )
        return torch.full_like(b_enc, float(threshold))
    return sae.own()["log_threshold"].detach().double().exp().to(b_enc.dtype)
