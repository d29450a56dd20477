"""What is said of silent latents, against a list of everything that fired."""

from typing import Any

import pytest
import torch

from saefast.engines.config import TrainConfig
from saefast.engines.dead import DeadLatents
from saefast.engines.recipe import choose
from saefast.models.config import SAEConfig
from saefast.ops.code import Code

L, B = 40, 4


def counters(**settings: Any) -> DeadLatents:
    return DeadLatents(L, choose(SAEConfig(8, L, 2), TrainConfig(device="cpu", **settings), n_rows=10_000))


def history(dead: DeadLatents, batches: int, seed: int) -> list[set[int]]:
    """What fires in each batch: latent 0 never, 1 in the first batch alone, the others now and then."""
    generator, fired = torch.Generator().manual_seed(seed), []
    for number in range(batches):
        idx = torch.randint(2, L, (B, 2), generator=generator).int()
        if number == 0:
            idx[0, 0] = 1
        hit = dead.fired(Code(torch.ones(B, 2), idx))
        dead.take(dead.unless(hit, B), hit, B)
        fired.append(set(idx.flatten().tolist()))
    return fired


@pytest.mark.parametrize("unit", ["tokens", "steps"])
@pytest.mark.parametrize("start", [0, -1, -B])
@pytest.mark.parametrize("batches", [1, 2, 3, 7, 16])
def test_silent_is_told_over_a_window_that_has_passed(unit: Any, start: int, batches: int) -> None:
    for limit in (1, 3, 10**6):  # batches after which a latent is dead: some within the run, one far beyond
        after = limit * B if unit == "tokens" else limit
        dead = counters(batch_size=B, dead_unit=unit, dead_start=start, dead_after=after)
        fired = history(dead, batches, seed=batches)
        found = dead.silent(batches * B)
        window = max(min(batches // 2, limit), 1)
        assert found.tokens == window * B
        assert float(found.share) == pytest.approx((L - len(set().union(*fired[-window:]))) / L)
        assert float(found.never) == pytest.approx((L - len(set().union(*fired))) / L)
        assert float(found.never) <= float(found.share)


def test_batches_that_are_cut_short() -> None:
    dead = counters(batch_size=100, dead_after=10_000_000)
    history(dead, 3, seed=0)
    assert dead.silent(3 * B).tokens == 3 * B  # all there were
