"""The row operations on a CPU, in fp32: those of `saefast.optim.reference` over the C++ extension (csrc/rows.hpp).

Bitwise the same for any number of threads; torch.get_num_threads() says how many work.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from saefast import extension
from saefast.ops.code import Code, Decoded, Prefixes
from saefast.ops.groups import Entries, Groups
from saefast.optim.state import AdamStep, AnyMatrix, Job, LeanMatrix


def _ext() -> ModuleType:
    ext = extension.load()
    assert ext is not None, "row_ops picks this module only where the extension is there"
    return ext


def _new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory for C++ to fill, on the CPU and of this dtype even if torch's defaults are others."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def group_entries(idx: Tensor, keep: Tensor, n_latents: int) -> Groups:
    n = idx.numel()
    order, latents, offsets = (_new(size, dtype=torch.int32) for size in (n, n, n + 1))
    groups = _ext().group_entries(idx, keep, n_latents, order, latents, offsets)
    offsets = offsets[: groups + 1]
    return Groups(order[: int(offsets[-1])], latents[:groups], offsets)


def fill_entries(groups: Groups, parts: list[tuple[Code, Tensor]], prefixes: Prefixes, n_latents: int) -> Entries:
    n = len(groups.order)
    dec_row, enc_row = (_new(n, dtype=torch.int32) for _ in range(2))
    found = Entries(dec_row, _new(n), enc_row, _new(n), _new(n_latents))
    given = [_ext().EntryPart(*code[:3], grad) for code, grad in parts]
    _ext().fill_entries(given, prefixes.bounds, prefixes.by_latent, n_latents, *groups, *found)
    return found


def batch_sums(x: Tensor) -> tuple[float, float]:
    return _ext().batch_sums(x, torch.get_num_threads())


def weighted_row_sum(W: Tensor, rows: Tensor | None = None, coef: Tensor | None = None) -> Tensor:
    out = _new(W.shape[1])
    _ext().weighted_row_sum(W, rows, coef, out, torch.get_num_threads())
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
    decoded = Decoded(_new(len(prefixes.weight), code.rows), _new(*code.acts.shape))
    weight = torch.tensor(prefixes.weight, dtype=torch.float32, device="cpu")
    bounds = torch.tensor(prefixes.bounds, dtype=torch.int32, device="cpu")
    args = _ext().DecodeLoss(
        *(x, *code[:3], W_dec, b_dec, bounds, weight, prefixes.by_latent, prefixes.main, residual),
        *(*decoded, error, relu),
    )
    _ext().decode_loss(args, torch.get_num_threads())
    return decoded


def catch_up(matrix: AnyMatrix, step: AdamStep, rows: Tensor | None = None) -> None:
    _ext().catch_up(_matrix(matrix), _step(step), rows, torch.get_num_threads())


def normalise_rows(matrix: AnyMatrix, step: AdamStep, rows: Tensor | None = None) -> None:
    _ext().normalise_rows(_matrix(matrix), _step(step), rows, torch.get_num_threads())


def update_rows(jobs: list[Job]) -> None:
    lean = [isinstance(job.matrix, LeanMatrix) for job in jobs]
    parts = [[_job(job) for job, is_lean in zip(jobs, lean, strict=True) if is_lean == kind] for kind in (False, True)]
    _ext().update_rows(*parts, torch.get_num_threads())


def gradient_squares(job: Job) -> None:
    _ext().gradient_squares(_job(job), torch.get_num_threads())


def _matrix(m: AnyMatrix) -> Any:
    if isinstance(m, LeanMatrix):
        return _ext().LeanMatrix(m.w, m.m, m.scale, m.v, m.last_step, m.norms, m.seed & 0xFFFFFFFF)
    return _ext().AdamMatrix(m.w, m.m, m.v, m.last_step, m.shadow, m.norms)


def _step(s: AdamStep) -> Any:
    return _ext().AdamStep(
        *(s.step, s.beta1, s.beta2, s.lr, s.eps, s.drift, s.drift_eps, s.grad_scale, s.project, int(s.norm))
    )


def _job(job: Job) -> Any:
    kind = _ext().LeanJob if isinstance(job.matrix, LeanMatrix) else _ext().AdamJob
    return kind(_matrix(job.matrix), _step(job.step), _ext().RowGradient(*job.gradient), job.rows, job.squares)
