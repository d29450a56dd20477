"""The row operations where several warps share a row: no races, not even in form, and plain torch's results."""

from collections.abc import Callable

import pytest
import torch

from ptx.emulate import emulated
from saefast.kernels import tuning
from saefast.ops.code import Code, Prefixes
from saefast.optim import lean as rows_lean
from saefast.optim import reference as rows
from saefast.optim import triton as rows_triton
from saefast.optim import triton_batch as batch_triton
from saefast.optim.state import AdamStep, AnyMatrix, DriftTable, Job, LeanMatrix, Matrix, Norm, RowGradient

STEP, L, CUT = 6, 6, 8
OPERATIONS: dict[str, Callable[[object, Job], None]] = {
    "update": lambda module, job: module.update_rows([job]),
    "norm pass": lambda module, job: module.gradient_squares(job._replace(step=job.step._replace(project=True))),
    "settle": lambda module, job: module.catch_up(job.matrix, job.step),
    "unit norm": lambda module, job: module.normalise_rows(job.matrix, job.step, job.rows),
}


@pytest.fixture(autouse=True)
def _cut_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "CUT", CUT)


def matrix(kind: str, D: int, norms: bool) -> AnyMatrix:
    """Weights some of whose rows stand at an earlier step than others."""
    w = torch.randn(L, D) / D**0.5
    if kind == "adam":
        found: AnyMatrix = Matrix.of(w, shadow=True, norms=norms)
        found.m.normal_(std=0.1)
        found.v.uniform_(1e-4, 1e-2)
    else:
        found = LeanMatrix.of(w.bfloat16(), 5, norms=norms)
        found.m.copy_(torch.randint(-127, 128, (L, D)))
        found.scale.copy_(torch.rand(found.scale.shape) * 1e-3)
        found.v.uniform_(1e-4, 1e-3)
    found.last_step.copy_(torch.randint(0, STEP, (L,)))
    return found


def new_job(kind: str, D: int, norm: Norm, M: int = 0) -> Job:
    """Two short groups, one that is cut, and a row that is not there."""
    drift = DriftTable(0.9, 0.999, 1e-8)
    for _ in range(STEP):
        drift.add(1e-3)
    whole = norm != Norm.never
    step = AdamStep(STEP, 0.9, 0.999, 1e-3, 1e-8, drift.drift, drift.drift_eps, project=whole, norm=norm)
    offsets = torch.tensor([0, 2, 2 + CUT + 3, 15, 15], dtype=torch.int32)
    entries = torch.randint(9, (15,), dtype=torch.int32)
    along = torch.randn(4, M) if M else None
    gradient = RowGradient(torch.randn(9, D), offsets, entries, torch.randn(15), along)
    chosen = torch.tensor([0, 2, 5, -1], dtype=torch.int32)
    return Job(matrix(kind, D, whole), step, gradient, chosen, torch.zeros(4))


def there(job: Job) -> Job:
    """A copy without the row that is not there."""
    fields = {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in vars(job.matrix).items()}
    along = job.gradient.along
    gradient = job.gradient._replace(offsets=job.gradient.offsets[:-1], along=None if along is None else along[:-1])
    matrix = type(job.matrix)(**fields)
    return job._replace(matrix=matrix, gradient=gradient, rows=job.rows[:-1], squares=job.squares[:-1].clone())


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize(
    ("kind", "D", "sm"), [("adam", 600, 90), ("lean", 600, 90), ("lean", 768, 80), ("lean", 2304, 90)]
)
def test_warps_that_share_a_row(kind: str, D: int, sm: int, norm: Norm, operation: str) -> None:
    assert tuning.rows(D, True).warps > 1
    ours = new_job(kind, D, norm)
    plain = there(ours)
    OPERATIONS[operation](rows, plain)
    with emulated(sm) as found:
        OPERATIONS[operation](rows_triton, ours)
    assert found.launches
    assert not found.faults, found.faults
    assert not found.formal
    assert_close(ours.matrix, plain.matrix)
    torch.testing.assert_close(ours.squares[:3], plain.squares, rtol=1e-4, atol=1e-4)
    assert ours.squares[3] == 0


