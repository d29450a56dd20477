"""HierarchicalTopK: many budgets of latents from one SAE, in both engines, and what it gives at each of them."""

from pathlib import Path
from typing import Any

import dense_statements as dense
import pytest
import torch
from family import ENGINES, assert_both_engines_agree, assert_goes_on_bit_for_bit, assert_trains_as_stated, rows

import saefast
from saefast.engines.fused import FusedEngine
from saefast.engines.recipe import choose
from saefast.errors import InputError
from saefast.models.architecture import At
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.training.plan import Sizes

D, L, K = 12, 48, 6


def config(**changes: Any) -> SAEConfig:
    return SAEConfig(D, L, K, **(dict(hierarchical=(1, 3), dtype="float64", init="tied") | changes))


# Budgets as they are given -> all of them.
BUDGETS: dict[Any, list[int]] = {
    (1, 3): [1, 3, K],
    (2, K): [2, K],
    (4, 16): [4, K, 16],
    (K,): [K],
    "all": [1, 2, 3, 4, 5, K],
}


@pytest.mark.parametrize("given", BUDGETS, ids=str)
def test_k_is_always_a_budget_and_what_is_served(given: Any) -> None:
    terms = config(hierarchical=given).architecture().terms(saefast.TrainConfig(), At(0, 1))
    assert terms.bounds == BUDGETS[given]
    assert terms.bounds[terms.main] == K
    assert not terms.by_latent
    assert sum(term.weight for term in terms.prefixes) == pytest.approx(1)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("given", BUDGETS, ids=str)
def test_training_is_the_stated_maths(given: Any, engine: str) -> None:
    statement = dense.hierarchical_topk(BUDGETS[given])
    assert_trains_as_stated(config(hierarchical=given), {}, statement, engine)


@pytest.mark.parametrize("given", [(1, 3), (4, 16), "all"], ids=str)
def test_both_engines_train_alike(given: Any) -> None:
    assert_both_engines_agree(config(hierarchical=given), dict(auxk_coef=1 / 32, dead_after=40))


def test_the_loss_reported_is_the_mean_over_budgets_and_the_fvu_that_of_k() -> None:
    sae = SAE(config(), seed=1)
    x = rows(40, D, torch.float64)
    fvus = []
    for k in (1, 3, K):
        error = (x - sae.with_k(k)(x).x_hat).detach()
        fvus.append(float(error.square().sum() / (x - x.mean(0)).square().sum()))
    for kind in ENGINES.values():
        stats = kind(SAE(config(), seed=1), saefast.TrainConfig(), 10).step(x)
        assert float(stats.loss) == pytest.approx(sum(fvus) / 3, rel=1e-12)
        assert float(stats.fvu) == pytest.approx(fvus[-1], rel=1e-12)


def test_a_cut_code_is_the_best_of_the_whole_one() -> None:
    sae = SAE(config(), seed=1)
    x = rows(30, D, torch.float64)
    acts, idx = sae.encode_sparse(x)
    for k in (1, 2, 5, K):
        cut = sae.with_k(k)
        assert torch.equal(cut.encode_sparse(x)[1], idx[:, :k])
        torch.testing.assert_close(cut.encode_sparse(x)[0], acts[:, :k])
        torch.testing.assert_close(cut(x).x_hat, sae.decode_sparse(acts[:, :k], idx[:, :k]))
    assert sae.config.k == K
    assert sae.with_k(10).encode_sparse(x)[1].shape == (30, 10)


def test_it_explains_more_with_few_latents_than_an_sae_of_one_budget() -> None:
    """What it is for: cut to a budget, it beats the SAE of k alone that is cut likewise."""
    data = rows(4000, D)
    train = saefast.TrainConfig(n_tokens=60_000, batch_size=100)
    left = {}
    for given in (None, "all"):
        sae = saefast.train(data, config(hierarchical=given, dtype="float32", init="rows"), train)
        left[given] = float((data - sae.with_k(1)(data).x_hat).detach().square().sum())
    assert left["all"] < 0.9 * left[None]


def test_another_k_shares_the_weights_and_is_saved_as_an_sae(tmp_path: Path) -> None:
    sae = SAE(config(), seed=1)
    cut = sae.with_k(2)
    x = rows(5, D, torch.float64)
    cut(x).x_hat.sum().backward()
    assert sae.W_dec.grad is not None
    with torch.no_grad():
        sae.b_dec += 1
    assert torch.equal(cut.b_dec, sae.b_dec)
    cut.save(tmp_path / "cut")
    loaded = saefast.load(tmp_path / "cut")
    assert (loaded.config.k, loaded.config.hierarchical) == (2, (1, 3))
    torch.testing.assert_close(loaded(x).x_hat, cut(x).x_hat)


@pytest.mark.parametrize("given", [(1, 3), "all"], ids=str)
def test_with_all_budgets_another_k_keeps_what_was_trained(given: Any) -> None:
    budgets = config(hierarchical=given).architecture().terms(saefast.TrainConfig(), At(0, 1)).bounds
    served = SAE(config(hierarchical=given), seed=1).with_k(2).config
    assert served.k == 2
    assert set(budgets) - {K} <= set(served.hierarchical)


def test_any_topk_sae_serves_another_k() -> None:
    sae = SAE(config(hierarchical=None), seed=1)
    assert sae.with_k(2).encode_sparse(rows(5, D, torch.float64))[0].shape == (5, 2)
    with pytest.raises(InputError, match=f"k is {L + 1} but n_latents only {L}"):
        sae.with_k(L + 1)
    with pytest.raises(InputError, match="k is 0: expected at least 1"):
        sae.with_k(0)


@pytest.mark.parametrize("optimizer", ["adam", "adam-lean"])
def test_a_run_goes_on_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    trained = assert_goes_on_bit_for_bit(config(dtype="float32", init="rows"), dict(optimizer=optimizer), tmp_path)
    assert trained.config.hierarchical == (1, 3)


def test_the_plan_counts_all_budgets() -> None:
    def sizes(given: Any) -> Sizes:
        sae = config(hierarchical=given)
        return Sizes.of(sae, choose(sae, saefast.TrainConfig(), n_rows=1 << 20))

    assert (sizes((4, 16)).k, sizes((4, 16)).terms) == (16, 3)
    assert (sizes("all").k, sizes("all").terms) == (K, K)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(hierarchical=()),
            r"hierarchical is \(\): expected ascending numbers of at least 1, such as \(8, 16, 32\)",
        ),
        (dict(hierarchical=(0, 2)), "expected ascending numbers of at least 1"),
        (dict(hierarchical=(3, 3)), "expected ascending numbers"),
        (dict(hierarchical=(3, 64)), r"hierarchical is \(3, 64\), but n_latents only 48"),
        (dict(activation="batchtopk"), "which activation='batchtopk' cannot have: its budgets are the best latents"),
        (dict(matryoshka=(8, 16)), "which matryoshka cannot have"),
        (dict(hierarchical="some"), "hierarchical is 'some'"),
        (dict(n_layers=2, apply_b_dec_to_input=False), r"hierarchical is \(1, 3\), which a cross-layer transcoder"),
    ],
)
def test_what_it_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(**changes)


def test_multi_topk_is_another_budget() -> None:
    with pytest.raises(InputError, match=r"multi_topk_coef is 0\.1, which a hierarchical SAE has not"):
        FusedEngine(SAE(config(), seed=1), saefast.TrainConfig(multi_topk_coef=0.1), 10)
