"""Resampling at inputs as published: who is drawn, what a latent begins with, both engines alike, exact resuming."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import saefast
from saefast.engines.autograd import AutogradEngine
from saefast.engines.config import TrainConfig
from saefast.engines.draw import Draw
from saefast.engines.fused import FusedEngine
from saefast.engines.recipe import choose
from saefast.engines.resample import due, next_due, steps_to_draw
from saefast.errors import InputError
from saefast.models.architecture import Block
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

D, L, K, B, TOTAL, AT = 12, 48, 4, 32, 20, (8, 16)
BASE: dict[str, Any] = dict(
    lr=1e-3, lr_warmup_steps=0, dead_unit="steps", dead_after=4, batch_size=B, resample="inputs", resample_steps=AT,
    resample_rows=3 * B, fit_encoder=False, beta1=0.9, settle_every=1,
)  # fmt: skip
SAES: dict[str, dict[str, Any]] = {
    "relu": dict(activation="relu"),
    "topk": {},
    "batchtopk": dict(activation="batchtopk"),
}


def batches(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    sources = torch.randn(40, D)
    code = torch.rand(TOTAL, B, 40) * (torch.rand(TOTAL, B, 40) < 0.1)
    return list((code @ sources + 0.1 * torch.randn(TOTAL, B, D) + torch.randn(D)).to(dtype))


def engine(kind: str, first: Tensor, sae: dict[str, Any], **settings: Any) -> Any:
    """A third of its latents never fires until it begins anew. kind: "fused", "autograd" or "lean"."""
    lean = kind == "lean"
    dtype = "bfloat16" if lean else str(first.dtype).removeprefix("torch.")
    config = TrainConfig(**BASE | dict(optimizer="adam-lean" if lean else "adam") | settings)
    made = AutogradEngine if kind == "autograd" else FusedEngine
    found = made(SAE(SAEConfig(D, L, K, dtype=dtype, **sae), seed=1), config, TOTAL)
    found.initialise(first.float() if lean else first)
    biases = found.weights.matrices["b_enc"].w[0] if lean else found.sae.b_enc.data
    biases[::3] -= 50.0
    if lean:
        found.weights.copy_biases()
    return found


def step(one: Any, x: Tensor) -> Tensor:
    """The ids of the latents that began anew in it."""
    one.step(x)
    return (one.dead.age == 0).nonzero().flatten()


@pytest.mark.parametrize("name", SAES)
@pytest.mark.parametrize("kind", ["fused", "autograd"])
def test_latents_begin_at_inputs_as_published(kind: str, name: str) -> None:
    """Against the appendix: rows of the last three batches by their loss, norms, bias, moments, and no one else."""
    data = batches()
    one = engine(kind, data[0], SAES[name])
    losses = []
    for x in data[: AT[0]]:
        with torch.no_grad():
            losses.append((x - one.sae(x).x_hat).square().sum(1))
        before = {name: p.detach().clone() for name, p in one.sae.named_parameters()}
        ids = step(one, x)
    assert len(ids) >= 10
    assert set(ids.tolist()) <= set(range(0, L, 3))
    sae, near = one.sae, torch.cat(data[AT[0] - 3 : AT[0]])
    cosine = normalize(sae.W_dec.detach()[ids], dim=1) @ normalize(near, dim=1).T
    assert (cosine.max(1).values > 1 - 1e-6).all(), "a decoder row is no input of the last three batches"
    assert len(cosine.argmax(1).unique()) == len(ids)
    torch.testing.assert_close(sae.W_dec.detach()[ids].norm(dim=1), torch.ones(len(ids)).double(), rtol=1e-6, atol=0)
    alive = ~one.dead.mask(one.dead.since)
    norm = 0.2 * sae.W_enc.detach()[alive].norm(dim=1).mean()
    torch.testing.assert_close(sae.W_enc.detach()[ids], norm * sae.W_dec.detach()[ids], rtol=1e-5, atol=1e-7)
    assert (sae.b_enc.detach()[ids] == 0).all()
    state = one.state_dict()
    for parameter in ("W_enc", "W_dec", "b_enc"):
        for moment in ("m", "v") if kind == "fused" else ("exp_avg", "exp_avg_sq"):
            value = state[f"adam.{parameter}.{moment}"]
            value = value[0] if value.dim() == 2 and len(value) == 1 else value
            assert (value[ids] == 0).all()
            assert (value[alive] != 0).any()
    # What is drawn has large losses: more than the mean, by far.
    drawn = torch.cat(losses[-3:])[cosine.argmax(1)].square().mean()
    assert drawn > torch.cat(losses[-3:]).square().mean()
    assert not torch.equal(before["W_dec"], sae.W_dec)


@pytest.mark.parametrize("name", SAES)
def test_engines_draw_alike(name: str) -> None:
    data = batches()
    ours, dense = (engine(kind, data[0], SAES[name]) for kind in ("fused", "autograd"))
    begun = []
    for x in data:
        ids = step(ours, x)
        assert torch.equal(ids, step(dense, x))
        begun += ids.tolist()
    assert len(begun) >= 10
    for a, b in zip(ours.sae.parameters(), dense.sae.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def everything(one: Any) -> dict[str, Any]:
    return one.state_dict() | {name: p.detach() for name, p in one.sae.state_dict().items()}


@pytest.mark.parametrize("kind", ["fused", "autograd", "lean"])
@pytest.mark.parametrize("cut", [5, 6, 7, 8, 14])
def test_resume_in_the_middle_of_a_draw_is_bit_exact(kind: str, cut: int) -> None:
    data = batches(torch.float32)
    whole, first, second = (engine(kind, data[0], SAES["relu"]) for _ in range(3))
    fresh = [step(whole, x).tolist() for x in data]
    for x in data[:cut]:
        first.step(x)
    saved = {name: v.clone() if isinstance(v, Tensor) else v for name, v in first.state_dict().items()}
    assert ("draw.x" in saved) == (cut in (6, 7, 14)), sorted(saved)
    second.sae.load_state_dict(first.sae.state_dict())
    second.load_state_dict(saved)
    assert [step(second, x).tolist() for x in data[cut:]] == fresh[cut:]
    a, b = everything(second), everything(whole)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name], name


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    data = torch.cat(batches(torch.float32))
    train = TrainConfig(**BASE | dict(n_tokens=len(data), save_every=7, settle_every=4))
    config = SAEConfig(D, L, K, activation="relu")

    class Stop(Exception):
        pass

    def stop(line: dict[str, Any]) -> None:
        raise Stop

    whole = saefast.train(data, config, train, tmp_path / "whole")
    with pytest.raises(Stop):
        saefast.train(data, config, train, tmp_path / "cut", on_log=stop)
    resumed = saefast.train(data, config, train, tmp_path / "cut", resume=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_state_of_other_rows_is_refused() -> None:
    data = batches(torch.float32)
    one = engine("fused", data[0], SAES["relu"])
    for x in data[:7]:
        one.step(x)
    state = one.state_dict()
    for name, bad in (
        ("draw.x", state["draw.x"][:, 1:]),
        ("draw.target", state["draw.target"][1:]),
        ("draw.keys", None),
    ):
        with pytest.raises(InputError, match="draw"):
            one.load_state_dict(state | {name: bad})


# The draw.


def whole(n_latents: int, width: int) -> tuple[Block, ...]:
    return (Block(slice(0, n_latents), slice(0, width), slice(0, width)),)


def test_blocks_read_and_write_columns_of_their_own() -> None:
    """Latents 0 to 3 read two columns and write all four, 4 to 7 read the other two and write the last two."""
    blocks = Block(slice(0, 4), slice(0, 2), slice(0, 4)), Block(slice(4, 8), slice(2, 4), slice(2, 4))
    x, target, draw = torch.randn(30, 4), torch.randn(30, 4), Draw()
    draw.add(x, target, torch.randn(30, 4), 30, 0, 0)
    assert draw.rows is not None
    keys = draw.rows[0]
    hopeless = torch.tensor([False, True, True, False] * 2)
    fresh = draw.take(blocks, hopeless, ~hopeless, torch.ones(8, 2))
    assert fresh is not None
    assert fresh.latents.tolist() == [1, 2, 5, 6]
    assert (keys.diff() <= 0).all()
    first, second = normalize(target, dim=1), normalize(target[:, 2:], dim=1)
    for row, latent in enumerate(fresh.latents.tolist()):
        written = fresh.W_dec[row] @ first.T if latent < 4 else fresh.W_dec[row, 2:] @ second.T
        token = int(written.argmax())
        assert float(written[token]) == pytest.approx(1, abs=1e-6)
        assert latent < 4 or (fresh.W_dec[row, :2] == 0).all()
        read = x[token, :2] if latent < 4 else x[token, 2:]
        torch.testing.assert_close(fresh.W_enc[row], 0.2 * 2**0.5 * normalize(read, dim=0))


def test_rows_are_drawn_by_the_square_of_their_loss() -> None:
    """One of eight rows, over two batches: frequencies within five standard deviations."""
    residual = torch.eye(8) * torch.arange(8.0)[:, None].sqrt()  # losses 0 to 7
    x, n, found = torch.eye(8) + 1, 3000, Counter[int]()
    hopeless = torch.zeros(20, dtype=torch.bool)
    hopeless[3] = True
    for seed in range(n):
        draw = Draw()
        for part, at in ((slice(0, 4), 1), (slice(4, 8), 2)):
            draw.add(x[part], x[part], residual[part], 3, seed, at)
        fresh = draw.take(whole(20, 8), hopeless, ~hopeless, torch.ones(20, 8))
        assert fresh is not None
        assert fresh.latents.tolist() == [3]
        found[int(fresh.W_dec[0].argmax())] += 1
        assert draw.rows is None
    shares = torch.arange(8.0).square() / torch.arange(8.0).square().sum()
    for row, share in enumerate(shares.tolist()):
        assert abs(found[row] / n - share) <= 5 * (share * (1 - share) / n) ** 0.5 + 1e-12, row


def test_what_is_drawn_depends_not_on_how_many_are_kept() -> None:
    x, residual = torch.randn(60, 6), torch.randn(60, 6)
    hopeless = torch.arange(30) < 9
    ends = []
    for most in (9, 20, 100):
        draw = Draw()
        for at in range(4):
            part = slice(15 * at, 15 * at + 15)
            draw.add(x[part], x[part], residual[part], most, 0, at)
            assert draw.rows is not None
            assert len(draw.rows[0]) == min(most, 15 * at + 15)
        ends.append(draw.take(whole(30, 6), hopeless, ~hopeless, torch.ones(30, 6)))
    for other in ends[1:]:
        assert torch.equal(other.W_dec, ends[0].W_dec)


def test_rows_without_a_loss_or_a_direction_are_not_drawn() -> None:
    x, residual = torch.randn(6, 4), torch.randn(6, 4)
    residual[:2], x[2:4] = 0, 0
    draw = Draw()
    draw.add(x, x, residual, 6, 0, 0)
    hopeless = torch.arange(9) < 5
    fresh = draw.take(whole(9, 4), hopeless, ~hopeless, torch.ones(9, 4))
    assert fresh is not None
    assert len(fresh.latents) == 2
    assert ((fresh.W_dec @ normalize(x[4:], dim=1).T).max(1).values > 0.999).all()
    draw.add(x, x, torch.zeros(6, 4), 6, 0, 0)
    assert draw.take(whole(9, 4), hopeless, ~hopeless, torch.ones(9, 4)) is None
    draw.add(x, x, residual, 6, 0, 0)
    assert draw.take(whole(9, 4), torch.ones(9).bool(), torch.zeros(9).bool(), torch.ones(9, 4)) is None


def test_when_rows_are_gathered() -> None:
    config = choose(SAEConfig(D, L, K), TrainConfig(**BASE | dict(resample_rows=2 * B + 1)), total_steps=TOTAL)
    assert [step for step in range(TOTAL + 1) if due(step, TOTAL, config)] == list(AT)
    found = [steps_to_draw(step, TOTAL, config) for step in range(TOTAL)]
    assert found == [None] * 5 + [3, 2, 1] + [None] * 5 + [3, 2, 1] + [None] * 4
    every = choose(
        SAEConfig(D, L, K), TrainConfig(**BASE | dict(resample_steps=None, resample_every=6)), total_steps=TOTAL
    )
    assert [next_due(step, TOTAL, every) for step in (0, 5, 6, 11, 12)] == [6, 6, 12, 12, None]
    assert [steps_to_draw(step, TOTAL, every) for step in range(8)] == [None, None, None, 3, 2, 1, None, None]


@pytest.mark.parametrize("bad", [(0, 5), (5, 5), (9, 3)])
def test_steps_that_make_no_sense(bad: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="resample_steps is"):
        TrainConfig(resample_steps=bad)
