"""The row operations on a GPU: `saefast.optim.reference`'s functions over kernels/decode_loss.py and row_update.py.

Everything repeats bit for bit: no float atomics, sums in fixed order. Nothing makes the host wait for the GPU, so jobs
may name more rows than there are (`Groups.latents`): those of -1 are passed over. The exception is rows wider than one
program holds where an operation needs whole rows (`tuning.MAX_ROW`; a `LeanMatrix` always does; beyond `tuning.WIDE`,
Adam with `RowGradient.along` of several blocks): plain torch takes them, some at a time, with gradient rows that the
kernels sum.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from saefast.kernels import decode_loss as decode_kernels
from saefast.kernels import row_update as row_kernels
from saefast.kernels import tuning
from saefast.ops.code import Code, Decoded, Prefixes
from saefast.ops.triton_launch import architecture, autotunes, on_device, readable
from saefast.optim import reference as plain
from saefast.optim.lean import COLUMN, NORMALISED, WORD, mix
from saefast.optim.state import AdamStep, AnyMatrix, Job, LeanMatrix, Norm, RowGradient
from saefast.optim.triton_batch import batch_sums, constant, fill_entries, group_entries

__all__ = [
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

# Whether decode_loss fuses a product into the addition that follows it. Where a lane holds one column, the addition is
# the first of a sum across lanes: fused, each lane rounds another of the two products, so they disagree by a bit, and
# which of them stores the sum is not fixed.
FUSION = False


class Cut(NamedTuple):
    """How long groups are cut into pieces; see kernels/row_update.py."""

    first: Tensor
    """(groups + 1,) int32: group r has pieces first[r] .. first[r + 1]."""
    group: Tensor
    """(room,) int32: the group of each piece. How many there are stays on the device."""


class Pieces(NamedTuple):
    sums: Tensor
    """(room, D) fp32."""
    first: Tensor
    """(groups + 1,) int32."""


def weighted_row_sum(W: Tensor, rows: Tensor | None = None, coef: Tensor | None = None) -> Tensor:
    """As `saefast.optim.reference.weighted_row_sum`; rows of -1 add nothing."""
    n = len(W) if rows is None else len(rows)
    if W.dtype not in (torch.float32, torch.bfloat16) or n <= tuning.CUT:
        if rows is not None and coef is not None:
            rows, coef = rows.clamp_min(0), torch.where(rows < 0, 0, coef)
        return plain.weighted_row_sum(W, rows, coef)
    room = triton.cdiv(n, tuning.CUT)
    # One group, all of whose pieces are known beforehand. Made on the device: n differs from step to step where codes
    # are of any length, and a copy would make the host wait.
    ends = torch.arange(0, n + 1, n, dtype=torch.int32, device=W.device)
    first = torch.arange(0, room + 1, room, dtype=torch.int32, device=W.device)
    group = torch.zeros(room, dtype=torch.int32, device=W.device)
    return _piece_sums(readable(W), ends, rows, coef, Cut(first, group)).sum(0)


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
    (B, D), P = x.shape, len(prefixes.weight)
    if x.dtype != torch.float32:
        return plain.decode_loss(x, code, W_dec, b_dec, prefixes, residual, relu=relu, error=error)
    csr = code.row_ptr is not None
    # No program writes padding's.
    found = Decoded(x.new_empty(P, B), (torch.zeros_like if csr else torch.empty_like)(code.acts))
    if B == 0:
        return found
    # Filled in on the device: to copy them there would make the host wait.
    weights = torch.stack([w.float() if isinstance(w, Tensor) else x.new_full((), w) for w in prefixes.weight])
    given = (
        *(code.acts.contiguous(), code.idx.contiguous(), readable(W_dec), b_dec, weights),
        *(constant(tuple(prefixes.bounds), x.device), residual, error, *found, B, D),
    )
    options = dict(P=P, MAIN=prefixes.main, BY_LATENT=prefixes.by_latent, RELU=relu, BLOCK_P=triton.next_power_of_2(P))

    def launch(config: tuning.DecodeLoss) -> None:
        how = options | dict(BLOCK_K=config.block_k, BLOCK_D=config.block_d, num_warps=config.warps, num_stages=1)
        if csr:
            decode_kernels.decode_loss_csr[(B,)](
                x.contiguous(), code.row_ptr, *given, **how, maxnreg=tuning.ROW_REGISTERS, enable_fp_fusion=FUSION
            )
        else:
            decode_kernels.decode_loss[(B,)](x.contiguous(), *given, K, **how, enable_fp_fusion=FUSION)

    K = 0 if csr else code.idx.shape[1]
    config = tuning.decode_loss_csr(D, P) if csr else tuning.decode_loss(D, K, P)
    with on_device(x):
        if autotunes(x):
            key = ("decode_loss", architecture(x.device), config, csr, W_dec.dtype, P)
            config = tuning.autotune(key, tuning.decode_loss_candidates(config), launch)
        launch(config)
    return found


def catch_up(matrix: AnyMatrix, step: AdamStep, rows: Tensor | None = None) -> None:
    if not _served(matrix, step):
        for part in _few(matrix, rows):
            plain.catch_up(matrix, step, part)
        return
    _settle(matrix, step, rows, drift=True)
    _mark(matrix, rows, step.step)


def normalise_rows(matrix: AnyMatrix, step: AdamStep, rows: Tensor | None = None) -> None:
    step = step._replace(norm=Norm.after_update)
    if _served(matrix, step):
        return _settle(matrix, step, rows, drift=False)
    for part in _few(matrix, rows):
        plain.normalise_rows(matrix, step, part)
    return None


class Prepared(NamedTuple):
    """A job with all the memory it takes, so that running out of it comes before the first row is written."""

    job: Job
    pieces: Pieces | None
    squares: Tensor
    """(n, blocks a row) of fp32 zeros."""


def gradient_squares(job: Job) -> None:
    prepared = _prepare(job, {})
    _, pieces, squares = prepared
    if len(squares) == 0:
        return
    if not _serves(job):
        for part, grad in _wide(prepared):
            plain.squares_of(part, grad)
        return
    config, D = _config(job.matrix, job.step), job.matrix.w.shape[1]
    with on_device(squares):
        row_kernels.gradient_rows[(squares.numel(),)](
            *_gradient(job.gradient, pieces), job.rows, job.matrix.w, None, squares, D, PROJECT=job.step.project,
            ALONG=_blocks_along(job.gradient), UNROLL=config.unroll, **_options(config),
        )  # fmt: skip
    torch.sum(squares, dim=1, out=job.squares)


def update_rows(jobs: list[Job]) -> None:
    cuts: dict[int, Cut] = {}
    for prepared in [_prepare(job, cuts) for job in jobs]:
        if len(prepared.squares) == 0:
            continue
        if _serves(prepared.job):
            _update(prepared)
        else:
            for part, grad in _wide(prepared):
                plain.update_by(part, grad)


def _prepare(job: Job, cuts: dict[int, Cut]) -> Prepared:
    """cuts: of offsets by their id, for jobs over the same groups."""
    g, n, D = job.gradient, len(job.gradient.offsets) - 1, job.matrix.w.shape[1]
    blocks = triton.cdiv(D, _config(job.matrix, job.step).block_d)
    squares = torch.zeros((n, blocks), dtype=torch.float32, device=job.matrix.w.device)
    if n == 0 or len(g.row) <= tuning.CUT:
        return Prepared(job, None, squares)
    cut = cuts.get(id(g.offsets)) or cuts.setdefault(id(g.offsets), _cut(g.offsets, len(g.row)))
    return Prepared(job, Pieces(_piece_sums(g.source, g.offsets, g.row, g.coef, cut), cut.first), squares)


def _update(prepared: Prepared) -> None:
    job, pieces, squares = prepared
    matrix, step, D = job.matrix, job.step, job.matrix.w.shape[1]
    config = _config(matrix, step)
    rate, root2 = step.lr / (1 - step.beta1**step.step), (1 - step.beta2**step.step) ** 0.5
    numbers = (float(step.grad_scale), 1 - step.beta1, step.beta2, 1 - step.beta2, rate, root2, step.eps)
    options = dict(PROJECT=step.project, NORM=int(step.norm), UNROLL=config.unroll, **_options(config))
    options["ALONG"] = _blocks_along(job.gradient)
    given, until = (*_gradient(job.gradient, pieces), job.rows, *_drift(matrix, step)), _until(step, step.step - 1)
    with on_device(matrix.w):
        if isinstance(matrix, LeanMatrix):
            row_kernels.lean_row_update[(len(squares),)](
                *given, *_lean(matrix), squares, *until, D, _when(matrix, step), *numbers,
                **_blocks(matrix), **options,
            )  # fmt: skip
        else:
            row_kernels.row_update[(squares.numel(),)](
                *given, matrix.w, matrix.m, matrix.v, matrix.shadow, matrix.norms, squares, *until, D, *numbers,
                **options,
            )  # fmt: skip
    _mark(matrix, job.rows, step.step)
    torch.sum(squares, dim=1, out=job.squares)


def _settle(matrix: AnyMatrix, step: AdamStep, rows: Tensor | None, *, drift: bool) -> None:
    n, D = len(matrix.w) if rows is None else len(rows), matrix.w.shape[1]
    if n == 0:
        return
    config = _config(matrix, step)
    options = dict(NORM=int(step.norm), **_options(config))
    given, until = (rows, *(_drift(matrix, step) if drift else (None,) * 3)), _until(step, step.step)
    with on_device(matrix.w):
        if isinstance(matrix, LeanMatrix):
            row_kernels.lean_settle_rows[(n,)](
                *given, *_lean(matrix), *until, D, _when(matrix, step, 0 if drift else NORMALISED), **_blocks(matrix),
                ROOM=triton.next_power_of_2(matrix.scale.shape[1]), **options,
            )  # fmt: skip
        else:
            row_kernels.settle_rows[(n * triton.cdiv(D, config.block_d),)](
                *given, matrix.w, matrix.m, matrix.v, matrix.shadow, matrix.norms, *until, D, **options
            )


def _drift(matrix: AnyMatrix, step: AdamStep) -> tuple[Tensor, ...]:
    return matrix.last_step, step.drift, step.drift_eps


def _until(step: AdamStep, until: int) -> tuple[int, float, float]:
    """The step that rows are settled up to, and the logarithms of the decays."""
    log1, log2 = (math.log2(beta) if beta > 0 else -math.inf for beta in (step.beta1, step.beta2))
    return until, log1, log2


def _mark(matrix: AnyMatrix, rows: Tensor | None, step: int) -> None:
    """Rows stand at `step` now. Apart from what moves them: the programs of a row's blocks all read where it stood."""
    if rows is None:
        matrix.last_step.clamp_min_(step)
    elif len(rows):
        with on_device(rows):
            row_kernels.mark_rows[(triton.cdiv(len(rows), tuning.ENTRIES),)](
                rows, matrix.last_step, len(rows), step, BLOCK=tuning.ENTRIES, num_warps=4, num_stages=1
            )


