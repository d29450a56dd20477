"""GroupMax: one latent of each group, in both engines, saved, served and refused."""

from pathlib import Path
from typing import Any

import dense_statements as dense
import pytest
import torch
from dense_statements import Found, Parameters
from family import ENGINES, assert_both_engines_agree, assert_goes_on_bit_for_bit, assert_trains_as_stated, rows
from torch import Tensor

import saefast
from saefast.engines.fused import FusedEngine
from saefast.engines.recipe import choose
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.training.loop import fold
from saefast.training.plan import Sizes

D, L, K = 12, 48, 4


def config(**changes: Any) -> SAEConfig:
    return SAEConfig(D, L, K, **(dict(activation="groupmax", dtype="float64", init="tied") | changes))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("centred", [True, False])
def test_training_is_the_stated_maths(engine: str, centred: bool) -> None:
    assert_trains_as_stated(config(apply_b_dec_to_input=centred), {}, dense.group_max(K, centred=centred), engine)


SETTINGS: dict[str, dict[str, Any]] = {
    "AuxK": dict(auxk_coef=1 / 32, dead_after=40),
    "all selected count": dict(auxk_coef=1 / 32, dead_after=40, fired_above=None),
    "clipped, averaged": dict(auxk_coef=1 / 32, dead_after=40, max_grad_norm=0.01, ema_decay=0.9),
    "rows wait to be settled": dict(auxk_coef=1 / 32, dead_after=40, beta1=0.0, settle_every=3),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_both_engines_train_alike(name: str) -> None:
    assert_both_engines_agree(config(), SETTINGS[name])


def test_both_engines_rank_by_norms_alike() -> None:
    free = dict(decoder_norm="never", project_decoder_grad=False)
    changes = dict(rescale_acts_by_decoder_norm=True, unit_norm_decoder=False)
    assert_both_engines_agree(config(**changes), SETTINGS["AuxK"] | free)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_code_has_the_largest_of_each_group(scaled: bool) -> None:
    sae = SAE(config(rescale_acts_by_decoder_norm=scaled, unit_norm_decoder=False), seed=1)
    with torch.no_grad():
        sae.W_dec *= torch.rand(L, 1, dtype=torch.float64) + 0.5
        sae.b_enc.normal_()
    x = rows(40, D, torch.float64)
    pre = (((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc) * (sae.decoder_norms() if scaled else 1)).detach()
    acts, idx = sae.encode_sparse(x)
    assert acts.shape == (40, K)
    for token in range(40):
        for group in range(K):
            members = list(range(group * L // K, (group + 1) * L // K))
            best = max(members, key=lambda latent: float(pre[token, latent]))
            assert int(idx[token, group]) == best
            assert float(acts[token, group].detach()) == pytest.approx(max(float(pre[token, best]), 0), rel=1e-12)
    alone = torch.cat([sae.encode(row[None]) for row in x])
    torch.testing.assert_close(alone, sae.encode(x), rtol=1e-12, atol=1e-12)


def test_gradients_of_what_is_served() -> None:
    sae = SAE(config(), seed=1)
    x = rows(6, D, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sae(x).x_hat, (x,))


def test_scaled_inputs_are_folded() -> None:
    sae = SAE(config(), seed=1)
    with torch.no_grad():
        sae.b_enc.normal_()
        sae.b_dec.normal_()
    x, scale = rows(50, D, torch.float64), 3.0
    torch.testing.assert_close(fold(sae, scale).encode(x), sae.encode(x * scale) / scale)


@pytest.mark.parametrize("optimizer", ["adam", "adam-lean"])
def test_a_run_goes_on_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    trained = assert_goes_on_bit_for_bit(config(dtype="float32", init="rows"), dict(optimizer=optimizer), tmp_path)
    data = rows(500, D)
    fvu = float((trained(data).x_hat - data).detach().square().sum() / (data - data.mean(0)).square().sum())
    assert fvu < 0.9


def nested_groups(p: Parameters, x: Tensor, step: int) -> Found:
    """Matryoshka over GroupMax: the first latents of the dictionary are its first groups."""
    code = dense.best_of_group(dense.pre_activations(p, x), K)
    parts = [(1.0, code[:, :width] @ p["W_dec"][:width] + p["b_dec"]) for width in (12, 24, L)]
    return Found(code, parts, main=2)


@pytest.mark.parametrize("engine", ENGINES)
def test_matryoshka_lies_over_it(engine: str) -> None:
    assert_trains_as_stated(config(matryoshka=(12, 24)), {}, nested_groups, engine)


def test_an_activation_that_squares_beyond_fp32_is_seen_in_any_group() -> None:
    sae = SAE(config(dtype="float32"), seed=1)
    engine = FusedEngine(sae, saefast.TrainConfig(), 10)
    x = rows(40, D)
    engine.initialise(x)
    with torch.no_grad():
        sae.b_enc[-1] = 1e16
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    with pytest.raises(InputError, match="step 0"):
        engine.step(x)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def test_the_plan_counts_k_entries() -> None:
    sizes = Sizes.of(config(), choose(config(), saefast.TrainConfig(), n_rows=1 << 20))
    assert (sizes.k, sizes.ranked, sizes.terms) == (K, None, 1)


def test_sparsifys_recipe_lets_nobodys_zero_count() -> None:
    assert saefast.preset("sparsify", D, L, K, activation="groupmax")[1].fired_above == 0.0
    assert saefast.preset("sparsify", D, L, K)[1].fired_above is None


def test_what_it_cannot_be_or_do_is_refused() -> None:
    with pytest.raises(
        InputError, match="n_latents is 48 and k 5: latents are not k equal groups; take n_latents = 45"
    ):
        SAEConfig(D, L, 5, activation="groupmax")
    for settings, message in (
        (dict(multi_topk_coef=0.1), r"multi_topk_coef is 0\.1, which needs activation='topk'"),
        (dict(k_start=8), "k_start is 8, which activation='groupmax' cannot have: k is the number of its groups"),
    ):
        with pytest.raises(InputError, match=message):
            FusedEngine(SAE(config(), seed=1), saefast.TrainConfig(**settings), 10)
    with pytest.raises(
        InputError, match="k is 2, but an SAE of activation='groupmax' serves the k it was trained with"
    ):
        SAE(config(), seed=1).with_k(2)
