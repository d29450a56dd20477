"""The row kernels of the fused engine against plain torch: rows to settle, empty groups, a group that is cut."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from saefast.kernels import tuning
from saefast.optim import lean as rows_lean
from saefast.optim import reference as rows
from saefast.optim import triton as rows_triton
from saefast.optim.state import AdamStep, AnyMatrix, DriftTable, Job, LeanMatrix, Matrix, Norm, RowGradient

STEP = 8
OPERATIONS = ("update_rows", "gradient_squares", "catch_up", "normalise_rows")


def row_operation(D: int, device: str, kind: str, operation: str, rows_in_job: int) -> dict[str, Any]:
    """One operation by the kernels, by plain torch, and (Adam) by that in float64."""
    job = new_job(D, device, kind, rows_in_job)
    ours, plain = copied(job, torch.float32), copied(job, torch.float32)
    run(rows_triton, operation, ours)
    run(rows, operation, plain)
    squares = relative(ours.squares, plain.squares)
    if isinstance(ours.matrix, LeanMatrix) and isinstance(plain.matrix, LeanMatrix):
        return {"squares": squares} | same_rounding(ours.matrix, plain.matrix, squares)
    exact = copied(job, torch.float64)
    run(rows, operation, exact)
    found: dict[str, Any] = {"squares": squares, "outcome": "ok" if squares <= 1e-4 else "failed"}
    for name in ("w", "m", "v", "norms"):
        got, narrow, wide = (getattr(one.matrix, name) for one in (ours, plain, exact))
        error, allowed = (float((t.double() - wide).abs().max()) for t in (got, narrow))
        allowed = 2 * allowed + 1e-6 * float(wide.abs().max())
        found |= {f"{name} error": error, f"{name} allowed": allowed}
        found["outcome"] = found["outcome"] if error <= allowed else "failed"
    return found


def run(module: ModuleType, operation: str, job: Job) -> None:
    if operation in ("catch_up", "normalise_rows"):
        getattr(module, operation)(job.matrix, job.step, job.rows)
        job.squares.zero_()
    else:
        getattr(module, operation)([job] if operation == "update_rows" else job)


def new_job(D: int, device: str, kind: str, n: int) -> Job:
    """n rows of 2 n, one of which has a group longer than one program adds up."""
    lengths = torch.randint(0, 6, (n,))
    lengths[0], lengths[1] = 0, tuning.CUT + 5
    entries, offsets = int(lengths.sum()), torch.zeros(n + 1, dtype=torch.int32)
    offsets[1:] = lengths.cumsum(0)
    gradient = RowGradient(
        torch.randn(50, D, device=device),
        offsets.to(device),
        torch.randint(50, (entries,), dtype=torch.int32, device=device),
        torch.randn(entries, device=device),
    )
    drift = DriftTable(0.9, 0.999, 1e-8, device)
    for _ in range(STEP):
        drift.add(1e-3)
    step = AdamStep(STEP, 0.9, 0.999, 1e-3, 1e-8, drift.drift, drift.drift_eps, project=True, norm=Norm.after_update)
    chosen = torch.randperm(2 * n)[:n].sort().values.int().to(device)
    return Job(with_past(2 * n, D, device, kind), step, gradient, chosen, torch.full((n,), torch.nan, device=device))


def with_past(L: int, D: int, device: str, kind: str) -> AnyMatrix:
    """Weights some of whose rows stand at an earlier step than others."""
    w = torch.randn(L, D, device=device) / D**0.5
    if kind == "adam":
        matrix: AnyMatrix = Matrix.of(w, norms=True)
        matrix.m.normal_(std=0.1)
        matrix.v.uniform_(1e-4, 1e-2)
    else:
        matrix = LeanMatrix.of(w.bfloat16(), 5, norms=True)
        matrix.m.copy_(torch.randint(-127, 128, (L, D)))
        matrix.scale.copy_(torch.rand(matrix.scale.shape) * 1e-3)
        matrix.v.uniform_(1e-4, 1e-3)
    matrix.last_step.copy_(torch.randint(0, STEP, (L,)))
    return matrix


def copied(job: Job, dtype: torch.dtype) -> Job:
    """A deep copy, its float32 tensors in a dtype."""

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(dtype, copy=True) if value.dtype == torch.float32 else value.clone()

    matrix = type(job.matrix)(**{name: cast(value) for name, value in vars(job.matrix).items()})
    return job._replace(matrix=matrix, gradient=RowGradient(*map(cast, job.gradient)), squares=cast(job.squares))


def same_rounding(ours: LeanMatrix, plain: LeanMatrix, squares: float) -> dict[str, Any]:
    """The same random bits round alike but where sums differ: by one step of the rounding, in few places."""
    ids = torch.arange(len(plain.w), device=plain.w.device)
    width = -(-plain.w.shape[1] // plain.scale.shape[1])
    quantum = plain.scale.float().repeat_interleave(width, dim=1)[:, : plain.w.shape[1]]
    steps = ((rows_lean.moments(ours, ids) - rows_lean.moments(plain, ids)).abs() / quantum.clamp_min(1e-30)).max()
    alike = min(float((getattr(ours, n) == getattr(plain, n)).float().mean()) for n in ("w", "m", "scale"))
    apart = relative(ours.w.float(), plain.w.float())
    v = relative(ours.v, plain.v)
    # bfloat16 has 8 bits: one step of the largest weight.
    good = float(steps) <= 1.02 and alike > 0.98 and apart <= 2**-7 and max(v, squares) <= 1e-4
    return {"outcome": "ok" if good else "failed", "alike": alike, "moments apart": float(steps), "v": v, "w": apart}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
