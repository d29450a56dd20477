"""Gated: its maths against the dense statement, both engines, L0 brought to k, serving, resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_statements import gated, gradients
from family import assert_goes_on_bit_for_bit, assert_trains_as_stated, rows
from torch import Tensor

import saefast
from saefast.engines.autograd import AutogradEngine, total_loss
from saefast.engines.fused import FusedEngine
from saefast.errors import InputError
from saefast.models.architecture import At
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.training.loop import fold

D, L, K, B = 12, 48, 4, 40


def config(**changes: Any) -> SAEConfig:
    return SAEConfig(D, L, K, activation="gated", **changes)


def sae_as_trained() -> SAE:
    """With scales and biases that are all different."""
    sae = SAE(config(dtype="float64"), seed=1)
    with torch.no_grad():
        sae.r_mag.normal_(0, 0.3)
        sae.b_mag.normal_(0, 0.2)
        sae.b_enc.normal_(-0.4, 0.3)
        sae.b_dec.normal_(0, 0.1)
    return sae


def code_of(sae: SAE, x: Tensor) -> Tensor:
    """(n, L) the activations, as the paper has them."""
    product = (x - sae.b_dec) @ sae.W_enc.T
    magnitude = (sae.r_mag.exp() * product + sae.b_mag).relu()
    return torch.where(product + sae.b_enc > 0, magnitude, 0).detach()


@pytest.mark.parametrize("loss", ["sum", "fvu"])
def test_the_loss_and_its_gradients_are_the_papers(loss: Any) -> None:
    x, sae = rows(B, D, torch.float64), sae_as_trained()
    train = saefast.TrainConfig(engine="autograd", sparsity_warmup_share=0.0, loss=loss, lr=1e-3, sparsity_coef=0.03)
    running = AutogradEngine(sae, train, 60)
    expected, wanted = gradients(dict(sae.named_parameters()), gated(0.03), x, loss=loss)
    losses = total_loss(sae, x, running.dead, running.config, at=At(0, 60))
    losses.total.backward()
    torch.testing.assert_close(losses.total.detach(), expected, rtol=1e-12, atol=0)
    for name, gradient in wanted.items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(getattr(sae, name).grad, gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_training_is_that_of_the_dense_statement(engine: Any) -> None:
    settings = dict(engine=engine, sparsity_coef=0.02, sparsity_warmup_share=0.0)
    assert_trains_as_stated(config(dtype="float64"), settings, gated(0.02), engine)


SETTINGS: dict[str, dict[str, Any]] = {
    "ours": {},
    "clipped, averaged": dict(max_grad_norm=0.01, ema_decay=0.9, loss="sum"),
    "latents begin anew": dict(resample_every=5, dead_after=B, resample_until=1.0),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_both_engines_train_alike(name: str) -> None:
    settings: dict[str, Any] = dict(lr=1e-3, batch_size=B, dead_after=3 * B, settle_every=1) | SETTINGS[name]
    data = rows(30 * B, D, torch.float64).split(B)
    ours, dense = (
        kind(SAE(config(dtype="float64"), seed=3), saefast.TrainConfig(**settings, engine=kind.name), 60)
        for kind in (FusedEngine, AutogradEngine)
    )
    for one in (ours, dense):
        one.initialise(data[0])
    for x in data:
        a, b = ours.step(x), dense.step(x)
        for figure in ("loss", "fvu", "l0", "dead_share", "sparsity_loss", "sparsity_coef", "grad_norm"):
            # Counts are float32.
            near = 1e-7 if figure in ("l0", "dead_share") else 1e-9
            assert float(getattr(a, figure)) == pytest.approx(float(getattr(b, figure)), rel=near, abs=near), figure
    for parameter in ours.names:
        one, other = (getattr(running.sae, parameter).detach() for running in (ours, dense))
        assert (one - other).abs().max() <= 1e-9 * other.abs().max(), parameter


def test_gates_begin_open_for_k_latents() -> None:
    x = rows(400, D)
    running = FusedEngine(SAE(config(), seed=3), saefast.TrainConfig(lr=1e-3, batch_size=B), 60)
    running.initialise(x)
    assert float((running.sae.encode(x) > 0).sum()) == pytest.approx(K * len(x), abs=1)


def test_plain_training_brings_l0_to_k() -> None:
    data = rows(24_000, D)
    sae = saefast.train(data[:20_000], config(), saefast.TrainConfig(n_tokens=20_000, batch_size=64))
    l0 = float((sae.encode(data[20_000:]) > 0).sum()) / 4000
    assert abs(l0 / K - 1) < 0.15, l0


def test_a_token_is_served_by_its_gates_whatever_lies_beside_it() -> None:
    sae, x = sae_as_trained(), rows(200, D, torch.float64)
    expected = code_of(sae, x)
    assert len({int(n) for n in (expected > 0).sum(1)}) > 3
    torch.testing.assert_close(sae.encode(x).detach(), expected)
    torch.testing.assert_close(torch.cat([sae.encode(row[None]) for row in x]).detach(), expected)


def test_gradients_of_what_is_served() -> None:
    sae, x = sae_as_trained(), rows(6, D, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sae(x).x_hat, (x,))


def test_scaled_inputs_are_folded_into_biases_and_not_into_scales() -> None:
    sae, x, scale = sae_as_trained(), rows(50, D, torch.float64), 3.0
    raw = fold(sae, scale)
    torch.testing.assert_close(raw.encode(x), sae.encode(x * scale) / scale)
    torch.testing.assert_close(raw(x).x_hat, sae(x * scale).x_hat / scale)
    assert torch.equal(raw.r_mag, sae.r_mag)


@pytest.mark.parametrize("optimizer", ["adam", "adam-lean"])
def test_a_run_is_saved_loaded_and_resumed(optimizer: Any, tmp_path: Path) -> None:
    sae = assert_goes_on_bit_for_bit(config(), dict(optimizer=optimizer), tmp_path)
    assert sae.r_mag.detach().abs().sum() > 0


def test_what_it_has_not_is_refused() -> None:
    with pytest.raises(InputError, match=r"auxk_coef is 0\.1, which chooses the top dead latents"):
        FusedEngine(SAE(config(), seed=3), saefast.TrainConfig(auxk_coef=0.1), 60)
    with pytest.raises(InputError, match="its latents are not ranked"):
        config(rescale_acts_by_decoder_norm=True)
