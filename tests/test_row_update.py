"""row_update and the kernels beside it, on Triton, against plain torch in float64.

Groups are cut at CUT entries here, sooner than in earnest, to have many pieces of few entries.
"""

import interp
import pytest
import torch
from torch import Tensor

from saefast.kernels import tuning
from saefast.ops.code import Code, Prefixes
from saefast.ops.groups import group_entries
from saefast.optim import lean as rows_lean
from saefast.optim import reference as rows
from saefast.optim import triton as rows_triton
from saefast.optim.dispatch import row_ops
from saefast.optim.state import AdamStep, DriftTable, Job, LeanMatrix, Matrix, Norm, RowGradient

interp.speed_up()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

OPTIONS = [
    dict(),
    dict(project=True, norm=Norm.after_update),
    dict(project=True, norm=Norm.before_update, grad_scale=0.3),
    dict(norm=Norm.after_update, grad_scale=0.01),
]
STATE = ("w", "m", "v", "norms")
CUT = 12


@pytest.fixture(autouse=True)
def cut_soon(request, monkeypatch):
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(tuning, "CUT", CUT)


def constants(step: int, **options) -> AdamStep:
    """Of a run whose learning rate moved."""
    drift = DriftTable(0.9, 0.999, 1e-8, "cuda" if torch.cuda.is_available() else "cpu")
    for past in range(step - 1):
        drift.add(1e-3 * (1 + past % 3))
    return AdamStep(step, 0.9, 0.999, 1e-3, 1e-8, drift.drift, drift.drift_eps, **options)


def random_matrix(L: int, D: int, step: int, device: torch.device, norms: bool = True) -> Matrix:
    """Weights with a past: some rows stand at an earlier step than others."""
    matrix = Matrix.of(torch.randn(L, D, device=device), shadow=True, norms=norms)
    matrix.m.copy_(torch.randn(L, D) * 0.1)
    matrix.v.copy_(torch.rand(L, D) * 0.01)
    matrix.last_step.copy_(torch.randint(0, step, (L,)))
    return matrix


def random_job(matrix: Matrix, lengths: list[int], step: int = 8, **options) -> Job:
    """A job of as many rows as there are lengths of groups."""
    (L, D), device, n = matrix.w.shape, matrix.w.device, sum(lengths)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    source, row, coef = torch.randn(50, D), torch.randint(50, (n,), dtype=torch.int32), torch.randn(n)
    gradient = RowGradient(*(t.to(device) for t in (source, offsets, row, coef)))
    chosen = torch.randperm(L)[: len(lengths)].sort().values.int().to(device)
    return Job(matrix, constants(step, **options), gradient, chosen, torch.full((len(lengths),), torch.nan).to(device))


