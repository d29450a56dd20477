"""The k · B largest activations of a batch of B rows, as BatchTopK wants them, by way of the k largest of each row."""

from collections.abc import Callable

import torch
from torch import Tensor

from saefast.ops.code import Code

# (k, rows) -> the k best entries (acts, idx) of these rows, or of all: values descending, ties to the lower latent.
RowEncoder = Callable[[int, Tensor | None], Code]
# Entries looked at in each row to begin with, as a multiple of k: most rows have fewer.
AT_FIRST = 2


def encode_batch_topk(encode: RowEncoder, B: int, k: int, n_latents: int, scale: Tensor | None = None) -> Code:
    """The k · B largest positive activations of a batch, CSR, with k · B places.

    Exact over what `encode` returns; ties go to the lower row, then to the lower latent; NaN ranks above +inf. Where
    fewer are positive, places are left over as padding. The k · B-th largest of each row's first few entries is a lower
    bound of the threshold. A row whose last entry is not below it may have more, and is encoded again, alone, with
    twice as many, until its last entry is below or all latents are there.

    Args:
        encode: the row-wise encoder, behind a ReLU.
        scale: (n_latents,) what activations are multiplied by where they are ranked; they stay unscaled.
    """
    width, total = min(AT_FIRST * k, n_latents), k * B
    code = encode(width, None)
    rank = _ranked(code, scale)
    found = [(torch.arange(B, device=code.idx.device), code, rank)]
    while width < n_latents:
        rows, code, rank = found[-1]
        bound = kth_largest(torch.cat([r.flatten() for _, _, r in found]), total)
        # Written so that NaN, which ranks above everything, is not below.
        wide = ~(rank[:, -1] < bound) & (rank[:, -1] != 0)
        if not wide.any():
            break
        width = min(2 * width, n_latents)
        found[-1] = (rows[~wide], Code(code.acts[~wide], code.idx[~wide]), rank[~wide])
        code = encode(width, rows[wide])
        found.append((rows[wide], code, _ranked(code, scale)))
    return _selected(found, B, total)


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of values (n,), 0-d; the smallest where there are fewer. NaN ranks above +inf."""
    return values.topk(min(k, len(values)), sorted=False).values.sort().values[0]


def _ranked(code: Code, scale: Tensor | None) -> Tensor:
    return code.acts if scale is None else code.acts * scale[code.idx.long()].to(code.acts.dtype)


def _selected(found: list[tuple[Tensor, Code, Tensor]], B: int, total: int) -> Code:
    """The `total` largest of candidates (rows, their code, its ranks), each row's entries in the order they come in."""
    token = torch.cat([rows.repeat_interleave(code.idx.shape[1]) for rows, code, _ in found])
    acts, idx = (torch.cat([getattr(code, name).flatten() for _, code, _ in found]) for name in ("acts", "idx"))
    rank = torch.cat([rank.flatten() for _, _, rank in found])
    if len(found) > 1:
        order = token.sort(stable=True).indices
        token, acts, idx, rank = (t[order] for t in (token, acts, idx, rank))
    bound = kth_largest(rank, total)
    # NaN is equal to itself here, and above all else.
    above = (rank > bound) | (rank.isnan() & ~bound.isnan())
    ties = ((rank == bound) & (rank != 0)) | (rank.isnan() & bound.isnan())
    # Entries of one value stand in the order of rows, and of latents within a row.
    chosen = above | (ties & (ties.cumsum(0) <= total - above.sum()))
    acts, idx, token = acts[chosen], idx[chosen], token[chosen]
    row_ptr = torch.zeros(B + 1, dtype=torch.int32, device=idx.device)
    row_ptr[1:] = torch.bincount(token, minlength=B).cumsum(0)
    left = total - len(idx)
    return Code(torch.cat([acts, acts.new_zeros(left)]), torch.cat([idx, idx.new_zeros(left)]), row_ptr)
