"""Transcoders: against a plain dense statement, in both engines, with and without skip; files, folding, resume."""

from pathlib import Path
from typing import Any

import dense_statements as dense
import pytest
import torch
import train_job
from classic import CLASSIC_TRAIN
from torch import Tensor
from torch.nn.functional import normalize

import saefast
from saefast.engines.autograd import AutogradEngine
from saefast.engines.fused import FusedEngine
from saefast.engines.recipe import choose
from saefast.engines.resample import fresh_latents
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, load
from saefast.training.api import train
from saefast.training.loop import fold
from saefast.training.plan import Sizes, memory_of

D, OUT, L, K, B = 12, 7, 48, 4, 32


def config(**changes: Any) -> SAEConfig:
    return SAEConfig(**(dict(d_in=D, n_latents=L, k=K, d_out=OUT) | changes))


def pairs(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """x and something else of another width: a sparse part and a linear one, around means that are not 0."""
    generator = torch.Generator().manual_seed(2)
    x = train_job.rows(n).to(dtype)
    turn, out = (torch.randn(D, d, generator=generator).to(dtype) for d in (20, OUT))
    return x, 50 * ((x @ turn).relu() @ torch.randn(20, OUT, generator=generator).to(dtype) + 3 * x @ out + 5)


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no skip": ({}, {}),
    "skip": (dict(skip=True), {}),
    "skip of one width": (dict(skip=True, d_out=None), {}),
    "skip, batchtopk": (dict(skip=True, activation="batchtopk"), {}),
    "skip, nested": (dict(skip=True, matryoshka=(8, 20)), {}),
    "skip, clipped, averaged": (dict(skip=True), dict(max_grad_norm=0.05, ema_decay=0.9)),
    "skip, OpenAI's AuxK": (dict(skip=True), dict(auxk_b_dec_grad=True, decoder_norm="pre_step")),
    "skip, norms": (dict(skip=True, rescale_acts_by_decoder_norm=True), dict(decoder_norm="never")),
    "skip, jumprelu": (dict(skip=True, activation="jumprelu"), dict(auxk_coef=0.0)),
    "skip, groupmax": (dict(skip=True, activation="groupmax"), {}),
    "no skip, dead at once": ({}, dict(dead_after=1, auxk_k=3)),
}


def target_of(sae: SAEConfig, target: Tensor, x: Tensor) -> Tensor:
    return target if sae.d_out == OUT else x.roll(1, 1) + target[:, :1]


