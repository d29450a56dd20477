"""Hot latents: the dense block gives what the sparse path gives, and none are hot unless that is asked for."""

from typing import Any

import pytest
import torch
from classic import CLASSIC
from torch import Tensor

from saefast.engines import hot
from saefast.engines.base import PARAMETERS
from saefast.engines.config import preset
from saefast.engines.fused import FusedEngine
from saefast.models.sae import SAE
from saefast.ops.groups import group_entries

# A share of tokens that no latent exceeds.
NEVER = 1.0
DEVICE = torch.device("cpu")
on_each_device = pytest.mark.usefixtures("on_each_device")
D, L, K, B = 24, 128, 6, 200


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hot, "REFRESH_EVERY", 5)
    monkeypatch.setattr(hot, "COLUMNS", 4)


def batches(n: int, dtype: torch.dtype) -> list[Tensor]:
    """Sources of very different frequency, so that some latents fire on most tokens."""
    sources, share = torch.randn(60, D), torch.logspace(-2.5, -0.2, 60)
    code = torch.rand(n, B, 60) * (torch.rand(n, B, 60) < share)
    return list((code @ sources + 0.05 * torch.randn(n, B, D)).to(DEVICE, dtype))


def engine(data: list[Tensor], share: float | None, **settings: Any) -> FusedEngine:
    dtype = str(data[0].dtype).removeprefix("torch.")
    settings = CLASSIC | dict(lr=1e-3, dead_after=2 * B, dtype=dtype) | settings
    sae_config, config = preset("saefast", D, L, K, **settings)
    found = FusedEngine(SAE(sae_config, seed=1, device=DEVICE), config, 60, settle_every=3, hot_share=share)
    found.initialise(data[0])
    return found


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("max_grad_norm", [None, 0.01])
def test_same_results_as_without(dtype: torch.dtype, max_grad_norm: float | None) -> None:
    data = batches(40, dtype)
    block, plain = (engine(data, share, max_grad_norm=max_grad_norm) for share in (0.05, NEVER))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    for x in data:
        a, b = block.step(x), plain.step(x)
        for name in ("loss", "fvu", "auxk_loss", "grad_norm"):
            assert float(getattr(a, name)) == pytest.approx(float(getattr(b, name)), rel=tolerance), name
    assert block.hot is not None
    assert plain.hot is not None
    assert len(plain.hot.ids) == 0
    assert len(block.hot.ids) >= 8, "nothing was hot, so nothing was tested"
    for name in PARAMETERS:
        a, b = getattr(block.sae, name).detach(), getattr(plain.sae, name).detach()
        assert (a - b).abs().max() <= 10 * tolerance * b.abs().max(), name


@on_each_device
def test_a_dead_latent_is_never_computed_twice() -> None:
    """A latent can be dead and still count as hot for a while: then its gradient must not be split."""
    data = batches(30, torch.float64)
    block, plain = (engine(data, share, dead_after=1, dead_unit="steps", auxk_k=40) for share in (0.01, NEVER))
    skipped = 0
    for x in data:
        assert block.hot is not None
        skipped += bool(block.hot.has(block.dead.since >= 1))
        assert block.step(x).loss == pytest.approx(plain.step(x).loss, rel=1e-10)
    assert skipped > 0


@on_each_device
def test_repeatable_and_resumable() -> None:
    data = batches(20, torch.float32)
    whole, again, first, second = (engine(data, 0.05) for _ in range(4))
    curve = [whole.step(x).loss for x in data]
    assert [again.step(x).loss for x in data] == curve
    for x in data[:12]:
        first.step(x)
    second.sae.load_state_dict(first.sae.state_dict())
    second.load_state_dict(first.state_dict())
    assert [second.step(x).loss for x in data[12:]] == curve[12:]


@on_each_device
def test_a_lean_run_has_hot_latents_too() -> None:
    data = batches(30, torch.float32)
    block, plain = (engine(data, share, optimizer="adam-lean") for share in (0.05, NEVER))
    losses = [(float(block.step(x).loss), float(plain.step(x).loss)) for x in data]
    assert block.hot is not None
    assert len(block.hot.ids) >= 8
    assert losses[-1][0] == pytest.approx(losses[-1][1], rel=0.02)


@on_each_device
def test_no_latent_is_hot_unless_that_is_asked_for() -> None:
    assert engine(batches(1, torch.float32), None).hot is None


def test_picks_the_hottest_in_whole_columns() -> None:
    found = hot.HotLatents(20, 0.2, torch.device("cpu"))
    idx = torch.arange(20, dtype=torch.int32).expand(20, 20)
    on = (torch.arange(20)[:, None] < torch.arange(20)).contiguous()  # latent l fires on l tokens of 20
    for step in range(5):
        rate = found.after(group_entries(idx.flatten(), on.flatten(), 20).counts(20), 20, step)
        found.take(rate, int(found.above(rate, step)), step)
    assert found.ids.tolist() == list(range(8, 20))  # 15 fire on more than 0.2 of the tokens: 12 fill whole columns
    block = found.block(torch.ones(20, 20), idx)
    assert block is not None
    assert torch.equal(block.acts, torch.ones(20, 12))
    assert torch.equal(block.is_hot, idx >= 8)
