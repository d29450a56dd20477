"""AuxK as matrix products over the dead latents, where every token takes many of the few there are.

Each of B tokens takes k of n dead latents. As a sparse code that is B · k entries, each of which gathers a row of a
matrix four times in a step: to be ranked in full precision, decoded, and summed up for both weight matrices. As a dense
block it is five products over B · n places. Same results within rounding, for one reconstruction of the batch
(no MultiTopK).
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from saefast.devices import DEVICES, find
from saefast.ops.reference import stable_topk

# Dead latents for each that a token takes, up to which a block pays where the device is not in the table.
RATIO = 16.0
# Bytes of gradient rows that a block may hold, and of everything else: the default of `ops.encode_topk`'s scratch.
BUDGET = 1 << 30
# Bytes a value takes while a row's best k are looked for: itself, its rank, and keys of 8 bytes in several states.
SELECT_BYTES = 64


class Encoder(NamedTuple):
    """What ranks and decodes latents: W_enc, W_dec (L, D), b_enc (L,), and the decoder's norms (L,) where they rank."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    norms: Tensor | None


class Code(NamedTuple):
    """The batch's own code, whose entries of dead latents the block takes over; plane is its weighted residual."""

    acts: Tensor
    """(B, K)."""
    idx: Tensor
    """(B, K) int32."""
    grad: Tensor
    """(B, K)."""
    plane: Tensor
    """(B, D)."""


class Block(NamedTuple):
    """What AuxK gives to n dead latents."""

    ids: Tensor
    """(n,) int64."""
    taken: Tensor | None
    """(B, K) bool: entries of the batch's own code that are in here."""
    for_dec: Tensor
    """(n, D) gradient rows."""
    for_enc: Tensor
    """(n, D)."""
    b_enc: Tensor
    """(n,)."""
    squares: Tensor
    """(B,) Σ (e - e_hat)² of each token."""


def pays_off(x: Tensor, k: int, n: int) -> bool:
    """Whether a block of n dead latents, k of them a token, beats the sparse code for x (B, D), and fits."""
    return x.is_cuda and n <= most(x.device) * k and 2 * n * x.shape[1] * x.element_size() <= BUDGET


@cache
def most(device: torch.device) -> float:
    """Dead latents for each that a token takes, up to which a block pays on a GPU.

    With rows of D fp32 numbers a sparse entry moves 4 · 4 · D bytes, and a place of the block takes 5 · 2 · D
    operations in fp32. With k / n entries a place they take as long at n / k = 1.6 · (operations a second) / (bytes a
    second): 18.6, 26.7, 12.7 and 12.5 on an H200, H100, A100 and B200. On a CPU gathers come out of the caches and the
    sparse code stays.
    """
    known = DEVICES.get(find(torch.cuda.get_device_name(device)) or "")
    return break_even(known.flops_fp32, known.bandwidth) if known else RATIO


def break_even(flops: float, bandwidth: float) -> float:
    """n / k at which an entry's 16 D bytes take as long as 10 D operations for each of its n / k places."""
    return (16 / bandwidth) / (10 / flops)


def auxk_block(
    x: Tensor, error: Tensor, plane: Tensor, encoder: Encoder, ids: Tensor, k: int, weight: float | Tensor, *,
    relu: bool, code: Code | None,
) -> Block:  # fmt: skip
    """AuxK's loss weight · Σ (e - e_hat)² and its gradients.

    Args:
        x: (B, D) what the encoder sees. error: (B, D) e.
        plane: (B, D) out, weight · (e - e_hat).
        weight: a number, or a 0-d tensor on x's device.
        ids: (n,) int64 ascending dead latents, of which each token takes its k best; ties go to the lower latent.
        relu: clip activations at zero.
        code: None where no dead latent can be in the batch's own code.
    """
    (B, D), n = x.shape, len(ids)
    slot = None if code is None else _slots(code.idx, ids, len(encoder.W_enc))
    for_dec, for_enc = (x.new_zeros(n, D) for _ in range(2))
    b_enc, squares = x.new_zeros(n), x.new_empty(B)
    width = max(1, min(n, BUDGET // 8 // (D * x.element_size())))
    height = max(1, BUDGET // 4 // ((n + 3 * width) * (x.element_size() + 1)))
    for rows in _parts(B, height):
        acts, chosen = _select(x[rows], encoder, ids, k, relu, width)
        left = error[rows].clone()
        for some in _parts(n, width):
            left -= acts[:, some] @ encoder.W_dec[ids[some]].to(x.dtype)
        squares[rows] = left.square().sum(1)
        plane[rows] = weight * left
        for some in _parts(n, width):
            grad = (plane[rows] @ encoder.W_dec[ids[some]].to(x.dtype).T).mul_(-2).mul_(chosen[:, some])
            for_dec[some].addmm_(acts[:, some].T, plane[rows], alpha=-2)
            if code is not None and slot is not None:
                own = _dense(slot[rows], code.acts[rows], some)
                for_dec[some].addmm_(own.T, code.plane[rows], alpha=-2)
                grad += _dense(slot[rows], code.grad[rows], some)
            for_enc[some].addmm_(grad.T, x[rows])
            b_enc[some] += grad.sum(0)
    return Block(ids, None if slot is None else slot >= 0, for_dec, for_enc, b_enc, squares)


def _select(x: Tensor, encoder: Encoder, ids: Tensor, k: int, relu: bool, width: int) -> tuple[Tensor, Tensor]:
    """Activations (rows, n) of each row's k best latents, 0 elsewhere, and which of them get a gradient."""
    n = len(ids)
    acts = x.new_empty(len(x), n)
    for some in _parts(n, width):
        torch.mm(x, encoder.W_enc[ids[some]].to(x.dtype).T, out=acts[:, some])
    acts += encoder.b_enc[ids].to(x.dtype)
    chosen = torch.ones_like(acts, dtype=torch.bool)
    if k < n:
        chosen.zero_()
        for rows in _parts(len(x), max(1, BUDGET // 4 // (SELECT_BYTES * n))):
            rank = acts[rows] if encoder.norms is None else acts[rows] * encoder.norms[ids].to(x.dtype)
            chosen[rows].scatter_(1, stable_topk(rank, k), True)
    if relu:
        # A NaN stays, so that the loss says so.
        chosen &= ~(acts <= 0)
    return acts.masked_fill_(~chosen, 0), chosen


def _slots(idx: Tensor, ids: Tensor, n_latents: int) -> Tensor:
    """(B, K) int64: the place among ids of each entry's latent, -1 where it is none of them."""
    place = torch.full((n_latents,), -1, dtype=torch.int64, device=idx.device)
    place[ids] = torch.arange(len(ids), device=idx.device)
    return place[idx.long()]


def _dense(slot: Tensor, values: Tensor, some: slice) -> Tensor:
    """Values (rows, K) at their slots as (rows, len(some)). A row's slots are distinct, so no two values meet."""
    inside = (slot >= some.start) & (slot < some.stop)
    dense = values.new_zeros(len(slot), some.stop - some.start)
    return dense.scatter_add_(1, torch.where(inside, slot - some.start, 0), torch.where(inside, values, 0))


def _parts(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))
