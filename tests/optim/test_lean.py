"""The lean optimiser: C++ against plain torch, what its rounding does, its bytes, and whole steps with it."""

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from on_gpu import Moved
from torch import Tensor

from saefast import extension
from saefast.engines.base import PARAMETERS
from saefast.engines.config import preset
from saefast.engines.fused import FusedEngine
from saefast.errors import InputError
from saefast.models.sae import SAE
from saefast.optim import lean as rows_lean
from saefast.optim import reference as rows
from saefast.optim.state import LEAN_BLOCK, AdamStep, DriftTable, Job, LeanMatrix, Norm, RowGradient

needs_cpp = pytest.mark.skipif(not extension.available(), reason="needs the C++ extension")


def cpp() -> ModuleType:
    from saefast.optim import native as rows_native

    return rows_native


CPP, GPU = pytest.param("cpp", marks=needs_cpp), pytest.param("gpu", marks=pytest.mark.gpu)
BACKENDS, KERNELS = [CPP, "plain", GPU], [CPP, GPU]
DEVICE = torch.device("cpu")
on_each_device = pytest.mark.usefixtures("on_each_device")


def backend(name: str) -> Any:
    if name == "gpu":
        return Moved(importlib.import_module("saefast.optim.triton"), "cuda")
    return cpp() if name == "cpp" else rows


def matrix_with_past(L: int, D: int, seed: int = 5) -> LeanMatrix:
    matrix = LeanMatrix.of((torch.randn(L, D) / D**0.5).bfloat16(), seed, norms=True)
    matrix.m.copy_(torch.randint(-127, 128, (L, D)))
    matrix.scale.copy_(torch.rand(matrix.scale.shape) * 1e-3)
    matrix.v.copy_(torch.rand(L) * 1e-3)
    matrix.last_step.copy_(torch.randint(0, 7, (L,)))
    return matrix


def constants(step: int, lr: float = 1e-3, **options: Any) -> AdamStep:
    table = DriftTable(0.9, 0.999, 1e-8)
    for _ in range(step - 1):
        table.add(lr)
    return AdamStep(step, 0.9, 0.999, lr, 1e-8, table.drift, table.drift_eps, **options)


def job(matrix: LeanMatrix, step: AdamStep, touched: int = 9) -> Job:
    L, D = matrix.w.shape
    source, n = torch.randn(30, D) * 0.01, torch.arange(0, 3 * touched + 1, 3, dtype=torch.int32)
    gradient = RowGradient(source, n, torch.randint(30, (3 * touched,), dtype=torch.int32), torch.randn(3 * touched))
    latents = torch.randperm(L)[:touched].sort().values.int()
    return Job(matrix, step, gradient, latents, torch.empty(touched))


def copied(one: Job) -> Job:
    m = one.matrix
    assert isinstance(m, LeanMatrix)
    tensors = (t.clone() for t in (m.w, m.m, m.scale, m.v, m.last_step))
    return one._replace(matrix=LeanMatrix(*tensors, m.seed, m.norms.clone()), squares=one.squares.clone())


