"""Resampling: latents that fire on nothing begin anew at what the SAE explains worst.

Bricken et al. (2023, "Towards Monosemanticity", appendix) do so four times in a run, at inputs drawn by their loss.
Dictionary learning has always done it at the residual: K-SVD (Aharon et al. 2006) replaces an atom that no signal uses
by the signal that is represented worst. Here it happens all through a run, a few latents at a time, at residuals; or as
published (`draw.py`), where TrainConfig.resample says "inputs".
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from saefast.engines.recipe import Recipe
from saefast.models.architecture import Block

# Of a batch's tokens, the share that may give a latent its direction: many latents at once would be much alike.
MOST = 0.5


class Fresh(NamedTuple):
    """Latents and the rows that they begin anew with."""

    latents: Tensor
    """(n,) int64."""
    W_enc: Tensor
    """(n, d_in)."""
    W_dec: Tensor
    """(n, d_out)."""
    b_enc: Tensor
    """(n,)."""
    zeroed: bool = False
    """Second moments begin at 0 too, and b_enc at this and not at what the architecture says."""


def due(step: int, total_steps: int, config: Recipe) -> bool:
    """Whether latents are resampled after `step` updates. Not at the end of a run: they would have no time to learn."""
    if config.resample_steps is not None:
        return step in config.resample_steps
    every = config.resample_every
    return every > 0 and step > 0 and step % every == 0 and step <= config.resample_until * total_steps


def next_due(step: int, total_steps: int, config: Recipe) -> int | None:
    """The first number of updates above `step` after which latents are resampled; None where there is none."""
    if config.resample_steps is not None:
        return min((s for s in config.resample_steps if step < s <= total_steps), default=None)
    if config.resample_every == 0:
        return None
    found = (step // config.resample_every + 1) * config.resample_every
    return found if due(found, total_steps, config) else None


def steps_to_draw(step: int, total_steps: int, config: Recipe) -> int | None:
    """Of the step after `step` updates, if rows of its batch may be begun at: updates until that happens, its own
    included. None where they may not."""
    if config.resample != "inputs" or (then := next_due(step, total_steps, config)) is None:
        return None
    return then - step if then - step <= math.ceil(config.resample_rows / config.batch_size) else None


def fresh_in_blocks(
    blocks: tuple[Block, ...],
    residual: Tensor,
    hopeless: Tensor,
    alive: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    seed: int,
    step: int,
    x: Tensor | None = None,
) -> Fresh | None:
    """`fresh_latents` of each block of latents, from the columns of x and of the residual that are its own."""
    if len(blocks) == 1:
        return fresh_latents(residual, hopeless, alive, W_enc, W_dec, seed, step, x)
    parts = []
    for number, (own, reads, writes) in enumerate(blocks):
        rows = None if x is None else x[:, reads]
        matrices = W_enc[own], W_dec[own, writes]
        # Seeds that no other step of the run has.
        drawn = fresh_latents(
            residual[:, writes], hopeless[own], alive[own], *matrices, seed, -1 - step * len(blocks) - number, rows
        )
        if drawn is not None:
            whole = W_dec.new_zeros(len(drawn.latents), W_dec.shape[1], dtype=drawn.W_dec.dtype)
            whole[:, writes] = drawn.W_dec
            parts.append(drawn._replace(latents=drawn.latents + own.start, W_dec=whole))
    if not parts:
        return None
    latents, enc, dec, biases = (torch.cat(tensors) for tensors in zip(*(part[:4] for part in parts), strict=True))
    return Fresh(latents, enc, dec, biases)


def fresh_latents(
    residual: Tensor,
    hopeless: Tensor,
    alive: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    seed: int,
    step: int,
    x: Tensor | None = None,
) -> Fresh | None:
    """What hopeless latents begin anew with: directions of residuals, drawn with probability ∝ ‖e‖², each at most once.

    The decoder's row is e at the usual norm of a decoder's row, the encoder's is e at the usual norm of an encoder's,
    the median of those alive: a latent competes from its first token on, on equal terms. b_enc is 0. Where the target
    is not x, e lies in another space than what is encoded: the encoder's row points at the token's x from the batch's
    mean, and b_enc has it measured from there.

    Args:
        residual: (B, d_out) target - x_hat of a batch.
        hopeless, alive: (L,) bool.
        W_enc: (L, d_in). W_dec: (L, d_out).
        x: (B, d_in) what is encoded, where that is not what is reconstructed.
        seed: of the run; the draw depends on it and on the step alone, so a resumed run draws the same.

    Returns:
        None where nothing is hopeless, or nothing alive.
    """
    squares = residual.double().square().sum(1).cpu()
    ids = hopeless.nonzero().squeeze(1)
    n = min(len(ids), int(MOST * len(residual)), int((squares > 0).sum()))
    if n == 0 or not alive.any():
        return None
    # Generators take seeds below 2^64.
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    order = torch.randperm(len(ids), generator=generator, dtype=torch.int64, device="cpu")
    ids = ids[order[:n].to(ids.device)]
    tokens = torch.multinomial(squares / squares.sum(), n, generator=generator).to(residual.device)
    decoded = encoded = torch.nn.functional.normalize(residual[tokens].float(), dim=1)
    origin = torch.zeros_like(decoded[0])
    if x is not None:
        origin = x.float().mean(0)
        encoded = torch.nn.functional.normalize(x[tokens].float() - origin, dim=1)
    encoded, decoded = (at * W.norm(dim=1)[alive].float().median() for at, W in ((encoded, W_enc), (decoded, W_dec)))
    return Fresh(ids, encoded, decoded, -encoded @ origin)
