"""Row-wise Adam against dense Adam: to the bit where every row fires, within a stated bound where some rest."""

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saefast import extension
from saefast.errors import InputError
from saefast.optim import reference as rows
from saefast.optim.state import AdamStep, DriftTable, Job, Matrix, RowGradient

needs_cpp = pytest.mark.skipif(not extension.available(), reason="needs the C++ extension")


def cpp() -> ModuleType:
    from saefast.optim import native as rows_native

    return rows_native


class Rows:
    """Adam on the rows of one matrix that get a gradient, on a backend."""

    def __init__(self, w: Tensor, backend: ModuleType, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8):
        self.matrix, self.backend, self.betas, self.eps = Matrix.of(w.clone()), backend, betas, eps
        self.table, self.t = DriftTable(*betas, eps), 0

    def constants(self, step: int, lr: float) -> AdamStep:
        return AdamStep(step, *self.betas, lr, self.eps, self.table.drift, self.table.drift_eps)

    def step(self, grad: Tensor, ids: Tensor, lr: float) -> None:
        """grad (n, D) for rows ids (n,)."""
        self.t += 1
        if len(ids):
            n = torch.arange(len(ids) + 1, dtype=torch.int32)
            gradient = RowGradient(grad, n, n[:-1], torch.ones(len(ids), dtype=grad.dtype))
            job = Job(self.matrix, self.constants(self.t, lr), gradient, ids.int(), grad.new_empty(len(ids)))
            self.backend.update_rows([job])
        self.table.add(lr)

    def settle(self) -> None:
        self.backend.catch_up(self.matrix, self.constants(self.t, 0.0))


class RoundedSqrt(TorchFunctionMode):
    """Square roots rounded correctly. torch's own fp32 ones, from MKL, are off in the last bit for 20 % of inputs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.sqrt:
            return args[0].double().sqrt().to(args[0].dtype)
        return func(*args, **(kwargs or {}))


@needs_cpp
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.99), (0.0, 0.9), (0.3, 0.95)])
@pytest.mark.parametrize("kind", ["fused", "single tensor"])
def test_bit_equal_to_dense_adam(betas: tuple[float, float], kind: str) -> None:
    """Every row fires at every step: torch.optim.Adam's own arithmetic, over a schedule of learning rates."""
    # torch's fused kernel rounds the last few of its elements, which do not fill a vector, in another order.
    L, D, steps = 37, 64 if kind == "fused" else 67, 60
    start = torch.randn(L, D)
    dense = torch.nn.Parameter(start.clone())
    options = dict(fused=True) if kind == "fused" else dict(foreach=False)
    adam = torch.optim.Adam([dense], betas=betas, **options)
    ours = Rows(start, cpp(), betas)
    for t in range(steps):
        grad = torch.randn(L, D) * torch.rand(L, 1) ** 4
        adam.param_groups[0]["lr"] = lr = 1e-2 * (1 - t / steps)
        dense.grad = grad.clone()
        with RoundedSqrt():
            adam.step()
        ours.step(grad, torch.arange(L), lr)
        assert torch.equal(ours.matrix.w, dense)
    assert torch.equal(ours.matrix.m, adam.state[dense]["exp_avg"])
    assert torch.equal(ours.matrix.v, adam.state[dense]["exp_avg_sq"])


def test_every_operation_is_torchs_own() -> None:
    """Tells whether MKL's square root is still the one thing RoundedSqrt has to stand in for."""
    values = torch.rand(4096) + 1e-3
    exact = values.double().sqrt().float()
    assert (values.sqrt() - exact).abs().max() <= exact.max() * 2**-23


BACKENDS = [pytest.param("cpp", marks=needs_cpp), "plain"]


def dense_reference(
    start: Tensor, grads: list[Tensor], lrs: list[float], betas: tuple[float, float], eps: float
) -> Tensor:
    """Dense Adam in float64, written out."""
    w, m, v = start.double(), torch.zeros_like(start, dtype=torch.float64), torch.zeros_like(start, dtype=torch.float64)
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), 1):
        m = betas[0] * m + (1 - betas[0]) * g.double()
        v = betas[1] * v + (1 - betas[1]) * g.double() ** 2
        w = w - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return w


def rarely_fired(
    backend: str, betas: tuple[float, float], eps: float, scale: float, steps: int = 120
) -> tuple[Tensor, Tensor]:
    """Rows that fire with shares from always to almost never, over a schedule; ours settled, and dense Adam's."""
    L, D = 24, 9
    start = torch.randn(L, D)
    share = torch.linspace(0, 1, L) ** 3
    ours = Rows(start.double() if backend == "plain" else start, rows if backend == "plain" else cpp(), betas, eps)
    grads, lrs = [], []
    for t in range(steps):
        fires = torch.rand(L) < share
        fires[0] = t == 0
        grad = torch.randn(L, D) * fires[:, None] * scale
        lr = 0.0 if t == 0 else 1e-2 * min(1, t / 20) * (1 - t / steps)
        grads.append(grad)
        lrs.append(lr)
        ids = fires.nonzero().squeeze(1)
        ours.step(grad[ids].to(ours.matrix.w.dtype), ids, lr)
    ours.settle()
    return ours.matrix.w.double() - start, dense_reference(start, grads, lrs, betas, eps) - start


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)])
def test_rows_left_alone_end_where_dense_adam_takes_them(backend: str, betas: tuple[float, float]) -> None:
    """With eps small against √v the closed form is exact: only rounding is left, one of a weight's size a step."""
    ours, dense = rarely_fired(backend, betas, eps=1e-8, scale=1.0)
    assert (ours - dense).abs().max() <= (1e-9 if backend == "plain" else 120 * 2**-24 * 4)
    assert dense.abs().max() > 0.05


