"""Every op in plain torch: the oracle for kernels, and the fallback on any device and dtype.

Written to be read, not to be fast, but never holding a (B, L) tensor: `encode_topk` merges a running top-k over
chunks of latents. Everything is differentiable by autograd, so float64 gradchecks run on these very functions.
Arguments are not validated here; `saefast.ops` does that.
"""

import torch
from torch import Tensor

Code = tuple[Tensor, Tensor]  # acts (B, K), idx (B, K) int32
Ranked = tuple[Tensor, Tensor, Tensor]  # acts, what they rank by, idx: each (B, n)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pre_activations(x: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    """x W_encᵀ + b_enc in the accumulation dtype. x (B, D), W_enc (C, D), b_enc (C,) -> (B, C)."""
    dtype = accumulate_dtype(x.dtype)
    pre = x.to(dtype) @ W_enc.to(dtype).T
    return pre if b_enc is None else pre + b_enc.to(dtype)


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    latents: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = True,
    chunk: int = 4096,
) -> Code:
    """The k largest pre-activations of every row (Gao et al. 2024, arXiv 2406.04093, eq. 2).

    Values descend, ties go to the lower index, NaN ranks above +inf. Memory is O(B · (chunk + k)).

    Args:
        x: (B, D).
        W_enc: (L, D), one latent a row.
        b_enc: (L,) or None.
        k: latents kept per row.
        latents: (n,) sorted ids; only these compete. Ids returned are still those of W_enc.
        scale: (L,) positive; ranks by scale · pre, returns pre.
        relu: clip the values at zero after selection. The indices stay k distinct latents either way.
        chunk: latents looked at in one go.

    Returns:
        acts (B, k) in the accumulation dtype and idx (B, k) int32.
    """
    B, ids = x.shape[0], torch.arange(W_enc.shape[0], device=x.device) if latents is None else latents.long()
    none = x.new_empty((B, 0), dtype=accumulate_dtype(x.dtype))
    best: Ranked = none, none, ids.new_empty((B, 0))
    for part in ids.split(chunk):
        # A slice of consecutive ids is a view; only an explicit list pays for a copy of its rows.
        rows = slice(int(part[0]), int(part[-1]) + 1) if latents is None else part
        pre = pre_activations(x, W_enc[rows], None if b_enc is None else b_enc[rows])
        rank = pre if scale is None else pre * scale[rows].to(pre.dtype)
        best = merge_topk(best, (pre, rank, part.expand(B, -1)), k)
    return (best[0].relu() if relu else best[0]), best[2].int()


def encode_tiles(
    pre: Tensor, bound: Tensor, group: int, *, scale: Tensor | None = None, count: bool = False
) -> tuple[Tensor, Tensor]:
    """What the tiles of an encoder say about each group of columns of a chunk pre (B, n) of pre-activations.

    Args:
        bound: (B,) the k-th best so far of every row, NaN for none; with `count` (n,) a threshold for every column.
        group: columns of a group; the last one may have fewer.
        scale: (n,) positive; ranks by scale · pre.

    Returns:
        (B, groups): the largest rank of each group, or how many of its values are above their threshold.
        (B, groups) bool: whether any can matter, so that the group's values are stored.
    """
    B, past = len(pre), -pre.shape[1] % group
    if count:
        on = torch.nn.functional.pad((~(pre <= bound)).int(), (0, past))
        found = on.view(B, -1, group).sum(2, dtype=torch.int32)
        return found, found > 0
    rank = pre if scale is None else pre * scale.to(pre.dtype)
    found = torch.nn.functional.pad(rank, (0, past), value=-torch.inf).view(B, -1, group).amax(2)
    return found, ~(found <= bound[:, None])


def merge_topk(best: Ranked, chunk: Ranked, k: int) -> Ranked:
    """The k best so far, and those of a chunk of later columns, become the k best of both.

    Values descend by rank, ties go to the earlier column, NaN stands first. Each is acts, what they rank by, and idx,
    all (B, n). Where acts rank by themselves, the second is the first.
    """
    acts, idx = torch.cat([best[0], chunk[0]], dim=1), torch.cat([best[2], chunk[2]], dim=1)
    rank = acts if chunk[1] is chunk[0] else torch.cat([best[1], chunk[1]], dim=1)
    # Candidates stand in ascending order of column, so a stable order gives ties to the earlier one.
    order = stable_topk(rank.detach(), min(k, rank.shape[1]))
    kept = acts.gather(1, order)
    return kept, kept if rank is acts else rank.gather(1, order), idx.gather(1, order)


