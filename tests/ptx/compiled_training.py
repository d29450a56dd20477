"""Training steps on the emulated GPU against the CPU engine: the drivers, their launches and the compiled kernels.

Everything that a step launches, with the weights' own dtypes: bf16 and int8 in the lean optimiser, hot latents' dense
blocks, sweeps over whole matrices (NORM = 0), AuxK, several prefixes, clipping, averages and every way to keep the
decoder's norm.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from ptx.emulate import emulated
from saefast import hot
from saefast.recipe import preset
from saefast.sae import SAE
from saefast.step import PARAMETERS, FusedStep

D, L, K, B, STEPS = 48, 96, 6, 16, 3
SOON = dict(lr=1e-3, dead_after=2 * B)
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "saefast": ("saefast", SOON),
    "lean": ("saefast", SOON | dict(optimizer="adam-lean")),
    "hot": ("saefast", SOON | dict(max_grad_norm=0.01)),
    "lean and hot": ("saefast", SOON | dict(optimizer="adam-lean")),
    "several prefixes": ("sparsify", SOON | dict(auxk_coef=1 / 32, multi_topk_coef=1 / 8)),
    "norm before the step": ("openai", dict(lr=1e-3, dead_after=2, auxk_k=20, ema_decay=0.9)),
    "acts rescaled": ("saelens", dict(lr=1e-3, dead_after=2)),
    "raw rows": ("saefast", dict(decoder_norm="never", project_decoder_grad=False, auxk_coef=0.0, lr=1e-3)),
}
# Each architecture's code differs in the encoder alone, so most recipes run on one.
CASES = [(90, recipe) for recipe in RECIPES] + [(80, "saefast"), (80, "lean and hot")]


def batches() -> list[Tensor]:
    """Some latents fire on nearly every token, others hardly ever."""
    sources, share = torch.randn(60, D), torch.logspace(-2.5, -0.1, 60)
    code = torch.rand(STEPS, B, 60) * (torch.rand(STEPS, B, 60) < share)
    return list(code @ sources + 0.05 * torch.randn(STEPS, B, D))


def trained(recipe: str, data: list[Tensor]) -> tuple[FusedStep, list[float]]:
    name, settings = RECIPES[recipe]
    sae_config, config = preset(name, D, L, K, engine="fused", **settings)
    share = 0.05 if "hot" in recipe else None
    engine = FusedStep(SAE(sae_config, seed=1), config, STEPS, sweep_every=2, hot_share=share)
    engine.initialise(data[0])
    losses = [float(engine.step(x).loss) for x in data]
    engine.finish()
    return engine, losses


@pytest.fixture(autouse=True)
def _soon_hot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot, "REFRESH_EVERY", 1)
    monkeypatch.setattr(hot, "COLUMNS", 4)


@pytest.mark.parametrize(("sm", "recipe"), CASES)
def test_steps_are_the_cpus(sm: int, recipe: str, seed: int) -> None:
    data = batches()
    expected, curve = trained(recipe, data)
    torch.manual_seed(seed)
    with emulated(sm) as found:
        ours, losses = trained(recipe, data)
    assert not found.faults, found.faults
    assert found.launches > 20
    # Sums of up to D + B terms in another order, and fused multiply-adds: a few roundings of fp32 a step.
    assert losses == pytest.approx(curve, rel=1e-5)
    for name in PARAMETERS:
        a, b = (getattr(engine.sae, name).detach().float() for engine in (ours, expected))
        # A lean weight is rounded stochastically: where sums differ in the last bit, by one step of bf16.
        step = 2**-7 * b.abs() if "lean" in recipe else 0
        assert ((a - b).abs() <= 1e-5 * b.abs().max() + step).all(), name
    if "hot" in recipe:
        assert ours.hot is not None
        assert len(ours.hot.ids) >= 4, "nothing was hot, so nothing was tested"
