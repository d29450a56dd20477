"""Gradients along the weights' own rows (RowGradient.along) on every backend, against a dense statement."""

import importlib
from types import ModuleType
from typing import Any

import interp
import pytest
import torch
from torch import Tensor

from saefast import extension
from saefast.kernels import tuning
from saefast.optim import lean as rows_lean
from saefast.optim import reference as rows
from saefast.optim.state import AdamStep, AnyMatrix, DriftTable, Job, LeanMatrix, Matrix, Norm, RowGradient

interp.speed_up()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

STEP, L, N, CUT = 8, 14, 5, 12
BETA1, BETA2, LR, EPS = 0.9, 0.99, 1e-2, 1e-8
OPTIONS = [
    dict(),
    dict(norm=Norm.after_update, grad_scale=0.2),
    dict(project=True, norm=Norm.after_update),
    dict(project=True, norm=Norm.before_update, grad_scale=0.3),
    dict(norm=Norm.before_update),
]
needs_cpp = pytest.mark.skipif(not extension.available(), reason="needs the C++ extension")
on_each_backend = pytest.mark.parametrize("name", ["reference", pytest.param("native", marks=needs_cpp), "triton"])


@pytest.fixture
def place(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where a backend's tensors lie. Groups are cut sooner than in earnest by those kernels that cut them."""
    if device.type == "cpu":
        monkeypatch.setattr(tuning, "CUT", CUT)
    return device if name == "triton" else torch.device("cpu")


def backend(name: str) -> ModuleType:
    return importlib.import_module(f"saefast.optim.{name}")


def past_table() -> DriftTable:
    table = DriftTable(BETA1, BETA2, EPS)
    for _ in range(STEP - 1):
        table.add(LR)
    return table


def new_job(D: int, M: int, lean: bool, **options: Any) -> Job:
    """Rows that stand at different steps, of norms other than 1; groups that are empty, short, and cut."""
    w = torch.randn(L, D) * torch.rand(L, 1) * 2
    matrix: AnyMatrix = LeanMatrix.of(w.bfloat16(), 5, norms=True) if lean else Matrix.of(w, shadow=True, norms=True)
    if isinstance(matrix, LeanMatrix):
        matrix.m.copy_(torch.randint(-127, 128, (L, D)))
        matrix.scale.copy_(torch.rand(matrix.scale.shape) * 1e-3)
        matrix.v.uniform_(1e-3, 1e-2)
    else:
        matrix.m.normal_(std=0.1)
        matrix.v.uniform_(1e-3, 1e-2)
    matrix.last_step.copy_(torch.randint(0, STEP, (L,)))
    lengths = torch.tensor([2, 0, CUT + 3, 300, 1])
    n, offsets = int(lengths.sum()), torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    entries = torch.randint(20, (n,), dtype=torch.int32)
    gradient = RowGradient(torch.randn(20, D), offsets, entries, torch.randn(n) / 10, torch.randn(N, M))
    table = past_table()
    step = AdamStep(STEP, BETA1, BETA2, LR, EPS, table.drift, table.drift_eps, **options)
    return Job(matrix, step, gradient, torch.randperm(L)[:N].sort().values.int(), torch.full((N,), torch.nan))


def on(job: Job, device: torch.device) -> Job:
    """A deep copy of a job on a device."""

    def to(value: Any) -> Any:
        return value.to(device, copy=True) if isinstance(value, Tensor) else value

    matrix = type(job.matrix)(**{field: to(value) for field, value in vars(job.matrix).items()})
    gradient, step = RowGradient(*map(to, job.gradient)), AdamStep(*map(to, job.step))
    return Job(matrix, step, gradient, to(job.rows), to(job.squares))


def dense_gradient(job: Job, w: Tensor) -> Tensor:
    """Of Σ coef · source · w + Σ along / 2 · ‖block of w‖², by autograd, at w (N, D) float64."""
    g, at = job.gradient, w.clone().requires_grad_(True)
    assert g.along is not None
    loss, M = at.new_zeros(()), g.along.shape[1]
    for r in range(N):
        part = slice(int(g.offsets[r]), int(g.offsets[r + 1]))
        loss = loss + (g.coef[part].double() @ g.source[g.row[part].long()].double()) @ at[r]
        loss = loss + (g.along[r].double() / 2 * at[r].view(M, -1).square().sum(1)).sum()
    return torch.autograd.grad(loss, at)[0]


def settled(job: Job) -> Job:
    """A copy whose rows stand at the step before, with the plain backend."""
    copy = on(job, torch.device("cpu"))
    rows.catch_up(copy.matrix, copy.step._replace(step=STEP - 1), copy.rows)
    return copy


def unit(w: Tensor) -> Tensor:
    return w / w.norm(dim=1, keepdim=True)


def dense_step(job: Job, w: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Weights, moments and squares after a step of Adam from settled rows, by definition. v (N, D) or (N, 1)."""
    step, grad = job.step, dense_gradient(job, w)
    w = unit(w) if step.norm == Norm.before_update else w
    if step.project:
        grad = grad - (grad * unit(w)).sum(1, keepdim=True) * unit(w)
    squares = grad.square().sum(1)
    grad = grad * step.grad_scale
    m = BETA1 * m + (1 - BETA1) * grad
    square = grad.square() if v.shape == m.shape else grad.square().mean(1, keepdim=True)
    v = BETA2 * v + (1 - BETA2) * square
    w = w - LR * (m / (1 - BETA1**STEP)) / ((v / (1 - BETA2**STEP)).sqrt() + EPS)
    return unit(w) if step.norm == Norm.after_update else w, m, v, squares


@on_each_backend
@pytest.mark.parametrize(("D", "M"), [(1, 1), (24, 3), (130, 1)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_update(name: str, D: int, M: int, options: dict[str, Any], place: torch.device) -> None:
    job = new_job(D, M, False, **options)
    before = settled(job).matrix
    assert isinstance(before, Matrix)
    ids = job.rows.long()
    expected = dense_step(job, *(t[ids].double() for t in (before.w, before.m, before.v)))
    ours = on(job, place)
    backend(name).update_rows([ours])
    for wanted, got in zip(expected, (ours.matrix.w, ours.matrix.m, ours.matrix.v), strict=False):
        torch.testing.assert_close(got[ids.to(place)].cpu().double(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.squares.cpu().double(), expected[3], rtol=1e-4, atol=1e-5)
    others = torch.ones(L, dtype=torch.bool)
    others[ids] = False
    assert torch.equal(ours.matrix.w.cpu()[others], job.matrix.w[others])


@on_each_backend
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("M", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_norm_pass_counts_it(name: str, lean: bool, M: int, options: dict[str, Any], place: torch.device) -> None:
    """gradient_squares of settled rows: by definition, and what the update says."""
    job = settled(new_job(24, M, lean, **options))
    w = job.matrix.w[job.rows.long()].double()
    grad = dense_gradient(job, w)
    if options.get("project"):
        grad = grad - (grad * unit(w)).sum(1, keepdim=True) * unit(w)
    first, second = on(job, place), on(job, place)
    backend(name).gradient_squares(first)
    backend(name).update_rows([second])
    torch.testing.assert_close(first.squares.cpu().double(), grad.square().sum(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.squares, second.squares, rtol=1e-4, atol=1e-5)
    assert torch.equal(first.matrix.w.cpu(), job.matrix.w), "the norm pass wrote something"


@on_each_backend
@pytest.mark.parametrize(("D", "M"), [(24, 3), (1100, 1)])
@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_lean(name: str, D: int, M: int, options: dict[str, Any], place: torch.device) -> None:
    """Weights within one rounding to bfloat16, moments within one step of their 8 bits, the rest as exact as fp32."""
    job = new_job(D, M, True, **options)
    # The definition begins at rows before their rounding, so at rows that stand at the step before.
    job.matrix.last_step.fill_(STEP - 1)
    before = job.matrix
    assert isinstance(before, LeanMatrix)
    ids = job.rows.long()
    w, v = before.w[ids].double(), before.v[ids, None].double()
    w, m, v, squares = dense_step(job, w, rows_lean.moments(before, ids).double(), v)
    ours = on(job, place)
    backend(name).update_rows([ours])
    after = on(ours, torch.device("cpu")).matrix
    assert isinstance(after, LeanMatrix)
    quantum = after.scale[ids].float().repeat_interleave(-(-D // after.scale.shape[1]), dim=1)[:, :D]
    assert ((rows_lean.moments(after, ids) - m).abs() <= 1.02 * quantum).all()
    assert ((after.w[ids].double() - w).abs() <= 2**-7 * w.abs() + 1e-5).all()
    torch.testing.assert_close(after.v[ids].double(), v[:, 0], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(ours.squares.cpu().double(), squares, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lean", [False, True])
def test_rows_wider_than_a_program_holds(lean: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some at a time by plain torch, each with its own part of `along`; a row that is not there is passed over."""
    from saefast.optim import triton as rows_triton

    monkeypatch.setattr(tuning, "MAX_ROW", 16)
    monkeypatch.setattr(rows, "GATHER", 48)
    job = new_job(24, 3, lean, norm=Norm.after_update)
    plain, ours = on(job, torch.device("cpu")), on(job, device)
    g = ours.gradient
    assert g.along is not None
    padded = ours._replace(
        rows=torch.cat([ours.rows, -torch.ones_like(ours.rows[:1])]), squares=torch.zeros(N + 1, device=device),
        gradient=g._replace(offsets=torch.cat([g.offsets, g.offsets[-1:]]), along=torch.cat([g.along, g.along[:1]])),
    )  # fmt: skip
    rows.update_rows([plain])
    rows_triton.update_rows([padded])
    torch.testing.assert_close(padded.squares[:N].cpu(), plain.squares, rtol=1e-4, atol=1e-5)
    apart = (padded.matrix.w.cpu().float() - plain.matrix.w.float()).abs()
    assert (apart <= (2**-7 * plain.matrix.w.float().abs() if lean else 1e-5)).all()


@pytest.mark.parametrize("name", ["reference", pytest.param("native", marks=needs_cpp), "triton"])
@pytest.mark.parametrize("lean", [False, True])
def test_zeros_change_no_bit(name: str, lean: bool, place: torch.device) -> None:
    job = new_job(48, 2, lean, project=True, norm=Norm.after_update)
    found = []
    for along in (None, torch.zeros(N, 2)):
        one = on(job._replace(gradient=job.gradient._replace(along=along)), place)
        backend(name).update_rows([one])
        found.append((one.matrix.w, *one.matrix.state().values(), one.squares))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@needs_cpp
@pytest.mark.parametrize(
    ("along", "message"),
    [
        (torch.zeros(N, 5), "along has 5 columns: expected a divisor of 24"),
        (torch.zeros(N, 0), "along has 0 columns"),
        (torch.zeros(N + 1, 2), "along holds 12 elements: expected 10"),
        (torch.zeros(N, 2).double(), "along"),
    ],
)
def test_cpp_refuses_another_shape(along: Tensor, message: str) -> None:
    job = new_job(24, 2, False)
    with pytest.raises((TypeError, ValueError), match=message):
        backend("native").update_rows([job._replace(gradient=job.gradient._replace(along=along))])


def test_several_blocks_beside_a_wide_row_are_left_to_torch(device: torch.device) -> None:
    """Their moments would not fit in a GPU's registers; the results are the same."""
    from saefast.optim import triton as rows_triton

    job = new_job(2 * tuning.WIDE, 2, False, norm=Norm.after_update)
    assert not rows_triton._serves(job)
    assert rows_triton._serves(job._replace(gradient=job.gradient._replace(along=torch.zeros(N, 1))))
    plain, ours = on(job, torch.device("cpu")), on(job, device)
    rows.update_rows([plain])
    rows_triton.update_rows([ours])
    torch.testing.assert_close(ours.matrix.w.cpu(), plain.matrix.w, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.squares.cpu(), plain.squares, rtol=1e-4, atol=1e-5)
