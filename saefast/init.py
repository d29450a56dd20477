"""How an SAE's weights begin: random encoder and decoder, and the pre-bias from data."""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from saefast.sae import SAE

Init = Literal["tied", "tied_0.1", "kaiming"]
BiasInit = Literal["zeros", "mean", "geometric_median"]


# Rows made at a time, so that a huge dictionary needs no more memory to begin than to train.
_ROWS = 1 << 14


def init_weights(
    n_latents: int,
    d_in: int,
    init: Init,
    generator: torch.Generator | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """W_enc and W_dec, both (n_latents, d_in), drawn in fp32 on the CPU so that every device begins alike.

    "tied": unit rows, encoder = decoder (dictionary_learning). "tied_0.1": rows of norm 0.1, encoder = decoder
    (SAELens). "kaiming": encoder uniform in ±1/√d_in, decoder = its rows at unit norm (sparsify, OpenAI).
    """
    bound = d_in**-0.5  # kaiming-uniform with a = √5, which is nn.Linear's default
    W_enc, W_dec = (torch.empty(n_latents, d_in, dtype=dtype, device=device) for _ in range(2))
    for enc, dec in zip(W_enc.split(_ROWS), W_dec.split(_ROWS), strict=True):
        drawn = torch.empty(dec.shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
        unit = drawn / drawn.norm(dim=1, keepdim=True)
        dec.copy_(unit * 0.1 if init == "tied_0.1" else unit)
        enc.copy_(drawn if init == "kaiming" else dec)
    return W_enc, W_dec


def start_b_dec_(sae: "SAE", rows: Tensor, kind: BiasInit) -> None:
    """Sets the pre-bias from sample rows (n, d_in): 0, their mean, or their geometric median."""
    with torch.no_grad():
        if kind == "zeros":
            sae.b_dec.zero_()
        else:
            sae.b_dec.copy_(wide(rows).mean(0) if kind == "mean" else geometric_median(rows))


@torch.no_grad()
def scale_encoder_(sae: "SAE", seed: int, n_directions: int = 256) -> None:
    """Divides W_enc by the mean norm that random unit vectors come back with (OpenAI sparse_autoencoder, train.py).

    The vectors are encoded around b_dec, so set that first.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(n_directions, sae.config.d_in, generator=generator, dtype=torch.float32, device="cpu")
    directions /= directions.norm(dim=1, keepdim=True)
    recovered = sae(directions.to(sae.device, sae.dtype) + sae.b_dec).x_hat - sae.b_dec
    sae.W_enc.div_(recovered.norm(dim=1).mean())


def geometric_median(rows: Tensor, max_iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least summed distance to rows (n, d_in). -> (d_in,) fp32 (fp64 for fp64 rows).

    Weiszfeld's iteration with Vardi and Zhang's rule (2000, PNAS 97:1423) for a guess that falls on a row, where the
    plain iteration would divide by zero or stay for ever. Ends when a step is shorter than `tolerance` times the mean
    distance.
    """
    rows = wide(rows)
    guess = rows.mean(0)
    for _ in range(max_iterations):
        distance = (rows - guess).norm(dim=1)
        near = tolerance * distance.mean()
        apart = distance > near
        if not apart.any():
            break
        weight = torch.where(apart, 1 / distance, torch.zeros_like(distance))
        direction = (weight @ rows) / weight.sum() - guess
        # Rows on the guess hold it with a force of 1 each, against the pull of all others.
        pull = (weight.sum() * direction.norm()).clamp_min(torch.finfo(rows.dtype).tiny)
        step = (1 - (~apart).sum() / pull).clamp_min(0) * direction
        guess = guess + step
        if step.norm() <= near:
            break
    return guess


def wide(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()
