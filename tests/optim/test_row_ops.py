"""The row operations: C++ against plain torch, plain torch against autograd, the same bits on any number of threads."""

import importlib
import itertools
from types import ModuleType
from typing import Any

import pytest
import torch
from on_gpu import Moved
from torch import Tensor

from saefast import extension
from saefast.ops import groups
from saefast.optim import reference as rows
from saefast.optim.state import AdamStep, DriftTable, Job, Matrix, Norm, RowGradient

needs_cpp = pytest.mark.skipif(not extension.available(), reason="needs the C++ extension")


def cpp() -> ModuleType:
    from saefast.optim import native as rows_native

    return rows_native


CPP, GPU = pytest.param("cpp", marks=needs_cpp), pytest.param("gpu", marks=pytest.mark.gpu)
on_kernels = pytest.mark.parametrize("kernels", [CPP, GPU])


def backend(name: str) -> Any:
    return cpp() if name == "cpp" else Moved(importlib.import_module("saefast.optim.triton"), "cuda")


def code(B: int, K: int, L: int) -> tuple[Tensor, Tensor]:
    """A code with K distinct latents a token, some of its activations zero."""
    idx = torch.rand(B, L).topk(K, dim=1).indices.int()
    return torch.randn(B, K).relu(), idx


def filled(found: groups.Groups) -> groups.Groups:
    """Without the room for more runs that a GPU's have."""
    n = int((found.latents >= 0).sum())
    return groups.Groups(found.order[: int(found.offsets[-1])], found.latents[:n], found.offsets[: n + 1])


@pytest.fixture
def threads() -> "itertools.chain[int]":
    before = torch.get_num_threads()
    yield itertools.chain([1, 2, 3, 5])
    torch.set_num_threads(before)


@on_kernels
@pytest.mark.parametrize(("n", "L"), [(0, 7), (1, 1), (1000, 5), (1000, 3000), (5000, 1 << 23)])
def test_runs(kernels: str, n: int, L: int) -> None:
    idx = torch.randint(L, (n,), dtype=torch.int32)
    keep = torch.rand(n) < 0.7
    ours, plain = filled(backend(kernels).group_entries(idx, keep, L)), groups.group_entries(idx, keep, L)
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert ours.order.dtype == ours.latents.dtype == ours.offsets.dtype == torch.int32
    # Stable: batch order within a run; and every kept entry is in its latent's run.
    for latent, part in zip(ours.latents, torch.tensor_split(ours.order, ours.offsets[1:-1].long()), strict=False):
        assert (part[1:] > part[:-1]).all()
        assert (idx[part.long()] == latent).all()


@needs_cpp
@pytest.mark.parametrize("bad", [-1, 10])
def test_runs_refuse_a_latent_out_of_range(bad: int) -> None:
    idx = torch.tensor([1, bad, 2], dtype=torch.int32)
    with pytest.raises(IndexError, match=rf"idx\[1\] is {bad}, outside \[0, 10\)"):
        cpp().group_entries(idx, torch.ones(3, dtype=torch.bool), 10)


def test_runs_over_all_latents() -> None:
    idx = torch.tensor([4, 1, 4, 0], dtype=torch.int32)
    found = groups.group_entries(idx, torch.ones(4, dtype=torch.bool), 6)
    assert found.over_all(6).tolist() == [0, 1, 2, 2, 2, 4, 4]


