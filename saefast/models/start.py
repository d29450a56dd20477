"""Where training starts an SAE: its pre-bias from data, and its encoder's scale."""

import torch
from torch import Tensor

from saefast.models.init import BiasInit, geometric_median, wide
from saefast.models.sae import SAE


def start_b_dec_(sae: SAE, rows: Tensor, kind: BiasInit) -> None:
    """Sets the pre-bias from sample rows (n, d_in): 0, their mean, or their geometric median."""
    with torch.no_grad():
        if kind == "zeros":
            sae.b_dec.zero_()
        else:
            sae.b_dec.copy_(wide(rows).mean(0) if kind == "mean" else geometric_median(rows))


@torch.no_grad()
def scale_encoder_(sae: SAE, seed: int, n_directions: int = 256) -> None:
    """Divides W_enc by the mean norm that random unit vectors come back with (OpenAI sparse_autoencoder, train.py).

    The vectors are encoded around b_dec, so set that first.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(n_directions, sae.config.d_in, generator=generator, dtype=torch.float32, device="cpu")
    directions /= directions.norm(dim=1, keepdim=True)
    recovered = sae(directions.to(sae.device, sae.dtype) + sae.b_dec).x_hat - sae.b_dec
    sae.W_enc.div_(recovered.norm(dim=1).mean())
