"""Calibration: an SAE whose latents compete becomes one with thresholds, calibrated on data.

TopK takes the k best of a token whatever they are, BatchTopK those of a batch. JumpReLU with thresholds that are met as
often does nearly the same and looks at each latent alone, so that a token's code depends on no other latent and no
other token. It is how other libraries store BatchTopK SAEs (SAELens, with one threshold for all latents).
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saefast import ambient
from saefast.errors import InputError
from saefast.metrics.streaming import Reconstruction
from saefast.models.architecture import Block
from saefast.models.sae import SAE, require_real
from saefast.ops.code import Code
from saefast.ops.encoder import Encoder
from saefast.typed import typed

# A threshold lies below the smallest activation that it lets pass by such a share of it, more than it loses as a
# logarithm; or half-way to the next smaller one, if that is closer.
_BELOW = 1e-5
# Rows that are measured at a time.
_ROWS = 2048


class Served(NamedTuple):
    """What an SAE makes of rows."""

    l0: float
    """Mean number of active latents."""
    fvu: float
    """Σ(target - x_hat)² / Σ(target - mean)²."""


class Calibrated(NamedTuple):
    """An SAE with activation "jumprelu", and what it does to the rows that it was calibrated on."""

    sae: SAE
    before: Served
    after: Served


@typed
@ambient.plainly(grad=False)
def as_jumprelu(sae: SAE, rows: Tensor, targets: Tensor | None = None, *, per_latent: bool = False) -> Calibrated:
    """A copy of an SAE that serves by thresholds, with which the rows have k latents on average.

    Activations in units of decoder norms (`rescale_acts_by_decoder_norm`) have these norms folded into the weights.

    Args:
        sae: one whose latents compete: topk, batchtopk or groupmax, with nested dictionaries or without.
        rows: (n, d_in) as the SAE takes them; some ten thousand tell a threshold well.
        targets: (n, d_out) what they are to be mapped to; None is the rows themselves.
        per_latent: each latent gets a threshold of its own, above which it is active on as many of the rows as it was
            chosen on; one that was never chosen has the threshold for all. False is one threshold for all latents, or
            for all of a layer in a cross-layer transcoder.

    Raises:
        InputError: the SAE has thresholds already, no row a positive activation, or rows are of another shape or not
            finite.
    """
    if sae.architecture.pointwise is not None:
        raise InputError(
            f"activation is {sae.config.activation!r}, which decides over each latent alone already: expected topk, "
            "batchtopk or groupmax"
        )
    if sae.architecture.norms(sae.W_dec[:1]).shape[1] > 1:
        raise InputError("the SAE is a crosscoder, whose latents are ranked by several norms: it is served as it is")
    targets = rows if targets is None else targets
    _check(sae, rows, targets)
    made = _folded(sae)
    encoder = Encoder(made._flatten(rows), made.W_enc, made.b_enc)
    # Buffers as they begin: a batch chooses, and not a threshold that it was given.
    chosen = sae.architecture.serve(encoder, sae.architecture.buffers())
    for block, part in zip(blocks := sae.architecture.blocks(), _parts(chosen, blocks), strict=True):
        own = encoder.of(*block[:2])
        common = _threshold_for_all(own, part)
        thresholds = _thresholds(own, part, common) if per_latent else torch.full_like(own.b_enc, common)
        made.own()["log_threshold"][block.latents] = thresholds.log()
    return Calibrated(made, served(sae, rows, targets), served(made, rows, targets))


@ambient.plainly(grad=False)
def served(sae: SAE, rows: Tensor, targets: Tensor) -> Served:
    """L0 and FVU of an SAE on rows (n, d_in) and what they are to be mapped to (n, d_out)."""
    found, active = Reconstruction(), 0
    for x, target in zip(rows.split(_ROWS), targets.split(_ROWS), strict=True):
        out = sae(x)
        found.update(target, out.x_hat)
        active += int((out.acts > 0).sum())
    return Served(active / len(rows), found.compute()["fvu"])


def _check(sae: SAE, rows: Tensor, targets: Tensor) -> None:
    for name, tensor, width in (("rows", rows, sae.config.d_in), ("targets", targets, sae.d_out)):
        require_real(name, tensor)
        if tensor.dim() != 2 or tensor.shape[1] != width or len(tensor) != len(rows) or not len(rows):
            raise InputError(
                f"{name} has shape {tuple(tensor.shape)}: expected (n, {width}) with n >= 1, alike in both"
            )
        if not tensor.isfinite().all():
            raise InputError(f"{name} holds NaN or inf: leave such rows out")


def _folded(sae: SAE) -> SAE:
    """The SAE as a JumpReLU without thresholds yet: the same pre-activations, in the units that they are served in."""
    unit = sae.config.unit_norm_decoder or sae.config.rescale_acts_by_decoder_norm
    changes: dict[str, Any] = dict(activation="jumprelu", rescale_acts_by_decoder_norm=False, hierarchical=None)
    config = dataclasses.replace(sae.config_as_is(), unit_norm_decoder=unit, **changes)
    made = SAE(config, device="meta").to_empty(device=sae.device).requires_grad_(False)
    shared = sae.state_dict()
    for name, tensor in made.state_dict().items():
        if name in shared:
            tensor.copy_(shared[name])
    if sae.config.rescale_acts_by_decoder_norm:
        units = sae._units()
        made.W_enc.mul_(units[:, None])
        made.b_enc.mul_(units)
        made.W_dec.div_(units[:, None])
    return made


def _parts(chosen: Code, blocks: tuple[Block, ...]) -> list[Code]:
    """The code of each block's own latents, counted from its first: they lie beside each other, as many of each."""
    if len(blocks) == 1:
        return [chosen]
    acts, idx = chosen.acts.chunk(len(blocks), dim=1), chosen.idx.chunk(len(blocks), dim=1)
    return [Code(a, i - block.latents.start) for a, i, block in zip(acts, idx, blocks, strict=True)]


