"""Groups: the entries of a sparse code grouped by latent, by one stable sort that a whole step shares.

The row operations of every backend return these types, so they stand above those rooms.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """Entries grouped by latent, in the order of the batch within a latent."""

    order: Tensor
    """(n,) int32: positions in the flattened code, latent by latent. Those beyond offsets[-1] belong to none."""
    latents: Tensor
    """(U,) int32, ascending: latents that have an entry. On a GPU, where counting them would make the host wait, as
    many as there may be: -1, with an empty group, follows the last one."""
    offsets: Tensor
    """(U + 1,) int32: group r is order[offsets[r] : offsets[r + 1]]."""

    def counts(self, n_latents: int) -> Tensor:
        """(n_latents,) int32: entries of every latent."""
        counts = self.offsets.new_zeros(n_latents + 1)
        # A latent of -1 writes its count of 0 to the last place, which is cut off.
        counts[self.latents.long()] = self.offsets.diff()
        return counts[:-1]

    def over_all(self, n_latents: int) -> Tensor:
        """(n_latents + 1,) int32: offsets of every latent's group, empty ones included."""
        offsets = self.offsets.new_zeros(n_latents + 1)
        torch.cumsum(self.counts(n_latents), 0, dtype=torch.int32, out=offsets[1:])
        return offsets


class Entries(NamedTuple):
    """The n grouped entries of a code as both weight matrices' updates want them."""

    dec_row: Tensor
    """(n,) int32 row of the residual planes, taken as one (planes · B, D) matrix."""
    dec_coef: Tensor
    """(n,) -2 · act: residuals are minus half the gradient."""
    enc_row: Tensor
    """(n,) int32 token."""
    enc_coef: Tensor
    """(n,) dloss / dact."""
    grad_by_latent: Tensor
    """(L,) Σ dloss / dact of each group, 0 for latents without one: the gradient of b_enc."""


def group_entries(idx: Tensor, keep: Tensor, n_latents: int) -> Groups:
    """Groups the entries of idx (n,) int32 with keep (n,) bool by latent.

    Plain torch; the backends that `saefast.optim.dispatch.row_ops` picks have faster ones of the same name.
    """
    kept = keep.nonzero().squeeze(1)
    sorted_idx, order = idx[kept].sort(stable=True)
    latents, counts = torch.unique_consecutive(sorted_idx, return_counts=True)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Groups(kept[order].int(), latents.int(), offsets.int())
