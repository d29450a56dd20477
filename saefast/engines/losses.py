"""What a training step minimises, as weights of sums of squares: stated once, used by every engine.

    loss = Σ over terms of weight · Σe_p² + auxk_coef · auxk_weight · Σ(e_hat - e)²

with e_p = target - what prefix p of the code decodes to (the terms are the architecture's), e the main prefix's, and
e_hat the dead latents' reconstruction of e. The weights are constants of a step: no gradient goes through them.
"""

import torch
from torch import Tensor

from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.models.architecture import Terms
from saefast.ops.code import Number
from saefast.ops.reference import accumulate_dtype


def sum_squares(x: Tensor) -> Tensor:
    """Σx² as a 0-d tensor in the accumulation dtype."""
    return x.to(accumulate_dtype(x.dtype)).square().sum()


def total_variance(x: Tensor) -> Tensor:
    """Σ over rows and columns of (x - mean over rows)², 0-d: the denominator of the FVU. x (B, D)."""
    x = x.to(accumulate_dtype(x.dtype))
    return sum_squares(x - x.mean(0))


def inverse_variance(rows: Tensor) -> float:
    """1 / mean of (rows - column means)²: OpenAI's mse_scale, fixed at the start of a run. rows (n, D).

    Raises:
        InputError: the rows do not differ.
    """
    variance = float(total_variance(rows))
    if not variance > 0:
        raise InputError(
            f"the first {len(rows)} rows are all equal, and loss 'scaled_mse' divides by their variance: shuffle the "
            "data, or use loss='sum'"
        )
    return rows.numel() / variance


def reconstruction_weight(shape: torch.Size, variance: Number, config: TrainConfig, mse_scale: float = 1.0) -> Number:
    """What multiplies Σe² in the loss.

    "fvu": 1 / Σ(target - mean)² (sparsify). "sum": 1 / B (dictionary_learning, SAELens). "scaled_mse":
    mse_scale / (B · D), the mean squared error over the variance of the first rows seen (OpenAI).

    Args:
        shape: (B, D) of the target.
        variance: its `total_variance`.
        mse_scale: `inverse_variance` of the run's first rows; only "scaled_mse" reads it.
    """
    if config.loss == "fvu":
        return 1 / variance
    return 1 / shape[0] if config.loss == "sum" else mse_scale / shape.numel()


def term_weights(
    terms: Terms, shape: torch.Size, variance: Number, config: TrainConfig, mse_scale: float = 1.0
) -> list[Number]:
    """What multiplies Σe_p² of each of the architecture's terms. Arguments as `reconstruction_weight`."""
    loss = reconstruction_weight(shape, variance, config, mse_scale)
    return [term.weight * loss if term.unit == "loss" else term.weight / variance for term in terms.prefixes]


def auxk_wanted(d_in: int, config: TrainConfig) -> int:
    """Dead latents that reconstruct each token's residual where there are enough: d_in // 2 (Gao et al. 2024, B.1)."""
    return config.auxk_k if config.auxk_k is not None else max(d_in // 2, 1)


def auxk_weight(shape: torch.Size, n_dead: int, variance: Number, unexplained: Number, config: TrainConfig) -> Number:
    """What multiplies Σ(e_hat - e)², before auxk_coef.

    One over: Σ(e - mean e)² ("residual": OpenAI, dictionary_learning; 0 where that is 0), Σ(target - mean)² ("inputs":
    sparsify) or B ("none": SAELens); times min(n_dead / auxk_k, 1) where auxk_scale_few_dead (sparsify, SAELens).

    Args:
        shape: (B, D) of the residual e.
        n_dead: how many latents are dead.
        variance: `total_variance` of the target.
        unexplained: `total_variance` of e; only "residual" reads it.
    """
    few = min(n_dead / auxk_wanted(shape[1], config), 1.0) if config.auxk_scale_few_dead else 1.0
    if config.auxk_denominator == "none":
        return few / shape[0]
    if config.auxk_denominator == "inputs":
        return few / variance
    if isinstance(unexplained, Tensor):
        return torch.where(unexplained > 0, few / unexplained, torch.zeros_like(unexplained))
    return few / unexplained if unexplained > 0 else 0.0


def auxk_runs(n_dead: int, config: TrainConfig) -> bool:
    """Whether the AuxK loss has a value or a gradient in this step.

    With no dead latent e_hat is 0 and nothing depends on a weight, except in OpenAI's form: there b_dec stands on
    both sides, with gradient on one, so the loss goes on moving b_dec (at the cost of one sum over the residual).
    """
    return config.auxk_coef > 0 and (n_dead > 0 or config.auxk_b_dec_grad)
