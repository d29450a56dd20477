"""JumpReLU: its maths against the dense statement, both engines, thresholds that hold L0 at k, serving, resuming."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_statements import Statement, Window, gradients, jump_relu_l0, jump_relu_tanh
from family import assert_trains_as_stated
from torch import Tensor

import saefast
from saefast.engines.autograd import AutogradEngine, total_loss
from saefast.engines.base import EngineBase
from saefast.engines.fused import FusedEngine
from saefast.errors import InputError
from saefast.models.architecture import At
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.training.loop import fold

D, L, K, B = 12, 48, 4, 40


def config(**changes: Any) -> SAEConfig:
    return SAEConfig(D, L, K, activation="jumprelu", **changes)


def rows(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sources of very different frequency, so that tokens want very different numbers of latents."""
    code = torch.rand(n, 30) * (torch.rand(n, 30) < torch.linspace(0.02, 0.3, 30)) * (1 + 3 * (torch.rand(n, 1) < 0.1))
    return (code @ torch.randn(30, D) + 0.01 * torch.randn(n, D)).to(dtype)


OF_THE_SAE = ("jumprelu_bandwidth", "jumprelu_ste_to_input", "apply_b_dec_to_input", "unit_norm_decoder")


def engine(kind: Any, dtype: str = "float64", **settings: Any) -> Any:
    settings = dict(lr=1e-3, batch_size=B, dead_after=3 * B, settle_every=1, engine=kind.name) | settings
    own = {key: settings.pop(key) for key in OF_THE_SAE if key in settings}
    return kind(SAE(config(dtype=dtype, **own), seed=3), saefast.TrainConfig(**settings), 60)


