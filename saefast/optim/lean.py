"""The lean optimiser's row operations in plain torch (see `saefast.optim.LeanMatrix`), and what they share with Adam's.

The random bits of a rounding are those of the C++ and GPU versions: hash(key(seed, step, row) + column).
"""

from typing import TypeVar

import torch
from torch import Tensor

from saefast.optim.state import AdamStep, Job, LeanMatrix, Norm

WORD = 0xFFFFFFFF
COLUMN, ROW = 0x9E3779B9, 0x85EBCA6B
# Keeps the rounding of a normalised row apart from that of the update of the same step.
NORMALISED = 0x5851F42D


def unit(w: Tensor) -> Tensor:
    """Rows at unit norm."""
    return w / w.norm(dim=1, keepdim=True).clamp_min(torch.finfo(w.dtype).eps)


def project_out(grad: Tensor, w: Tensor) -> Tensor:
    """grad (n, D) without its part along the rows of w (n, D); in place."""
    along = (grad * w).sum(1) / w.square().sum(1).clamp_min(torch.finfo(w.dtype).tiny)
    return grad.addcmul_(along[:, None], w, value=-1)


def add_along(grad: Tensor, w: Tensor, along: Tensor | None) -> Tensor:
    """grad (n, D) plus `RowGradient.along` (n, M) times the blocks of the rows of w (n, D); in place."""
    if along is not None:
        blocks = (len(w), along.shape[1], w.shape[1] // along.shape[1])
        grad.view(blocks).addcmul_(along[:, :, None], w.view(blocks))
    return grad


Word = TypeVar("Word", int, Tensor)


def mix(x: Word) -> Word:
    """An integer hash (Wellons 2018, "lowbias32") of a 32-bit word, or of int64 tensors that hold such."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D & WORD
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & WORD
    return x ^ (x >> 16)


def random_bits(seed: int, step: int, rows: Tensor, n_columns: int, salt: int = 0) -> Tensor:
    """(n, n_columns) int64 words for rows (n,) int64 at a step."""
    when = mix(torch.tensor(seed + step * COLUMN + salt & WORD, dtype=torch.int64, device=rows.device))
    key = mix(when ^ (rows * ROW & WORD))
    return mix(key[:, None] + torch.arange(n_columns, device=rows.device) * COLUMN & WORD)


def to_bf16(w: Tensor, bits: Tensor) -> Tensor:
    """w (n, D) fp32 rounded to bfloat16, up with the probability of its distance from below; low 16 bits decide."""
    words = w.contiguous().view(torch.int32).long() & WORD
    upper = (words + (bits & 0xFFFF)) >> 16
    return torch.where(upper >= 1 << 15, upper - (1 << 16), upper).to(torch.int16).view(torch.bfloat16)


def _widths(matrix: LeanMatrix) -> tuple[int, int]:
    D, blocks = matrix.w.shape[1], matrix.scale.shape[1]
    return blocks, -(-D // blocks)


def moments(matrix: LeanMatrix, ids: Tensor) -> Tensor:
    """The first moments of rows ids (n,) -> (n, D) fp32."""
    _, width = _widths(matrix)
    scale = matrix.scale[ids].float().repeat_interleave(width, dim=1)[:, : matrix.w.shape[1]]
    return matrix.m[ids].float() * scale


def _store_moments(matrix: LeanMatrix, ids: Tensor, m: Tensor, bits: Tensor) -> None:
    (n, D), (blocks, width) = m.shape, _widths(matrix)
    padded = torch.nn.functional.pad(m, (0, blocks * width - D)).view(n, blocks, width)
    most = padded.abs().amax(2) / 127
    # Rounded up, so that no value exceeds 127 scales.
    above = ((most.contiguous().view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)
    # A block of zeros, or of values too small for a normal scale, is stored as zeros.
    normal = above.float() >= torch.finfo(torch.float32).tiny
    inverse = torch.where(normal, 1 / above.float(), 0).repeat_interleave(width, dim=1)[:, :D]
    uniform = (bits >> 16).float() * 2**-16
    matrix.m[ids] = (m * inverse + uniform).floor().clamp(-127, 127).to(torch.int8)
    matrix.scale[ids] = above


def _store_weights(matrix: LeanMatrix, ids: Tensor, w: Tensor, bits: Tensor) -> None:
    matrix.w[ids] = to_bf16(w, bits)
    if matrix.norms is not None:
        matrix.norms[ids] = w.norm(dim=1)


def _settled(matrix: LeanMatrix, step: AdamStep, ids: Tensor, until: int) -> tuple[Tensor, Tensor]:
    """Weights of rows ids with their drift up to `until`, and the decay of their first moments. Settles v in place."""
    w, since = matrix.w[ids].float(), matrix.last_step[ids].long()
    missed = (until - since).clamp_min(0)
    drift, drift_eps = (t.to(ids.device)[since].float() for t in (step.drift, step.drift_eps))
    factor = torch.where(missed > 0, drift / (matrix.v[ids].sqrt() + drift_eps), 0)
    moved = (unit(w) if step.norm == Norm.before_update else w) - factor[:, None] * moments(matrix, ids)
    moved = unit(moved) if step.norm == Norm.after_update else moved
    matrix.v[ids] *= (step.beta2 ** missed.double()).float()
    matrix.last_step[ids] = torch.maximum(since, torch.full_like(since, until)).int()
    return torch.where(missed[:, None] > 0, moved, w), (step.beta1 ** missed.double()).float()


def catch_up(matrix: LeanMatrix, step: AdamStep, rows: Tensor | None = None) -> None:
    """As `saefast.optim.reference.catch_up`. First moments keep their 8-bit values; their scales shrink."""
    ids = torch.arange(len(matrix.w), device=matrix.w.device) if rows is None else rows.long()
    ids = ids[matrix.last_step[ids] < step.step]
    w, decay = _settled(matrix, step, ids, step.step)
    matrix.scale[ids] = (matrix.scale[ids].float() * decay[:, None]).to(torch.bfloat16)
    _store_weights(matrix, ids, w, random_bits(matrix.seed, step.step, ids, w.shape[1]))


def normalise_rows(matrix: LeanMatrix, step: AdamStep, rows: Tensor | None = None) -> None:
    """As `saefast.optim.reference.normalise_rows`."""
    ids = torch.arange(len(matrix.w), device=matrix.w.device) if rows is None else rows.long()
    bits = random_bits(matrix.seed, step.step, ids, matrix.w.shape[1], NORMALISED)
    _store_weights(matrix, ids, unit(matrix.w[ids].float()), bits)


def update(job: Job, matrix: LeanMatrix, grad: Tensor) -> None:
    """One step of job.rows with gradient rows grad (n, D). Fills job.squares."""
    step = job.step
    ids = torch.arange(len(matrix.w), device=matrix.w.device) if job.rows is None else job.rows.long()
    # Rows are settled by their moments, before those are overwritten.
    m = moments(matrix, ids)
    w, decay = _settled(matrix, step, ids, step.step - 1)
    m *= decay[:, None]
    grad = add_along(grad, w, job.gradient.along)
    w = unit(w) if step.norm == Norm.before_update else w
    grad = project_out(grad, w) if step.project else grad
    torch.sum(grad.square(), dim=1, out=job.squares)
    grad = grad * step.grad_scale
    m.lerp_(grad, 1 - step.beta1)
    v = matrix.v[ids].mul_(step.beta2).add_(grad.square().mean(1), alpha=1 - step.beta2)
    correction1, correction2 = 1 - step.beta1**step.step, 1 - step.beta2**step.step
    w = w - (step.lr / correction1) * m / (v.sqrt() / correction2**0.5 + step.eps)[:, None]
    w = unit(w) if step.norm == Norm.after_update else w
    bits = random_bits(matrix.seed, step.step, ids, w.shape[1])
    _store_weights(matrix, ids, w, bits)
    _store_moments(matrix, ids, m, bits)
    matrix.v[ids] = v
    matrix.last_step[ids] = step.step
