"""The row operations on a GPU: `saefast.rows`' functions over kernels/decode_loss.py and kernels/row_update.py.

On plain torch, because no kernel of theirs exists: `moments`, `group_runs` (one stable sort), and matrices whose rows
are wider than one program holds where an operation needs whole rows (`tuning.MAX_ROW`; a `LeanMatrix` always does) or
whose weights are neither float32 nor lean. Everything repeats bit for bit: no float atomics, sums in fixed order.
What sleeping rows owe is read from the drift table, which is copied to the device at every call: 8 bytes a step taken.
No GPU has run this module yet: it is unproven on a GPU.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from saefast import rows as plain
from saefast.kernels import decode_loss as decode_kernels
from saefast.kernels import row_update as row_kernels
from saefast.kernels import tuning
from saefast.optim import AdamStep, AnyMatrix, Job, LeanMatrix, Norm, RowGradient
from saefast.rows import group_runs, moments
from saefast.rows_lean import COLUMN, NORMALISED, WORD, mix
from saefast.runs import Decoded, Entries, Runs
from saefast.triton_launch import architecture, on_device, readable, sweeps

__all__ = [
    "catch_up",
    "decode_loss",
    "fill_entries",
    "gradient_squares",
    "group_runs",
    "moments",
    "normalise_rows",
    "update_rows",
    "weighted_row_sum",
]

# Whether decode_loss fuses a product into the addition that follows it. Where a lane holds one column, the addition is
# the first of a sum across lanes: fused, each lane rounds another of the two products, so they disagree by a bit, and
# which of them stores the sum is not fixed.
FUSION = False


class Pieces(NamedTuple):
    """How long runs are cut; see kernels/row_update.py."""

    sums: Tensor
    """(pieces, D) fp32."""
    first: Tensor
    """(runs + 1,) int32."""


def fill_entries(
    runs: Runs, acts: Tensor, grad: Tensor, columns: list[int], bounds: list[int], n_tokens: int, n_latents: int
) -> Entries:
    found = plain.fill_entries(runs, acts, grad, columns, bounds, n_tokens, n_latents)
    # index_add_ adds in no fixed order on a GPU.
    sums = acts.new_zeros(n_latents)
    if len(runs.latents):
        lengths = (runs.offsets[1:] - runs.offsets[:-1]).long()
        sums[runs.latents.long()] = torch.segment_reduce(found.enc_coef, "sum", lengths=lengths, unsafe=True)
    return found._replace(grad_by_latent=sums)


def weighted_row_sum(W: Tensor, rows: Tensor | None = None, coef: Tensor | None = None) -> Tensor:
    n = len(W) if rows is None else len(rows)
    if W.dtype not in (torch.float32, torch.bfloat16) or n <= tuning.CUT:
        return plain.weighted_row_sum(W, rows, coef)
    pieces = _cut(readable(W), torch.tensor([0, n], dtype=torch.int32, device=W.device), rows, coef, n)
    assert pieces is not None
    return pieces.sums[: -(-n // tuning.CUT)].sum(0)


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
    (B, K), D, P = idx.shape, x.shape[1], len(weight)
    if x.dtype != torch.float32:
        return plain.decode_loss(
            x, acts, idx, W_dec, b_dec, weight, bounds, residual, by_latent=by_latent, relu=relu, error=error
        )
    squares, grad_acts = x.new_empty(P, B), x.new_empty(B, K)
    if B == 0:
        return Decoded(squares, grad_acts)

    def launch(config: tuning.DecodeLoss) -> None:
        decode_kernels.decode_loss[(B,)](
            x.contiguous(), acts.contiguous(), idx.contiguous(), readable(W_dec), b_dec,
            x.new_tensor(weight), torch.tensor(bounds, dtype=torch.int32, device=x.device),
            residual, error, squares, grad_acts, B, D, K,
            P=P, BY_LATENT=by_latent, RELU=relu, BLOCK_P=triton.next_power_of_2(P), BLOCK_K=config.block_k,
            BLOCK_D=config.block_d, num_warps=config.warps, num_stages=1, enable_fp_fusion=FUSION,
        )  # fmt: skip

    config = tuning.decode_loss(D, K, P)
    with on_device(x):
        if sweeps(x):
            key = ("decode_loss", architecture(x.device), config, W_dec.dtype, P)
            config = tuning.sweep(key, tuning.decode_loss_candidates(config), launch)
        launch(config)
    return Decoded(squares, grad_acts)


def catch_up(matrix: AnyMatrix, step: AdamStep, rows: Tensor | None = None) -> None:
    if not _served(matrix, step):
        return plain.catch_up(matrix, step, rows)
    owed = _owed(matrix, step, step.step, rows)
    _settle(matrix, step, rows, owed)
    if rows is None:
        matrix.last_step.clamp_min_(step.step)
    else:
        ids = rows.long()
        matrix.last_step[ids] = matrix.last_step[ids].clamp_min(step.step)
    return None


def normalise_rows(matrix: AnyMatrix, step: AdamStep, rows: Tensor | None = None) -> None:
    if not _served(matrix, step._replace(norm=Norm.after_update)):
        return plain.normalise_rows(matrix, step, rows)
    return _settle(matrix, step._replace(norm=Norm.after_update), rows, None)


def gradient_squares(job: Job) -> None:
    matrix, gradient = job.matrix, job.gradient
    if not _served(matrix, job.step):
        return plain.gradient_squares(job)
    n, D = len(gradient.offsets) - 1, matrix.w.shape[1]
    if n == 0:
        return None
    config, blocks, squares = _launch(matrix, job.step, n)
    pieces = _cut(gradient.source, gradient.offsets, gradient.row, gradient.coef, len(gradient.row))
    with on_device(matrix.w):
        row_kernels.gradient_squares[(n * blocks,)](
            *_gradient(gradient, pieces), job.rows, matrix.w, squares, D, PROJECT=job.step.project,
            UNROLL=config.unroll, **_options(config),
        )  # fmt: skip
    return _add_squares(job, squares)


class Prepared(NamedTuple):
    """A job with all the memory it takes, so that running out of it comes before the first row is written."""

    job: Job
    owed: Tensor
    pieces: Pieces | None
    squares: Tensor


def update_rows(jobs: list[Job]) -> None:
    served = [_served(job.matrix, job.step) for job in jobs]
    prepared = [_prepare(job) for job, by_kernel in zip(jobs, served, strict=True) if by_kernel]
    for part in prepared:
        _update(part)
    plain.update_rows([job for job, by_kernel in zip(jobs, served, strict=True) if not by_kernel])


def _prepare(job: Job) -> Prepared:
    gradient, n = job.gradient, len(job.gradient.offsets) - 1
    squares = _launch(job.matrix, job.step, n)[2]
    pieces = _cut(gradient.source, gradient.offsets, gradient.row, gradient.coef, len(gradient.row)) if n else None
    return Prepared(job, _owed(job.matrix, job.step, job.step.step - 1, job.rows), pieces, squares)


def _update(prepared: Prepared) -> None:
    job, owed, pieces, squares = prepared
    matrix, step, n = job.matrix, job.step, len(job.gradient.offsets) - 1
    if n == 0:
        return
    config, blocks, _ = _launch(matrix, step, 0)
    rate, root2 = step.lr / (1 - step.beta1**step.step), (1 - step.beta2**step.step) ** 0.5
    numbers = (float(step.grad_scale), 1 - step.beta1, step.beta2, 1 - step.beta2, rate, root2, step.eps)
    options = dict(PROJECT=step.project, NORM=int(step.norm), UNROLL=config.unroll, **_options(config))
    given, D = (*_gradient(job.gradient, pieces), job.rows, owed), matrix.w.shape[1]
    with on_device(matrix.w):
        if isinstance(matrix, LeanMatrix):
            row_kernels.lean_row_update[(n,)](
                *given, *_lean(matrix), squares, n, D, _when(matrix, step), *numbers, **_blocks(matrix), **options
            )
        else:
            row_kernels.row_update[(n * blocks,)](
                *given, matrix.w, matrix.m, matrix.v, matrix.shadow, matrix.norms, squares, n, D, *numbers, **options
            )
    if job.rows is None:
        matrix.last_step.fill_(step.step)
    else:
        matrix.last_step[job.rows.long()] = step.step
    _add_squares(job, squares)


def _settle(matrix: AnyMatrix, step: AdamStep, rows: Tensor | None, owed: Tensor | None) -> None:
    n, D = len(matrix.w) if rows is None else len(rows), matrix.w.shape[1]
    if n == 0:
        return
    config, blocks, _ = _launch(matrix, step, 0)
    options = dict(NORM=int(step.norm), **_options(config))
    with on_device(matrix.w):
        if isinstance(matrix, LeanMatrix):
            salt = 0 if owed is not None else NORMALISED
            row_kernels.lean_settle_rows[(n,)](
                rows, owed, *_lean(matrix), n, D, _when(matrix, step, salt), **_blocks(matrix),
                ROOM=triton.next_power_of_2(matrix.scale.shape[1]), **options,
            )  # fmt: skip
        else:
            row_kernels.settle_rows[(n * blocks,)](
                rows, owed, matrix.w, matrix.m, matrix.v, matrix.shadow, matrix.norms, n, D, **options
            )


def _lean(matrix: LeanMatrix) -> tuple[Tensor | None, ...]:
    return matrix.w, matrix.m, matrix.scale, matrix.v, matrix.norms


def _blocks(matrix: LeanMatrix) -> dict[str, int]:
    blocks = matrix.scale.shape[1]
    return dict(WIDTH=-(-matrix.w.shape[1] // blocks), BLOCKS=blocks)


def _when(matrix: LeanMatrix, step: AdamStep, salt: int = 0) -> int:
    """The hash of seed and step, as the int32 of the same bits."""
    word = int(mix(torch.tensor(matrix.seed + step.step * COLUMN + salt & WORD, dtype=torch.int64, device="cpu")))
    return word - (1 << 32) if word >= 1 << 31 else word


def _whole_rows(matrix: AnyMatrix, step: AdamStep) -> bool:
    """Whether a program has to see its whole row."""
    if isinstance(matrix, LeanMatrix):
        return True
    return step.project or step.norm != Norm.never or matrix.norms is not None


def _served(matrix: AnyMatrix, step: AdamStep) -> bool:
    """Whether the kernels take this operation."""
    known = isinstance(matrix, LeanMatrix) or matrix.w.dtype == torch.float32
    return known and (matrix.w.shape[1] <= tuning.MAX_ROW or not _whole_rows(matrix, step))


def _launch(matrix: AnyMatrix, step: AdamStep, n: int) -> tuple[tuning.Rows, int, Tensor]:
    """Settings, blocks a row, and room for the squares of each block."""
    D = matrix.w.shape[1]
    config = tuning.rows(D, _whole_rows(matrix, step))
    blocks = triton.cdiv(D, config.block_d)
    return config, blocks, matrix.w.new_empty((n, blocks), dtype=torch.float32)


def _options(config: tuning.Rows) -> dict[str, int]:
    return dict(BLOCK_D=config.block_d, num_warps=config.warps, num_stages=1, maxnreg=tuning.ROW_REGISTERS)


def _add_squares(job: Job, squares: Tensor) -> None:
    torch.sum(squares, dim=1, out=job.squares)


def _gradient(g: RowGradient, pieces: Pieces | None) -> tuple[Tensor | None, ...]:
    return g.source, g.offsets, g.row, g.coef, *(pieces or (None, None))


def _owed(matrix: AnyMatrix, step: AdamStep, until: int, rows: Tensor | None) -> Tensor:
    """(5, n) fp32: steps each row slept up to `until`, its drift and drift_eps, and the decays of m and v."""
    since = (matrix.last_step if rows is None else matrix.last_step[rows.long()]).clamp_max(until).long()
    slept = (until - since).double()
    table = torch.stack([step.drift[: until + 1], step.drift_eps[: until + 1]]).float().to(since.device)
    drift, eps = table[:, since]
    eps = torch.where(slept > 0, eps, 1)  # entries the table does not have yet are 0, and so may v be
    return torch.stack([slept.float(), drift, eps, (step.beta1**slept).float(), (step.beta2**slept).float()])


def _cut(source: Tensor, offsets: Tensor, row: Tensor | None, coef: Tensor | None, n_entries: int) -> Pieces | None:
    """Sums the pieces of runs longer than tuning.CUT; None where so few entries have no such run.

    How many pieces there are stays on the device; there is room for as many as there may be.
    """
    if n_entries <= tuning.CUT:
        return None
    n, D, cut = len(offsets) - 1, source.shape[1], tuning.CUT
    lengths = offsets[1:] - offsets[:-1]
    # A run longer than one piece has less than two pieces for every CUT entries.
    room = 2 * n_entries // cut
    first = offsets.new_zeros(n + 1)
    torch.cumsum(torch.where(lengths > cut, (lengths + cut - 1) // cut, 0), 0, dtype=torch.int32, out=first[1:])
    numbers = torch.arange(room, dtype=torch.int32, device=source.device)
    run = (torch.searchsorted(first, numbers, right=True) - 1).clamp_max(n - 1).int()
    sums = source.new_empty((room, D), dtype=torch.float32)
    config = tuning.rows(D, False)
    with on_device(source):
        row_kernels.piece_sums[(room * triton.cdiv(D, config.block_d),)](
            source, offsets, row, coef, first, run, sums, n, D, CUT=cut, UNROLL=config.unroll,
            **_options(config),
        )  # fmt: skip
    return Pieces(sums, first)
