"""Hot latents: those that fire on so many tokens that a dense block on the matrix units may beat gathering row by row.

An entry of the sparse code costs the bytes of one row; a column of a dense block costs the arithmetic of B entries.
Latents above a share of tokens form a block A (B, H): decode gains A W_hot, gradients come from three products, and the
rest stays sparse. Same results within rounding, for the block's products run in fp32 for weights of any dtype: in bf16
they would round the largest activations of all to 8 bits.

Only where it is asked for: on an H100 it gained nothing at D = 4096, and at 768 its launches cost two of 7.5 ms
(bench/NOTES.md).
"""

from typing import NamedTuple

import torch
from torch import Tensor

REFRESH_EVERY = 100
# The block's columns come in multiples of this, the hottest latents first.
COLUMNS = 128


class Block(NamedTuple):
    """A batch's hot entries as a dense matrix."""

    ids: Tensor
    """(H,) int64 latents."""
    acts: Tensor
    """(B, H)."""
    is_hot: Tensor
    """(B, K) bool: which entries of the code are in the block."""
    slot: Tensor
    """(B, K) int64: their columns; 0 elsewhere."""


class HotLatents:
    """Which latents are hot, by a moving average of how often they fire.

    Args:
        share: the firing share above which a latent is hot.
    """

    def __init__(self, n_latents: int, share: float, device: torch.device) -> None:
        self.share = share
        self.rate = torch.zeros(n_latents, dtype=torch.float32, device=device)
        self.slot = torch.full((n_latents,), -1, dtype=torch.int32, device=device)

        self.ids = self._chosen()

    def _chosen(self) -> Tensor:
        """(H,) int64, ascending. The host waits for their number."""
        return (self.slot >= 0).nonzero().squeeze(1)

    def has(self, mask: Tensor) -> Tensor:
        """Whether a latent of mask (n_latents,) bool is hot, 0-d."""
        return ((self.slot >= 0) & mask).any()

    def after(self, counts: Tensor, n_tokens: int, step: int) -> Tensor:
        """The rates as they stand after a batch with counts (n_latents,) of entries; see `take`."""
        return self.rate.lerp(counts.to(self.rate.dtype) / n_tokens, 1 / min(step + 1, REFRESH_EVERY))

    def above(self, rate: Tensor, step: int) -> Tensor | float:
        """How many latents are to be hot after a step with these rates, 0-d; 0 where none are chosen after it."""
        return (rate > self.share).sum() if (step + 1) % REFRESH_EVERY == 0 else 0.0

    def take(self, rate: Tensor, above: int, step: int) -> None:
        """Takes over a step's `after` and `above`, and chooses anew every REFRESH_EVERY steps."""
        self.rate = rate
        if (step + 1) % REFRESH_EVERY == 0:
            order = rate.argsort(descending=True, stable=True)
            self.ids = order[: above // COLUMNS * COLUMNS].sort().values
            self.slot.fill_(-1)
            self.slot[self.ids] = torch.arange(len(self.ids), dtype=torch.int32, device=rate.device)

    def block(self, acts: Tensor, idx: Tensor) -> Block | None:
        """The hot part of a code acts, idx (B, K); None while nothing is hot."""
        ids = self.ids
        if len(ids) == 0:
            return None
        slot = self.slot[idx.long()].long()
        is_hot = slot >= 0
        slot = slot.clamp_min(0)
        # Latents of a token are distinct, so no two entries meet in a place; those that are not hot add 0.
        dense = acts.new_zeros(len(acts), len(ids)).scatter_add_(1, slot, torch.where(is_hot, acts, 0))
        return Block(ids, dense, is_hot, slot)

    def state(self) -> dict[str, Tensor]:
        return {"hot.rate": self.rate, "hot.slot": self.slot}

    def loaded(self) -> None:
        """The tensors of `state` were given other values."""
        self.ids = self._chosen()
