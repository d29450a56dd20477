"""k that falls from k_start to k over a share of the run: topk and batchtopk, in both engines, resumed to the bit."""

from pathlib import Path
from typing import Any

import dense_statements as dense
import pytest
import torch
from dense_statements import Found, Parameters, Statement
from family import ENGINES, assert_both_engines_agree, assert_goes_on_bit_for_bit, assert_trains_as_stated, rows
from torch import Tensor

import saefast
from saefast.engines.fused import FusedEngine
from saefast.engines.recipe import choose
from saefast.errors import InputError
from saefast.models.architecture import At
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.models.topk import k_at
from saefast.training.plan import Sizes

D, L, K, START, STEPS = 12, 48, 3, 13, 20
# Over half of the run: k falls by one with every step.
ANNEALED: dict[str, Any] = dict(k_start=START, k_anneal_share=0.5)
FALLING = [13, 12, 11, 10, 9, 8, 7, 6, 5, 4] + [3] * 10


def config(**changes: Any) -> SAEConfig:
    return SAEConfig(D, L, K, **(dict(dtype="float64", init="tied") | changes))


def test_k_falls_linearly_and_stays() -> None:
    train = saefast.TrainConfig(**ANNEALED)
    assert [k_at(config(), train, At(step, STEPS)) for step in range(STEPS)] == FALLING
    assert [k_at(config(), saefast.TrainConfig(), At(step, STEPS)) for step in range(STEPS)] == [K] * STEPS
    at_once = saefast.TrainConfig(k_start=START, k_anneal_share=0.0)
    assert k_at(config(), at_once, At(0, STEPS)) == K
    whole = saefast.TrainConfig(k_start=START, k_anneal_share=1.0)
    ks = [k_at(config(), whole, At(step, 1000)) for step in range(1000)]
    assert ks[0] == START
    assert ks[-1] == K
    assert ks == sorted(ks, reverse=True)


def annealed(statement: Any) -> Statement:
    return lambda p, x, step: statement(FALLING[step])(p, x, step)


def annealed_multi(p: Parameters, x: Tensor, step: int) -> Found:
    return dense.topk(FALLING[step], multi=0.5)(p, x, step)


def annealed_hierarchy(p: Parameters, x: Tensor, step: int) -> Found:
    """Budgets 1, 2 and the k of the step, which is what an SAE then has."""
    return dense.hierarchical_topk((1, 2, FALLING[step]))(p, x, step)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], Statement]] = {
    "topk": ({}, {}, annealed(dense.topk)),
    "batchtopk": (dict(activation="batchtopk"), {}, annealed(dense.batch_topk)),
    "multi": ({}, dict(multi_topk_coef=0.5), annealed_multi),
    "hierarchical": (dict(hierarchical=(1, 2)), {}, annealed_hierarchy),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_training_is_the_stated_maths(name: str, engine: str) -> None:
    sae, train, statement = CASES[name]
    assert_trains_as_stated(config(**sae), ANNEALED | train, statement, engine, steps=STEPS)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_both_engines_train_alike(activation: Any) -> None:
    assert_both_engines_agree(config(activation=activation), ANNEALED | dict(auxk_coef=1 / 32, dead_after=40))


def test_l0_comes_down_and_the_sae_serves_k() -> None:
    engine = FusedEngine(SAE(config(), seed=1), saefast.TrainConfig(**ANNEALED), STEPS)
    x = rows(40, D, torch.float64)
    engine.initialise(x)
    l0 = [float(engine.step(x).l0) for _ in range(STEPS)]
    assert l0[0] > 2 * K
    assert all(found <= k for found, k in zip(l0, FALLING, strict=True))
    assert engine.sae.encode_sparse(x)[0].shape == (40, K)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("optimizer", ["adam", "adam-lean"])
def test_a_run_goes_on_bit_for_bit(activation: Any, optimizer: str, tmp_path: Path) -> None:
    """It is cut while k falls: 50 steps, of which 25 have another k than the last."""
    settings = ANNEALED | dict(optimizer=optimizer)
    assert_goes_on_bit_for_bit(config(activation=activation, dtype="float32", init="rows"), settings, tmp_path)


def test_the_threshold_is_of_the_k_that_serves() -> None:
    """It is not set while k is wider, whose threshold would be lower; then its mean begins at the first value."""
    engine = FusedEngine(SAE(config(activation="batchtopk"), seed=1), saefast.TrainConfig(**ANNEALED), STEPS)
    data = rows(STEPS * 40, D, torch.float64).split(40)
    engine.initialise(data[0])
    for x, k in zip(data, FALLING, strict=True):
        assert float(engine.sae.threshold) == -1
        sae = engine.sae
        pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()
        engine.step(x)
        if k == K:
            smallest = float(pre.flatten().topk(K * 40).values[-1])
            assert float(engine.sae.threshold) == pytest.approx(smallest, rel=1e-5)
            return
    raise AssertionError("k never came down")


def test_a_run_that_ends_before_threshold_start_has_a_threshold() -> None:
    train = saefast.TrainConfig(threshold_start=1000)
    engine = FusedEngine(SAE(config(activation="batchtopk"), seed=1), train, 5)
    data = rows(5 * 40, D, torch.float64).split(40)
    for x in data[:-1]:
        engine.step(x)
        assert float(engine.sae.threshold) == -1
    engine.step(data[-1])
    assert float(engine.sae.threshold) > 0


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_the_plan_counts_the_widest_code(activation: Any) -> None:
    sae = SAEConfig(768, 1 << 15, 32, activation=activation)
    wide = Sizes.of(sae, choose(sae, saefast.TrainConfig(k_start=128), n_rows=1 << 30))
    plain = Sizes.of(sae, choose(sae, saefast.TrainConfig(), n_rows=1 << 30))
    assert (plain.k, wide.k) == (32, 128)
    assert (wide.ranked or wide.k) == 4 * (plain.ranked or plain.k)


def test_the_plan_counts_the_most_terms() -> None:
    sae = SAEConfig(768, 1 << 15, 32, hierarchical="all")
    assert Sizes.of(sae, choose(sae, saefast.TrainConfig(k_start=64), n_rows=1 << 30)).terms == 64


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(k_start=0), "k_start is 0: expected at least 1, or None"),
        (dict(k_anneal_share=1.5), r"k_anneal_share is 1\.5: expected a number between 0 and 1"),
        (dict(k_anneal_share=float("nan")), "k_anneal_share is nan"),
    ],
)
def test_settings_out_of_bounds(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        saefast.TrainConfig(**settings)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("start", [K - 1, L + 1])
def test_a_start_that_does_not_go_with_the_sae_is_refused(activation: Any, start: int) -> None:
    with pytest.raises(InputError, match=f"k_start is {start}: expected a number from k = {K}, which training ends"):
        FusedEngine(SAE(config(activation=activation), seed=1), saefast.TrainConfig(k_start=start), 10)


def test_layers_that_share_k_cannot_anneal_it() -> None:
    shared = SAEConfig(D, L, 4, n_layers=2, apply_b_dec_to_input=False)
    with pytest.raises(
        InputError, match=r"k_start is 8, which a cross-layer transcoder .* cannot have: its layers share"
    ):
        FusedEngine(SAE(shared, seed=1), saefast.TrainConfig(k_start=8), 10)
