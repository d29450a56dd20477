"""Crosscoders: against a dense statement, both engines alike, layers of one scale, a run from its rows to its file."""

from pathlib import Path
from typing import Any

import dense_statements as dense
import pytest
import torch
from classic import CLASSIC, CLASSIC_TRAIN
from torch import Tensor

import saefast
from saefast.engines.autograd import AutogradEngine
from saefast.engines.base import PARAMETERS
from saefast.engines.fused import FusedEngine
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.training.finetune import finetune
from saefast.training.progress import read_metrics

WIDTHS, L, K, B = (8, 8, 8), 48, 3, 40
D = sum(WIDTHS)


def config(activation: str = "topk", widths: tuple[int, ...] = WIDTHS, **changes: Any) -> SAEConfig:
    return SAEConfig(sum(widths), L, K, activation=activation, crosscode_widths=widths, **changes)


def rows(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows of three layers made of one code: some sources are in one layer alone, others in two or all of them."""
    generator = torch.Generator().manual_seed(seed)
    code = torch.rand(n, 30, generator=generator) ** 8
    decoders = torch.randn(30, 3, 8, generator=generator) * (torch.rand(30, 3, 1, generator=generator) < 0.6)
    noise = 0.01 * torch.randn(n, D, generator=generator)
    return (code @ decoders.flatten(1) + noise + 0.5).to(dtype)


def loud(x: Tensor) -> Tensor:
    """Rows whose layers have very different scales."""
    return x * torch.tensor([1e-2, 1.0, 30.0]).repeat_interleave(8).to(x)


def engine(kind: Any, activation: str, **settings: Any) -> Any:
    settings = CLASSIC | dict(lr=3e-3, dead_after=3 * B, settle_every=1) | settings
    own = {key: settings.pop(key) for key in ("init", "apply_b_dec_to_input") if key in settings}
    return kind(SAE(config(activation, dtype="float64", **own), seed=3), saefast.TrainConfig(**settings), 60)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("kind", [FusedEngine, AutogradEngine])
def test_training_follows_the_dense_statement(activation: str, kind: Any) -> None:
    """Free norms and projections off, so that the parts' norms grow apart and the ranking follows them."""
    free = dict(decoder_norm="never", project_decoder_grad=False, auxk_coef=0.0, loss="sum", apply_b_dec_to_input=False)
    ours = engine(kind, activation, beta2=0.999, lr_decay_share=0.0, **free)
    with torch.no_grad():
        ours.sae.W_dec *= torch.rand(L, 3, generator=torch.Generator().manual_seed(5)).repeat_interleave(8, 1) * 2
    start = {name: getattr(ours.sae, name) for name in PARAMETERS}
    recipe = dense.Recipe(lr=3e-3, steps=60, betas=(0.9, 0.999), loss="sum", unit_rows=False)
    statement = dense.crosscoder_topk(K, 3, batch=activation == "batchtopk")
    plain = dense.Trainer(start, statement, recipe)
    different = 0
    for x in rows(40 * B, torch.float64).split(B):
        different += not torch.equal(*codes(plain.p, x))
        loss, _ = plain.step(x)
        assert float(ours.step(x).loss) == pytest.approx(float(loss), rel=1e-9)
    assert different > 20, "other rankings give the same codes, so nothing was tested"
    for name in PARAMETERS:
        torch.testing.assert_close(getattr(ours.sae, name).detach(), plain.p[name].detach(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [FusedEngine, AutogradEngine])
def test_an_l1_penalty_on_summed_norms_follows_the_dense_statement(kind: Any) -> None:
    """Lindsey et al.'s loss: Σ over layers of the squared errors, and coef · Σ acts · Σ over layers of ‖d‖."""
    free = dict(decoder_norm="never", project_decoder_grad=False, auxk_coef=0.0, loss="sum", lr_decay_share=0.0)
    paid = dict(sparsity_coef=0.1, sparsity_warmup_share=0.0, sparse_start=False, fit_encoder=False)
    train = saefast.TrainConfig(**CLASSIC_TRAIN | dict(lr=3e-3, settle_every=1) | free | paid)
    sae = SAE(config("relu", dtype="float64", unit_norm_decoder=False, apply_b_dec_to_input=False), seed=3)
    recipe = dense.Recipe(lr=3e-3, steps=60, betas=(0.9, 0.999), loss="sum", unit_rows=False)
    start = {name: getattr(sae, name) for name in PARAMETERS}
    plain = dense.Trainer(start, dense.relu_l1(0.1, by_norm=True, centred=False, blocks=3), recipe)
    ours = kind(sae, train, 60)
    for x in rows(30 * B, torch.float64).split(B):
        loss, _ = plain.step(x)
        assert float(ours.step(x).loss) == pytest.approx(float(loss), rel=1e-9)
    for name in PARAMETERS:
        torch.testing.assert_close(getattr(sae, name).detach(), plain.p[name].detach(), rtol=1e-7, atol=1e-9)


def codes(p: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of two rankings: by the sum of the layers' norms, and by the norm of the whole row."""
    pre = dense.pre_activations(p, x, centred=False)
    return tuple(dense.best_of_row(pre, K, pre * dense.decoder_norms(p, blocks)) > 0 for blocks in (3, 1))  # type: ignore[return-value]


SETTINGS: dict[str, dict[str, Any]] = {
    "ours": {},
    "free norms, clipped": dict(decoder_norm="never", project_decoder_grad=False, max_grad_norm=0.01),
    "resampled": dict(resample_every=4, auxk_coef=0.0),
    "in the data": dict(init="rows", fit_encoder=True),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_both_engines_train_alike(name: str, activation: str) -> None:
    data = rows(40 * B, torch.float64).split(B)
    ours, plain = (engine(kind, activation, **SETTINGS[name]) for kind in (FusedEngine, AutogradEngine))
    for one in (ours, plain):
        one.initialise(data[0])
    for x in data:
        a, b = ours.step(x), plain.step(x)
        for figure in ("loss", "fvu", "l0", "auxk_loss", "dead_share"):
            assert float(getattr(a, figure)) == pytest.approx(float(getattr(b, figure)), rel=1e-8), figure
    for parameter in PARAMETERS:
        a, b = (getattr(one.sae, parameter).detach() for one in (ours, plain))
        assert (a - b).abs().max() <= 1e-8 * b.abs().max(), parameter


@pytest.mark.parametrize("free", [True, False])
def test_both_engines_pay_by_summed_norms_alike(free: bool) -> None:
    """The penalty's gradient goes along each part of a decoder row by itself."""
    rows_of = dict(decoder_norm="never", project_decoder_grad=False) if free else {}
    paid = dict(jumprelu_penalty="tanh", sparsity_coef=0.02, jumprelu_threshold=0.3, auxk_coef=0.0, loss="sum")
    data = rows(30 * B, torch.float64).split(B)
    ours, plain = (engine(kind, "jumprelu", **paid, **rows_of) for kind in (FusedEngine, AutogradEngine))
    for one in (ours, plain):
        one.initialise(data[0])
    for x in data:
        a, b = ours.step(x), plain.step(x)
        for figure in ("loss", "fvu", "grad_norm", "sparsity_loss"):
            assert float(getattr(a, figure)) == pytest.approx(float(getattr(b, figure)), rel=1e-8), figure
        assert float(a.l0) == pytest.approx(float(b.l0))  # one of them is a float32
        assert float(a.sparsity_loss) > 0
    for parameter in (*PARAMETERS, "log_threshold"):
        a, b = (getattr(one.sae, parameter).detach() for one in (ours, plain))
        assert (a - b).abs().max() <= 1e-8 * b.abs().max(), parameter


def test_parts_of_several_widths_are_paid_for_in_one_engine() -> None:
    config_of = SAEConfig(24, L, K, activation="jumprelu", crosscode_widths=(4, 20))
    train = dict(n_tokens=400, batch_size=B, save_every=0, jumprelu_penalty="tanh", sparsity_coef=0.02)
    with pytest.raises(
        InputError, match=r"crosscode_widths is \(4, 20\), and activation='jumprelu' pays by decoder norms"
    ):
        saefast.train(rows(500), config_of, saefast.TrainConfig(**train))
    saefast.train(rows(500), config_of, saefast.TrainConfig(engine="autograd", **train))
    # Where it does not pay by norms, either engine will do.
    saefast.train(rows(500), config_of, saefast.TrainConfig(**train | dict(jumprelu_penalty="l0")))


def test_matryoshka_lies_under_it() -> None:
    sae_config = config("batchtopk", matryoshka=(16,))
    sae = saefast.train(rows(1000), sae_config, saefast.TrainConfig(n_tokens=4000, batch_size=B))
    assert sae.architecture.parts() == WIDTHS
    assert [term.bound for term in sae.architecture.terms(saefast.TrainConfig(), None).prefixes] == [16, L]  # type: ignore[arg-type]


@pytest.mark.parametrize("widths", [WIDTHS, (4, 20)])
def test_latents_are_ranked_and_measured_by_the_summed_norms_of_scaled_parts(widths: tuple[int, ...]) -> None:
    sae = SAE(config("topk", widths, dtype="float64"), seed=1)
    scale = torch.tensor([3.0, 0.5, 2.0][: len(widths)], dtype=torch.float64)
    sae.part_scale.copy_(scale)
    with torch.no_grad():
        sae.W_dec *= torch.rand(L, D, dtype=torch.float64) + 0.1
        sae.W_dec[7] = 0
    norms = sum(s * part.norm(dim=1) for s, part in zip(scale, sae.W_dec.detach().split(widths, dim=1), strict=True))
    x = rows(60, torch.float64)
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach() * norms
    expected = torch.zeros_like(pre).scatter(1, pre.topk(K).indices, pre.topk(K).values.relu())
    torch.testing.assert_close(sae.encode(x).detach(), expected)
    safe = torch.where(norms > 0, norms, 1)
    x_hat = (expected / safe) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(sae(x).x_hat, x_hat)
    torch.testing.assert_close(sae.decode(expected), x_hat)


def test_gradients_of_what_is_served() -> None:
    sae = SAE(config("batchtopk", dtype="float64"), seed=1)
    sae.threshold.fill_(0.8)
    x = rows(6, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sae(x).x_hat, (x,))


def settings(**changes: Any) -> saefast.TrainConfig:
    return saefast.TrainConfig(**(dict(n_tokens=6000, batch_size=B, lr=5e-3, save_every=0) | changes))


@pytest.mark.parametrize(("engine_name", "activation"), [("fused", "topk"), ("autograd", "batchtopk")])
def test_every_layer_counts_alike_whatever_its_scale(tmp_path: Path, engine_name: str, activation: str) -> None:
    x = rows(2000)
    train = settings(engine=engine_name)
    plain = saefast.train(x, config(activation), train, tmp_path / "plain")
    sae = saefast.train(loud(x), config(activation), train, tmp_path / "loud")
    # The rows that training sees are the same but for rounding, and so is what it finds.
    assert float(sae.part_scale[0] / plain.part_scale[0]) == pytest.approx(100, rel=1e-3)
    assert float(sae.part_scale[2] / plain.part_scale[2]) == pytest.approx(1 / 30, rel=1e-3)
    by_part = [fvu(one, rows, part) for one, rows in ((plain, x), (sae, loud(x))) for part in range(3)]
    assert max(by_part) < 0.5
    assert by_part[3:] == pytest.approx(by_part[:3], rel=0.2)
    # What the run measured on scaled rows is what the SAE gives for raw ones.
    held = loud(x)[-100:] * sae.part_scale.repeat_interleave(8)
    found = (held - sae(loud(x)[-100:]).x_hat.detach() * sae.part_scale.repeat_interleave(8)).square().sum()
    expected = read_metrics(tmp_path / "loud")[-1]["heldout/fvu"]
    assert float(found / (held - held.mean(0)).square().sum()) == pytest.approx(expected, rel=1e-3)


def fvu(sae: SAE, x: Tensor, part: int) -> float:
    """Of one layer."""
    y, y_hat = (rows[:, 8 * part : 8 * part + 8] for rows in (x, sae(x).x_hat.detach()))
    return float((y - y_hat).square().sum() / (y - y.mean(0)).square().sum())


def test_layers_keep_their_scales_where_that_is_asked_for() -> None:
    sae = saefast.train(loud(rows(1000)), config(), settings(normalize="none"))
    assert sae.part_scale.tolist() == [1, 1, 1]


@pytest.mark.parametrize("options", [{}, dict(optimizer="adam-lean"), dict(engine="autograd")], ids=str)
def test_a_run_is_saved_loaded_and_resumed(options: dict[str, Any], tmp_path: Path) -> None:
    data, train = loud(rows(1000)), settings(n_tokens=1600, save_every=6, **options)

    class Stop(Exception):
        pass

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 20:
            raise Stop

    whole = saefast.train(data, config("batchtopk"), train, tmp_path / "whole")
    with pytest.raises(Stop):
        saefast.train(data, config("batchtopk"), train, tmp_path / "cut", on_log=stop)
    resumed = saefast.train(data, config("batchtopk"), train, tmp_path / "cut", resume=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    loaded = saefast.load(tmp_path / "whole")
    assert loaded.config.crosscode_widths == WIDTHS
    assert torch.equal(loaded.part_scale, whole.part_scale)
    assert torch.equal(loaded.encode(data[:50]), whole.encode(data[:50]))


def test_what_cannot_be_a_crosscoder() -> None:
    with pytest.raises(InputError, match=r"crosscode_widths is \(8, 8\), 16 in all, but d_in is 24"):
        SAEConfig(24, L, K, crosscode_widths=(8, 8))
    with pytest.raises(InputError, match=r"crosscode_widths is \(24,\): expected widths of at least two"):
        SAEConfig(24, L, K, crosscode_widths=(24,))
    with pytest.raises(InputError, match=r"crosscode_widths is \(0, 24\): expected"):
        SAEConfig(24, L, K, crosscode_widths=(0, 24))


def test_fine_tuning_through_a_model_is_refused() -> None:
    with pytest.raises(
        InputError, match="sae reconstructs 3 layers or models at once, none of which can stand in alone"
    ):
        finetune(SAE(config()), torch.nn.Linear(2, 2), [], tokenizer=None, hook="")