def _few(matrix: AnyMatrix, rows: Tensor | None) -> Iterator[Tensor]:
    """The rows, as many at a time as plain torch's temporaries should hold. Waits for their number."""
    every = torch.arange(len(matrix.w), dtype=torch.int32, device=matrix.w.device)
    rows = every if rows is None else rows[rows >= 0]
    yield from (part for part in rows.split(max(plain.GATHER // matrix.w.shape[1], 1)) if len(part))


def _wide(prepared: Prepared) -> Iterator[tuple[Job, Tensor]]:
    """A job in parts of `_few` rows each, and the sums over their groups (n, D)."""
    job, pieces, _ = prepared
    D, begin = job.matrix.w.shape[1], 0
    job.squares.zero_()  # of rows that are not there too
    config = tuning.rows(D, False)
    for rows in _few(job.matrix, job.rows):
        part, grad = slice(begin, begin := begin + len(rows)), rows.new_empty((len(rows), D), dtype=torch.float32)
        along = job.gradient.along
        gradient = job.gradient._replace(
            offsets=job.gradient.offsets[part.start :], along=None if along is None else along[part]
        )
        cut = pieces and pieces._replace(first=pieces.first[part.start :])
        with on_device(grad):
            row_kernels.gradient_rows[(len(rows) * triton.cdiv(D, config.block_d),)](
                *_gradient(gradient._replace(along=None), cut), None, None, grad, None, D, PROJECT=False, ALONG=0,
                UNROLL=config.unroll, **_options(config),
            )  # fmt: skip
        yield job._replace(rows=rows, gradient=gradient, squares=job.squares[part]), grad


def _lean(matrix: LeanMatrix) -> tuple[Tensor | None, ...]:
    return matrix.w, matrix.m, matrix.scale, matrix.v, matrix.norms


def _blocks(matrix: LeanMatrix) -> dict[str, int]:
    blocks = matrix.scale.shape[1]
    return dict(WIDTH=-(-matrix.w.shape[1] // blocks), BLOCKS=blocks)


def _when(matrix: LeanMatrix, step: AdamStep, salt: int = 0) -> int:
    """The hash of seed and step, as the int32 of the same bits."""
    word = mix(matrix.seed + step.step * COLUMN + salt & WORD)
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


def _serves(job: Job) -> bool:
    """Whether the kernels take an update: several blocks of `along` do not fit beside a wide row and its moments."""
    fits = isinstance(job.matrix, LeanMatrix) or _blocks_along(job.gradient) < 2 or job.matrix.w.shape[1] <= tuning.WIDE
    return _served(job.matrix, job.step) and (fits or not _whole_rows(job.matrix, job.step))


def _config(matrix: AnyMatrix, step: AdamStep) -> tuning.Rows:
    D = matrix.w.shape[1]
    return tuning.rows(D, _whole_rows(matrix, step) and D <= tuning.MAX_ROW)


def _options(config: tuning.Rows) -> dict[str, int]:
    return dict(BLOCK_D=config.block_d, num_warps=config.warps, num_stages=1, maxnreg=tuning.ROW_REGISTERS)


def _gradient(g: RowGradient, pieces: Pieces | None) -> tuple[Tensor | None, ...]:
    return g.source, g.offsets, g.row, g.coef, *(pieces or (None, None)), g.along


def _blocks_along(g: RowGradient) -> int:
    return 0 if g.along is None else g.along.shape[1]


def _cut(offsets: Tensor, n_entries: int) -> Cut:
    """Where groups longer than tuning.CUT are cut."""
    n, cut = len(offsets) - 1, tuning.CUT
    lengths = offsets[1:] - offsets[:-1]
    # A group longer than one piece has less than two pieces for every CUT entries.
    room = 2 * n_entries // cut
    first = offsets.new_zeros(n + 1)
    torch.cumsum(torch.where(lengths > cut, (lengths + cut - 1) // cut, 0), 0, dtype=torch.int32, out=first[1:])
    numbers = torch.arange(room, dtype=torch.int32, device=offsets.device)
    return Cut(first, (torch.searchsorted(first, numbers, right=True) - 1).clamp_max(n - 1).int())


def _piece_sums(source: Tensor, offsets: Tensor, row: Tensor | None, coef: Tensor | None, cut: Cut) -> Tensor:
    """(room, D) fp32: the sum of each piece."""
    room, D, config = len(cut.group), source.shape[1], tuning.pieces(source.shape[1])
    sums = source.new_empty((room, D), dtype=torch.float32)
    with on_device(source):
        row_kernels.piece_sums[(room * triton.cdiv(D, config.block_d),)](
            source, offsets, row, coef, cut.first, cut.group, sums, len(offsets) - 1, D, CUT=tuning.CUT,
            UNROLL=config.unroll, **_options(config),
        )  # fmt: skip
    return sums