@pytest.mark.parametrize("operation", ["update", "norm pass"])
@pytest.mark.parametrize("norm", [Norm.never, Norm.before_update])
@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("kind", ["adam", "lean"])
def test_gradients_along_the_weights(kind: str, M: int, norm: Norm, operation: str) -> None:
    ours = new_job(kind, 600, norm, M)
    plain = there(ours)
    OPERATIONS[operation](rows, plain)
    with emulated(90) as found:
        OPERATIONS[operation](rows_triton, ours)
    assert not found.faults, found.faults
    assert not found.formal
    assert_close(ours.matrix, plain.matrix)
    torch.testing.assert_close(ours.squares[:3], plain.squares, rtol=1e-4, atol=1e-4)


def assert_close(ours: AnyMatrix, plain: AnyMatrix) -> None:
    assert torch.equal(ours.last_step, plain.last_step)
    torch.testing.assert_close(ours.v, plain.v, rtol=1e-5, atol=1e-8)
    if isinstance(ours, LeanMatrix) and isinstance(plain, LeanMatrix):
        # Where sums differ in their last bits, a value is rounded to its other neighbour.
        ids, width = torch.arange(L), -(-plain.w.shape[1] // plain.scale.shape[1])
        step = plain.scale.float().repeat_interleave(width, dim=1)[:, : plain.w.shape[1]]
        assert ((rows_lean.moments(ours, ids) - rows_lean.moments(plain, ids)).abs() <= 1.02 * step).all()
        assert ((ours.w.float() - plain.w.float()).abs() <= 2**-7 * plain.w.float().abs() + 1e-30).all()
        assert min(float((getattr(ours, n) == getattr(plain, n)).float().mean()) for n in ("w", "m", "scale")) > 0.98
    else:
        torch.testing.assert_close(ours.w, plain.w, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.m, plain.m, rtol=1e-5, atol=1e-6)
    if ours.norms is not None:
        torch.testing.assert_close(ours.norms, plain.norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["adam", "lean"])
def test_rows_wider_than_a_program_holds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "MAX_ROW", 1024)
    ours = new_job(kind, 2304, Norm.after_update)
    plain = there(ours)
    rows.update_rows([plain])
    with emulated(90) as found:
        rows_triton.update_rows([ours])
    assert {call.kernel for call in found.calls} == {"piece_sums", "gradient_rows"}
    assert not found.faults, found.faults
    assert not found.formal
    assert_close(ours.matrix, plain.matrix)


@pytest.mark.parametrize(("B", "D"), [(7, 33), (130, 300)])
def test_batch_sums(B: int, D: int) -> None:
    x = torch.randn(B, D) + 10
    with emulated(90) as found:
        variance, squares = batch_triton.batch_sums(x)
    assert not found.faults, found.faults
    assert not found.formal
    wide = x.double()
    torch.testing.assert_close(variance, (wide - wide.mean(0)).square().sum(), rtol=1e-11, atol=0)
    torch.testing.assert_close(squares, wide.square().sum(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("D", [20, 32])
def test_lanes_agree_on_a_sum(D: int, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """decode_loss where a lane holds one column: with products fused into sums across lanes, they do not."""
    monkeypatch.setattr(rows_triton, "FUSION", fused)
    B, K, W = 12, 3, torch.randn(40, D)
    idx = torch.rand(B, 40).topk(K, dim=1).indices.int()
    x, acts, planes = torch.randn(B, D), torch.rand(B, K), torch.empty(2, 1, B, D)
    expected = rows.decode_loss(x, Code(acts, idx), W, None, Prefixes([K], [0.7]), planes[0])
    with emulated(90) as found:
        ours = rows_triton.decode_loss(x, Code(acts, idx), W, None, Prefixes([K], [0.7]), planes[1])
    # Which lane's value stays is the hardware's choice.
    assert bool(found.faults) == fused, found.faults
    assert not found.formal
    torch.testing.assert_close(ours.grad_acts, expected.grad_acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(planes[1], planes[0], rtol=1e-5, atol=1e-5)