def decode_by_autograd(
    x: Tensor, acts: Tensor, idx: Tensor, W: Tensor, b: Tensor, weight: list[float], masks: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss by autograd -> squares (P, B), grad_acts, and dloss / dx_hat of the entries of each prefix, (P, B, D)."""
    acts = acts.clone().requires_grad_(True)
    squares, hats = [], []
    for mask in masks:
        x_hat = torch.einsum("bk,bkd->bd", acts * mask, W[idx.long()]) + b
        x_hat.retain_grad()
        hats.append(x_hat)
        squares.append((x - x_hat).square().sum(1))
    sum(w * s.sum() for w, s in zip(weight, squares, strict=True)).backward()
    grads = [h.grad for h in hats]
    heard = [sum(grads[p:]) for p in range(len(masks))]
    return torch.stack(squares).detach(), acts.grad, torch.stack(heard)


@pytest.mark.parametrize("by_latent", [False, True])
@pytest.mark.parametrize("P", [1, 2, 3])
@pytest.mark.parametrize("relu", [False, True])
def test_plain_decode_loss_is_autograds(by_latent: bool, P: int, relu: bool) -> None:
    B, K, L, D = 7, 6, 20, 5
    acts, idx = code(B, K, L)
    acts = (acts if relu else torch.randn(B, K)).double()
    x, W, b = (torch.randn(*s, dtype=torch.float64) for s in ((B, D), (L, D), (D,)))
    bounds = {1: [K], 2: [2, K], 3: [1, 4, K]}[P] if not by_latent else {1: [L], 2: [8, L], 3: [3, 9, L]}[P]
    weight = [0.3, 1.1, 0.7][:P]
    key = idx.long() if by_latent else torch.arange(K).expand(B, K)
    masks = [(key < bound).double() for bound in bounds]
    squares, grad, heard = decode_by_autograd(x, acts, idx, W, b, weight, masks)
    residual, error = torch.empty(P, B, D, dtype=torch.float64), torch.empty(B, D, dtype=torch.float64)
    found = rows.decode_loss(x, acts, idx, W, b, weight, bounds, residual, by_latent=by_latent, relu=relu, error=error)
    torch.testing.assert_close(found.squares, squares)
    torch.testing.assert_close(found.grad_acts, grad * (acts > 0) if relu else grad)
    torch.testing.assert_close(-2 * residual, heard)
    torch.testing.assert_close(error.square().sum(1), squares[0])


@on_kernels
@pytest.mark.parametrize(("B", "K", "L", "D"), [(1, 1, 1, 1), (5, 3, 9, 17), (33, 8, 50, 130), (3, 6, 6, 64)])
@pytest.mark.parametrize("kind", ["top-k", "multi", "matryoshka", "aux"])
def test_decode_loss(kernels: str, B: int, K: int, L: int, D: int, kind: str) -> None:
    acts, idx = code(B, K, L)
    acts = torch.randn(B, K) if kind == "aux" else acts
    x, W, b = torch.randn(B, D), torch.randn(L, D), torch.randn(D)
    by_latent, relu = kind == "matryoshka", kind != "aux"
    bounds = {"multi": [1 + K // 3, 1 + K], "matryoshka": [1 + L // 3, L + 1]}.get(kind, [K])
    args = (x, acts, idx, W, None if kind == "aux" else b, [0.5, 0.25][: len(bounds)], bounds)
    results = []
    for module, dtype in ((backend(kernels), torch.float32), (rows, torch.float32), (rows, torch.float64)):
        cast = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
        residual, error = torch.empty(len(bounds), B, D, dtype=dtype), torch.empty(B, D, dtype=dtype)
        found = module.decode_loss(*cast, residual, by_latent=by_latent, relu=relu, error=error)
        results.append((found.squares, found.grad_acts, residual, error))
    for ours, plain, exact in zip(*results, strict=True):
        allowed = 2 * (plain - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed


@needs_cpp
def test_decode_loss_refuses_a_latent_out_of_range() -> None:
    idx = torch.tensor([[0, 9]], dtype=torch.int32)
    with pytest.raises(IndexError, match=r"idx\[1\] is 9"):
        cpp().decode_loss(
            torch.zeros(1, 4), torch.ones(1, 2), idx, torch.zeros(9, 4), None, [1.0], [2], torch.zeros(1, 1, 4)
        )


@on_kernels
def test_sums(kernels: str) -> None:
    x = torch.randn(700, 37) + 3
    variance, squares = backend(kernels).batch_sums(x)
    wide = x.double()
    assert float(variance) == pytest.approx(float((wide - wide.mean(0)).square().sum()), rel=1e-12)
    assert float(squares) == pytest.approx(float(wide.square().sum()), rel=1e-12)
    ids, coef = torch.randint(700, (900,), dtype=torch.int32), torch.randn(900)
    for args in ((x,), (x, ids), (x, ids, coef)):
        exact = rows.weighted_row_sum(*(a.double() if a.is_floating_point() else a for a in args))
        torch.testing.assert_close(backend(kernels).weighted_row_sum(*args), exact.float(), rtol=1e-5, atol=1e-3)


def table(steps: int, lr: float = 1e-3) -> DriftTable:
    found = DriftTable(0.9, 0.999, 1e-8)
    for _ in range(steps):
        found.add(lr)
    return found


def random_matrix(L: int, D: int, dtype: torch.dtype = torch.float32, step: int = 7) -> Matrix:
    """Weights with a past: some rows stand at an earlier step than others."""
    matrix = Matrix.of(torch.randn(L, D, dtype=dtype), shadow=dtype == torch.float32, norms=True)
    matrix.m.copy_(torch.randn(L, D) * 0.1)
    matrix.v.copy_(torch.rand(L, D) * 0.01)
    matrix.last_step.copy_(torch.randint(0, step, (L,)))
    return matrix


def random_job(matrix: Matrix, touched: int, entries: int, step: int = 8, **options: object) -> Job:
    L, D = matrix.w.shape
    dtype = matrix.w.dtype
    latents = torch.randperm(L)[:touched].sort().values.int()
    owner = torch.cat(
        [torch.arange(touched), torch.randint(touched, (entries,)), torch.zeros(entries, dtype=torch.int64)]
    )
    counts = torch.bincount(owner, minlength=touched)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    source = torch.randn(50, D).to(dtype)
    gradient = RowGradient(
        source, offsets, torch.randint(50, (len(owner),), dtype=torch.int32), torch.randn(len(owner)).to(dtype)
    )
    drift = table(step - 1)
    constants = AdamStep(step, 0.9, 0.999, 1e-3, 1e-8, drift.drift, drift.drift_eps, **options)
    return Job(matrix, constants, gradient, latents, torch.empty(touched, dtype=dtype))


def copied(job: Job, dtype: torch.dtype) -> Job:
    def cast(t: Tensor | None) -> Tensor | None:
        return t if t is None or t.dtype in (torch.int32, torch.bfloat16) else t.to(dtype)

    m = job.matrix
    matrix = Matrix(*(None if t is None else cast(t).clone() for t in (m.w, m.m, m.v, m.last_step, m.shadow, m.norms)))
    return job._replace(
        matrix=matrix, gradient=RowGradient(*(cast(t) for t in job.gradient)), squares=job.squares.to(dtype)
    )


OPTIONS = [
    dict(),
    dict(project=True, norm=Norm.after_update),
    dict(project=True, norm=Norm.before_update, grad_scale=0.3),
    dict(norm=Norm.after_update, grad_scale=0.01),
]


@on_kernels
@pytest.mark.parametrize("D", [1, 19, 64, 130])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_update_rows(kernels: str, D: int, options: dict[str, object]) -> None:
    """Sleeping rows, long runs, projection, clipping and norms, against the plain backend in float64."""
    job = random_job(random_matrix(40, D), touched=23, entries=700, **options)
    wide = copied(job, torch.float64)
    narrow = copied(job, torch.float32)
    backend(kernels).update_rows([job])
    rows.update_rows([wide])
    rows.update_rows([narrow])
    for name in ("w", "m", "v", "norms"):
        ours, plain, exact = (getattr(j.matrix, name) for j in (job, narrow, wide))
        allowed = 2 * (plain - exact).abs().max() + 1e-6 * exact.abs().max()
        assert (ours - exact).abs().max() <= allowed, name
    assert torch.equal(job.matrix.last_step, wide.matrix.last_step)
    torch.testing.assert_close(job.squares.double(), wide.squares, rtol=1e-4, atol=1e-4)
    assert torch.equal(job.matrix.shadow, job.matrix.w.bfloat16())


@on_kernels
def test_untouched_rows_stay_untouched(kernels: str) -> None:
    job = random_job(random_matrix(40, 16), touched=11, entries=30, norm=Norm.after_update)
    before = copied(job, torch.float32)
    backend(kernels).update_rows([job])
    others = torch.ones(40, dtype=torch.bool)
    others[job.rows.long()] = False
    for name in ("w", "m", "v", "last_step", "norms"):
        assert torch.equal(getattr(job.matrix, name)[others], getattr(before.matrix, name)[others])
        assert not torch.equal(getattr(job.matrix, name)[~others], getattr(before.matrix, name)[~others])


@on_kernels
def test_the_norm_pass_says_what_the_update_says(kernels: str) -> None:
    job = random_job(random_matrix(40, 24), touched=23, entries=700, project=True)
    before = copied(job, torch.float32)
    backend(kernels).catch_up(job.matrix, job.step._replace(step=7), job.rows)
    first = job._replace(squares=torch.empty_like(job.squares))
    backend(kernels).gradient_squares(first)
    backend(kernels).update_rows([job])
    assert torch.equal(first.squares, job.squares)
    rows.catch_up(before.matrix, before.step._replace(step=7), before.rows)
    rows.gradient_squares(before)
    torch.testing.assert_close(before.squares, job.squares, rtol=1e-4, atol=1e-4)


@on_kernels
@pytest.mark.parametrize("norm", list(Norm))
def test_catch_up_and_norms(kernels: str, norm: Norm) -> None:
    L, D = 40, 33
    for chosen in (None, torch.arange(0, L, 3, dtype=torch.int32)):
        ours = random_matrix(L, D)
        drift = table(9)
        step = AdamStep(9, 0.9, 0.999, 1e-3, 1e-8, drift.drift, drift.drift_eps, norm=norm)
        plain = copied(Job(ours, step, RowGradient(*[torch.empty(0)] * 4), None, torch.empty(0)), torch.float32).matrix
        backend(kernels).catch_up(ours, step, chosen)
        rows.catch_up(plain, step, chosen)
        backend(kernels).normalise_rows(ours, step, torch.tensor([1, 5], dtype=torch.int32))
        rows.normalise_rows(plain, step, torch.tensor([1, 5], dtype=torch.int32))
        for name in ("w", "m", "v", "norms"):
            torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=1e-5, atol=1e-6)
        assert torch.equal(ours.last_step, plain.last_step)
        assert torch.equal(ours.shadow, ours.w.bfloat16())


@needs_cpp
def test_same_bits_on_any_number_of_threads(threads: "itertools.chain[int]") -> None:
    """A latent that fires everywhere included: its run is cut at fixed places."""
    B, K, L, D = 600, 4, 90, 70
    acts, idx = code(B, K, L)
    idx[:, 0] = 7
    x, W, b = torch.randn(B, D), torch.randn(L, D), torch.randn(D)
    job = random_job(random_matrix(400, D), touched=300, entries=3000, project=True, norm=Norm.after_update)
    results = []
    for n in threads:
        torch.set_num_threads(n)
        residual = torch.empty(1, B, D)
        found = cpp().decode_loss(x, acts, idx, W, b, [0.1], [K], residual)
        mine = copied(job, torch.float32)
        cpp().update_rows([mine])
        sums = cpp().weighted_row_sum(x), torch.tensor(cpp().batch_sums(x))
        results.append([*found, residual, mine.matrix.w, mine.matrix.v, mine.squares, *sums])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradient_rows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    job = random_job(random_matrix(40, 8), touched=23, entries=100)
    whole = rows.gradient_rows(job.gradient)
    monkeypatch.setattr(rows, "GATHER", 24)
    torch.testing.assert_close(rows.gradient_rows(job.gradient), whole)


@on_kernels
@pytest.mark.parametrize("bounds", [[5], [2, 5]])
@pytest.mark.parametrize("aux", [0, 3])
def test_entries(kernels: str, bounds: list[int], aux: int) -> None:
    """Rows, weights and sums of every entry, for a code with nested prefixes and one with AuxK's entries behind it."""
    B, K, L = 11, 5, 30
    acts, idx = code(B, K, L)
    extra_acts, extra_idx = torch.randn(B, aux), torch.rand(B, L).topk(aux, dim=1).indices.int()
    flat = torch.cat([acts.flatten(), extra_acts.flatten()])
    ids = torch.cat([idx.flatten(), extra_idx.flatten()])
    grad = torch.randn(len(flat)) * (flat != 0)
    grouped = filled(backend(kernels).group_entries(ids, flat != 0, L))
    columns = [K, aux] if aux else [K]
    ours = backend(kernels).fill_entries(grouped, flat, grad, columns, bounds, B, L)
    plain = rows.fill_entries(grouped, flat, grad, columns, bounds, B, L)
    for name, a, b in zip(ours._fields, ours, plain, strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for i, e in enumerate(grouped.order.tolist()):
        token, plane = (e // K, int(e % K >= bounds[0])) if e < B * K else ((e - B * K) // aux, len(bounds))
        assert int(ours.enc_row[i]) == token
        assert int(ours.dec_row[i]) == plane * B + token
        assert float(ours.dec_coef[i]) == -2 * float(flat[e])
    torch.testing.assert_close(ours.grad_by_latent, torch.zeros(L).index_add(0, ids.long(), grad))


def test_what_another_device_wrote_comes_back() -> None:
    """The go-between of the gpu variants above, from one device to itself: results, and what is written in place."""
    job = random_job(random_matrix(40, 8), touched=23, entries=100, norm=Norm.after_update)
    alone = copied(job, torch.float32)
    Moved(rows, "cpu").update_rows([job])
    rows.update_rows([alone])
    for name in ("w", "m", "v", "norms", "last_step", "shadow"):
        assert torch.equal(getattr(job.matrix, name), getattr(alone.matrix, name)), name
    assert torch.equal(job.squares, alone.squares)
    assert Moved(rows, "cpu").batch_sums(job.gradient.source) == rows.batch_sums(job.gradient.source)