OPTIONS = [dict(), dict(project=True, norm=Norm.after_update), dict(norm=Norm.before_update, grad_scale=0.1)]


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("D", [1, 40, 513, 1100])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_update(name: str, D: int, options: dict[str, Any]) -> None:
    """The same random bits: results differ by a rounding flip at most where the two round sums differently."""
    ours = job(matrix_with_past(20, D), constants(8, **options))
    plain = copied(ours)
    backend(name).update_rows([ours])
    rows.update_rows([plain])
    a, b = ours.matrix, plain.matrix
    assert isinstance(a, LeanMatrix)
    assert isinstance(b, LeanMatrix)
    ids = torch.arange(20)
    quantum = b.scale.float().repeat_interleave(-(-D // b.scale.shape[1]), dim=1)[:, :D]
    assert ((rows_lean.moments(a, ids) - rows_lean.moments(b, ids)).abs() <= 1.01 * quantum).all()
    assert ((a.w.float() - b.w.float()).abs() <= 2**-7 * b.w.float().abs() + 1e-30).all()
    assert (a.w == b.w).float().mean() > 0.99
    assert (a.m == b.m).float().mean() > 0.99
    torch.testing.assert_close(a.v, b.v)
    torch.testing.assert_close(a.norms, b.norms)
    torch.testing.assert_close(ours.squares, plain.squares)
    assert torch.equal(a.last_step, b.last_step)


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("norm", list(Norm))
def test_catch_up_and_norms(name: str, norm: Norm) -> None:
    ours = job(matrix_with_past(30, 70), constants(12, norm=norm))
    plain = copied(ours)
    for module, one in ((backend(name), ours), (rows, plain)):
        module.catch_up(one.matrix, one.step, one.rows)
        module.normalise_rows(one.matrix, one.step, one.rows[:3])
    a, b = ours.matrix, plain.matrix
    assert (a.w == b.w).float().mean() > 0.99
    assert torch.equal(a.m, b.m)
    torch.testing.assert_close(a.scale.float(), b.scale.float(), rtol=2**-7, atol=0)
    torch.testing.assert_close(a.v, b.v)
    assert torch.equal(a.last_step, b.last_step)


@needs_cpp
def test_a_learning_rate_of_zero_moves_no_weight() -> None:
    """bf16 values are their own rounding, whatever the random bits."""
    one = job(matrix_with_past(20, 64), constants(8, lr=0.0), touched=20)
    before = one.matrix.w.clone()
    cpp().update_rows([one])
    assert torch.equal(one.matrix.w, before)


@pytest.mark.parametrize("name", BACKENDS)
def test_tiny_steps_add_up(name: str) -> None:
    """1000 steps of a hundredth of a bf16 step each: rounding to nearest would stay put."""
    L, D, steps, lr = 4, 256, 1000, 2**-9 / 100
    matrix = LeanMatrix.of(torch.full((L, D), 0.75, dtype=torch.bfloat16), seed=3)
    table = DriftTable(0.0, 0.999, 1e-8)
    n = torch.arange(L + 1, dtype=torch.int32)
    for t in range(1, steps + 1):
        step = AdamStep(t, 0.0, 0.999, lr, 1e-12, table.drift, table.drift_eps)
        gradient = RowGradient(torch.ones(1, D), n, torch.zeros(L, dtype=torch.int32), torch.ones(L))
        backend(name).update_rows([Job(matrix, step, gradient, None, torch.empty(L))])
        table.add(lr)
    moved = 0.75 - matrix.w.float()
    assert float(moved.mean()) == pytest.approx(steps * lr, rel=0.05)
    # Each element walks at random around that: about √(p (1 - p) steps) of its own steps of 2^-8 · 0.75.
    assert 0 < float(moved.std()) < 4 * (0.01 * steps) ** 0.5 * 2**-8


@pytest.mark.parametrize("name", BACKENDS)
def test_the_first_moment_is_unbiased(name: str) -> None:
    """Averaged over rows, and so over random bits, the 8-bit moment is Adam's, small elements beside large ones too."""
    L, D = 2000, 64
    grad = torch.logspace(-4, 0, D)[None]
    matrix = LeanMatrix.of(torch.zeros(L, D, dtype=torch.bfloat16), seed=11)
    table, expected = DriftTable(0.9, 0.999, 1e-8), torch.zeros(D)
    n = torch.arange(L + 1, dtype=torch.int32)
    for t in range(1, 21):
        step = AdamStep(t, 0.9, 0.999, 0.0, 1e-8, table.drift, table.drift_eps)
        gradient = RowGradient(grad, n, torch.zeros(L, dtype=torch.int32), torch.ones(L))
        backend(name).update_rows([Job(matrix, step, gradient, None, torch.empty(L))])
        table.add(0.0)
        expected = 0.9 * expected + 0.1 * grad[0]
    mean = rows_lean.moments(matrix, torch.arange(L)).mean(0)
    noise = float(expected.max()) / 127 / L**0.5
    assert ((mean - expected).abs() <= 6 * noise + 0.005 * expected).all()


def test_the_random_bits_are_spread_and_keyed() -> None:
    ids = torch.arange(300)
    bits = rows_lean.random_bits(1, 2, ids, 400)
    share = torch.stack([(bits >> b & 1).float().mean() for b in range(32)])
    assert ((share - 0.5).abs() < 0.01).all()
    for other in ((2, 2, ids, 400), (1, 3, ids, 400), (1, 2, ids + 300, 400), (1, 2, ids, 400, rows_lean.NORMALISED)):
        assert (rows_lean.random_bits(*other) == bits).float().mean() < 1e-4
    assert len(bits.unique()) > 0.99 * bits.numel()


@pytest.mark.parametrize(("D", "most"), [(768, 3.024), (4096, 3.012), (384, 3.042), (100, 3.2)])
def test_bytes_a_parameter(D: int, most: float) -> None:
    """Weights, moments, scales, steps, and the biases with their moments: everything the optimiser keeps."""
    L = 64
    sae_config, config = preset("saefast", D, L, 8, optimizer="adam-lean")
    engine = FusedEngine(SAE(sae_config, seed=0), config, 10)
    total = sum(matrix.bytes() for matrix in engine.weights.matrices.values()) - 4 * 3 * D  # b_dec does not grow with L
    assert total / (2 * L * D) <= most


def test_blocks_never_cross_rows() -> None:
    """One huge element coarsens its own block and nothing else."""
    D = 2 * LEAN_BLOCK
    matrix = LeanMatrix.of(torch.zeros(3, D, dtype=torch.bfloat16), seed=1)
    grad = torch.full((3, D), 1e-3)
    grad[1, 5] = 1e3
    n = torch.arange(4, dtype=torch.int32)
    one = Job(matrix, constants(1), RowGradient(grad, n, n[:3], torch.ones(3)), None, torch.empty(3))
    rows.update_rows([one])
    expected = 0.1 * grad
    got = rows_lean.moments(matrix, torch.arange(3))
    assert (got[1, 6:LEAN_BLOCK] == 0).all()  # lost beside the huge one, as a shared scale must
    others = torch.ones(3, D, dtype=torch.bool)
    others[1, :LEAN_BLOCK] = False
    torch.testing.assert_close(got[others], expected[others], rtol=0.02, atol=0)


D, L, K, B = 32, 256, 6, 128


def batches(n: int) -> list[Tensor]:
    sources = torch.randn(100, D)
    code = torch.rand(n, B, 100) * (torch.rand(n, B, 100) < 0.05)
    return list((code @ sources + 0.1 * torch.randn(n, B, D) + torch.randn(D)).to(DEVICE))


def engine(first: Tensor, optimizer: str = "adam-lean", name: str = "saefast", **settings: Any) -> FusedEngine:
    settings = dict(lr=1e-3, auxk_coef=1 / 32, dead_after=3 * B, lr_warmup_steps=2) | settings
    if name in ("openai", "saelens"):
        settings["dead_after"] = 3
    sae_config, config = preset(name, D, L, K, optimizer=optimizer, **settings)
    found = FusedEngine(SAE(sae_config, seed=1, device=DEVICE), config, 200, settle_every=4)
    found.initialise(first)
    return found


def everything(one: FusedEngine) -> dict[str, Any]:
    state = one.state_dict() | {name: getattr(one.sae, name).detach() for name in PARAMETERS}
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def assert_identical(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name], name


@on_each_device
@pytest.mark.parametrize("name", ["saefast", "sparsify", "dictionary_learning", "saelens"])
def test_learns_about_as_adam_does(name: str) -> None:
    data = batches(150)
    lean, adam = engine(data[0], name=name), engine(data[0], "adam", name=name)
    losses = [[float(e.step(x).fvu) for x in data] for e in (lean, adam)]
    ours, theirs = (sum(curve[-20:]) / 20 for curve in losses)
    # The first batch may be what the SAE began in; the second is new to it.
    assert theirs < 0.85 * losses[1][1], "adam did not learn either, so nothing was tested"
    assert ours == pytest.approx(theirs, rel=0.1)
    assert lean.sae.dtype == torch.bfloat16
    assert lean.sae.config.dtype == "bfloat16"


@on_each_device
def test_same_bits_again_on_any_threads_and_after_a_resume() -> None:
    data, before, ends = batches(20), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            one = engine(data[0])
            for x in data:
                one.step(x)
            ends.append(everything(one))
    finally:
        torch.set_num_threads(before)
    assert_identical(*ends)
    first, second = engine(data[0]), engine(data[0])
    for x in data[:7]:
        first.step(x)
    saved = everything(first)
    second.sae.load_state_dict({name: saved[name] for name in PARAMETERS})
    second.load_state_dict({name: value for name, value in saved.items() if name not in PARAMETERS})
    for x in data[7:]:
        second.step(x)
    assert_identical(everything(second), ends[0])


@on_each_device
def test_seeds_round_differently() -> None:
    data = batches(3)
    ends = []
    for seed in (0, 1):
        one = engine(data[0], seed=seed)
        for x in data:
            one.step(x)
        ends.append(everything(one)["W_dec"])
    assert not torch.equal(*ends)


@on_each_device
def test_bad_rows_change_nothing() -> None:
    data = batches(4)
    one = engine(data[0])
    for x in data[:3]:
        one.step(x)
    before = everything(one)
    bad = data[3].clone()
    bad[2, 2] = float("nan")
    with pytest.raises(InputError, match="row 2"):
        one.step(bad)
    assert_identical(everything(one), before)


def test_no_average_of_bf16_weights() -> None:
    with pytest.raises(InputError, match="ema_decay needs optimizer='adam'"):
        engine(batches(1)[0], ema_decay=0.9)