@pytest.mark.parametrize("eps", [1e-6, 1e-4, 1e-2, 1.0])
def test_eps_enters_to_first_order(eps: float) -> None:
    """The stated bound: the drift errs by at most a share eps / (√v + eps), and by far less where eps is small."""
    ours, dense = rarely_fired("plain", (0.9, 0.999), eps=eps, scale=1.0)
    share = eps / (0.03 + eps)  # √v is about √(1 - β2) = 0.03 after one gradient of size 1
    assert (ours - dense).abs().max() <= share**2 * dense.abs().max() + 1e-9


def test_a_row_left_alone_for_the_whole_run_gets_all_its_drift() -> None:
    """One gradient, then nothing: the weight travels lr · r / (1 - r) further, which is where dense Adam takes it."""
    start = torch.zeros(1, 1, dtype=torch.float64)
    ours = Rows(start, rows, eps=1e-16)
    for t in range(2000):
        ours.step(torch.ones(int(t == 1000), 1, dtype=torch.float64), torch.arange(int(t == 1000)), 1e-3)
    r = 0.9 / math.sqrt(0.999)
    moved_at_once = -float(ours.matrix.w)
    ours.settle()
    assert -float(ours.matrix.w) / moved_at_once == pytest.approx(1 / (1 - r), rel=5e-3)  # bias corrections still move
    assert int(ours.matrix.last_step) == 2000
    assert float(ours.matrix.m) == pytest.approx(0.1 * 0.9**999, rel=1e-9)
    assert float(ours.matrix.v) == pytest.approx(0.001 * 0.999**999, rel=1e-9)


def test_the_table_is_the_sum_it_claims_to_be() -> None:
    """Against the sum written out, past the first 1024 steps, for a schedule with zeros."""
    beta1, beta2, eps, steps = 0.9, 0.999, 1e-3, 1500
    lrs = [0.0 if t % 7 == 0 else 1e-3 * (1 + math.sin(t)) for t in range(1, steps + 1)]
    table = DriftTable(beta1, beta2, eps)
    for lr in lrs:
        table.add(lr)
    r = beta1 / math.sqrt(beta2)
    for s in (0, 3, 600, 1100, 1023, 1024, steps - 1):
        c2 = [1 - beta2**t for t in range(s + 1, steps + 1)]
        weight = [lrs[t - 1] * math.sqrt(1 - beta2**t) / (1 - beta1**t) * r ** (t - s) for t in range(s + 1, steps + 1)]
        inner = sum(w * math.sqrt(c) * beta2 ** (-n / 2) for n, (w, c) in enumerate(zip(weight, c2, strict=True), 1))
        assert float(table.drift[s]) == pytest.approx(sum(weight), rel=1e-12)
        assert float(table.drift_eps[s]) == pytest.approx(eps * inner / sum(weight), rel=1e-12)
    assert float(table.drift[steps]) == 0


def test_the_table_comes_back_bit_for_bit() -> None:
    first, second = DriftTable(0.9, 0.999, 1e-8), DriftTable(0.9, 0.999, 1e-8)
    for t in range(1300):
        first.add(1e-3 / (t + 1))
    second.load(first.state())
    for table in (first, second):
        for t in range(900):
            table.add(1e-4 * (t % 3))
    assert torch.equal(first.state(), second.state())
    assert torch.equal(first.drift[:2201], second.drift[:2201])
    assert torch.equal(first.drift_eps[:2200], second.drift_eps[:2200])


class Made(TorchDispatchMode):
    """Counts the elements that torch's operations write."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.elements += sum(t.numel() for t in tree_leaves(found) if isinstance(t, Tensor))
        return found


def test_a_step_costs_the_table_as_much_in_a_long_run_as_in_a_short_one() -> None:
    made = []
    for steps in (1_500, 300_000):
        table = DriftTable(0.9, 0.999, 1e-8)
        table.load(torch.ones(2, steps + 1, dtype=torch.float64))
        with Made() as mode:
            table.add(1e-3)
            _ = table.drift, table.drift_eps
        made.append(mode.elements)
    assert 0 < made[0] == made[1] <= 20 * table.window


def test_a_table_of_another_shape_is_refused() -> None:
    with pytest.raises(InputError, match="drift is"):
        DriftTable(0.9, 0.999, 1e-8).load(torch.zeros(3, 4, dtype=torch.float64))


@needs_cpp
def test_a_row_without_a_past_stays_where_it_is() -> None:
    start = torch.randn(5, 3)
    ours = Rows(start, cpp())
    for _ in range(10):
        ours.step(torch.empty(0, 3), torch.arange(0), 1e-2)
    ours.settle()
    assert torch.equal(ours.matrix.w, start)
