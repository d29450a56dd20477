"""The fused engine on a GPU that is not there (fake_cuda): how often the host waits for it, and that it steps as a CPU.

A wait is a value read by the host, a size that depends on values, or a copy from the host's memory.
"""

from collections.abc import Iterator
from typing import Any

import fake_cuda
import interp
import pytest
import torch
from classic import CLASSIC
from torch import Tensor

from saefast.engines import auxk_block, hot
from saefast.engines.base import PARAMETERS
from saefast.engines.config import preset
from saefast.engines.fused import FusedEngine
from saefast.errors import InputError
from saefast.models.sae import SAE
from saefast.optim import triton as rows_triton

interp.speed_up()
pytestmark = [
    pytest.mark.skipif(not interp.INTERPRETED, reason="needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
D, L, K, B = 16, 32, 3, 12
# What a step is to contain, and how many steps until it does: the last one is looked at.
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (2, {}),
    "settled": (2, dict(settle_every=2)),
    "all rows": (2, dict(settle_every=1)),
    "hot latents": (4, dict(hot_share=0.05)),
    "hot latents chosen": (6, dict(hot_share=0.05)),
    "AuxK by entries": (3, dict(auxk_coef=1 / 32, dead_after=B)),
    "AuxK by a block": (3, dict(auxk_coef=1 / 32, dead_after=B)),
    "AuxK and hot latents": (4, dict(auxk_coef=1 / 32, dead_after=2 * B, hot_share=0.1, auxk_b_dec_grad=True)),
    "clipped, several prefixes": (2, dict(max_grad_norm=0.01, multi_topk_coef=1 / 8)),
    "lean": (2, dict(optimizer="adam-lean", settle_every=2)),
    "lean, AuxK by entries, clipped": (
        3,
        dict(optimizer="adam-lean", max_grad_norm=0.01, auxk_coef=1 / 32, dead_after=B),
    ),
    "averaged, before the step": (2, dict(ema_decay=0.9, decoder_norm="pre_step", fired_above=1e-3)),
}


@pytest.fixture(autouse=True)
def _soon_hot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot, "REFRESH_EVERY", 3)
    monkeypatch.setattr(hot, "COLUMNS", 4)


@pytest.fixture
def gpu() -> Iterator[fake_cuda.Gpu]:
    with fake_cuda.device() as found:
        yield found


def batches(n: int) -> list[Tensor]:
    """Sources of very different frequency, so that some latents fire on most tokens and others die."""
    sources, share = torch.randn(60, D), torch.logspace(-2.5, -0.2, 60)
    code = torch.rand(n, B, 60) * (torch.rand(n, B, 60) < share)
    return list(code @ sources + 0.05 * torch.randn(n, B, D))


def engine(first: Tensor, *, hot_share: float | None = None, settle_every: int = 1000, **settings: Any) -> FusedEngine:
    settings = CLASSIC | dict(lr=1e-3, dead_after=100 * B, auxk_coef=0.0) | settings
    sae_config, config = preset("saefast", D, L, K, **settings)
    sae = SAE(sae_config, seed=1).to(first.device)
    found = FusedEngine(sae, config, 60, settle_every=settle_every, hot_share=hot_share)
    found.initialise(first)
    return found


def on_gpu(data: list[Tensor]) -> list[Tensor]:
    return [x.to("cuda:0") for x in data]


