"""Every architecture's first steps on a GPU are those of the CPU, where independent statements hold them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.architecture_kinds import Kind, kinds
from bench.architectures import Settings, begin, synthetic
from saefast.engines.fused import FusedEngine

D, L, B, STEPS, K = 96, 1024, 512, 6, 16
# With half of their latents on they take all of them in chunks (engines/dense_pass.py).
HALF = {name: kind for name, kind in kinds().items() if kind.begins_dense}


def first_steps(kind: Kind, device: str, k: int = K) -> tuple[FusedEngine, list[Any]]:
    x, target, *_ = synthetic(STEPS * B, D).of(kind)
    engine = begin(kind, x.shape[1], k, Settings(L, B, STEPS, (k,), (k,), device))
    engine.initialise(x.to(device), target.to(device))
    batches = zip(x.to(device).split(B), target.to(device).split(B), strict=True)
    return engine, [engine.step(*given) for given in batches]


def assert_as_on_a_cpu(run: Callable[[str], tuple[FusedEngine, list[Any]]]) -> None:
    (ours, found), (plain, wanted) = run("cuda"), run("cpu")
    assert ours.sae.device.type == "cuda"
    for one, other in zip(found, wanted, strict=True):
        # fp32 sums in another order; a latent whose rank that turns costs a millionth of a loss.
        for figure in ("loss", "fvu", "l0"):
            assert float(getattr(one, figure)) == pytest.approx(float(getattr(other, figure)), rel=1e-3), figure
    for engine in (ours, plain):
        engine.finish()
    expected = dict(plain.sae.named_parameters())
    for name, tensor in ours.sae.named_parameters():
        apart = (tensor.detach().cpu() - expected[name].detach()).abs().mean()
        assert apart <= 0.02 * expected[name].detach().abs().mean(), name


@pytest.mark.gpu
@pytest.mark.parametrize("name", kinds())
def test_first_steps(name: str) -> None:
    assert_as_on_a_cpu(lambda device: first_steps(kinds()[name], device))


@pytest.mark.gpu
@pytest.mark.parametrize("name", HALF)
def test_first_steps_with_half_of_all_latents_on(name: str) -> None:
    assert_as_on_a_cpu(lambda device: first_steps(HALF[name], device, k=L // 2))


@pytest.mark.gpu
@pytest.mark.parametrize("name", kinds())
def test_same_bits_again(name: str) -> None:
    (first, one), (second, two) = (first_steps(kinds()[name], "cuda") for _ in range(2))
    assert [float(stats.loss) for stats in one] == [float(stats.loss) for stats in two]
    others = dict(second.sae.named_parameters())
    assert all(torch.equal(tensor, others[key]) for key, tensor in first.sae.named_parameters())
