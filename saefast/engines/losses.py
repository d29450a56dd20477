"""The losses of a training step, as small functions: what to measure, and the one number that weighs it.

Every loss is a weight times a sum of squares over the batch. The weights are constants of a step (no gradient goes
through them), so an engine that works without autograd uses the same functions:

    loss = reconstruction_weight · Σe²
         + auxk_coef · auxk_weight · Σ(e_hat - e)²
         + multi_topk_coef · Σe_4k² / Σ(x - mean)²

with e = x - x_hat, e_hat the dead latents' reconstruction of e, and e_4k the residual with 4k latents.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.models.sae import SAE
from saefast.ops import autograd
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


def reconstruction_weight(
    shape: torch.Size, variance: Tensor, config: TrainConfig, mse_scale: float = 1.0
) -> Tensor | float:
    """What multiplies Σe² in the loss.

    "fvu": 1 / Σ(x - mean)² (sparsify). "sum": 1 / B (dictionary_learning, SAELens). "scaled_mse": mse_scale / (B · D),
    the mean squared error over the variance of the first rows seen (OpenAI).

    Args:
        shape: (B, D) of the batch.
        variance: its `total_variance`.
        mse_scale: `inverse_variance` of the run's first rows; only "scaled_mse" reads it.
    """
    if config.loss == "fvu":
        return 1 / variance
    return 1 / shape[0] if config.loss == "sum" else mse_scale / shape.numel()


def auxk_wanted(d_in: int, config: TrainConfig) -> int:
    """Dead latents that reconstruct each token's residual where there are enough: d_in // 2 (Gao et al. 2024, B.1)."""
    return config.auxk_k if config.auxk_k is not None else max(d_in // 2, 1)


def auxk_weight(residual: Tensor, variance: Tensor, n_dead: int, config: TrainConfig) -> Tensor | float:
    """What multiplies Σ(e_hat - e)², before auxk_coef.

    One over: Σ(e - mean e)² ("residual": OpenAI, dictionary_learning; 0 where that is 0), Σ(x - mean x)² ("inputs":
    sparsify) or B ("none": SAELens); times min(n_dead / auxk_k, 1) where auxk_scale_few_dead (sparsify, SAELens).

    Args:
        residual: (B, D) e = x - x_hat, detached.
        variance: `total_variance` of the batch x.
        n_dead: how many latents are dead.
    """
    n_rows, d_in = residual.shape
    scale = min(n_dead / auxk_wanted(d_in, config), 1.0) if config.auxk_scale_few_dead else 1.0
    if config.auxk_denominator == "none":
        return scale / n_rows
    if config.auxk_denominator == "inputs":
        return scale / variance
    unexplained = total_variance(residual)
    return torch.where(unexplained > 0, scale / unexplained, torch.zeros_like(unexplained))


def auxk_runs(n_dead: int, config: TrainConfig) -> bool:
    """Whether the AuxK loss says anything in this step.

    With no dead latent e_hat is 0 and nothing depends on a weight, except in OpenAI's form: there b_dec stands on
    both sides, with gradient on one, so the loss goes on moving b_dec (at the cost of one sum over the residual).
    """
    return config.auxk_coef > 0 and (n_dead > 0 or config.auxk_b_dec_grad)


class DeadLatents:
    """How long ago each latent fired, in tokens or in steps, and so which are dead.

    A counter starts at `dead_start`, grows by the batch's tokens (or by 1), goes back to 0 when its latent fires, and
    at `dead_after` the latent is dead. What counts as firing: `TrainConfig.fired_above`.

    Attributes:
        since: (n_latents,) int64 counters.
    """

    def __init__(self, n_latents: int, config: TrainConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.since = torch.full((n_latents,), config.dead_start, dtype=torch.int64, device=device)

    def after(self, acts: Tensor, idx: Tensor) -> Tensor:
        """The counters as they stand after a batch's code (B, k); assign them to `since` once the step is sure."""
        n_latents, above = len(self.since), self.config.fired_above
        fired = idx if above is None else torch.where(acts > above, idx, n_latents)
        # One place more, for what did not fire: to leave it out would make the host count the rest.
        hit = self.since.new_zeros(n_latents + 1, dtype=torch.bool)
        return self.unless(hit.index_fill_(0, fired.flatten().long(), True)[:-1], acts.shape[0])

    def unless(self, fired: Tensor, n_rows: int) -> Tensor:
        """The counters after a batch of n_rows in which the latents of fired (n_latents,) bool fired."""
        since = self.since + (n_rows if self.config.dead_unit == "tokens" else 1)
        return since.masked_fill_(fired, 0)

    def mask(self, since: Tensor) -> Tensor:
        """(n_latents,) bool: which latents these counters call dead."""
        return since >= self.config.dead_after

    def ids(self, since: Tensor) -> Tensor:
        """(n_dead,) ascending int64 ids of the latents that these counters call dead."""
        return self.mask(since).nonzero().squeeze(1)

    def share(self) -> Tensor:
        """Dead latents over all latents, 0-d."""
        return self.mask(self.since).float().mean()


class Losses(NamedTuple):
    """The loss with its autograd graph, and what the counters and the log need."""

    total: Tensor
    auxk: Tensor | float
    """Without its coefficient; 0 where AuxK did not run."""
    fvu: Tensor
    """Σe² / Σ(x - mean)², detached."""
    acts: Tensor
    """(B, k), detached."""
    since: Tensor
    """(n_latents,) the dead-latent counters after this batch."""


def total_loss(sae: SAE, x: Tensor, dead: DeadLatents, config: TrainConfig, mse_scale: float = 1.0) -> Losses:
    """The whole loss of a batch x (B, d_in), differentiable in the SAE's four parameters. `dead` is only read."""
    variance = total_variance(x)
    centred = x - sae.b_dec if sae.config.apply_b_dec_to_input else x
    wide_acts, wide_idx = _encode(sae, centred, config)
    acts, idx = wide_acts[:, : sae.config.k], wide_idx[:, : sae.config.k].contiguous()

    e = x - _decode(sae, acts, idx)
    squares = sum_squares(e)
    total = reconstruction_weight(x.shape, variance, config, mse_scale) * squares

    # sparsify reports MultiTopK's indices as those of the top k, and its counters believe it.
    fired = (wide_acts, wide_idx) if config.reproduce_bugs else (acts, idx)
    since = dead.after(fired[0].detach(), fired[1])
    auxk: Tensor | float = 0.0
    if config.auxk_coef:
        dead_ids = dead.ids(since if config.dead_update_first else dead.since)
        auxk = auxk_loss(sae, centred, e.detach(), variance, dead_ids, config)
        total = total + config.auxk_coef * auxk
    if config.multi_topk_coef:
        heard = wide_acts.detach() if config.reproduce_bugs else wide_acts
        total = total + config.multi_topk_coef * sum_squares(x - _decode(sae, heard, wide_idx)) / variance
    auxk = auxk.detach() if isinstance(auxk, Tensor) else auxk
    return Losses(total, auxk, squares.detach() / variance, acts.detach(), since)


def auxk_loss(
    sae: SAE, centred: Tensor, residual: Tensor, variance: Tensor, dead_ids: Tensor, config: TrainConfig
) -> Tensor | float:
    """AuxK: the top dead latents of each token reconstruct the residual (Gao et al. 2024, arXiv 2406.04093, A.2).

    Args:
        centred: (B, D) what the encoder sees of the batch.
        residual: (B, D) x - x_hat, detached.
        variance: `total_variance` of the batch.
        dead_ids: (n_dead,) ascending int64; only their rows of W_enc are read.

    Returns:
        A 0-d tensor, or 0.0 where the loss does not run.
    """
    n_dead = len(dead_ids)
    if not auxk_runs(n_dead, config):
        return 0.0
    e_hat = torch.zeros_like(residual)
    if n_dead:
        k = min(auxk_wanted(residual.shape[1], config), n_dead)
        acts, idx = autograd.encode_topk(
            centred, sae.W_enc, sae.b_enc, k, latents=dead_ids, scale=_ranking(sae), relu=config.auxk_relu
        )
        e_hat = autograd.decode(acts.detach() if config.reproduce_bugs else acts, idx, sae.W_dec)
    if config.auxk_b_dec_grad:
        # Worth 0, with gradient: b_dec is on both sides of OpenAI's AuxK, detached in the target.
        e_hat = e_hat + (sae.b_dec - sae.b_dec.detach())
    return auxk_weight(residual, variance, n_dead, config) * sum_squares(e_hat - residual)


def _encode(sae: SAE, centred: Tensor, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """The top k, or the top 4k where MultiTopK wants them: columns come best first, so one selection serves both."""
    k = sae.config.k
    if config.multi_topk_coef:
        k = min(4 * k, sae.config.n_latents)
    return autograd.encode_topk(
        centred, sae.W_enc, sae.b_enc, k, scale=_ranking(sae), clip_grad=not config.reproduce_bugs
    )


def _ranking(sae: SAE) -> Tensor | None:
    """Decoder norms where activations are measured in them (SAELens).

    They matter to the ranking alone: an activation pre · ‖w‖ decodes as (pre · ‖w‖) · w / ‖w‖, so the norm cancels in
    the reconstruction and in its derivative, and training works on pre.
    """
    return sae.decoder_norms().detach() if sae.config.rescale_acts_by_decoder_norm else None


def _decode(sae: SAE, acts: Tensor, idx: Tensor) -> Tensor:
    return autograd.decode(acts, idx, sae.W_dec) + sae.b_dec