def stable_topk(values: Tensor, k: int, ids: Tensor | None = None) -> Tensor:
    """Columns (B, k) of the k largest values of each row, descending, ties to the lower column, NaN first.

    Args:
        ids: (B, n) integers below 2^31, distinct in a row: ties go to the lower of these instead.
    """
    if values.dtype == torch.float64 or values.shape[1] >= 2**31:
        if ids is None:
            return values.argsort(dim=1, descending=True, stable=True)[:, :k]
        ascending = ids.argsort(dim=1)
        return ascending.gather(1, stable_topk(values.gather(1, ascending), k))
    # One int64 per value, ordered as (value, -column): all keys differ, so any top-k is the stable one.
    bits = torch.where(values.isnan(), torch.full_like(values, torch.nan), values + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    columns = torch.arange(values.shape[1], device=values.device) if ids is None else ids.long()
    return ((ordered << 32) | (0x7FFFFFFF - columns)).topk(k, dim=1).indices


def positive_keys(values: Tensor) -> Tensor:
    """Integers in the order of floats, none negative: 0 for all that are not positive, NaN above +inf.

    int32 for fp32 and int64 for fp64, so that a key says all of its value's bits.
    """
    kind = torch.int64 if values.dtype == torch.float64 else torch.int32
    # The bits of positive floats, read as an integer, are in their order.
    bits = torch.where(values > 0, values, 0).view(kind)
    return torch.where(values.isnan(), torch.iinfo(kind).max, bits)


def select_kth(keys: Tensor, k: int) -> Tensor:
    """The k-th largest of keys (n,), integers of which none is negative, 0-d; 0 where there are fewer."""
    return keys.kthvalue(len(keys) - k + 1).values if k <= len(keys) else keys.new_zeros(())


def encode_batch_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, *, scale: Tensor | None = None, chunk: int = 4096
) -> tuple[Tensor, Tensor, Tensor]:
    """The k · B largest positive pre-activations of the whole batch, as CSR (BatchTopK: arXiv 2412.06410).

    Ties go to the lower row, then to the lower latent; NaN ranks above +inf and counts as positive. Memory is
    O(B · (chunk + k)).

    Args:
        scale: (L,) positive; ranks by scale · pre, returns pre. The rest as `encode_topk`.

    Returns:
        row_ptr (B + 1,) int32, and the entries of each row as `encode_topk` orders them: idx (B · k,) int32 and acts
        (B · k,) in the accumulation dtype. Where fewer are positive, the rest is 0 and belongs to no row.
    """
    (B, L), n, dtype = (x.shape[0], W_enc.shape[0]), k * x.shape[0], accumulate_dtype(x.dtype)
    acts = rank = x.new_empty(0, dtype=dtype)
    place = torch.empty(0, dtype=torch.int64, device=x.device)
    for start in range(0, L, chunk):
        part = slice(start, min(start + chunk, L))
        pre = pre_activations(x, W_enc[part], None if b_enc is None else b_enc[part])
        by = pre if scale is None else pre * scale[part].to(dtype)
        row, column = torch.nonzero(~(by.detach() <= 0), as_tuple=True)
        place = torch.cat([place, row * L + column + start])
        acts, rank = torch.cat([acts, pre[row, column]]), torch.cat([rank, by[row, column]])
        # By place, and then stably by rank, NaN first.
        order = place.argsort()
        order = order[rank.detach()[order].argsort(descending=True, stable=True)][:n]
        place, acts, rank = place[order], acts[order], rank[order]
    row = place // L
    order = row.argsort(stable=True)
    row_ptr = torch.zeros(B + 1, dtype=torch.int32, device=x.device)
    torch.cumsum(torch.bincount(row, minlength=B), 0, dtype=torch.int32, out=row_ptr[1:])
    padding = n - len(order)
    return (
        row_ptr,
        torch.nn.functional.pad((place % L)[order].int(), (0, padding)),
        torch.nn.functional.pad(acts[order], (0, padding)),
    )


def encode_group_max(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    best: int = 1,
    scale: Tensor | None = None,
    relu: bool = True,
    chunk: int = 4096,
) -> Code:
    """The largest pre-activation of each of k groups of latents: the "groupmax" of EleutherAI's sparsify.

    Group g has the L / k consecutive latents from g · L / k on. Memory is O(B · (chunk + k · best)).

    Args:
        k: groups; a divisor of L.
        best: entries of each group, at most L / k. The rest as `encode_topk`, whose order those of a group have.

    Returns:
        acts in the accumulation dtype and idx int32, both (B, k · best), groups ascending.
    """
    width = W_enc.shape[0] // k
    found = []
    for start in range(0, k * width, width):
        group = slice(start, start + width)
        bias, by = (None if vector is None else vector[group] for vector in (b_enc, scale))
        acts, idx = encode_topk(x, W_enc[group], bias, best, scale=by, relu=relu, chunk=chunk)
        found.append((acts, idx + start))
    return torch.cat([acts for acts, _ in found], 1), torch.cat([idx for _, idx in found], 1)