def _threshold_for_all(encoder: Encoder, chosen: Code) -> float:
    """Above which there are as many entries as were chosen, of any latent."""
    n = int((chosen.acts > 0).sum())
    if n == 0:
        raise InputError("rows have no positive pre-activation: expected rows like those that the SAE was trained on")
    # One more than there is room for where all are taken.
    k = min(n // chosen.rows + 1, len(encoder.b_enc))
    best = encoder.batch_topk(k).acts.sort(descending=True).values
    return float(_below(best[n - 1], best[n] if n < len(best) else best.new_zeros(())))


def _below(smallest: Tensor, next_smaller: Tensor) -> Tensor:
    return torch.maximum(smallest * (1 - _BELOW), (smallest + next_smaller) / 2)


def _thresholds(encoder: Encoder, chosen: Code, common: float) -> Tensor:
    """(n_latents,) above which each latent has as many entries as were chosen of it."""
    L = len(encoder.b_enc)
    on = chosen.acts > 0
    idx, acts = chosen.idx[on].long(), chosen.acts[on]
    counts = torch.bincount(idx, minlength=L)
    least = torch.full((L,), torch.inf, dtype=acts.dtype, device=acts.device).scatter_reduce(0, idx, acts, "amin")
    # All that is as large as the least that was chosen: the threshold is among these.
    among = encoder.above(least * (1 - _BELOW))
    order = among.acts.argsort(descending=True, stable=True)
    order = order[among.idx[order].argsort(stable=True)]
    ends = torch.bincount(among.idx.long(), minlength=L).cumsum(0)
    begin = ends - torch.bincount(among.idx.long(), minlength=L)
    last = (begin + counts - 1).clamp_min(0)
    values = torch.cat([among.acts[order], acts.new_zeros(1)])
    next_smaller = torch.where(last + 1 < ends, values[last + 1], 0)
    return torch.where(counts > 0, _below(values[last], next_smaller), common).to(encoder.b_enc.dtype)
