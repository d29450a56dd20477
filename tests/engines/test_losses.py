"""The losses: derivatives against dense autograd and numeric ones, weights against numbers, counters against a loop."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from saefast.engines.autograd import auxk_loss, total_loss
from saefast.engines.config import TrainConfig
from saefast.engines.dead import DeadLatents
from saefast.engines.losses import (
    auxk_runs,
    auxk_wanted,
    auxk_weight,
    inverse_variance,
    reconstruction_weight,
    total_variance,
)
from saefast.engines.recipe import Recipe, choose
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.ops import encoder
from saefast.ops.code import Code

B, D, L, K = 7, 6, 24, 3
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")


def small_sae(**changes: Any) -> SAE:
    """float64, all four parameters random, decoder rows of unequal norm."""
    sae = SAE(SAEConfig(D, L, K, dtype="float64", unit_norm_decoder=False, **changes))
    with torch.no_grad():
        for name in NAMES:
            parameter = getattr(sae, name)
            parameter.copy_(torch.randn_like(parameter) * (0.3 if name.startswith("b") else 1))
    return sae


def config_of(**changes: Any) -> Recipe:
    settings: dict[str, Any] = dict(auxk_coef=1 / 32, dead_after=10_000_000) | changes
    return choose(SAEConfig(D, L, K), TrainConfig(engine="autograd", **settings), n_rows=10_000)


def counters(config: Recipe, dead: list[int]) -> DeadLatents:
    """Counters by which exactly these latents are dead, and stay so whatever the batch fires."""
    since = torch.zeros(L, dtype=torch.int64)
    since[dead] = 10**9
    state = DeadLatents(L, config)
    state.since = since
    return state


def dense_loss(sae: SAE, x: Tensor, dead: Tensor, c: Recipe, mse_scale: float) -> Tensor:
    """Every variant of the loss over (B, L) matrices."""
    norms = sae.W_dec.norm(dim=1) if sae.config.rescale_acts_by_decoder_norm else torch.ones_like(sae.b_enc)
    centred = x - sae.b_dec if sae.config.apply_b_dec_to_input else x
    hidden = (centred @ sae.W_enc.T + sae.b_enc) * norms

    def kept(k: int, among: Tensor, relu: bool = True) -> Tensor:
        chosen = torch.where(among, hidden, -torch.inf).topk(k, dim=1).indices
        mask = torch.zeros_like(hidden).scatter(1, chosen, 1.0)
        return (hidden.relu() if relu else hidden) * mask / norms

    everyone = torch.ones(L, dtype=torch.bool)
    e = x - kept(K, everyone) @ sae.W_dec - sae.b_dec
    spread = ((x - x.mean(0)) ** 2).sum()
    loss = {"fvu": (e**2).sum() / spread, "sum": (e**2).sum() / B, "scaled_mse": mse_scale * (e**2).mean()}[c.loss]
    n_dead, half = int(dead.sum()), c.auxk_k or D // 2
    if c.auxk_coef and (n_dead or c.auxk_b_dec_grad):
        e_hat = kept(min(half, n_dead), dead, c.auxk_relu) @ sae.W_dec if n_dead else 0 * e
        target = e.detach()
        if c.auxk_b_dec_grad:
            e_hat, target = e_hat + sae.b_dec, target + sae.b_dec.detach()
        residual = e.detach()
        under = {"residual": ((residual - residual.mean(0)) ** 2).sum(), "inputs": spread, "none": B}
        scale = min(n_dead / half, 1) if c.auxk_scale_few_dead else 1
        loss = loss + c.auxk_coef * scale * ((e_hat - target) ** 2).sum() / under[c.auxk_denominator]
    if c.multi_topk_coef:
        wide = x - kept(min(4 * K, L), everyone) @ sae.W_dec - sae.b_dec
        loss = loss + c.multi_topk_coef * (wide**2).sum() / spread
    return loss


LOSSES = ("fvu", "sum", "scaled_mse")
DEAD = {"none": [], "one": [5], "many": list(range(0, L, 2))}
VARIANTS: list[dict[str, Any]] = [
    dict(auxk_denominator=denominator, auxk_relu=relu, auxk_b_dec_grad=b_dec, auxk_scale_few_dead=scale, auxk_k=k)
    for denominator, (relu, b_dec, scale, k) in itertools.product(
        ("residual", "inputs", "none"),
        ((True, False, True, None), (False, False, False, 5), (True, True, False, 4), (True, False, True, 99)),
    )
]


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("clipped", [False, True])
def test_loss_and_gradients_equal_dense_autograd(loss: Any, dead: str, rescale: bool, clipped: bool) -> None:
    """All AuxK variants with MultiTopK, with rows that have fewer than k positive pre-activations and without."""
    sae = small_sae(rescale_acts_by_decoder_norm=rescale)
    if clipped:
        sae.b_enc.data -= 4.0
    x = torch.randn(B, D, dtype=torch.float64) + 0.5
    for variant in VARIANTS:
        config = config_of(loss=loss, auxk_coef=0.7, multi_topk_coef=0.3, dead_update_first=False, **variant)
        ours = total_loss(sae, x, counters(config, DEAD[dead]), config, mse_scale=1.7)
        mask = torch.zeros(L, dtype=torch.bool)
        mask[DEAD[dead]] = True
        dense = dense_loss(sae, x, mask, config, mse_scale=1.7)
        assert float(ours.total.detach()) == pytest.approx(float(dense.detach()), rel=1e-12)
        parameters = [getattr(sae, name) for name in NAMES]
        for name, a, b in zip(
            NAMES, torch.autograd.grad(ours.total, parameters), torch.autograd.grad(dense, parameters), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert (int((ours.served.acts == 0).sum()) > 0) == clipped


def test_encoder_without_centring() -> None:
    sae, x = small_sae(apply_b_dec_to_input=False), torch.randn(B, D, dtype=torch.float64)
    config = config_of(auxk_coef=0.7, multi_topk_coef=0.3, dead_update_first=False)
    mask = torch.zeros(L, dtype=torch.bool)
    mask[::2] = True
    ours = total_loss(sae, x, counters(config, DEAD["many"]), config).total
    dense = dense_loss(sae, x, mask, config, 1.0)
    parameters = [getattr(sae, name) for name in NAMES]
    for a, b in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(dense, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shift", [0.0, -2.0])
def test_gradcheck_of_reconstruction_and_multi_topk(shift: float) -> None:
    """Numeric derivatives; with the shift most selected latents are clipped."""
    sae, x = small_sae(), torch.randn(B, D, dtype=torch.float64)
    sae.b_enc.data += shift
    config = config_of(auxk_coef=0.0, multi_topk_coef=0.5)
    dead = DeadLatents(L, config)

    def loss(*_weights: Tensor) -> Tensor:
        return total_loss(sae, x, dead, config).total

    assert torch.autograd.gradcheck(loss, tuple(getattr(sae, name) for name in NAMES), atol=1e-7)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shift", [0.0, -2.0])
def test_gradcheck_of_auxk(relu: bool, shift: float) -> None:
    """The residual is a constant of AuxK, so it is given: numeric derivatives cannot know of a detach."""
    sae, x = small_sae(), torch.randn(B, D, dtype=torch.float64)
    sae.b_enc.data += shift
    config = config_of(auxk_relu=relu)
    residual, ids = torch.randn(B, D, dtype=torch.float64), torch.arange(0, L, 2)

    def loss(*_weights: Tensor) -> Tensor:
        value = auxk_loss(sae, x - sae.b_dec, residual, total_variance(x), ids, config)
        assert isinstance(value, Tensor)
        return value

    assert torch.autograd.gradcheck(loss, tuple(getattr(sae, name) for name in NAMES), atol=1e-7)


class Spy:
    """Counts calls of encoder.encode_topk and keeps their keyword arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[dict[str, Any]] = []
        self.original = encoder.encode_topk
        monkeypatch.setattr(encoder, "encode_topk", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(kwargs | {"k": args[3]})
        return self.original(*args, **kwargs)


@pytest.mark.parametrize("b_dec_grad", [False, True])
def test_auxk_encodes_nothing_while_no_latent_is_dead(monkeypatch: pytest.MonkeyPatch, b_dec_grad: bool) -> None:
    spy, sae, x = Spy(monkeypatch), small_sae(), torch.randn(B, D, dtype=torch.float64)
    config = config_of(auxk_b_dec_grad=b_dec_grad, auxk_scale_few_dead=False, multi_topk_coef=0.1)
    losses = total_loss(sae, x, DeadLatents(L, config), config)
    assert [call["k"] for call in spy.calls] == [4 * K]  # one selection for the top k and MultiTopK
    assert (float(losses.auxk) > 0) == b_dec_grad


def test_auxk_lets_only_dead_latents_compete(monkeypatch: pytest.MonkeyPatch) -> None:
    spy, sae, x = Spy(monkeypatch), small_sae(), torch.randn(B, D, dtype=torch.float64)
    config = config_of(dead_update_first=False)
    total_loss(sae, x, counters(config, [2, 5, 11]), config)
    assert spy.calls[1]["latents"].tolist() == [2, 5, 11]
    assert spy.calls[1]["k"] == 3


def test_multi_topk_with_fewer_than_4k_latents() -> None:
    sae = SAE(SAEConfig(D, 2 * K, K, dtype="float64"))
    config, x = config_of(auxk_coef=0.0, multi_topk_coef=1.0), torch.randn(B, D, dtype=torch.float64)
    loss = total_loss(sae, x, DeadLatents(2 * K, config), config)
    everything = (x @ sae.W_enc.T).relu() @ sae.W_dec
    extra = ((x - everything) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert float(loss.total.detach()) == pytest.approx(float((loss.fvu + extra).detach()), rel=1e-12)


def test_weights_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])  # means 2, 4; deviations 1, 2: total variance 10
    assert float(total_variance(x)) == 10
    assert inverse_variance(x) == 4 / 10
    shape, variance = x.shape, total_variance(x)
    assert float(reconstruction_weight(shape, variance, config_of(loss="fvu"))) == pytest.approx(1 / 10)
    assert reconstruction_weight(shape, variance, config_of(loss="sum")) == 1 / 2
    assert reconstruction_weight(shape, variance, config_of(loss="scaled_mse"), 3.0) == 3 / 4

    residual = torch.tensor([[0.0, 1.0], [0.0, 5.0]])  # variance 8
    few = dict(auxk_k=4, auxk_scale_few_dead=True)
    expected = {"residual": 1 / 8, "inputs": 1 / 10, "none": 1 / 2}
    for denominator, weight in expected.items():
        config: Any = config_of(auxk_denominator=denominator, **few)
        for unexplained in (total_variance(residual), float(total_variance(residual))):
            numbers = shape, variance, unexplained, config
            assert float(auxk_weight(numbers[0], 1, *numbers[1:])) == pytest.approx(weight / 4)
            assert float(auxk_weight(numbers[0], 9, *numbers[1:])) == pytest.approx(weight)
    for nothing in (torch.zeros(()), 0.0):
        assert float(auxk_weight(shape, 9, variance, nothing, config_of())) == 0  # a residual without variance


