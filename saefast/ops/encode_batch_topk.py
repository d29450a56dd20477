"""encode_batch_topk: the k · B largest positive pre-activations of a whole batch, as many a row as fall to it.

Rows are encoded by a row-wise encoder that is as exact as `encode_topk`, with room for more than k candidates. The
k·B-th largest candidate of the batch bounds the true one from below, so a row can hold more of the answer than its
candidates only if the last of them reaches that bound: those rows alone are encoded again with twice the room, until
there are none. All candidates of a row that is encoded again are among the k·B largest found so far, so together they
take memory of O(k · B) whatever the data: never B · L.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.ops import checks, reference
from saefast.ops.code import Code
from saefast.ops.encode_topk import encode_topk
from saefast.ops.mixed import encode_topk_mixed
from saefast.ops.reference import positive_keys
from saefast.ops.registered import Registered, low_precision
from saefast.ops.select_kth import select_kth
from saefast.ops.selected import gradients, remember
from saefast.typed import typed

# (x (m, D), k) -> acts (m, k) that no ReLU has clipped, idx (m, k) int32: in `encode_topk`'s order and as exact.
RowEncoder = Callable[[Tensor, int], tuple[Tensor, Tensor]]
# Candidates that a row has room for at first, in units of k.
ROOM = 4


@typed
def encode_batch_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, *, scale: Tensor | None = None, W_low: Tensor | None = None
) -> Code:
    """The exact k · B largest of ReLU(x W_encᵀ + b_enc) over the batch (BatchTopK: arXiv 2412.06410), without (B, L).

    Exact over the accumulators of `encode_topk`; ties go to the lower row, then to the lower latent, NaN ranks above
    +inf. A function of its arguments alone. Differentiable in x, W_enc and b_enc. The host waits for a GPU once, or a
    few times where rows hold many more than k entries. Autocast as for `encode_topk`; a W_low stands in its way.

    Args:
        x: (B, D) float. W_enc: (L, D), x's dtype and device. b_enc: (L,) float, or None.
        k: entries a row on average, 1 <= k <= L.
        scale: (L,) positive floats: ranks by scale · pre, returns pre. Gets no gradient.
        W_low: (L, D) bf16, the rounded copy of W_enc: chooses candidates (`mixed.encode_topk_mixed`). x is fp32 then.

    Returns:
        A CSR code of k · B entries, those of a row in the order of `encode_topk`. Where fewer are positive, the rest is
        padding. acts are fp32 (fp64 for fp64 inputs).

    Raises:
        InputError: a shape, dtype, device or k that cannot be served.
    """
    low = low_precision(x, W_enc) if W_low is None else None
    L = checks.encoder(x, W_enc, b_enc, low if W_low is None else W_enc.dtype)
    if not 1 <= k <= L:
        raise InputError(f"k is {k!r}: expected an int between 1 and n_latents = {L}")
    if k * x.shape[0] >= 2**31:
        raise InputError(f"k is {k} and x has {x.shape[0]} rows: expected a product below 2**31; encode fewer rows")
    if scale is not None:
        checks.vector("scale", scale, W_enc)
    if W_low is not None:
        checks.rounded(W_low, x, W_enc, b_enc)
    return Code(*_encode_batch_topk(x, W_enc, b_enc, k, scale, W_low, low))


def _run(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, scale: Tensor | None, W_low: Tensor | None,
    low: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> acts, idx, row_ptr."""
    if low is not None:
        x, W_enc = x.to(low), W_enc.to(low)

    def encode(rows: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        if W_low is not None and b_enc is not None:
            return encode_topk_mixed(
                rows, W_low.contiguous(), W_enc.contiguous(), b_enc, wanted, scale=scale, relu=False
            )
        return encode_topk(rows, W_enc, b_enc, wanted, scale=scale, relu=False)

    code = batch_topk(encode, x.contiguous(), k, len(W_enc), scale)
    assert code.row_ptr is not None
    return code.acts, code.idx, code.row_ptr


def _fake(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    B = x.shape[0]
    acts = x.new_empty(k * B, dtype=reference.accumulate_dtype(x.dtype))
    return acts, x.new_empty(k * B, dtype=torch.int32), x.new_empty(B + 1, dtype=torch.int32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, W_enc, b_enc = inputs[:3]
    remember(ctx, x, W_enc, b_enc, Code(*output), clip=True)


def _backward(ctx: Any, grad_acts: Tensor, *others: Any) -> tuple[Tensor | None, ...]:
    return gradients(ctx, grad_acts) + (None,) * 4


_encode_batch_topk = Registered("encode_batch_topk", _run, _fake, save=_save, backward=_backward)


def batch_topk(encode: RowEncoder, x: Tensor, k: int, n_latents: int, scale: Tensor | None = None) -> Code:
    """`encode_batch_topk` over a row-wise encoder; scale must be the one that it ranks by."""
    B, n = x.shape[0], k * x.shape[0]
    if B == 0:
        empty = torch.empty(0, dtype=torch.int32, device=x.device)
        return Code(x.new_empty(0, dtype=encode(x, k)[0].dtype), empty, empty.new_zeros(1))
    found = [_candidates(encode, x, torch.arange(B, device=x.device), min(ROOM * k, n_latents), scale)]
    while True:
        counts, may_hold_more = _share(found, n, B)
        last, room = found[-1], found[-1].acts.shape[1]
        # Here the host waits for a GPU.
        n_more = int(may_hold_more.sum()) if room < n_latents else 0
        if n_more == 0:
            return _collected(found, counts, n)
        order = may_hold_more.int().argsort(descending=True, stable=True)
        found[-1] = _Candidates(*(t[order[n_more:]] for t in last))
        found.append(_candidates(encode, x, last.rows[order[:n_more]], min(2 * room, n_latents), scale))


class _Candidates(NamedTuple):
    """Rows that were encoded with the same room."""

    rows: Tensor
    """(m,) ascending."""
    acts: Tensor
    """(m, room)."""
    idx: Tensor
    keys: Tensor
    """`positive_keys` of what ranks them: descending in a row."""


def _candidates(encode: RowEncoder, x: Tensor, rows: Tensor, room: int, scale: Tensor | None) -> _Candidates:
    acts, idx = encode(x if len(rows) == len(x) else x[rows], room)
    rank = acts if scale is None else acts * scale[idx.long()].to(acts.dtype)
    return _Candidates(rows, acts, idx, positive_keys(rank))


def _share(found: list[_Candidates], n: int, B: int) -> tuple[Tensor, Tensor]:
    """How the n largest candidates are spread over the rows, and whose share may grow with more room.

    Returns:
        (B,) how many of each row's candidates, the first ones, are among them.
        (m,) bool: of the last candidates' rows, those that may hold more of the answer than is among their candidates.
    """
    device = found[0].rows.device
    threshold = select_kth(torch.cat([c.keys.flatten() for c in found]), n)
    above, ties = torch.zeros((2, B), dtype=torch.int64, device=device).unbind()
    for c in found:
        above[c.rows] = (c.keys > threshold).sum(1)
        ties[c.rows] = ((c.keys == threshold) & (threshold > 0)).sum(1)
    # What ties with the n-th goes to the first rows.
    before = ties.cumsum(0) - ties
    left = n - above.sum()
    taken = torch.minimum((left - before).clamp_min(0), ties)
    least, rows = found[-1].keys[:, -1], found[-1].rows
    # Ties beyond a row's candidates count only where the rows up to it leave something for them.
    more_ties = (least == threshold) & (least > 0) & ((before + ties)[rows] < left)
    return above + taken, (least > threshold) | more_ties


def _collected(found: list[_Candidates], counts: Tensor, n: int) -> Code:
    """The first counts[b] candidates of every row b, in n places."""
    row_ptr = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=row_ptr[1:])
    # One place more, for what is left out: to skip it would make the host count the rest.
    acts, idx = found[0].acts.new_zeros(n + 1), found[0].idx.new_zeros(n + 1)
    for c in found:
        column = torch.arange(c.acts.shape[1], device=counts.device)
        place = torch.where(column < counts[c.rows][:, None], row_ptr[c.rows][:, None] + column, n).flatten()
        acts[place], idx[place] = c.acts.flatten(), c.idx.flatten()
    return Code(acts[:n], idx[:n], row_ptr)
