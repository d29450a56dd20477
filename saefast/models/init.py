"""How weights begin: random encoders and decoders, and the centre of some rows."""

from typing import Literal

import torch
from torch import Tensor

Init = Literal["rows", "active_subspace", "tied", "tied_0.1", "kaiming"]
BiasInit = Literal["zeros", "mean", "geometric_median"]


# Rows made at a time, so that a huge dictionary needs no more memory to begin than to train.
_ROWS = 1 << 14


def init_weights(
    enc_shape: tuple[int, ...],
    dec_shape: tuple[int, ...],
    init: Init,
    generator: torch.Generator | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """W_enc and W_dec of these shapes (L, width), drawn in fp32 on the CPU so that every device begins alike.

    "rows", "active_subspace": as "tied", until training has seen the first rows (`start_from_rows_` and
    `start_in_subspace_` of saefast.models.start). "tied": unit rows, encoder = decoder (dictionary_learning).
    "tied_0.1": rows of norm 0.1, encoder = decoder (SAELens). "kaiming": encoder uniform in ±1/√d_in, decoder = its
    rows at unit norm (sparsify, OpenAI). A decoder of another width than the encoder is drawn after it, by the same
    rule.
    """
    W_enc, W_dec = (torch.empty(shape, dtype=dtype, device=device) for shape in (enc_shape, dec_shape))
    for enc, dec in zip(W_enc.split(_ROWS), W_dec.split(_ROWS), strict=True):
        drawn = _drawn(enc, generator)
        unit = drawn / drawn.norm(dim=1, keepdim=True)
        enc.copy_(drawn if init == "kaiming" else unit * 0.1 if init == "tied_0.1" else unit)
        if dec.shape != enc.shape:
            drawn = _drawn(dec, generator)
            unit = drawn / drawn.norm(dim=1, keepdim=True)
        dec.copy_(unit * 0.1 if init == "tied_0.1" else unit)
    return W_enc, W_dec


def _drawn(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform in ± 1 / √width: kaiming-uniform with a = √5, which is nn.Linear's default."""
    bound = like.shape[1] ** -0.5
    return torch.empty(like.shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)


def geometric_median(rows: Tensor, max_iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least summed distance to rows (n, d_in). -> (d_in,) fp32 (fp64 for fp64 rows).

    Weiszfeld's iteration with Vardi and Zhang's rule (2000, PNAS 97:1423) for a guess that falls on a row, where the
    plain iteration would divide by zero or stay for ever. Ends when a step is shorter than `tolerance` times the mean
    distance.
    """
    rows = wide(rows)
    # About the mean: where that is far larger than the spread, steps would be lost in its rounding.
    start = rows.mean(0)
    rows, guess = rows - start, torch.zeros_like(start)
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
    return start + guess


def wide(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()
