"""Resampling: latents that fire on nothing begin anew at what the SAE explains worst.

Bricken et al. (2023, "Towards Monosemanticity", appendix) do so four times in a run, at inputs drawn by their loss.
Dictionary learning has always done it at the residual: K-SVD (Aharon et al. 2006) replaces an atom that no signal uses
by the signal that is represented worst. Here it happens all through a run, a few latents at a time, at residuals.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saefast.engines.recipe import Recipe

# Of a batch's tokens, the share that may give a latent its direction: many latents at once would be much alike.
MOST = 0.5


class Fresh(NamedTuple):
    """Latents and the rows that they begin anew with; their b_enc is 0."""

    latents: Tensor
    """(n,) int64."""
    W_enc: Tensor
    """(n, D)."""
    W_dec: Tensor
    """(n, D)."""


def due(step: int, total_steps: int, config: Recipe) -> bool:
    """Whether latents are resampled after `step` updates. Not at the end of a run: they would have no time to learn."""
    every = config.resample_every
    return every > 0 and step > 0 and step % every == 0 and step <= config.resample_until * total_steps


def fresh_latents(
    residual: Tensor, hopeless: Tensor, alive: Tensor, W_enc: Tensor, W_dec: Tensor, seed: int, step: int
) -> Fresh | None:
    """What hopeless latents begin anew with: directions of residuals, drawn with probability ∝ ‖e‖², each at most once.

    The decoder's row is e at the usual norm of a decoder's row, the encoder's is e at the usual norm of an encoder's,
    the median of those alive: a latent competes from its first token on, on equal terms.

    Args:
        residual: (B, D) target - x_hat of a batch.
        hopeless, alive: (L,) bool.
        W_enc, W_dec: (L, D).
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
    directions = torch.nn.functional.normalize(residual[tokens].float(), dim=1)
    return Fresh(ids, *(directions * W.norm(dim=1)[alive].float().median() for W in (W_enc, W_dec)))
