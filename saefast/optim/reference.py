"""The row operations of a training step in plain torch.

`saefast.optim.dispatch` picks between this module and those with the same functions: `native` (C++ on a CPU) and
`triton` (kernels on a GPU). Arguments are not validated here: `engines.fused` is the only caller, and builds them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from saefast.ops.code import Code, Decoded, Prefixes
from saefast.ops.groups import Entries, Groups, group_entries
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


def fill_entries(groups: Groups, parts: list[tuple[Code, Tensor]], prefixes: Prefixes, n_latents: int) -> Entries:
    """Weighs the grouped entries of a step for the updates of both weight matrices.

    An entry of part 0 takes its gradient from the residual plane of its prefix; one that belongs to no prefix is not
    decoded, so its weight there is 0. A further part takes it from the plane after those of the parts before.

    Args:
        groups: of the parts' entries, flattened one part after the other.
        parts: each a code of the same rows and its dloss / dacts. Those after the first have K entries a row.
    """
    order, P = groups.order.long(), len(prefixes.bounds)
    prefix = prefixes.of(parts[0][0])
    planes = [prefix.clamp_max(P - 1)]
    planes += [torch.full_like(code.idx.flatten(), P + i).long() for i, (code, _) in enumerate(parts[1:])]
    coefs = [
        torch.where(prefix < P, -2 * parts[0][0].acts.flatten(), 0),
        *(-2 * c.acts.flatten() for c, _ in parts[1:]),
    ]
    token = torch.cat([code.tokens() for code, _ in parts])[order]
    grad = torch.cat([grad.flatten() for _, grad in parts])[order]
    latent = torch.repeat_interleave(groups.latents.long(), groups.offsets.diff().long())
    return Entries(
        (torch.cat(planes)[order] * parts[0][0].rows + token).int(),
        torch.cat(coefs)[order],
        token.int(),
        grad,
        grad.new_zeros(n_latents).index_add_(0, latent, grad),
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
    code: Code,
    W_dec: Tensor,
    b_dec: Tensor | None,
    prefixes: Prefixes,
    residual: Tensor,
    *,
    relu: bool = True,
    error: Tensor | None = None,
) -> Decoded:
    """Decode, residual, sums of squares and the gradient to the activations in one pass.

    Args:
        x: (B, D).
        code: of x's rows.
        W_dec: (L, D). b_dec: (D,) or None.
        prefixes: P of them.
        residual: (P, B, D) -> Σ over p' >= p of weight[p'] · e[p'], which is -1/2 dloss / dx_hat of an entry in p.
        relu: acts went through ReLU, so no gradient where they are not positive.
        error: (B, D) -> e of prefix `prefixes.main`.
    """
    P, token, prefix = len(prefixes.bounds), code.tokens(), prefixes.of(code)
    acts, idx = code.acts.flatten(), code.idx.flatten().long()
    x_hat = torch.zeros_like(x) if b_dec is None else b_dec.expand_as(x).clone()
    squares = []
    for p, w in enumerate(prefixes.weight):
        mine = (prefix == p).nonzero().squeeze(1)
        _add_rows(x_hat, token[mine], acts[mine], W_dec, idx[mine])
        e = x - x_hat
        squares.append(e.square().sum(1))
        residual[p] = w * e
        if p == prefixes.main and error is not None:
            error.copy_(e)
    for p in reversed(range(P - 1)):
        residual[p] += residual[p + 1]
    dots, plane = torch.zeros_like(acts), prefix.clamp_max(P - 1)
    for out, r, b, latent in _chunks(x.shape[1], dots, plane, token, idx):
        torch.sum(residual[r, b] * W_dec[latent].to(x.dtype), dim=1, out=out)
    on = (prefix < P) & ((acts > 0) | (not relu))
    return Decoded(torch.stack(squares), torch.where(on, -2 * dots, 0).view_as(code.acts))


def _add_rows(out: Tensor, to: Tensor, coef: Tensor, W: Tensor, rows: Tensor) -> None:
    """out[to[i]] += coef[i] · W[rows[i]], for one i after the other."""
    for there, weight, row in _chunks(W.shape[1], to, coef, rows):
        out.index_add_(0, there, weight[:, None] * W[row].to(out.dtype))


def gradient_rows(gradient: RowGradient) -> Tensor:
    """The sums over the groups, (rows, D); only this plain backend ever holds them."""
    counts = (gradient.offsets[1:] - gradient.offsets[:-1]).long()
    group = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    out = gradient.source.new_zeros(len(counts), gradient.source.shape[1])
    _add_rows(out, group, gradient.coef, gradient.source, gradient.row.long())
    return out


def _chunks(width: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    yield from zip(*(t.split(max(GATHER // width, 1)) for t in tensors), strict=True)


def catch_up(matrix: AnyMatrix, step: AdamStep, rows: Tensor | None = None) -> None:
    """Brings rows (n,) (None: all) to step.step as if their gradient had been 0 since last_step.

    Rows that stand there already are not touched. With Norm.before_update the others are scaled to unit norm
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
    missed = (step.step - since).double()[:, None]
    if step.norm == Norm.before_update:
        w = rows_lean.unit(w)
    w = w - drift * m / (v.sqrt() + drift_eps)
    if step.norm == Norm.after_update:
        w = rows_lean.unit(w)
    matrix.w[ids] = w
    matrix.m[ids] = m * (step.beta1**missed).to(dtype)
    matrix.v[ids] = v * (step.beta2**missed).to(dtype)
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


def _weights(job: Job, dtype: torch.dtype) -> Tensor:
    """The rows of the job (n, D)."""
    return (job.matrix.w if job.rows is None else job.matrix.w[job.rows.long()]).to(dtype)


def _projected(job: Job, grad: Tensor) -> Tensor:
    """The job's gradient rows (n, D), without their part along the weights' rows where the step asks for that."""
    return rows_lean.project_out(grad, _weights(job, grad.dtype)) if job.step.project else grad


def _with_along(job: Job, grad: Tensor) -> Tensor:
    """The job's gradient rows (n, D) with their part along the weights that the matrix holds now."""
    along = job.gradient.along
    return grad if along is None else rows_lean.add_along(grad, _weights(job, grad.dtype), along)


def gradient_squares(job: Job) -> None:
    """Fills job.squares and nothing else: the first pass of clipping by the global norm."""
    squares_of(job, gradient_rows(job.gradient))


def squares_of(job: Job, grad: Tensor) -> None:
    """gradient_squares with the sums over the groups (n, D) given, which it may overwrite."""
    torch.sum(_projected(job, _with_along(job, grad)).square(), dim=1, out=job.squares)


def update_rows(jobs: list[Job]) -> None:
    """One step for the rows of every job, each caught up to the step before first. Fills job.squares."""
    for job in jobs:
        update_by(job, gradient_rows(job.gradient))


def update_by(job: Job, grad: Tensor) -> None:
    """A job of update_rows with the sums over the groups (n, D) given, which it may overwrite."""
    if isinstance(job.matrix, LeanMatrix):
        rows_lean.update(job, job.matrix, grad)
    else:
        _adam(job, job.matrix, grad)


def _adam(job: Job, matrix: Matrix, grad: Tensor) -> None:
    step = job.step
    catch_up(matrix, step._replace(step=step.step - 1), job.rows)
    ids = torch.arange(len(matrix.w), device=matrix.w.device) if job.rows is None else job.rows.long()
    grad = _with_along(job, grad)
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
