"""Training steps on the emulated GPU against the CPU engine: the drivers, their launches and the compiled kernels.

Everything that a step launches, with the weights' own dtypes: bf16 and int8 in the lean optimiser, hot latents' dense
blocks, settling of whole matrices (NORM = 0), AuxK, several prefixes, clipping, averages and every way to keep the
decoder's norm.
"""

import os

import pytest
import torch

from ptx.emulate import emulated
from ptx.scenes import RECIPES, SMALL, batches, soon, trained
from saefast.engines.base import PARAMETERS

# Each architecture's code differs in the encoder alone, so most recipes run on one.
CASES = [(90, recipe) for recipe in RECIPES] + [(80, "saefast"), (80, "lean and hot")]
# A few that go through all that the others do; `make ptx` runs every one.
FEW = ("saefast", "lean and hot", "several prefixes", "norm before the step", "acts rescaled", "raw rows")
if os.environ.get("SAEFAST_PTX") != "all":
    CASES = [case for case in CASES if case[1] in FEW]


@pytest.mark.parametrize(("sm", "recipe"), CASES)
def test_steps_are_the_cpus(sm: int, recipe: str, seed: int) -> None:
    data = batches()
    with soon():
        expected, curve = trained(recipe, data)
    torch.manual_seed(seed)
    with soon(), emulated(sm) as found:
        ours, losses = trained(recipe, data)
    assert not found.faults, found.faults
    assert found.launches > 20
    # Sums of up to D + B terms in another order, and fused multiply-adds: a few roundings of fp32 a step.
    assert losses == pytest.approx(curve, rel=1e-5)
    for name in PARAMETERS:
        a, b = (getattr(engine.sae, name).detach().float() for engine in (ours, expected))
        # A lean weight is rounded stochastically: where sums differ in the last bit, by one step of bf16.
        step = 2**-7 * b.abs() if "lean" in recipe else torch.zeros(())
        # Adam divides a gradient by its own size: where one cancels to its last bits, the weight may move either way.
        assert ((a - b).abs() > 1e-5 * b.abs().max() + step).float().mean() <= 1e-3, name
        assert ((a - b).abs() <= 2 * 1e-3 * SMALL.steps + step).all(), name
    if "hot" in recipe:
        assert ours.hot is not None
        assert len(ours.hot.ids) >= 4, "nothing was hot, so nothing was tested"
