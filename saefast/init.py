"""How an SAE's weights begin: random encoder and decoder, and the pre-bias from data."""

from typing import Literal

import torch
from torch import Tensor

Init = Literal["tied", "tied_0.1", "kaiming"]
BiasInit = Literal["zeros", "mean", "geometric_median"]


def init_weights(
    n_latents: int, d_in: int, init: Init, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """W_enc and W_dec, both (n_latents, d_in) fp32.

    "tied": unit rows, encoder = decoder (dictionary_learning). "tied_0.1": rows of norm 0.1, encoder = decoder
    (SAELens). "kaiming": encoder uniform in ±1/√d_in, decoder = its rows at unit norm (sparsify, OpenAI).
    """
    bound = d_in**-0.5  # kaiming-uniform with a = √5, which is nn.Linear's default
    W = torch.empty(n_latents, d_in).uniform_(-bound, bound, generator=generator)
    unit = W / W.norm(dim=1, keepdim=True)
    if init == "kaiming":
        return W, unit
    norm = {"tied": 1.0, "tied_0.1": 0.1}[init]
    return unit * norm, unit * norm


def init_b_dec(rows: Tensor, kind: BiasInit) -> Tensor:
    """The pre-bias (d_in,) fp32 from sample rows (n, d_in)."""
    rows = rows.float()
    if kind == "zeros":
        return rows.new_zeros(rows.shape[1])
    return rows.mean(0) if kind == "mean" else geometric_median(rows)


def geometric_median(rows: Tensor, max_iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point with the least summed distance to rows (n, d_in), by Weiszfeld's iteration. -> (d_in,)."""
    guess = rows.mean(0)
    for _ in range(max_iterations):
        weight = 1 / (rows - guess).norm(dim=1).clamp_min(1e-12)
        previous, guess = guess, (weight[:, None] * rows).sum(0) / weight.sum()
        if (guess - previous).norm() < tolerance:
            break
    return guess