def weights(engine: FusedEngine) -> dict[str, Tensor]:
    return {name: getattr(engine.sae, name).detach().cpu().float() for name in PARAMETERS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_waits_twice_and_steps_as_a_cpu(kind: str, gpu: fake_cuda.Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, options = KINDS[kind]
    if "by entries" in kind:
        monkeypatch.setattr(auxk_block, "most", lambda device: 0.0)
    data = batches(steps)
    ours, plain = engine(on_gpu(data)[0], **options), engine(data[0], **options)
    for x in data:
        expected, batch = plain.step(x), on_gpu([x])[0]
        gpu.launches.clear()
        with gpu.counting() as waits:
            found = ours.step(batch)
        for figure, value in expected._asdict().items():
            assert float(getattr(found, figure)) == pytest.approx(float(value), rel=2e-5, abs=1e-7), figure
    assert 1 <= sum(waits.values()) <= 2, dict(waits)
    assert not gpu.atomics
    assert_did_what_it_is_called(kind, ours, float(expected.auxk_loss))
    assert (gpu.launches["decode_loss"] == 2) == ("by entries" in kind)
    for name, (a, b) in {name: (w, weights(plain)[name]) for name, w in weights(ours).items()}.items():
        # A lean weight is rounded stochastically: where sums differ in their last bits, by one step of bf16.
        step = 2**-7 * b.abs() if "lean" in kind else 0
        assert ((a - b).abs() <= 2e-5 * b.abs().max() + step).all(), name


@pytest.mark.parametrize("options", [{}, dict(auxk_coef=1 / 32, settle_every=2), dict(optimizer="adam-lean")], ids=str)
def test_steps_that_resample_step_as_a_cpu_and_others_wait_no_more(options: Any, gpu: fake_cuda.Gpu) -> None:
    """Which latents begin anew depends on values: such a step waits for them, every so many steps."""
    data = batches(7)
    settings = dict(dead_after=2 * B, resample_every=3, resample_until=1.0) | options
    ours, plain = engine(on_gpu(data)[0], **settings), engine(data[0], **settings)
    counts, fresh = [], []
    for x in data:
        plain.step(x)
        batch = on_gpu([x])[0]
        with gpu.counting() as waits:
            ours.step(batch)
        counts.append(sum(waits.values()))
        assert torch.equal(ours.dead.age.cpu(), plain.dead.age)
        fresh.append(int((plain.dead.age == 0).sum()))
    assert not gpu.atomics
    assert fresh[2] + fresh[5] >= 3, "no latent was resampled, so nothing was tested"
    assert fresh[:2] + fresh[3:5] + fresh[6:] == [0] * 5
    # The first step of a process also asks the device what it is.
    assert max(counts[1:2] + counts[3:5] + counts[6:]) <= 2
    for name, (a, b) in {name: (w, weights(plain)[name]) for name, w in weights(ours).items()}.items():
        step = 2**-7 * b.abs() if "optimizer" in options else 0
        assert ((a - b).abs() <= 2e-5 * b.abs().max() + step).all(), name


def assert_did_what_it_is_called(kind: str, engine: FusedEngine, auxk: float) -> None:
    if "hot" in kind:
        assert engine.hot is not None
        assert len(engine.hot.ids) >= 4
    assert (auxk > 0) == ("AuxK" in kind)
    assert engine.weights.lean == ("lean" in kind)
    if kind in ("settled", "all rows", "lean"):
        assert (engine.weights.enc.last_step == engine.step_count).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e20])
def test_a_batch_that_is_not_finite_changes_nothing(bad: float, gpu: fake_cuda.Gpu) -> None:
    first, second = batches(2)
    ours = engine(first.to("cuda:0"), auxk_coef=1 / 32, dead_after=B, max_grad_norm=1.0)
    ours.step(first.to("cuda:0"))
    before = {name: t.clone() for name, t in (ours._tensors() | dict(ours.sae.named_parameters())).items()}
    second[3, 1] = bad
    with pytest.raises(InputError, match="not finite at step 1"):
        ours.step(second.to("cuda:0"))
    for name, t in (ours._tensors() | dict(ours.sae.named_parameters())).items():
        assert torch.equal(t, before[name]), name
    assert ours.step_count == 1


def test_what_the_device_counts(gpu: fake_cuda.Gpu) -> None:
    """Each kind of wait is seen, and what does not wait is not counted."""
    host, x = torch.randn(4), torch.arange(4.0, device="cuda:0")
    waiting = [
        lambda: float(x.sum()),
        lambda: bool(x.any()),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: torch.equal(x, x),
        lambda: x.nonzero(),
        lambda: x[x > 1],
        lambda: x.unique(),
        lambda: x.repeat_interleave(x.int()),
        lambda: host.to("cuda:0"),
        lambda: x.copy_(host),
        lambda: torch.tensor([1, 2], device="cuda:0"),
        lambda: x.new_tensor([1.0]),
    ]
    for wait in waiting:
        with gpu.counting() as waits:
            wait()
        assert sum(waits.values()) == 1, waits
    with gpu.counting() as waits:
        y = torch.where(x > 1, x, 0).sort().values + x.new_zeros(4) + torch.full((4,), 2.0, device=x.device)
        y[1] = 3
        y[torch.zeros(2, dtype=torch.int64, device=x.device)] = 1.0
        torch.stack([y.sum(), x.max()]).double().lerp_(x[:2].double(), 0.5)
    assert not waits
    with pytest.raises(AssertionError, match="two devices"):
        x + host


def test_sums_over_any_number_of_rows_wait_for_nothing(gpu: fake_cuda.Gpu) -> None:
    """Where codes are of any length there are other numbers of groups in every step."""
    W, coef = on_gpu([torch.randn(700, D), torch.randn(700)])
    with gpu.counting() as waits:
        for n in (300, 301, 517):
            found = rows_triton.weighted_row_sum(W, torch.arange(n, dtype=torch.int32, device="cuda:0"), coef[:n])
            assert found.shape == (D,)
        assert not waits
