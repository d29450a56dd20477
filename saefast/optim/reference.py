"""The row operations of a training step in plain torch.

`saefast.optim.dispatch` picks between this module and those with the same functions: `native` (C++ on a CPU) and
`triton` (kernels on a GPU). Arguments are not validated here: `engines.fused` is the only caller, and builds them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from saefast.ops.groups import Decoded, Entries, Groups, Number, group_entries
from saefast.ops.reference import accumulate_dtype
from saefast.optim import lean as rows_lean
from saefast.optim.state import AdamStep, AnyMatrix, Job, LeanMatrix, Matrix, Norm, RowGradient

__all__ = [
    "Decoded",
    "batch_sums",
    "catch_up",
    "decode_loss",
    "fill_entries",
    "gradient_squares",
    "group_entries",
    "normalise_rows",
    "update_rows",
    "weighted_row_sum",
]

# Entries whose source rows are gathered in one go, times the width: bounds this module's own temporaries.
GATHER = 1 << 24


def fill_entries(
    runs: Groups, acts: Tensor, grad: Tensor, columns: list[int], bounds: list[int], n_tokens: int, n_latents: int
) -> Entries:
    """Weighs the entries of a code made of parts, each (n_tokens, columns), flattened one after the other.

    Part 0's column j hears the first residual plane p with j < bounds[p]; a further part the plane after those.

    Args:
        acts, grad: (entries,) activations and dloss / dact.
    """
    order, planes, tokens = runs.order.long(), [], []
    for part, width in enumerate(columns):
        column = torch.arange(width, device=acts.device)
        heard = torch.bucketize(column, torch.tensor(bounds, dtype=torch.int64, device=acts.device), right=True)
        planes.append((heard if part == 0 else torch.full_like(column, len(bounds) - 1 + part)).repeat(n_tokens))
        tokens.append(torch.arange(n_tokens, device=acts.device).repeat_interleave(width))
    token, grouped = torch.cat(tokens)[order], grad[order]
    run = torch.repeat_interleave(runs.latents.long(), (runs.offsets[1:] - runs.offsets[:-1]).long())
    return Entries(
        (torch.cat(planes)[order] * n_tokens + token).int(),
        -2 * acts[order],
        token.int(),
        grouped,
        acts.new_zeros(n_latents).index_add_(0, run, grouped),
    )


def batch_sums(x: Tensor) -> tuple[float, float]:
    """Σ over all elements of (x - column mean)², and of x², added in float64. x (B, D)."""
    wide = x.double()
    return float((wide - wide.mean(0)).square().sum()), float(wide.square().sum())


def weighted_row_sum(W: Tensor, rows: Tensor | None = None, coef: Tensor | None = None) -> Tensor:
    """Σ coef[i] · W[rows[i]] -> (D,); all rows where `rows` is None, weight 1 where `coef` is."""
    dtype = accumulate_dtype(W.dtype)
    out = W.new_zeros(W.shape[1], dtype=dtype)
    ids = torch.arange(len(W), device=W.device) if rows is None else rows.long()
    weights = torch.ones(len(ids), dtype=dtype, device=W.device) if coef is None else coef
    for part, weight in _chunks(W.shape[1], ids, weights):
        out += weight @ W[part].to(dtype)
    return out


def decode_loss(
    x: Tensor,
    acts: Tensor,
    idx: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    weight: list[Number],
    bounds: list[int],
    residual: Tensor,
    *,
    by_latent: bool = False,
    relu: bool = True,
    error: Tensor | None = None,
) -> Decoded:
    """Decode, residual, sums of squares and the gradient to the activations in one pass.

    Entry j of a token belongs to the first prefix p with key < bounds[p], the key being j (nested top-k, MultiTopK) or
    with `by_latent` the latent (Matryoshka, arXiv 2503.17547). Prefix p decodes the entries of prefixes 0 .. p.

    Args:
        x: (B, D). acts, idx: (B, K). W_dec: (L, D). b_dec: (D,) or None.
        weight: P weights, dloss / dΣe² of each prefix.
        bounds: P ascending bounds.
        residual: (P, B, D) -> Σ over p' >= p of weight[p'] · e[p'], which is -1/2 dloss / dx_hat of an entry in p.
        relu: acts went through ReLU, so no gradient where they are not positive.
        error: (B, D) -> e of the first prefix.
    """
    key = idx if by_latent else torch.arange(idx.shape[1], device=idx.device).expand_as(idx).contiguous()
    prefix = torch.bucketize(key, torch.tensor(bounds, dtype=torch.int64, device=idx.device), right=True)
    x_hat = torch.zeros_like(x) if b_dec is None else b_dec.expand_as(x).clone()
    squares = []
    for p, w in enumerate(weight):
        for j in range(idx.shape[1]):
            x_hat += torch.where(prefix[:, j] == p, acts[:, j], 0)[:, None] * W_dec[idx[:, j].long()].to(x.dtype)
        e = x - x_hat
        squares.append(e.square().sum(1))
        residual[p] = w * e
        if p == 0 and error is not None:
            error.copy_(e)
    for p in reversed(range(len(weight) - 1)):
        residual[p] += residual[p + 1]
    tokens = torch.arange(len(x), device=x.device)
    on = (prefix < len(bounds)) & ((acts > 0) | (not relu))
    plane = prefix.clamp(max=len(bounds) - 1)
    dots = [(residual[plane[:, j], tokens] * W_dec[idx[:, j].long()].to(x.dtype)).sum(1) for j in range(idx.shape[1])]
    return Decoded(torch.stack(squares), torch.where(on, -2 * torch.stack(dots, 1), 0))


def gradient_rows(gradient: RowGradient) -> Tensor:
    """The gradient rows themselves, (rows, D); only this plain backend ever holds them."""
    counts = (gradient.offsets[1:] - gradient.offsets[:-1]).long()
    run = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    out = gradient.source.new_zeros(len(counts), gradient.source.shape[1])
    for part, row, coef in _chunks(out.shape[1], run, gradient.row.long(), gradient.coef):
        out.index_add_(0, part, coef[:, None] * gradient.source[row])
    return out


def _chunks(width: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    yield from zip(*(t.split(max(GATHER // width, 1)) for t in tensors), strict=True)


def catch_up(matrix: AnyMatrix, step: AdamStep, rows: Tensor | None = None) -> None:
    """Brings rows (n,) (None: all) to step.step as if their gradient had been 0 since last_step.

    Rows that stand there already are not touched. With Norm.before_update a row that slept is scaled to unit norm
    before its drift, with Norm.after_update after it.
    """
    if isinstance(matrix, LeanMatrix):
        return rows_lean.catch_up(matrix, step, rows)
    since = matrix.last_step if rows is None else matrix.last_step[rows.long()]
    late = (since < step.step).nonzero().squeeze(1)
    ids = late if rows is None else rows.long()[late]
    if len(ids) == 0:
        return None
    since = since[late].long()
    dtype = accumulate_dtype(matrix.w.dtype)
    w, m, v = matrix.w[ids], matrix.m[ids], matrix.v[ids]
    drift, drift_eps = (t.to(since.device)[since].to(dtype)[:, None] for t in (step.drift, step.drift_eps))
    slept = (step.step - since).double()[:, None]
    if step.norm == Norm.before_update:
        w = rows_lean.unit(w)
    w = w - drift * m / (v.sqrt() + drift_eps)
    if step.norm == Norm.after_update:
        w = rows_lean.unit(w)
    matrix.w[ids] = w
    matrix.m[ids] = m * (step.beta1**slept).to(dtype)
    matrix.v[ids] = v * (step.beta2**slept).to(dtype)
    matrix.last_step[ids] = step.step
    return _copies(matrix, ids)


def normalise_rows(matrix: AnyMatrix, step: AdamStep, rows: Tensor | None = None) -> None:
    """Scales rows (n,) (None: all) to unit norm. `step` says when, which only stochastic rounding asks."""
    if isinstance(matrix, LeanMatrix):
        return rows_lean.normalise_rows(matrix, step, rows)
    ids = torch.arange(len(matrix.w), device=matrix.w.device) if rows is None else rows.long()
    matrix.w[ids] = rows_lean.unit(matrix.w[ids])
    return _copies(matrix, ids)


def _copies(matrix: Matrix, ids: Tensor) -> None:
    if matrix.shadow is not None:
        matrix.shadow[ids] = matrix.w[ids].to(torch.bfloat16)
    if matrix.norms is not None:
        matrix.norms[ids] = matrix.w[ids].norm(dim=1)


def _projected(job: Job, grad: Tensor) -> Tensor:
    """The job's gradient rows (n, D), without their part along the weights' rows where the step asks for that."""
    if not job.step.project:
        return grad
    w = job.matrix.w if job.rows is None else job.matrix.w[job.rows.long()]
    return rows_lean.project_out(grad, w.to(grad.dtype))


def gradient_squares(job: Job) -> None:
    """Fills job.squares and nothing else: the first pass of clipping by the global norm."""
    squares_of(job, gradient_rows(job.gradient))


def squares_of(job: Job, grad: Tensor) -> None:
    """gradient_squares with the gradient rows (n, D) given."""
    torch.sum(_projected(job, grad).square(), dim=1, out=job.squares)


def update_rows(jobs: list[Job]) -> None:
    """One step for the rows of every job, each caught up to the step before first. Fills job.squares."""
    for job in jobs:
        update_by(job, gradient_rows(job.gradient))


def update_by(job: Job, grad: Tensor) -> None:
    """A job of update_rows with the gradient rows (n, D) given, which it may overwrite."""
    if isinstance(job.matrix, LeanMatrix):
        rows_lean.update(job, job.matrix, grad)
    else:
        _adam(job, job.matrix, grad)


def _adam(job: Job, matrix: Matrix, grad: Tensor) -> None:
    step = job.step
    catch_up(matrix, step._replace(step=step.step - 1), job.rows)
    ids = torch.arange(len(matrix.w), device=matrix.w.device) if job.rows is None else job.rows.long()
    if step.norm == Norm.before_update:
        matrix.w[ids] = rows_lean.unit(matrix.w[ids])
    grad = _projected(job, grad)
    torch.sum(grad.square(), dim=1, out=job.squares)
    grad *= step.grad_scale
    w, m, v = matrix.w[ids], matrix.m[ids], matrix.v[ids]
    m.lerp_(grad, 1 - step.beta1)
    v.mul_(step.beta2).addcmul_(grad, grad, value=1 - step.beta2)
    correction1, correction2 = 1 - step.beta1**step.step, 1 - step.beta2**step.step
    w.addcdiv_(m, (v.sqrt() / correction2**0.5).add_(step.eps), value=-step.lr / correction1)
    matrix.w[ids] = rows_lean.unit(w) if step.norm == Norm.after_update else w
    matrix.m[ids], matrix.v[ids] = m, v
    matrix.last_step[ids] = step.step
    _copies(matrix, ids)