def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, threshold: Tensor | float, *, chunk: int = 4096
) -> tuple[Tensor, Tensor, Tensor]:
    """All pre-activations above a threshold, as CSR: JumpReLU (arXiv 2407.14435) and BatchTopK at inference.

    Args:
        x: (B, D). W_enc: (L, D). b_enc: (L,) or None.
        threshold: one number, or (L,) with one per latent; a latent is on where pre > threshold (NaN counts as on).

    Returns:
        row_ptr (B + 1,) int64, idx (nnz,) int32 ascending within a row, acts (nnz,) in the accumulation dtype.
    """
    L = W_enc.shape[0]
    theta = torch.as_tensor(threshold, device=x.device, dtype=accumulate_dtype(x.dtype)).expand(L)
    found = []
    for start in range(0, L, chunk):
        part = slice(start, min(start + chunk, L))
        pre = pre_activations(x, W_enc[part], None if b_enc is None else b_enc[part])
        found.append(fill_csr(pre, theta[part], start))
    row, col, acts = (torch.cat(pieces) for pieces in zip(*found, strict=True))
    order = row.argsort(stable=True)
    counts = torch.bincount(row, minlength=x.shape[0])
    row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return row_ptr, col[order].int(), acts[order]


def fill_csr(pre: Tensor, threshold: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
    """A chunk's values above their threshold, row by row and by ascending latent: row, latent and value, each (nnz,).

    Args:
        pre: (B, n) pre-activations of the latents from `start` on. threshold: (n,).
    """
    row, col = torch.nonzero(~(pre.detach() <= threshold), as_tuple=True)
    return row, col + start, pre[row, col]


def spmm(acts: Tensor, idx: Tensor, W: Tensor) -> Tensor:
    """Sparse @ dense: out[b] = Σ_j acts[b, j] · W[idx[b, j]].  acts, idx (B, K), W (L, D) -> (B, D) in W's dtype."""
    dtype = accumulate_dtype(W.dtype)
    out = W.new_zeros((acts.shape[0], W.shape[1]), dtype=dtype)
    for a, i in zip(acts.to(dtype).unbind(1), idx.long().unbind(1), strict=True):
        out = out + a[:, None] * W[i].to(dtype)
    return out.to(W.dtype)


def sddmm(x: Tensor, idx: Tensor, W: Tensor) -> Tensor:
    """Sampled dot products: out[b, j] = x[b] · W[idx[b, j]].  x (B, D), idx (B, K), W (L, D) -> (B, K)."""
    dtype = accumulate_dtype(x.dtype)
    dots = [(x.to(dtype) * W[i].to(dtype)).sum(1) for i in idx.long().unbind(1)]
    return torch.stack(dots, 1) if dots else x.new_zeros((x.shape[0], 0), dtype=dtype)


def spmm_t(acts: Tensor, idx: Tensor, x: Tensor, n_latents: int) -> Tensor:
    """Transposed product: out[l] = Σ over (b, j) with idx[b, j] = l of acts[b, j] · x[b].  -> (n_latents, D).

    The dense gradient of a weight matrix. The fused engine never forms it; autograd needs it.
    """
    dtype, latents = accumulate_dtype(x.dtype), idx.long().flatten()
    # Entries sorted by latent are bags of rows of x: one pass that adds each bag in order of the batch.
    order = latents.argsort(stable=True)
    counts = torch.bincount(latents, minlength=n_latents)
    return torch.nn.functional.embedding_bag(
        order // max(idx.shape[1], 1),
        x.to(dtype),
        counts.cumsum(0) - counts,
        mode="sum",
        per_sample_weights=acts.to(dtype).flatten()[order],
    )


def sum_by_latent(acts: Tensor, idx: Tensor, n_latents: int) -> Tensor:
    """out[l] = Σ over (b, j) with idx[b, j] = l of acts[b, j]: the gradient of b_enc. -> (n_latents,)."""
    return acts.new_zeros(n_latents).index_add(0, idx.flatten().long(), acts.flatten())
