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
from saefast.ops.code import Code, Prefixes
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
    """Without the room for more groups that a GPU's have."""
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


def ragged(acts: Tensor, idx: Tensor) -> Code:
    """CSR: the first so many entries of every row, none of the first, all of the second; and padding."""
    counts = torch.randint(0, idx.shape[1] + 1, (len(idx),))
    counts[:1], counts[1:2] = 0, idx.shape[1]
    row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    there = torch.arange(idx.shape[1]) < counts[:, None]
    return Code(*(torch.cat([t[there], t.new_zeros(4)]) for t in (acts, idx)), row_ptr)


class ByPrefixes(torch.autograd.Function):
    """Σ_p weight[p] · Σ e[p]² with the derivatives that a step makes of what decode_loss finds."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, W: Tensor, b: Tensor, x: Tensor, code: Code, prefixes: Prefixes) -> Tensor:
        residual, error = x.new_empty(len(prefixes.bounds), *x.shape), torch.empty_like(x)
        code = code._replace(acts=acts)
        found = rows.decode_loss(x, code, W, b, prefixes, residual, relu=False, error=error)
        # The residual that is reported is the main prefix's.
        torch.testing.assert_close(error.square().sum(1), found.squares[prefixes.main])
        keep = torch.arange(acts.numel()) < (acts.numel() if code.row_ptr is None else code.row_ptr[-1])
        grouped = groups.group_entries(code.idx.flatten(), keep, len(W))
        entries = rows.fill_entries(grouped, [(code, found.grad_acts)], prefixes, len(W))
        source = residual.flatten(0, 1)
        ctx.grad_acts, ctx.grad_b = found.grad_acts, -2 * residual[0].sum(0)
        ctx.grad_W = torch.zeros_like(W)
        gradient = RowGradient(source, grouped.offsets, entries.dec_row, entries.dec_coef)
        ctx.grad_W[grouped.latents.long()] = rows.gradient_rows(gradient)
        ctx.grad_x = 2 * residual[0]
        return sum(w * s.sum() for w, s in zip(prefixes.weight, found.squares, strict=True))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad * ctx.grad_acts, grad * ctx.grad_W, grad * ctx.grad_b, grad * ctx.grad_x, None, None


@pytest.mark.parametrize("csr", [False, True])
@pytest.mark.parametrize("by_latent", [False, True])
@pytest.mark.parametrize("P", [1, 2, 3])
@pytest.mark.parametrize("all_decoded", [False, True])
def test_gradcheck(csr: bool, by_latent: bool, P: int, all_decoded: bool) -> None:
    """Of acts, W_dec, b_dec and x, every prefix with a weight of its own."""
    B, K, L, D = 4, 5, 9, 3
    idx = torch.rand(B, L).topk(K, dim=1).indices.int()
    code = ragged(torch.randn(B, K), idx) if csr else Code(torch.randn(B, K), idx)
    most = (L if by_latent else K) - (0 if all_decoded else 2)
    bounds = [*sorted(torch.randperm(most - 1)[: P - 1].add(1).tolist()), most]
    prefixes = Prefixes(bounds, [0.3, 1.1, 0.7][:P], by_latent, main=P - 1)
    tensors = (code.acts, torch.randn(L, D), torch.randn(D), torch.randn(B, D))
    acts, W, b, x = (t.double().requires_grad_(True) for t in tensors)
    if csr:
        # Padding stays as it is: its activations are 0, and nothing depends on them.
        n = int(code.row_ptr[-1])
        real, padding = acts.detach()[:n].requires_grad_(True), acts.detach()[n:]
        assert torch.autograd.gradcheck(
            lambda a, *rest: ByPrefixes.apply(torch.cat([a, padding]), *rest, code, prefixes), (real, W, b, x)
        )
    else:
        assert torch.autograd.gradcheck(lambda *t: ByPrefixes.apply(*t, code, prefixes), (acts, W, b, x))


def by_definition(x: Tensor, code: Code, W: Tensor, b: Tensor, prefixes: Prefixes, relu: bool) -> tuple[Tensor, ...]:
    """Row by row and entry by entry: squares (P, B), grad_acts, e (P, B, D), prefix of each entry."""
    acts, idx = code.acts.flatten(), code.idx.flatten().tolist()
    ends = code.row_ptr.tolist() if code.row_ptr is not None else [i * code.idx.shape[1] for i in range(len(x) + 1)]
    P, e = len(prefixes.bounds), (x - b).expand(len(prefixes.bounds), *x.shape).clone()
    grad, found = torch.zeros_like(acts), [P] * len(idx)
    for row in range(len(x)):
        for i in range(ends[row], ends[row + 1]):
            key = idx[i] if prefixes.by_latent else i - ends[row]
            found[i] = sum(key >= bound for bound in prefixes.bounds)
            for p in range(found[i], P):
                e[p, row] -= acts[i] * W[idx[i]]
        for i in range(ends[row], ends[row + 1]):
            if acts[i] > 0 or not relu:
                parts = [-2 * w * e[p, row] @ W[idx[i]] for p, w in enumerate(prefixes.weight) if p >= found[i]]
                grad[i] = sum(parts)
    return e.square().sum(2), grad.view_as(code.acts), e, torch.tensor(found)


CODES = ["top-k", "multi", "matryoshka", "aux"]


def decode_problem(B: int, K: int, L: int, D: int, kind: str, csr: bool) -> tuple[Any, ...]:
    acts, idx = code(B, K, L)
    acts = torch.randn(B, K) if kind == "aux" else acts
    bounds = {"multi": [1 + K // 3, 1 + K], "matryoshka": [1 + L // 3, L]}.get(kind, [K])
    prefixes = Prefixes(bounds, [0.5, 0.25][: len(bounds)], kind == "matryoshka", main=len(bounds) - 1)
    given = ragged(acts, idx) if csr else Code(acts, idx)
    return torch.randn(B, D), given, torch.randn(L, D), None if kind == "aux" else torch.randn(D), prefixes


@pytest.mark.parametrize("csr", [False, True])
@pytest.mark.parametrize("kind", [*CODES, "some of no prefix"])
@pytest.mark.parametrize("relu", [False, True])
def test_plain_decode_loss_by_definition(csr: bool, kind: str, relu: bool) -> None:
    x, given, W, b, prefixes = decode_problem(7, 6, 20, 5, kind, csr)
    b = torch.randn(5) if b is None else b
    if kind == "some of no prefix":
        prefixes = Prefixes([2, 4], [0.3, 1.1])
    x, W, b, given = x.double(), W.double(), b.double(), given._replace(acts=given.acts.double())
    squares, grad, e, prefix = by_definition(x, given, W, b, prefixes, relu)
    residual, error = torch.empty_like(e), torch.empty_like(x)
    found = rows.decode_loss(x, given, W, b, prefixes, residual, relu=relu, error=error)
    torch.testing.assert_close(found.squares, squares)
    torch.testing.assert_close(found.grad_acts, grad)
    torch.testing.assert_close(error, e[prefixes.main])
    weighted = torch.tensor(prefixes.weight, dtype=torch.float64)[:, None, None] * e
    torch.testing.assert_close(residual, weighted.flip(0).cumsum(0).flip(0))
    assert torch.equal(prefixes.of(given), prefix)


@on_kernels
@pytest.mark.parametrize(
    ("B", "K", "L", "D"), [(1, 1, 1, 1), (5, 3, 9, 17), (33, 8, 50, 130), (3, 6, 6, 64), (0, 3, 9, 4)]
)
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("csr", [False, True])
def test_decode_loss(kernels: str, B: int, K: int, L: int, D: int, kind: str, csr: bool) -> None:
    args = decode_problem(B, K, L, D, kind, csr)
    if B == 0 and csr:
        args = (args[0], Code(torch.zeros(0), torch.zeros(0).int(), torch.zeros(1).int()), *args[2:])
    results = []
    for module, dtype in ((backend(kernels), torch.float32), (rows, torch.float32), (rows, torch.float64)):
        x, given, W, b, prefixes = args
        given, b = given._replace(acts=given.acts.to(dtype)), None if b is None else b.to(dtype)
        residual, error = torch.empty(len(prefixes.bounds), B, D, dtype=dtype), torch.empty(B, D, dtype=dtype)
        found = module.decode_loss(
            x.to(dtype), given, W.to(dtype), b, prefixes, residual, relu=kind != "aux", error=error
        )
        results.append((found.squares, found.grad_acts, residual, error))
    for ours, plain, exact in zip(*results, strict=True):
        assert ours.shape == exact.shape
        if exact.numel():
            allowed = 2 * (plain - exact).abs().max() + 1e-6 * exact.abs().max()
            assert (ours - exact).abs().max() <= allowed


def decode_by_cpp(given: Code, n_latents: int) -> None:
    x = torch.zeros(given.rows, 4)
    cpp().decode_loss(x, given, torch.zeros(n_latents, 4), None, Prefixes([2], [1.0]), torch.zeros(1, *x.shape))


@needs_cpp
def test_decode_loss_refuses_a_latent_out_of_range() -> None:
    with pytest.raises(IndexError, match=r"idx\[1\] is 9"):
        decode_by_cpp(Code(torch.ones(1, 2), torch.tensor([[0, 9]], dtype=torch.int32)), 9)


@needs_cpp
@pytest.mark.parametrize("row_ptr", [[0, 2, 1], [0, 1, 5], [1, 2, 3], []])
def test_decode_loss_refuses_rows_that_its_entries_do_not_have(row_ptr: list[int]) -> None:
    given = Code(torch.ones(3), torch.zeros(3, dtype=torch.int32), torch.tensor(row_ptr, dtype=torch.int32))
    with pytest.raises(ValueError, match="row_ptr"):
        decode_by_cpp(given if row_ptr else given._replace(row_ptr=torch.zeros(1, dtype=torch.int32)), 9)


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
    """Rows to settle, long groups, projection, clipping and norms, against the plain backend in float64."""
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
@pytest.mark.parametrize("csr", [False, True])
def test_same_bits_on_any_number_of_threads(csr: bool, threads: "itertools.chain[int]") -> None:
    """A latent that fires everywhere included: its group is cut at fixed places."""
    B, K, L, D = 600, 4, 90, 70
    acts, idx = code(B, K, L)
    idx[:, 0] = 7
    given = ragged(acts, idx) if csr else Code(acts, idx)
    x, W, b = torch.randn(B, D), torch.randn(L, D), torch.randn(D)
    job = random_job(random_matrix(400, D), touched=300, entries=3000, project=True, norm=Norm.after_update)
    results = []
    for n in threads:
        torch.set_num_threads(n)
        residual = torch.empty(1, B, D)
        found = cpp().decode_loss(x, given, W, b, Prefixes([K], [0.1]), residual)
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
@pytest.mark.parametrize(
    "prefixes", [Prefixes([5], []), Prefixes([2, 5], []), Prefixes([9, 30], [], True), Prefixes([2, 3], [])], ids=str
)
@pytest.mark.parametrize("more", [[], [3], [3, 2]])
@pytest.mark.parametrize("csr", [False, True])
def test_entries(kernels: str, prefixes: Prefixes, more: list[int], csr: bool) -> None:
    """Rows, weights and sums of every entry: prefixes by place and by latent, entries of none, other parts behind."""
    B, K, L, P = 11, 5, 30, len(prefixes.bounds)
    codes = [ragged(*code(B, K, L)) if csr else Code(*code(B, K, L))]
    codes += [Code(torch.randn(B, n), torch.rand(B, L).topk(n, dim=1).indices.int()) for n in more]
    parts = [(c, torch.randn(c.acts.shape) * (c.acts != 0)) for c in codes]
    each = ([c.acts for c in codes], [c.idx for c in codes], [grad for _, grad in parts])
    flat, ids, grad = (torch.cat([t.flatten() for t in tensors]) for tensors in each)
    grouped = filled(backend(kernels).group_entries(ids, flat != 0, L))
    ours, plain = (module.fill_entries(grouped, parts, prefixes, L) for module in (backend(kernels), rows))
    for name, a, b in zip(ours._fields, ours, plain, strict=True):
        torch.testing.assert_close(a, b, msg=name)
    # By definition: what each flattened entry is.
    wanted = []
    for number, c in enumerate(codes):
        for row in range(B):
            begin, end = c.row_ptr[row : row + 2].tolist() if c.row_ptr is not None else (0, c.idx.shape[1])
            for place in range(end - begin):
                latent = int(c.idx[begin + place] if c.row_ptr is not None else c.idx[row, place])
                key = latent if prefixes.by_latent else place
                plane = P - 1 + number if number else sum(key >= bound for bound in prefixes.bounds)
                wanted.append((row, min(plane, P - 1) if number == 0 else plane, number > 0 or plane < P))
        wanted += [(0, 0, False)] * (c.idx.numel() - (int(c.row_ptr[-1]) if c.row_ptr is not None else c.idx.numel()))
    for i, entry in enumerate(grouped.order.tolist()):
        row, plane, decoded = wanted[entry]
        assert int(ours.enc_row[i]) == row
        assert int(ours.dec_row[i]) == plane * B + row
        assert float(ours.dec_coef[i]) == (-2 * float(flat[entry]) if decoded else 0)
        assert float(ours.enc_coef[i]) == float(grad[entry])
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
