"""The row operations on a CPU, in fp32: `saefast.rows`' functions over the C++ extension (csrc/rows.hpp).

Bitwise the same for any number of threads; torch.get_num_threads() says how many work.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from saefast.native import extension
from saefast.optim import AdamStep, AnyMatrix, Job, LeanMatrix
from saefast.runs import Decoded, Entries, Runs


def _ext() -> ModuleType:
    ext = extension()
    assert ext is not None, "rows.backend picks this module only where the extension is there"
    return ext


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def group_runs(idx: Tensor, keep: Tensor, n_latents: int) -> Runs:
    n = idx.numel()
    order, latents, offsets = (torch.empty(size, dtype=torch.int32) for size in (n, n, n + 1))
    runs = _ext().group_runs(
        idx.data_ptr(), keep.data_ptr(), n, n_latents, order.data_ptr(), latents.data_ptr(), offsets.data_ptr()
    )
    offsets = offsets[: runs + 1]
    return Runs(order[: int(offsets[-1])], latents[:runs], offsets)


def fill_entries(
    runs: Runs, acts: Tensor, grad: Tensor, columns: list[int], bounds: list[int], n_tokens: int, n_latents: int
) -> Entries:
    n = len(runs.order)
    dec_row, enc_row = torch.empty(n, dtype=torch.int32), torch.empty(n, dtype=torch.int32)
    found = Entries(dec_row, torch.empty(n), enc_row, torch.empty(n), torch.empty(n_latents))
    _ext().fill_entries(
        acts.data_ptr(), grad.data_ptr(), columns, bounds, n_tokens, runs.order.data_ptr(), runs.latents.data_ptr(),
        runs.offsets.data_ptr(), len(runs.latents), n_latents, *(t.data_ptr() for t in found),
    )  # fmt: skip
    return found


def moments(x: Tensor) -> tuple[float, float]:
    return _ext().moments(x.data_ptr(), *x.shape, torch.get_num_threads())


def weighted_row_sum(W: Tensor, rows: Tensor | None = None, coef: Tensor | None = None) -> Tensor:
    out = torch.empty(W.shape[1])
    n = len(W) if rows is None else len(rows)
    threads = torch.get_num_threads()
    bf16 = W.dtype == torch.bfloat16
    _ext().weighted_row_sum(W.data_ptr(), bf16, W.shape[1], _address(rows), _address(coef), n, out.data_ptr(), threads)
    return out


def decode_loss(
    x: Tensor,
    acts: Tensor,
    idx: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None,
    weight: list[float],
    bounds: list[int],
    residual: Tensor,
    *,
    by_latent: bool = False,
    relu: bool = True,
    error: Tensor | None = None,
) -> Decoded:
    (B, K), P = idx.shape, len(weight)
    weights = torch.tensor(weight, dtype=torch.float32)
    limits = torch.tensor(bounds, dtype=torch.int32)
    squares, grad_acts = torch.empty(P, B), torch.empty(B, K)
    tensors = {
        "x": x, "acts": acts, "idx": idx, "W_dec": W_dec, "b_dec": b_dec, "bounds": limits, "weight": weights,
        "residual": residual, "squares": squares, "grad_acts": grad_acts, "error": error,
    }  # fmt: skip
    sizes = {"B": B, "K": K, "P": P, "d": x.shape[1], "n_latents": len(W_dec), "n_threads": torch.get_num_threads()}
    flags = {"bf16": W_dec.dtype == torch.bfloat16, "by_latent": by_latent, "relu": relu}
    _ext().decode_loss(**{name: _address(t) for name, t in tensors.items()}, **sizes, **flags)
    return Decoded(squares, grad_acts)


def catch_up(matrix: AnyMatrix, step: AdamStep, rows: Tensor | None = None) -> None:
    n = len(matrix.w) if rows is None else len(rows)
    _ext().catch_up(_matrix(matrix), _step(step), _address(rows), n, torch.get_num_threads())


def normalise_rows(matrix: AnyMatrix, step: AdamStep, rows: Tensor | None = None) -> None:
    n = len(matrix.w) if rows is None else len(rows)
    _ext().normalise_rows(_matrix(matrix), _step(step), _address(rows), n, torch.get_num_threads())


def update_rows(jobs: list[Job]) -> None:
    lean = [isinstance(job.matrix, LeanMatrix) for job in jobs]
    parts = [[_job(job) for job, is_lean in zip(jobs, lean, strict=True) if is_lean == kind] for kind in (False, True)]
    _ext().update_rows(*parts, torch.get_num_threads())


def gradient_squares(job: Job) -> None:
    _ext().gradient_squares(_job(job), torch.get_num_threads())


def _matrix(m: AnyMatrix) -> Any:
    sizes = m.w.shape
    if isinstance(m, LeanMatrix):
        tensors = (m.w, m.m, m.scale, m.v, m.last_step, m.norms)
        return _ext().LeanMatrix(*(_address(t) for t in tensors), *sizes, m.scale.shape[1], m.seed & 0xFFFFFFFF)
    return _ext().AdamMatrix(*(_address(t) for t in (m.w, m.m, m.v, m.last_step, m.shadow, m.norms)), *sizes)


def _step(s: AdamStep) -> Any:
    table = s.drift.data_ptr(), s.drift_eps.data_ptr()
    return _ext().AdamStep(s.step, s.beta1, s.beta2, s.lr, s.eps, *table, s.grad_scale, s.project, int(s.norm))


def _job(job: Job) -> Any:
    g = job.gradient
    gradient = _ext().RowGradient(g.source.data_ptr(), g.offsets.data_ptr(), g.row.data_ptr(), g.coef.data_ptr())
    kind = _ext().LeanJob if isinstance(job.matrix, LeanMatrix) else _ext().AdamJob
    n = len(g.offsets) - 1
    return kind(_matrix(job.matrix), _step(job.step), gradient, _address(job.rows), n, job.squares.data_ptr())
