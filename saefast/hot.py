"""Hot latents: those that fire on so many tokens that a dense block on the matrix units beats gathering row by row.

An entry of the sparse code costs the bytes of one row; a column of a dense block costs the arithmetic of B entries.
With BW bytes and F operations a second the two meet at a firing share of (bytes of a weight / 2) · BW / F. Latents
above it form a block A (B, H): decode gains A W_hot, gradients come from three products, and the rest stays sparse.
Same results within rounding.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from saefast.devices import DEVICES, find
from saefast.runs import Runs

REFRESH_EVERY = 100
# The block's columns come in multiples of this, the hottest latents first.
COLUMNS = 128


def threshold(device: torch.device, dtype: torch.dtype) -> float | None:
    """The firing share above which a dense block pays for weights of a dtype, or None where it never does."""
    # A CPU has none: its gathers run from the caches, where a row costs little more than its arithmetic.
    if device.type != "cuda":
        return None
    key = find(torch.cuda.get_device_name(device))
    if key is None:
        return None
    known = DEVICES[key]
    return break_even(known.flops if dtype == torch.bfloat16 else known.flops_fp32, known.bandwidth, dtype.itemsize)


def break_even(flops: float, bandwidth: float, weight_bytes: int) -> float:
    """The firing share at which one entry's bytes take as long as one column's arithmetic."""
    return weight_bytes / 2 * bandwidth / flops


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

    @property
    def ids(self) -> Tensor:
        """(H,) int64, ascending."""
        return (self.slot >= 0).nonzero().squeeze(1)

    def has(self, ids: Tensor) -> bool:
        """Whether one of ids (n,) is hot."""
        return bool((self.slot[ids] >= 0).any())

    def count(self, runs: Runs, n_tokens: int, step: int) -> None:
        """Takes note of the runs of a batch's code, and picks anew every REFRESH_EVERY steps."""
        fired = torch.zeros_like(self.rate)
        fired[runs.latents.long()] = (runs.offsets[1:] - runs.offsets[:-1]).to(fired.dtype)
        self.rate.lerp_(fired / n_tokens, 1 / min(step + 1, REFRESH_EVERY))
        if (step + 1) % REFRESH_EVERY == 0:
            self._pick()

    def _pick(self) -> None:
        above = int((self.rate > self.share).sum())
        order = self.rate.argsort(descending=True, stable=True)
        ids = order[: above // COLUMNS * COLUMNS].sort().values
        self.slot.fill_(-1)
        self.slot[ids] = torch.arange(len(ids), dtype=torch.int32, device=ids.device)

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