@pytest.mark.parametrize("name", SETTINGS)
def test_both_engines_train_alike(name: str) -> None:
    own, settings = SETTINGS[name]
    asked = config(dtype="float64", **own)
    always = dict(lr=1e-3, dead_after=3 * B, settle_every=1, resample_every=7)
    recipe = saefast.TrainConfig(**(CLASSIC_TRAIN | always | settings))
    x, target = pairs(22 * B)
    target = target_of(asked, target, x)
    ours, plain = (kind(SAE(asked, seed=3), recipe, 60) for kind in (FusedEngine, AutogradEngine))
    for engine in (ours, plain):
        engine.initialise(x, target)
    before = ours.sae.own().get("W_skip", torch.zeros(1)).detach().clone()
    for a, b in zip(x.split(B), target.split(B), strict=True):
        one, two = ours.step(a, b), plain.step(a, b)
        for figure in ("loss", "fvu", "l0", "auxk_loss", "dead_share", "grad_norm"):
            assert float(getattr(one, figure)) == pytest.approx(float(getattr(two, figure)), rel=1e-8), figure
    ours.finish()
    plain.finish()
    for parameter in ours.names:
        a, b = (getattr(engine.sae, parameter).detach() for engine in (ours, plain))
        assert (a - b).abs().max() <= 1e-9 * b.abs().max(), parameter
    if asked.skip:
        assert not torch.equal(before, ours.sae.W_skip)
        for name, average in (ours.averaged() or {}).items():
            torch.testing.assert_close(average, (plain.averaged() or {})[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_training_is_the_dense_statement(skip: bool, activation: str) -> None:
    """Plain torch that shares nothing with saefast: the code by a sort, x_hat = code W_dec + b_dec + x W_skipᵀ."""
    sae = SAE(config(dtype="float64", skip=skip, activation=activation), seed=3)
    off = dict(auxk_coef=0.0, lr_decay_start=-1, settle_every=1)
    recipe = saefast.TrainConfig(lr=1e-3, **(CLASSIC_TRAIN | off))
    x, target = pairs(15 * B)
    engine = FusedEngine(sae, recipe, 60)
    engine.initialise(x, target)
    start = {name: getattr(sae, name).detach().clone() for name in engine.names}
    statement = (dense.topk if activation == "topk" else dense.batch_topk)(K, centred=False)
    told = dense.Recipe(lr=1e-3, steps=60, loss="fvu")
    plain = dense.Trainer(start, dense.with_skip(statement) if skip else statement, told)
    for a, b in zip(x.split(B), target.split(B), strict=True):
        found = engine.step(a, b)
        loss, _ = plain.step(a, b)
        assert float(found.loss) == pytest.approx(float(loss), rel=1e-8)
    assert set(plain.p) == set(dict(sae.named_parameters()))
    for name, value in plain.p.items():
        torch.testing.assert_close(getattr(sae, name).detach(), value.detach(), rtol=1e-7, atol=1e-9)


def test_it_reconstructs_with_the_skip_and_says_when_x_is_missing() -> None:
    sae = SAE(config(dtype="float64", skip=True), seed=1)
    with torch.no_grad():
        sae.W_skip.normal_()
        sae.b_dec.normal_()
    x = torch.randn(3, 5, D, dtype=torch.float64)
    out = sae(x)
    code = sae.encode(x)
    expected = code @ sae.W_dec + sae.b_dec + x @ sae.W_skip.T
    assert out.x_hat.shape == (3, 5, OUT)
    torch.testing.assert_close(out.x_hat, expected)
    torch.testing.assert_close(sae.decode_sparse(out.acts, out.idx, x), expected)
    torch.testing.assert_close(sae.decode(code, x), expected)
    for without in (lambda: sae.decode_sparse(out.acts, out.idx), lambda: sae.decode(code)):
        with pytest.raises(InputError, match="x is not given: this SAE adds a linear map of it"):
            without()
    with pytest.raises(InputError, match="the code is of"):
        sae.decode_sparse(out.acts, out.idx, x[:2])
    # The encoder sees x as it is, whatever is centred elsewhere.
    assert not sae.config.apply_b_dec_to_input
    torch.testing.assert_close(code.topk(K).values, (x @ sae.W_enc.T + sae.b_enc).relu().topk(K).values)


def test_gradients() -> None:
    sae = SAE(config(dtype="float64", skip=True), seed=1)
    x = torch.randn(5, D, dtype=torch.float64, requires_grad=True)

    def x_hat(x: Tensor, W_skip: Tensor, W_dec: Tensor) -> Tensor:
        given = {"W_skip": W_skip, "W_dec": W_dec}
        return torch.func.functional_call(sae, given, (x,)).x_hat

    assert torch.autograd.gradcheck(x_hat, (x, sae.W_skip.detach().requires_grad_(), sae.W_dec))


@pytest.mark.parametrize("skip", [False, True])
def test_scaled_inputs_and_targets_are_folded(skip: bool) -> None:
    sae = SAE(config(dtype="float64", skip=skip), seed=1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.normal_()
    x = torch.randn(20, D, dtype=torch.float64)
    folded = fold(sae, 0.25, 8.0)
    torch.testing.assert_close(folded(x).x_hat, sae(0.25 * x).x_hat / 8)
    torch.testing.assert_close(folded(x).acts, sae(0.25 * x).acts / 8)


def settings(**changes: Any) -> saefast.TrainConfig:
    return saefast.TrainConfig(**(train_job.CONFIG | {"n_tokens": 32 * 40} | changes))


KINDS: dict[str, dict[str, Any]] = {
    "fused": dict(engine="fused"),
    "autograd": dict(engine="autograd"),
    "lean": dict(optimizer="adam-lean", lr=3e-3),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_run_is_saved_loaded_and_resumed_to_the_bit(tmp_path: Path, name: str) -> None:
    x, target = pairs(1500, torch.float32)
    data, asked = {"x": x, "target": target}, config(skip=True)

    def breaks(line: dict[str, Any]) -> None:
        if line["step"] == 27:
            raise ZeroDivisionError

    asks = settings(**KINDS[name], save_every=10, log_every=1)
    with pytest.raises(ZeroDivisionError):
        train(data, asked, asks, tmp_path / "run", on_log=breaks)
    resumed = train(data, asked, asks, tmp_path / "run", resume=True)
    whole = train(data, asked, asks)
    for kind in (resumed, load(tmp_path / "run")):
        for key, tensor in whole.state_dict().items():
            assert torch.equal(tensor, kind.state_dict()[key]), key
    assert whole.W_skip.abs().max() > 0


def test_the_skip_takes_what_is_linear() -> None:
    """Half of the target is a linear map of x, which a few latents cannot make."""
    x, target = pairs(3000, torch.float32)
    fvus = {}
    for skip in (False, True):
        sae = train({"x": x, "target": target}, config(skip=skip, k=2), settings(n_tokens=32 * 250))
        with torch.no_grad():
            error = target[-100:] - sae(x[-100:]).x_hat
        fvus[skip] = float(error.square().sum() / (target[-100:] - target[-100:].mean(0)).square().sum())
    assert fvus[True] < 0.5 * fvus[False] < 0.4


def test_latents_begin_in_the_data_of_both_spaces() -> None:
    x, target = pairs(400)
    engine = FusedEngine(SAE(config(dtype="float64"), seed=3), saefast.TrainConfig(batch_size=B), 10)
    engine.initialise(x, target)
    sae = engine.sae
    cosine = sae.W_dec @ normalize(target - sae.b_dec, dim=1).T
    best = cosine.max(1)
    torch.testing.assert_close(best.values, torch.ones(L, dtype=torch.float64))
    assert len(best.indices.unique()) == L
    # The encoder's row of a latent fires more on its own row of x than on others.
    pre = x @ sae.W_enc.T + sae.b_enc
    own = pre.gather(0, best.indices[None])[0]
    assert float((pre < own).double().mean()) > 0.9


def test_dead_latents_begin_anew_in_both_spaces() -> None:
    x, residual = pairs(60)
    dead = torch.arange(L) < 9
    found = fresh_latents(residual, dead, ~dead, torch.randn(L, D), torch.randn(L, OUT), 0, 5, x)
    assert found is not None
    tokens = (normalize(residual.float(), dim=1) @ normalize(found.W_dec, dim=1).T).argmax(0)
    centred = x.float() - x.float().mean(0)
    along = (found.W_enc * normalize(centred[tokens], dim=1)).sum(1)
    torch.testing.assert_close(along, found.W_enc.norm(dim=1))
    # At the batch's mean it is at 0, and at its own token as far above as that is from the mean.
    torch.testing.assert_close(found.W_enc @ x.float().mean(0) + found.b_enc, torch.zeros(9), rtol=0, atol=1e-4)


def test_what_goes_wrong_is_said_in_one_line() -> None:
    x, target = pairs(200, torch.float32)
    data = {"x": x, "target": target}
    for asked, given, message in (
        (config(d_out=8), data, "target is 7 wide, d_out is 8: set d_out = 7"),
        (SAEConfig(D, L, K), data, "target is 7 wide, d_in is 12, .*: set d_out = 7"),
        (config(), x, "has no target besides x, which a transcoder .d_out = 7, skip = False. reconstructs"),
        (config(d_out=None, skip=True), x, "has no target besides x"),
    ):
        with pytest.raises(InputError, match=message):
            train(given, asked, settings())
    with pytest.raises(InputError, match=r"a crosscoder reconstructs the rows that it takes"):
        config(crosscode_widths=(6, 6))
    with pytest.raises(InputError, match="d_out is 0: expected at least 1"):
        config(d_out=0)
    with pytest.raises(InputError, match=r"init_encoder_scale is True: .* set it to False"):
        train(data, config(), settings(init_encoder_scale=True))


def test_a_file_of_another_shape_is_refused(tmp_path: Path) -> None:
    SAE(config(skip=True), seed=0).save(tmp_path)
    loaded = load(tmp_path)
    assert loaded.config == config(skip=True)
    assert loaded.W_skip.shape == (OUT, D)
    text = (tmp_path / "sae.safetensors").read_bytes().replace(b'\\"d_out\\": 7', b'\\"d_out\\": 8')
    (tmp_path / "sae.safetensors").write_bytes(text)
    with pytest.raises(InputError):
        load(tmp_path)


def test_the_plan_counts_both_widths() -> None:
    kinds = [config(d_in=64, n_latents=4096, d_out=d_out, skip=skip) for d_out, skip in WIDTHS]
    memory = [memory_of(Sizes.of(one, choose(one, saefast.TrainConfig(n_tokens=100_000))), "cpu") for one in kinds]
    assert memory[1]["weights"] - memory[0]["weights"] == 4096 * (256 - 64) * 4
    assert memory[2]["weights"] - memory[1]["weights"] == 256 * 64 * 4
    assert memory[1]["optimiser state"] > memory[0]["optimiser state"]
    assert memory[1]["batch"] > memory[0]["batch"]


WIDTHS = ((64, False), (256, False), (256, True))