def copied(job: Job, dtype: torch.dtype = torch.float32) -> Job:
    def cast(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.to(dtype, copy=True) if t.dtype == torch.float32 else t.clone()

    m = job.matrix
    matrix = Matrix(*(cast(t) for t in (m.w, m.m, m.v, m.last_step, m.shadow, m.norms)))
    return job._replace(matrix=matrix, gradient=RowGradient(*map(cast, job.gradient)), squares=cast(job.squares))


def assert_shadow(matrix: Matrix) -> None:
    """A GPU rounds to bfloat16, the interpreter truncates."""
    if matrix.w.is_cuda:
        assert torch.equal(matrix.shadow, matrix.w.bfloat16())
    else:
        cut = (matrix.w.view(torch.int32) & -65536).view(torch.float32)
        rounded = matrix.w.bfloat16().float()
        assert ((matrix.shadow.float() == cut) | (matrix.shadow.float() == rounded)).all()


def assert_close_to_plain(operation, job: Job) -> Job:
    """operation(module, job) by the kernels, by plain torch, and by that in float64. Returns the kernels' job."""
    ours, plain, exact = copied(job), copied(job), copied(job, torch.float64)
    operation(rows_triton, ours)
    operation(rows, plain)
    operation(rows, exact)
    for name in STATE:
        got, narrow, wide = (getattr(j.matrix, name) for j in (ours, plain, exact))
        if got is not None:
            allowed = 2 * (narrow - wide).abs().max() + 1e-6 * wide.abs().max()
            assert (got - wide).abs().max() <= allowed, name
    assert torch.equal(ours.matrix.last_step, exact.matrix.last_step)
    torch.testing.assert_close(ours.squares.double(), exact.squares, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert_shadow(ours.matrix)
    return ours


def update(module, job: Job) -> None:
    module.update_rows([job])


@pytest.mark.parametrize("D", [1, 19, 64, 768])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_update(D, options, device):
    """Rows to settle, empty groups, groups at and beyond the length they are cut at."""
    lengths = [1, 0, 3, CUT, CUT + 1, 2, 2 * CUT, 3 * CUT + 5, 0]
    job = random_job(random_matrix(15, D, 7, device), lengths, **options)
    assert_close_to_plain(update, job)


def test_wide_rows_without_norms_are_cut_into_blocks(device):
    job = random_job(random_matrix(6, 2500, 7, device, norms=False), [2, 30, 0])
    assert tuning.rows(2500, False).block_d < 2500
    assert_close_to_plain(update, job)


def without_some(job: Job) -> Job:
    """The same job with room for more rows than it has."""
    n, g, device = len(job.rows), job.gradient, job.rows.device
    more = torch.full((n + 5,), -1, dtype=torch.int32, device=device)
    more[:n] = job.rows
    offsets = torch.cat([g.offsets, g.offsets[-1:].expand(5)])
    squares = torch.full((n + 5,), torch.nan, device=device)
    return job._replace(rows=more, gradient=g._replace(offsets=offsets), squares=squares)


@pytest.mark.parametrize("max_row", [tuning.MAX_ROW, 32])
@pytest.mark.parametrize("lean", [False, True])
def test_rows_that_are_not_there_are_passed_over(max_row, lean, device, monkeypatch):
    """The same bits as without them, in whole rows and in rows wider than a program holds."""
    monkeypatch.setattr(tuning, "MAX_ROW", max_row)
    matrix = lean_matrix(20, 40, 7, device) if lean else random_matrix(20, 40, 7, device)
    job = random_job(matrix, [2, 0, CUT + 1, 3], project=True, norm=Norm.after_update)
    exact, copy = job, lean_copy(job) if lean else copied(job)
    padded = without_some(copy)
    for operation in (
        lambda j: rows_triton.catch_up(j.matrix, j.step._replace(step=6), j.rows),
        lambda j: rows_triton.normalise_rows(j.matrix, j.step, j.rows),
        rows_triton.gradient_squares,
        lambda j: rows_triton.update_rows([j]),
    ):
        operation(exact)
        operation(padded)
        for name in (*exact.matrix.state(), "w", "norms"):
            assert torch.equal(getattr(exact.matrix, name), getattr(padded.matrix, name)), name
    assert torch.equal(exact.squares, padded.squares[:4])
    assert (padded.squares[4:] == 0).all()


@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
@pytest.mark.parametrize("lean", [False, True])
def test_rows_wider_than_a_program_holds(options, lean, device, monkeypatch):
    """Some at a time by plain torch, gradient rows by kernels: plain torch's results, without adding by atomics."""
    monkeypatch.setattr(tuning, "MAX_ROW", 32)
    monkeypatch.setattr(rows, "GATHER", 80)
    monkeypatch.setattr(torch.Tensor, "index_add_", lambda *args: pytest.fail("added by atomics"))
    matrix = lean_matrix(9, 40, 7, device) if lean else random_matrix(9, 40, 7, device)
    ours = random_job(matrix, [2, 3, 0, 2 * CUT, CUT + 1], **options)
    plain = lean_copy(ours) if lean else copied(ours)
    sources = [ours.gradient.source[ours.gradient.row.long()] * ours.gradient.coef[:, None]]
    rows_triton.update_rows([ours])
    rows.update_by(
        plain, torch.stack([part.sum(0) for part in sources[0].split(ours.gradient.offsets.diff().tolist())])
    )
    step = ours.step._replace(step=ours.step.step + 3)
    for module, job in ((rows_triton, ours), (rows, plain)):
        module.catch_up(job.matrix, step)
        module.normalise_rows(job.matrix, step)
    if lean:
        assert_same_rounding(ours.matrix, plain.matrix)
    else:
        for name in STATE:
            torch.testing.assert_close(getattr(ours.matrix, name), getattr(plain.matrix, name), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.squares, plain.squares, rtol=1e-4, atol=1e-4)


def test_a_latent_that_fires_on_every_token(device):
    """From a code to updates of both matrices, as a step does it."""
    B, K, L, D = 120, 2, 12, 40
    idx = torch.randint(1, L, (B, K), device=device, dtype=torch.int32)
    idx[:, 0] = 5
    acts, grad = torch.rand(B, K, device=device), torch.randn(B, K, device=device)
    runs = group_entries(idx.flatten(), torch.ones(B * K, dtype=torch.bool, device=device), L)
    parts, prefixes = [(Code(acts, idx), grad)], Prefixes([K], [])
    entries, plain = (module.fill_entries(runs, parts, prefixes, L) for module in (rows_triton, rows))
    assert all(torch.equal(a, b) for a, b in zip(entries[:4], plain[:4], strict=True))
    torch.testing.assert_close(entries.grad_by_latent, plain.grad_by_latent, rtol=1e-5, atol=1e-4)
    source = torch.randn(B, D, device=device)
    for row, coef in ((entries.dec_row, entries.dec_coef), (entries.enc_row, entries.enc_coef)):
        gradient = RowGradient(source, runs.offsets, row, coef)
        squares = torch.zeros(len(runs.latents), device=device)
        job = Job(random_matrix(L, D, 3, device), constants(4), gradient, runs.latents, squares)
        assert_close_to_plain(update, job)


def test_all_rows_take_part(device):
    """job.rows None: rows without an entry have a gradient of 0, and move on with their momentum."""
    job = random_job(random_matrix(5, 24, 7, device), [0, 2, 0, 1, 40], norm=Norm.after_update)
    ours = assert_close_to_plain(update, job._replace(rows=None))
    assert (ours.matrix.w != job.matrix.w).any(1).all()


def test_a_vector_is_one_row(device):
    matrix = Matrix.of(torch.randn(3000, device=device))
    row = torch.zeros(1, dtype=torch.int32, device=device)
    ends = torch.tensor([0, 1], dtype=torch.int32, device=device)
    gradient = RowGradient(torch.randn(1, 3000, device=device), ends, row, torch.ones(1, device=device))
    squares = torch.zeros(1, device=device)
    job = Job(matrix, constants(1), gradient, None, squares)
    expected = torch.optim.Adam([torch.nn.Parameter(matrix.w[0].clone())], lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    [parameter] = expected.param_groups[0]["params"]
    parameter.grad = gradient.source[0].clone()
    expected.step()
    update(rows_triton, job)
    torch.testing.assert_close(matrix.w[0], parameter.data, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(squares[0], gradient.source.square().sum(), rtol=1e-5, atol=0)


def test_no_rows(device):
    job = random_job(random_matrix(5, 24, 7, device), [])
    update(rows_triton, job)
    rows_triton.gradient_squares(job)
    rows_triton.catch_up(job.matrix, job.step, job.rows)
    rows_triton.normalise_rows(job.matrix, job.step, job.rows)


def test_untouched_rows_stay_untouched(device):
    job = random_job(random_matrix(40, 16, 7, device), [1, 2, 40], norm=Norm.after_update)
    ours = copied(job)
    update(rows_triton, ours)
    others = torch.ones(40, dtype=torch.bool, device=device)
    others[job.rows.long()] = False
    for name in (*STATE, "last_step", "shadow"):
        after, before = getattr(ours.matrix, name), getattr(job.matrix, name)
        assert torch.equal(after[others], before[others])
        assert not torch.equal(after[~others], before[~others])


def test_the_norm_pass_says_what_the_update_says(device):
    job = random_job(random_matrix(40, 24, 7, device), [1, 2, 40, 0, CUT], project=True)
    rows_triton.catch_up(job.matrix, job.step._replace(step=7), job.rows)
    first = copied(job)
    rows_triton.gradient_squares(first)
    for name in (*STATE, "last_step"):
        assert torch.equal(getattr(first.matrix, name), getattr(job.matrix, name)), "the norm pass wrote something"
    update(rows_triton, job)
    torch.testing.assert_close(first.squares, job.squares, rtol=1e-6, atol=0)
    plain = copied(first)
    rows.gradient_squares(plain)
    torch.testing.assert_close(plain.squares, job.squares, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize("some", [False, True])
def test_catch_up_and_norms(norm, some, device):
    job = random_job(random_matrix(40, 33, 9, device), [1], step=10, norm=norm)
    job = job._replace(step=job.step._replace(step=9))
    chosen = torch.arange(0, 40, 3, dtype=torch.int32, device=device) if some else None
    job.matrix.last_step[:2] = 9  # nothing to settle there
    # Fresh rows: 0 / 0 is where their drift would go wrong.
    job.matrix.m[3], job.matrix.v[3] = 0, 0
    ours = assert_close_to_plain(lambda module, j: module.catch_up(j.matrix, j.step, chosen), job)
    assert torch.equal(ours.matrix.w[:2], job.matrix.w[:2])
    few = torch.tensor([1, 5], dtype=torch.int32, device=device)
    assert_close_to_plain(lambda module, j: module.normalise_rows(j.matrix, j.step, few), ours)
    assert_close_to_plain(lambda module, j: module.normalise_rows(j.matrix, j.step), ours)


def test_a_row_left_alone_very_long(device):
    job = random_job(random_matrix(4, 20, 3, device), [1, 2, 0, 4], step=3000)
    assert_close_to_plain(update, job)


def test_steps_one_after_the_other_stay_with_plain_torch(device):
    ours = random_matrix(20, 24, 1, device)
    plain = copied(random_job(ours, [1])).matrix
    for step in range(1, 9):
        job = random_job(ours, [1, 2, 5], step=step, norm=Norm.after_update, project=True)
        update(rows_triton, job)
        update(rows, job._replace(matrix=plain))
    for name in STATE:
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_the_same_bits_again_and_whatever_else_is_in_the_batch(options, device):
    job = random_job(random_matrix(15, 70, 7, device), [1, 70, 0, 30, CUT], **options)
    first, second = copied(job), copied(job)
    update(rows_triton, first)
    update(rows_triton, second)
    assert all(torch.equal(getattr(first.matrix, name), getattr(second.matrix, name)) for name in STATE)
    assert torch.equal(first.squares, second.squares)
    # The run of 70 alone: it is cut where it was.
    g, alone = job.gradient, copied(job)
    part = slice(int(g.offsets[1]), int(g.offsets[2]))
    gradient = RowGradient(g.source, g.offsets[1:3] - g.offsets[1], g.row[part].clone(), g.coef[part].clone())
    update(rows_triton, alone._replace(gradient=gradient, rows=job.rows[1:2].clone(), squares=job.squares[1:2].clone()))
    assert torch.equal(alone.matrix.w[job.rows[1]], first.matrix.w[job.rows[1]])


@pytest.mark.parametrize("n", [0, 1, CUT, CUT + 1, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weighted_row_sum(n, dtype, device):
    W = torch.randn(n, 37, device=device).to(dtype)
    ids, coef = torch.randint(max(n, 1), (n,), dtype=torch.int32, device=device), torch.randn(n, device=device)
    for args in ((W,), (W, ids), (W, ids, coef)):
        exact = rows.weighted_row_sum(*(a.double() if a.is_floating_point() else a for a in args))
        torch.testing.assert_close(rows_triton.weighted_row_sum(*args), exact.float(), rtol=1e-5, atol=1e-3)


def lean_matrix(L: int, D: int, step: int, device: torch.device, norms: bool = True) -> LeanMatrix:
    matrix = LeanMatrix.of((torch.randn(L, D, device=device) / D**0.5).bfloat16(), 5, norms=norms)
    matrix.m.copy_(torch.randint(-127, 128, (L, D)))
    matrix.scale.copy_(torch.rand(matrix.scale.shape) * 1e-3)
    matrix.v.copy_(torch.rand(L) * 1e-3)
    matrix.last_step.copy_(torch.randint(0, step, (L,)))
    return matrix


def lean_copy(job: Job) -> Job:
    m = job.matrix
    tensors = (t.clone() for t in (m.w, m.m, m.scale, m.v, m.last_step))
    return job._replace(
        matrix=LeanMatrix(*tensors, m.seed, None if m.norms is None else m.norms.clone()), squares=job.squares.clone()
    )


def assert_same_rounding(ours: LeanMatrix, plain: LeanMatrix) -> None:
    """The same random bits: results differ where sums rounded differently, by one step of the rounding at most."""
    width = -(-plain.w.shape[1] // plain.scale.shape[1])
    quantum = plain.scale.float().repeat_interleave(width, dim=1)[:, : plain.w.shape[1]]
    ids = torch.arange(len(plain.w), device=plain.w.device)
    assert ((rows_lean.moments(ours, ids) - rows_lean.moments(plain, ids)).abs() <= 1.02 * quantum).all()
    assert ((ours.w.float() - plain.w.float()).abs() <= 2**-7 * plain.w.float().abs() + 1e-30).all()
    for name in ("w", "m", "scale"):
        assert (getattr(ours, name) == getattr(plain, name)).float().mean() > 0.98, name
    torch.testing.assert_close(ours.v, plain.v)
    assert torch.equal(ours.last_step, plain.last_step)
    if plain.norms is not None:
        torch.testing.assert_close(ours.norms, plain.norms)


@pytest.mark.parametrize("D", [1, 40, 513])
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_lean_rows(D, options, device):
    """Rows to settle, cut groups and several scale blocks a row, the random bits being plain torch's."""
    job = random_job(random_matrix(12, D, 7, device), [1, 30, 0, CUT, CUT + 1], **options)
    ours = job._replace(matrix=lean_matrix(12, D, 7, device, norms=D != 40))
    plain = lean_copy(ours)
    update(rows_triton, ours)
    update(rows, plain)
    assert_same_rounding(ours.matrix, plain.matrix)
    torch.testing.assert_close(ours.squares, plain.squares, rtol=1e-4, atol=1e-4)
    gradients = lean_copy(ours), lean_copy(ours)
    rows_triton.gradient_squares(gradients[0])
    rows.gradient_squares(gradients[1])
    torch.testing.assert_close(gradients[0].squares, gradients[1].squares, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", list(Norm))
def test_lean_rows_settled(norm, device):
    step = constants(12, norm=norm)
    chosen = torch.tensor([0, 2, 3, 8], dtype=torch.int32, device=device)
    for some in (None, chosen):
        ours = random_job(random_matrix(9, 70, 7, device), [1])._replace(matrix=lean_matrix(9, 70, 11, device))
        plain = lean_copy(ours)
        for module, job in ((rows_triton, ours), (rows, plain)):
            module.catch_up(job.matrix, step, some)
            module.normalise_rows(job.matrix, step, chosen[:2])
        assert_same_rounding(ours.matrix, plain.matrix)


def test_a_learning_rate_of_zero_moves_no_lean_weight(device):
    job = random_job(random_matrix(12, 70, 7, device), [1, 30, 2])
    job = job._replace(matrix=lean_matrix(12, 70, 7, device), step=job.step._replace(lr=0.0, drift=job.step.drift * 0))
    before = job.matrix.w.clone()
    update(rows_triton, job)
    assert torch.equal(job.matrix.w, before)


def test_memory_runs_out_before_the_first_row_is_written(device, monkeypatch):
    """The second job's pieces do not fit: the first job's rows stay as they were."""
    jobs = [random_job(random_matrix(9, 24, 7, device), [1, 700, 5]) for _ in range(2)]
    before = [copied(job) for job in jobs]
    piece_sums, calls = rows_triton._piece_sums, []

    def failing(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError
        return piece_sums(*args)

    monkeypatch.setattr(rows_triton, "_piece_sums", failing)
    with pytest.raises(MemoryError):
        rows_triton.update_rows(jobs)
    for job, was in zip(jobs, before, strict=True):
        assert all(torch.equal(getattr(job.matrix, name), getattr(was.matrix, name)) for name in STATE)


@pytest.mark.gpu
@pytest.mark.parametrize("D", [768, 1001, 4096])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_large(D, options, device):
    lengths = [*torch.randint(0, 40, (5000,)).tolist(), 8192, 3000]
    job = random_job(random_matrix(20000, D, 500, device), lengths, step=501, **options)
    first = assert_close_to_plain(update, job)
    second = copied(job)
    update(rows_triton, second)
    assert all(torch.equal(getattr(first.matrix, name), getattr(second.matrix, name)) for name in STATE)


@pytest.mark.gpu
def test_a_gpus_weights_are_served_by_the_kernels(device):
    assert row_ops(torch.zeros(1, 4, device=device)) is rows_triton