FREE: dict[str, Any] = dict(unit_norm_decoder=False, decoder_norm="never", project_decoder_grad=False)
SETTINGS: dict[str, dict[str, Any]] = {
    "ours": {},
    "L0, as published": dict(
        jumprelu_penalty="l0", sparsity_coef=0.01, jumprelu_bandwidth=0.2, jumprelu_threshold_lr=None, loss="sum"
    ),
    "a target L0": dict(jumprelu_penalty="target", sparsity_coef=1.0, jumprelu_threshold_lr=0.02),
    "tanh with free norms": dict(jumprelu_penalty="tanh", sparsity_coef=0.01, jumprelu_ste_to_input=True, **FREE),
    "pre-activations of all latents": dict(
        jumprelu_penalty="tanh", sparsity_coef=0.01, jumprelu_pre_act_coef=0.003, max_grad_norm=0.5, **FREE
    ),
    "a window beyond 0": dict(jumprelu_bandwidth=2.0, jumprelu_threshold=0.3, loss="sum"),
    "not centred, clipped, averaged": dict(apply_b_dec_to_input=False, max_grad_norm=0.01, ema_decay=0.9),
    "latents begin anew": dict(resample_every=5, dead_after=B, resample_until=1.0),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_both_engines_train_alike(name: str, dtype: str) -> None:
    steps = 30 if dtype == "float64" else 8
    data = rows(steps * B, getattr(torch, dtype)).split(B)
    tolerance = 1e-9 if dtype == "float64" else 5e-3
    ours, dense = engine(FusedEngine, dtype, **SETTINGS[name]), engine(AutogradEngine, dtype, **SETTINGS[name])
    for one in (ours, dense):
        one.initialise(data[0])
    begun = ours.sae.log_threshold.detach().clone()
    for x in data:
        a, b = ours.step(x), dense.step(x)
        for figure in ("loss", "fvu", "l0", "dead_share", "sparsity_loss", "sparsity_coef", "grad_norm"):
            # Counts are float32.
            near = max(tolerance, 1e-7) if figure in ("l0", "dead_share") else tolerance
            wanted = pytest.approx(float(getattr(b, figure)), rel=near, abs=near)
            assert float(getattr(a, figure)) == wanted, figure
    if dtype == "float64":
        for parameter in ours.names:
            a, b = (getattr(one.sae, parameter).detach() for one in (ours, dense))
            assert (a - b).abs().max() <= 1e-9 * b.abs().max(), parameter
        assert (ours.sae.log_threshold.detach() != begun).all(), "thresholds that are not trained"


def sae_as_trained(**changes: Any) -> SAE:
    """With thresholds, biases and norms that are all different."""
    sae = SAE(config(dtype="float64", unit_norm_decoder=False, **changes), seed=1)
    with torch.no_grad():
        sae.log_threshold.copy_(torch.randn(L, dtype=torch.float64) * 0.3 - 0.5)
        sae.b_enc.normal_(0, 0.1)
        sae.b_dec.normal_(0, 0.1)
        sae.W_dec *= torch.rand(L, 1, dtype=torch.float64) + 0.5
    return sae


STATEMENTS: dict[str, tuple[Statement, dict[str, Any]]] = {
    "target": (jump_relu_l0(0.7, Window(0.25), target_l0=K), dict(jumprelu_penalty="target", sparsity_coef=0.7)),
    "l0": (jump_relu_l0(0.03, Window(0.25)), dict(jumprelu_penalty="l0", sparsity_coef=0.03)),
    "tanh and pre-activations": (
        jump_relu_tanh(0.03, Window(0.25), slope=4.0, pre_act_coef=0.002),
        dict(jumprelu_penalty="tanh", sparsity_coef=0.03, jumprelu_pre_act_coef=0.002),
    ),
}


@pytest.mark.parametrize("loss", ["sum", "fvu"])
@pytest.mark.parametrize("name", STATEMENTS)
def test_the_loss_and_its_gradients_are_the_papers(name: str, loss: Any) -> None:
    statement, settings = STATEMENTS[name]
    x, sae = rows(B, torch.float64), sae_as_trained(jumprelu_bandwidth=0.25)
    train = saefast.TrainConfig(engine="autograd", sparsity_warmup_share=0.0, loss=loss, lr=1e-3, **settings)
    running = AutogradEngine(sae, train, 60)
    expected, wanted = gradients(dict(sae.named_parameters()), statement, x, loss=loss)
    losses = total_loss(sae, x, running.dead, running.config, at=At(0, 60))
    losses.total.backward()
    torch.testing.assert_close(losses.total.detach(), expected, rtol=1e-12, atol=0)
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(getattr(sae, parameter).grad, gradient, rtol=1e-9, atol=1e-12, msg=parameter)
    assert wanted["log_threshold"].abs().sum() > 0


@pytest.mark.parametrize("kind", ["fused", "autograd"])
def test_training_is_that_of_the_dense_statement(kind: str) -> None:
    """Losses of all steps and the parameters after them."""
    settings: dict[str, Any] = dict(
        engine=kind, jumprelu_penalty="target", sparsity_coef=0.7, sparsity_warmup_share=0.0, jumprelu_threshold_lr=None
    )
    statement = jump_relu_l0(0.7, Window(0.5, relative=True), target_l0=K)
    assert_trains_as_stated(config(dtype="float64"), settings, statement, kind)


@pytest.mark.parametrize("kind", ["fused", "autograd"])
def test_training_with_a_loss_of_all_pre_activations_is_that_of_the_dense_statement(kind: str) -> None:
    settings: dict[str, Any] = dict(
        engine=kind, jumprelu_penalty="tanh", sparsity_coef=0.03, sparsity_warmup_share=0.0,
        jumprelu_threshold_lr=None, jumprelu_pre_act_coef=0.002,
    )  # fmt: skip
    statement = jump_relu_tanh(0.03, Window(0.5, relative=True), slope=4.0, pre_act_coef=0.002)
    assert_trains_as_stated(config(dtype="float64"), settings, statement, kind)


def test_the_window_is_a_share_of_the_threshold() -> None:
    x, sae = rows(B, torch.float64), sae_as_trained()
    train = saefast.TrainConfig(
        engine="autograd", sparsity_warmup_share=0.0, loss="sum", lr=1e-3, **STATEMENTS["target"][1]
    )
    statement = jump_relu_l0(0.7, Window(0.5, relative=True), target_l0=K)
    _, wanted = gradients(dict(sae.named_parameters()), statement, x, loss="sum")
    total_loss(sae, x, AutogradEngine(sae, train, 60).dead, train, at=At(0, 60)).total.backward()
    torch.testing.assert_close(sae.log_threshold.grad, wanted["log_threshold"], rtol=1e-9, atol=1e-12)


def test_the_estimate_for_pre_activations_is_that_for_thresholds_turned_round() -> None:
    pre = torch.randn(200, 1, dtype=torch.float64, requires_grad=True)
    own = {"log_threshold": torch.full((1,), -0.3, dtype=torch.float64, requires_grad=True)}
    weights = torch.randn(200, 1, dtype=torch.float64)
    for to_input in (False, True):
        rule = config(jumprelu_ste_to_input=to_input, jumprelu_bandwidth=0.5).architecture().pointwise
        acts = rule.activate(pre, own)
        to_pre, to_own = torch.autograd.grad((weights * acts).sum(), [pre, own["log_threshold"]])
        threshold = math.exp(-0.3)
        inside = ((pre - threshold).abs() < 0.25).double() * threshold / 0.5 * weights
        passed = (pre > threshold).double() * weights
        torch.testing.assert_close(to_pre, (passed + inside if to_input else passed).detach())
        torch.testing.assert_close(to_own, (-inside.sum() * threshold)[None].detach())


def test_thresholds_begin_where_k_latents_are_active() -> None:
    x = rows(400)
    for kind in (FusedEngine, AutogradEngine):
        running: EngineBase = engine(kind, "float32")
        running.initialise(x)
        threshold = running.sae.log_threshold.detach()
        assert (threshold == threshold[0]).all()
        assert float((running.sae.encode(x) > 0).sum()) == pytest.approx(K * len(x), abs=1)
        given: EngineBase = engine(kind, "float32", jumprelu_threshold=0.125)
        given.initialise(x)
        assert (given.sae.log_threshold.detach().exp() - 0.125).abs().max() < 1e-7
    flat = engine(FusedEngine, "float32", fit_encoder=False)
    with torch.no_grad():
        flat.sae.b_enc.fill_(-1e9)
    flat.architecture.start(flat.sae, x, x, flat.config)
    assert (flat.sae.log_threshold == 0).all(), "rows without a positive pre-activation"


def test_plain_training_holds_l0_at_k() -> None:
    data = rows(24_000)
    sae = saefast.train(data[:20_000], config(), saefast.TrainConfig(n_tokens=20_000, batch_size=64))
    l0 = float((sae.encode(data[20_000:]) > 0).sum()) / 4000
    assert abs(l0 / K - 1) < 0.06, l0


def test_a_rate_like_all_others_leaves_the_code_dense() -> None:
    """What users see elsewhere: Adam moves a logarithm by the learning rate a step, whatever the penalty weighs."""
    data = rows(5120)
    settings: dict[str, Any] = dict(n_tokens=5120, batch_size=64, lr=1e-3, jumprelu_threshold=0.01)
    found = {}
    for rate, coef in ((None, None), (None, 100.0), (0.1, None)):
        train = saefast.TrainConfig(jumprelu_threshold_lr=rate, sparsity_coef=coef, **settings)
        sae = saefast.train(data, config(), train)
        found[rate, coef] = float((sae.encode(data) > 0).sum()) / len(data)
    assert min(found[None, None], found[None, 100.0]) > 4 * K
    assert found[0.1, None] < 2 * K


def test_a_token_is_served_by_its_latents_thresholds_whatever_lies_beside_it() -> None:
    sae, x = sae_as_trained(), rows(200, torch.float64)
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()
    expected = torch.where(pre > sae.log_threshold.detach().exp(), pre, 0)
    assert len({int(n) for n in (expected > 0).sum(1)}) > 3, "all tokens have as many latents"
    torch.testing.assert_close(sae.encode(x).detach(), expected)
    torch.testing.assert_close(torch.cat([sae.encode(row[None]) for row in x]).detach(), expected)
    with torch.no_grad():
        sae.log_threshold.fill_(30.0)
    out = sae(x[:4])
    assert out.acts.shape == out.idx.shape == (4, 0)
    torch.testing.assert_close(out.x_hat, sae.b_dec.expand(4, D))


def test_gradients_of_what_is_served() -> None:
    sae, x = sae_as_trained(), rows(6, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sae(x).x_hat, (x,))


def test_scaled_inputs_are_folded_into_the_thresholds() -> None:
    sae, x, scale = sae_as_trained(), rows(50, torch.float64), 3.0
    raw = fold(sae, scale)
    torch.testing.assert_close(raw.encode(x), sae.encode(x * scale) / scale)
    torch.testing.assert_close(raw(x).x_hat, sae(x * scale).x_hat / scale)


@pytest.mark.parametrize("optimizer", ["adam", "adam-lean"])
def test_a_run_is_saved_loaded_and_resumed(optimizer: Any, tmp_path: Path) -> None:
    data = rows(1600)
    train = saefast.TrainConfig(n_tokens=1600, batch_size=B, lr=3e-3, save_every=6, optimizer=optimizer)

    class Stop(Exception):
        pass

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 20:
            raise Stop

    whole = saefast.train(data, config(), train, tmp_path / "whole")
    with pytest.raises(Stop):
        saefast.train(data, config(), train, tmp_path / "cut", on_log=stop)
    resumed = saefast.train(data, config(), train, tmp_path / "cut", resume=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    loaded = saefast.load(tmp_path / "whole")
    assert torch.equal(loaded.log_threshold, whole.log_threshold)
    torch.testing.assert_close(loaded.encode(data[:50]), whole.encode(data[:50]))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a target without a weight": (dict(jumprelu_penalty="target"), "sparsity_coef is None, .* set sparsity_coef"),
    "AuxK": (dict(auxk_coef=0.1), r"auxk_coef is 0\.1, which chooses the top dead latents"),
    "a window of no width": (dict(jumprelu_bandwidth=0.0), r"jumprelu_bandwidth is 0\.0: expected more than 0"),
    "a threshold below 0": (dict(jumprelu_threshold=-1.0), r"jumprelu_threshold is -1\.0: expected more than 0"),
    "thresholds that do not learn": (dict(jumprelu_threshold_lr=0.0), r"jumprelu_threshold_lr is 0\.0: expected more"),
    "ranked by norms": (dict(rescale_acts_by_decoder_norm=True), "its latents are not ranked"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_do_not_go_together_are_refused(name: str) -> None:
    settings, message = REFUSED[name]
    of_the_sae = {key: value for key, value in settings.items() if hasattr(config(), key)}
    of_training = {key: value for key, value in settings.items() if key not in of_the_sae}
    with pytest.raises(InputError, match=message):
        FusedEngine(SAE(config(**of_the_sae), seed=3), saefast.TrainConfig(**of_training), 60)