def test_auxk_size_and_when_it_runs() -> None:
    assert [auxk_wanted(d, config_of()) for d in (1, 2, 768)] == [1, 1, 384]
    assert auxk_wanted(768, config_of(auxk_k=256)) == 256
    assert auxk_runs(1, config_of())
    assert not auxk_runs(0, config_of())
    assert auxk_runs(0, config_of(auxk_b_dec_grad=True))
    assert not auxk_runs(9, config_of(auxk_coef=0.0))


@pytest.mark.parametrize("unit", ["tokens", "steps"])
@pytest.mark.parametrize("above", [None, 0.0, 1e-3])
@pytest.mark.parametrize("start", [0, -1])
def test_dead_latents_against_a_loop(unit: Any, above: float | None, start: int) -> None:
    limit = 8 + start if unit == "tokens" else 3  # counts that some latents reach exactly
    config = config_of(dead_unit=unit, fired_above=above, dead_start=start, dead_after=limit)
    dead, by_hand, ages = DeadLatents(L, config), [start] * L, [0] * L
    for n in (4, 1, 6, 4, 4):
        idx = torch.stack([torch.randperm(L // 2)[:K] for _ in range(n)]).int()
        acts = torch.tensor([0.0, 5e-4, 2.0])[torch.randint(3, (n, K))]
        for latent in range(L):
            here = acts[idx == latent]
            fired = len(here) > 0 and (above is None or bool((here > above).any()))
            by_hand[latent] = 0 if fired else by_hand[latent] + (n if unit == "tokens" else 1)
            ages[latent] += n if unit == "tokens" else 1
        before = dead.since.clone()
        hit = dead.fired(Code(acts, idx))
        since = dead.unless(hit, n)
        assert torch.equal(dead.since, before)  # only read
        dead.take(since, hit, n)
        assert since.tolist() == by_hand
        assert dead.age.tolist() == ages
        silent, old = ({i for i, count in enumerate(counts) if count >= limit} for counts in (by_hand, ages))
        assert set(dead.hopeless().nonzero().flatten().tolist()) == silent & old
        if n == 6:  # these begin anew: they stay dead, and are given time
            dead.age[::2], ages[::2] = 0, [0] * (L // 2)
        assert dead.ids(since).tolist() == [i for i, count in enumerate(by_hand) if count >= limit]
        assert float(dead.share()) == pytest.approx(sum(c >= limit for c in by_hand) / L)


def test_dead_latents_count_beyond_32_bits() -> None:
    dead = DeadLatents(2, config_of(dead_after=3 * 2**40))
    dead.since += 3 * 2**40 - 1
    since = dead.unless(dead.fired(Code(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int32))), 1)
    assert since.tolist() == [0, 3 * 2**40]
    assert dead.ids(since).tolist() == [1]


@pytest.mark.parametrize("first", [True, False])
def test_the_batch_counts_before_or_after_auxk_asks(first: bool) -> None:
    """One token short of death: with dead_update_first the batch itself kills the latents that do not fire in it."""
    sae, x = small_sae(), torch.randn(B, D, dtype=torch.float64)
    config = config_of(dead_update_first=first, dead_after=B)
    losses = total_loss(sae, x, DeadLatents(L, config), config)
    assert (float(losses.auxk) > 0) == first


def test_a_batch_without_variance_is_not_finite() -> None:
    sae, x = small_sae(), torch.ones(B, D, dtype=torch.float64)
    config = config_of()
    assert not math.isfinite(float(total_loss(sae, x, DeadLatents(L, config), config).total.detach()))
