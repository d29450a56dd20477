"""Our step in somebody else's loop: forward, backward, an optimiser and a schedule of torch's, on either device."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saefast.engines.config import preset
from saefast.errors import InputError
from saefast.integrations.fused_step import LedEngine, StepInLoop, replaced, row_major, shared
from saefast.models.sae import SAE

DEVICE = torch.device("cpu")
D, L, K, B = 16, 64, 4, 32
pytestmark = pytest.mark.usefixtures("on_each_device")


def recipe(name: str = "saelens") -> Any:
    return preset(name, D, L, K, dead_after=2)


def batches(n: int = 6) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(B, D, generator=g).to(DEVICE) for _ in range(n)]


def in_loop(name: str = "saelens") -> tuple[SAE, StepInLoop, torch.optim.Adam, Any]:
    sae_config, config = recipe(name)
    sae = SAE(sae_config, seed=0, device=DEVICE)
    step, adam = StepInLoop(sae, config, "this loop"), torch.optim.Adam(sae.parameters(), lr=1e-2)
    step.follow(adam)
    return sae, step, adam, torch.optim.lr_scheduler.LambdaLR(adam, lambda i: 1 / (1 + i))


@pytest.mark.parametrize("name", ["saelens", "dictionary_learning", "sparsify"])
def test_the_loop_does_what_the_engine_does(name: str) -> None:
    """To the bit, at the rates of the loop's schedule; the optimiser has no gradient and no state."""
    sae, step, adam, schedule = in_loop(name)
    engine = LedEngine(SAE(recipe(name)[0], seed=0, device=DEVICE), recipe(name)[1], 100, settle_every=1)
    for i, x in enumerate(batches()):
        engine.rate = 1e-2 / (1 + i)
        stats, seen = engine.step(x), step.look(x)
        loss = step.noted(seen, seen.gradient.loss)
        assert loss.item() == pytest.approx(float(stats.loss), rel=1e-6)
        loss.backward()
        assert all(p.grad is None for p in sae.parameters())
        adam.step()
        schedule.step()
        for ours, theirs in zip(sae.parameters(), engine.sae.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert not adam.state
    assert step.engine.step_count == 6


def test_a_batch_without_backward_does_not_count() -> None:
    """Evaluation in the middle of a loop, and an optimiser that steps without a batch."""
    sae, step, adam, _ = in_loop()
    first, second = batches(2)
    before = sae.W_dec.detach().clone()
    step.look(first)
    adam.step()
    assert torch.equal(sae.W_dec, before)
    seen = step.look(second)
    step.noted(seen, seen.gradient.loss).backward()
    adam.step()
    assert not torch.equal(sae.W_dec, before)
    after = sae.W_dec.detach().clone()
    adam.step()
    assert torch.equal(sae.W_dec, after)


def test_misuse_is_said_in_one_line() -> None:
    _, step, adam, _ = in_loop()
    first, second = batches(2)
    seen = step.look(first)
    with pytest.raises(InputError, match=r"this loop: the loss was multiplied by 0\.5"):
        (step.noted(seen, 1.0) / 2).backward()
    step.look(second)
    with pytest.raises(InputError, match="not the last one"):
        step.noted(seen, 1.0).backward()
    seen = step.look(first)
    step.noted(seen, 1.0).backward()
    with pytest.raises(InputError, match="knows no accumulation"):
        step.look(second)
    adam.step()
    step.look(second)
    first[2, 3] = torch.inf
    with pytest.raises(InputError, match="row 2 of the batch"):
        step.look(first)


def test_transposed_views_are_trained_in_place() -> None:
    """Parameters (D, L) whose storage is ours; a state dict has them row by row."""
    sae_config, config = recipe()
    theirs = nn.Module()
    theirs.W = nn.Parameter(torch.randn(L, D).to(DEVICE).T)
    theirs.register_state_dict_post_hook(row_major)
    other = SAE(sae_config, seed=0, device=DEVICE)
    sae = SAE(sae_config, device="meta")
    shared(sae, {"W_enc": theirs.W.T, "W_dec": other.W_dec, "b_enc": other.b_enc, "b_dec": other.b_dec})
    assert sae.W_enc.data_ptr() == theirs.W.data_ptr()
    before = theirs.W.detach().clone()
    engine = LedEngine(sae, config, 100, settle_every=1)
    engine.rate = 1e-2
    engine.step(batches(1)[0])
    assert not torch.equal(theirs.W, before)
    assert torch.equal(sae.W_enc, theirs.W.T)
    state = theirs.state_dict()["W"]
    assert state.is_contiguous()
    assert torch.equal(state, theirs.W)
    assert not theirs.W.is_contiguous()


def test_replaced_attributes_come_back() -> None:
    module = nn.Linear(2, 2)
    module.kept = "before"
    with replaced(module, kept="now", forward=lambda x: x):
        assert module.kept == "now"
        assert module(3) == 3
    assert module.kept == "before"
    assert "forward" not in vars(module)
    assert module(torch.ones(2)).shape == (2,)
