"""The sparse code of a batch, and the prefixes of it that a loss reconstructs from.

Below every backend: what engines hand to the row operations (`saefast.optim`), and what `decode_loss` returns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# A number on the host, or 0-d on the device that it was worked out on: the host need not wait for it.
Number = float | Tensor


class Code(NamedTuple):
    """A sparse code of B rows: the same number of entries in each, or as many as `row_ptr` says (CSR)."""

    acts: Tensor
    """(B, K) float; (n,) where there is a row_ptr."""
    idx: Tensor
    """int32 of the same shape: the latents."""
    row_ptr: Tensor | None = None
    """(B + 1,) int32 ascending from 0: row b has the entries row_ptr[b] to row_ptr[b + 1]. Those from row_ptr[B] on are
    padding, which belongs to no row: act 0, idx 0."""
    pre: Tensor | None = None
    """The pre-activations, in the shape of acts, where acts are another function of them than ReLU."""

    @property
    def rows(self) -> int:
        return len(self.idx) if self.row_ptr is None else len(self.row_ptr) - 1

    @property
    def fullest(self) -> int:
        """Entries of the row that has the most of them."""
        if self.row_ptr is None:
            return self.idx.shape[1]
        return int(self.row_ptr.diff().max()) if self.rows else 0

    def tokens(self) -> Tensor:
        """(entries,) int64: the row of every entry; some row for padding."""
        device = self.idx.device
        if self.row_ptr is None:
            return torch.arange(self.rows, device=device).repeat_interleave(self.idx.shape[1])
        entries = torch.arange(len(self.idx), dtype=self.row_ptr.dtype, device=device)
        return torch.searchsorted(self.row_ptr[1:], entries, right=True).clamp_max(self.rows - 1)

    def columns(self) -> Tensor:
        """(entries,) int64: how many entries of its row come before each."""
        entries = torch.arange(self.idx.numel(), device=self.idx.device)
        if self.row_ptr is None:
            return entries - self.tokens() * self.idx.shape[1]
        return entries - self.row_ptr[self.tokens()]


class Prefixes(NamedTuple):
    """P nested parts of a code, each of which reconstructs the input: prefix p decodes entries of prefixes 0 to p.

    An entry belongs to the first prefix p with key < bounds[p]; the key is its place in its row (nested top-k:
    MultiTopK) or its latent (Matryoshka SAEs, arXiv 2503.17547). One that belongs to none is not decoded at all.
    """

    bounds: list[int]
    """P ascending bounds."""
    weight: list[Number]
    """dloss / dΣe² of each prefix, e being its residual."""
    by_latent: bool = False
    main: int = 0
    """The prefix whose residual is reported, which AuxK reconstructs."""

    def of(self, code: Code) -> Tensor:
        """(entries,) int64: the prefix of every entry; P for none, as for padding."""
        keys = code.idx.flatten().long() if self.by_latent else code.columns()
        found = torch.bucketize(keys, torch.tensor(self.bounds, dtype=torch.int64, device=keys.device), right=True)
        if code.row_ptr is None:
            return found
        entries = torch.arange(len(keys), device=keys.device)
        return torch.where(entries < code.row_ptr[-1], found, len(self.bounds))


class Decoded(NamedTuple):
    """What decode_loss finds. P prefixes of the code, B rows."""

    squares: Tensor
    """(P, B) Σ e² of each row, e = x - x_hat."""
    grad_acts: Tensor
    """dloss / dacts in the shape of acts, for the loss Σ_p weight[p] · Σ e[p]². 0 in padding."""


def padded(code: Code, n_latents: int, width: int = 0) -> Code:
    """The code with as many entries in every row as the fullest has, (B, K): what is added has act 0.

    A row is filled up with the lowest latents that it does not have, so that its ids stay distinct. Their pre is 0.

    Args:
        width: the least that K is to be, at most n_latents.
    """
    if code.row_ptr is None:
        return code
    counts, B = code.row_ptr.diff().long(), code.rows
    K = max(code.fullest, width)
    n = int(code.row_ptr[-1])
    token, column = code.tokens()[:n], code.columns()[:n]
    acts = code.acts.new_zeros(B, K)
    idx = code.idx.new_zeros(B, K)
    acts[token, column], idx[token, column] = code.acts[:n], code.idx[:n]
    pre = None
    if code.pre is not None:
        pre = code.pre.new_zeros(B, K)
        pre[token, column] = code.pre[:n]
    # Of the first 2 K latents a row lacks at least as many as it has places left over.
    width = min(2 * K, n_latents)
    there = torch.zeros(B, width + 1, dtype=torch.int8, device=idx.device)
    there[token, code.idx[:n].long().clamp_max(width)] = 1
    spare = there[:, :width].argsort(dim=1, stable=True)
    left = torch.arange(K, device=idx.device) - counts[:, None]
    return Code(acts, torch.where(left < 0, idx, spare.gather(1, left.clamp_min(0)).int()), pre=pre)


def to_rows(values: Tensor, row_ptr: Tensor) -> Tensor:
    """What a CSR code has for its entries, (n,), as (B, K): K of the fullest row, and 0 in what a row leaves over."""
    places = _places(row_ptr)
    return values.new_zeros(places.shape).masked_scatter(places, values)


def to_csr(values: Tensor, row_ptr: Tensor, n: int) -> Tensor:
    """`to_rows` undone: (B, K) as (n,), 0 for entries that belong to no row."""
    found = values[_places(row_ptr)]
    return torch.nn.functional.pad(found, (0, n - len(found)))


def _places(row_ptr: Tensor) -> Tensor:
    """(B, K) bool: which places of its row an entry takes. Here the host waits for a GPU."""
    counts = row_ptr.diff()
    fullest = int(counts.max()) if len(counts) else 0
    return torch.arange(fullest, dtype=counts.dtype, device=counts.device) < counts[:, None]
