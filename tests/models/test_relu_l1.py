"""ReLU with an L1 penalty, in both published forms: against dense statements, held at an L0, served, saved, resumed."""

import math
from pathlib import Path
from typing import Any

import dense_statements as dense
import pytest
import torch
from classic import CLASSIC
from torch import Tensor

import saefast
from saefast.analysis.evaluation import evaluate
from saefast.engines.autograd import AutogradEngine
from saefast.engines.base import PARAMETERS
from saefast.engines.fused import FusedEngine
from saefast.errors import InputError
from saefast.models import steering
from saefast.models.architecture import At
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.training.loop import fold

D, L, K, B, STEPS = 12, 48, 4, 40, 30
ENGINES = [FusedEngine, AutogradEngine]
# Bricken's form, and Templeton's.
UNIT: dict[str, Any] = {}
FREE: dict[str, Any] = dict(unit_norm_decoder=False, decoder_norm="never", project_decoder_grad=False)
FORMS = pytest.mark.parametrize("form", [UNIT, FREE], ids=["unit rows", "free rows"])


def rows(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    code = torch.rand(n, 30) * (torch.rand(n, 30) < 0.1)
    return (code @ torch.randn(30, D) + 0.01 * torch.randn(n, D)).to(dtype)


OF_THE_SAE = ("init", "unit_norm_decoder", "apply_b_dec_to_input", "crosscode_widths", "matryoshka")


def engine(kind: Any, dtype: str = "float64", steps: int = STEPS, **settings: Any) -> Any:
    settings = CLASSIC | dict(auxk_coef=0.0, lr=2e-3, settle_every=1, sparse_start=False) | settings
    own = {name: settings.pop(name) for name in OF_THE_SAE if name in settings}
    sae = SAE(SAEConfig(D, L, K, activation="relu", dtype=dtype, **own), seed=3)
    return kind(sae, saefast.TrainConfig(**settings), steps)


def scale_rows(one: Any) -> None:
    """Decoder rows of norms from 0.3 to 2, so that a penalty that leaves them out shows."""
    with torch.no_grad():
        one.sae.W_dec.mul_(torch.linspace(0.3, 2, L, dtype=one.sae.dtype)[:, None])


@pytest.mark.parametrize("kind", ENGINES)
@FORMS
@pytest.mark.parametrize("loss", ["sum", "fvu"])
@pytest.mark.parametrize("centred", [True, False])
def test_steps_are_those_of_the_dense_statement(kind: Any, form: dict[str, Any], loss: Any, centred: bool) -> None:
    coef, data = (0.5 if loss == "sum" else 0.05), rows(STEPS * B, torch.float64).split(B)
    settings = form | dict(loss=loss, sparsity_coef=coef, sparsity_warmup_share=0.3, apply_b_dec_to_input=centred)
    one = engine(kind, **settings, lr_warmup_steps=5, lr_decay_share=0.5)
    if form:
        scale_rows(one)
    one.initialise(data[0])
    statement = dense.relu_l1(dense.rising(coef, round(0.3 * STEPS)), by_norm=bool(form), centred=centred)
    recipe = dense.Recipe(
        lr=2e-3, steps=STEPS, warmup=5, decay_from=STEPS // 2, loss=loss, unit_rows=not form, betas=(0.9, 0.999)
    )
    trainer = dense.Trainer(dict(one.sae.named_parameters()), statement, recipe)
    for x in data:
        stats, (expected, found) = one.step(x), trainer.step(x)
        assert float(stats.loss) == pytest.approx(float(expected), rel=1e-9)
        assert float(stats.l0) == pytest.approx(float(found.l0.detach()), rel=1e-6)
        assert float(stats.sparsity_loss) == pytest.approx(float(found.penalty.detach()), rel=1e-9)
    for name in PARAMETERS:
        torch.testing.assert_close(getattr(one.sae, name).detach(), trainer.p[name].detach(), rtol=1e-7, atol=1e-9)


@FORMS
def test_engines_train_alike_in_float32_where_rows_are_settled_late(form: dict[str, Any]) -> None:
    """Without momentum rows that were left alone are where dense Adam has them but for their second moments."""
    data = rows(STEPS * B).split(B)
    ends = []
    for kind in ENGINES:
        one = engine(kind, "float32", **form, sparsity_coef=0.03, beta1=0.0, settle_every=4, max_grad_norm=0.5)
        one.initialise(data[0])
        ends.append([float(one.step(x).loss) for x in data])
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)


@FORMS
def test_gradients_of_the_penalty(form: dict[str, Any]) -> None:
    sae = SAE(SAEConfig(D, L, K, activation="relu", unit_norm_decoder=not form), seed=1)
    rule, own = sae.architecture.pointwise, {}
    pre = torch.randn(5, 7, dtype=torch.float64).add(0.3).requires_grad_()
    norms = torch.rand(7, dtype=torch.float64).add(0.2).requires_grad_() if form else None

    def paid(pre: Tensor, norms: Tensor | None) -> Tensor:
        return rule.penalty(pre, rule.activate(pre, own), own, norms, None)

    assert rule.wants_norms(None) == bool(form)
    assert torch.autograd.gradcheck(paid, (pre, norms))
    expected = torch.clamp(pre, min=0) * (1 if norms is None else norms)
    torch.testing.assert_close(paid(pre, norms), expected)


# L0.


def trained(form: dict[str, Any], steps: int = 500, seed: int = 0, **settings: Any) -> tuple[Any, list[float]]:
    """A run at the default recipe but for what is given; and the L0 of its steps."""
    torch.manual_seed(seed)
    sources = torch.randn(40, D)
    data = [(torch.rand(96, 40) * (torch.rand(96, 40) < 0.08)) @ sources for _ in range(steps)]
    own = {name: form[name] for name in OF_THE_SAE if name in form}
    train = {name: value for name, value in form.items() if name not in own}
    sae = SAE(SAEConfig(D, 96, K, activation="relu", **own), seed=seed)
    one = FusedEngine(sae, saefast.TrainConfig(**dict(batch_size=96) | train | settings), steps)
    one.initialise(torch.cat(data[:4]))
    return one, [float(one.step(x).l0) for x in data]


@FORMS
@pytest.mark.parametrize("settings", [{}, {"sparse_start": False}, {"loss": "sum"}], ids=str)
def test_l0_comes_to_k_and_stays(form: dict[str, Any], settings: dict[str, Any]) -> None:
    _, l0 = trained(form, **settings)
    assert sum(l0[-50:]) / 50 == pytest.approx(K, rel=0.05)
    # Of single batches of 96 tokens it varies by a tenth or two, whatever the SAE.
    tens = [sum(l0[at : at + 10]) / 10 for at in range(len(l0) - 200, len(l0), 10)]
    assert all(0.85 * K < mean < 1.15 * K for mean in tens)


def test_a_run_begins_with_k_active_latents_and_no_worse_than_its_mean() -> None:
    _, l0 = trained(UNIT, steps=2)
    assert l0[0] == pytest.approx(K, rel=0.15)
    data = rows(400)
    for sparse in (True, False):
        begun = engine(FusedEngine, "float32", sparse_start=sparse, fit_encoder=True, init="rows", sparsity_coef=0.0)
        begun.initialise(data)
        active = float((begun.sae.encode(data) > 0).sum(1).float().mean())
        # The threshold lies a thousandth below the last of the k a token that are chosen.
        assert K <= active <= 1.02 * K if sparse else active > 3 * K
        if sparse:
            # The scale is the one that reconstructs best: any other is worse.
            errors = []
            for factor in (0.9, 1.0, 1.1):
                again = SAE(begun.sae.config, seed=0)
                again.load_state_dict(begun.sae.state_dict())
                with torch.no_grad():
                    again.W_enc.mul_(factor), again.b_enc.mul_(factor)
                    errors.append(float((again(data).x_hat - data).square().sum()))
            assert errors[1] < min(errors[0], errors[2])
            assert errors[1] <= float((data - begun.sae.b_dec.detach()).square().sum())


def test_latents_that_begin_anew_have_the_biases_of_the_others() -> None:
    one = engine(FusedEngine, "float32", sparse_start=True, resample_every=5, dead_after=3 * B, lr=1e-3)
    data = rows(STEPS * B).split(B)
    one.initialise(data[0])
    with torch.no_grad():
        one.sae.W_enc[:9] = 0
        one.sae.b_enc[:9] = -9.0
    for x in data[:4]:
        one.step(x)
    before = one.sae.b_enc.detach().clone()
    one.step(data[4])
    begun = one.sae.b_enc.detach()[:9][before[:9] < -8]
    alive = ~one.dead.mask(one.dead.since)
    assert (begun[begun > -8] == begun[begun > -8][0]).all()
    assert float(begun[begun > -8][0]) == pytest.approx(float(one.sae.b_enc.detach()[alive].mean()), rel=1e-5)


def test_the_coefficient_is_moved_as_stated() -> None:
    """By hand: log coef = memory + 1/2 · clipped log(mean L0 / k), memory += that / its time."""
    kept, memory, mean, k, total = steering.state(0.2), math.log(0.2), None, 8, 1200
    for step, l0 in enumerate([400.0, 100.0, 30.0, 9.0, 8.0, 2.0, 0.0, 0.0]):
        error = 0.0 if mean is None else max(-1.0, min(1.0, mean - math.log(k)))
        assert float(steering.coefficient(kept, k)) == pytest.approx(math.exp(memory + 0.5 * error), rel=1e-12)
        now = math.log(max(l0, 1e-3))
        mean = now if mean is None else mean + (now - mean) / 4
        memory += max(-1.0, min(1.0, mean - math.log(k))) / (total / 30)
        kept = steering.counted(kept, l0, k, At(step, total))
    assert all(value.dtype == torch.float64 for value in kept.values())


# Serving, files, resuming.


def test_what_is_served_is_every_positive_pre_activation() -> None:
    sae, x = SAE(SAEConfig(D, L, K, activation="relu", dtype="float64"), seed=1), rows(20, torch.float64)
    with torch.no_grad():
        sae.b_enc.normal_(-0.3, 0.2), sae.b_dec.normal_()
    expected = torch.clamp((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc, min=0)
    torch.testing.assert_close(sae.encode(x), expected)
    torch.testing.assert_close(sae(x).x_hat, expected @ sae.W_dec + sae.b_dec)
    torch.testing.assert_close(torch.cat([sae.encode(row[None]) for row in x]), expected)
    raw = fold(sae, 3.0)
    torch.testing.assert_close(raw.encode(x), sae.encode(3.0 * x) / 3.0)
    torch.testing.assert_close(raw(x).x_hat, sae(3.0 * x).x_hat / 3.0)
    wanted = rows(6, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sae(x).x_hat, (wanted,))


@pytest.mark.parametrize("optimizer", ["adam", "adam-lean", "autograd"])
@FORMS
def test_a_killed_run_resumes_bit_for_bit(form: dict[str, Any], optimizer: Any, tmp_path: Path) -> None:
    own = {name: form[name] for name in OF_THE_SAE if name in form}
    kind = dict(engine="autograd") if optimizer == "autograd" else dict(optimizer=optimizer)
    settings = {name: value for name, value in form.items() if name not in own} | kind
    data, config = rows(30 * B), SAEConfig(D, L, K, activation="relu", **own)
    train = saefast.TrainConfig(
        n_tokens=len(data), batch_size=B, lr=2e-3, save_every=4, resample_every=5, dead_after=3 * B, **settings
    )

    class Stop(Exception):
        pass

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == 10:
            raise Stop

    whole = saefast.train(data, config, train, tmp_path / "whole")
    with pytest.raises(Stop):
        saefast.train(data, config, train, tmp_path / "cut", on_log=stop)
    resumed = saefast.train(data, config, train, tmp_path / "cut", resume=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    loaded = saefast.load(tmp_path / "whole")
    assert torch.equal(loaded(data[:9]).x_hat, whole(data[:9]).x_hat)
    active = float((loaded.encode(data) > 0).sum(1).float().mean())
    assert evaluate(loaded, data.split(B)).compute()["l0"] == pytest.approx(active, rel=1e-5)


# What does not go together.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(decoder_norm="never"), "decoder_norm is 'never' and unit_norm_decoder True.*long decoder rows"),
        (dict(unit_norm_decoder=False), "unit_norm_decoder is False, decoder_norm 'post_step'.* needs decoder_norm '"),
        (FREE | dict(project_decoder_grad=True), "project_decoder_grad True"),
        (dict(auxk_coef=0.1), "auxk_coef is 0.1.*'relu' does not rank"),
        (dict(multi_topk_coef=0.1), "multi_topk_coef is 0.1.*'relu' does not rank"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ENGINES)
def test_settings_that_do_not_go_together(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        engine(kind, **settings)


def test_a_rescaling_by_norms_is_refused() -> None:
    with pytest.raises(InputError, match="rescale_acts_by_decoder_norm is True"):
        SAEConfig(D, L, K, activation="relu", rescale_acts_by_decoder_norm=True)


# The published recipes.


def stepped(name: str, kind: Any, steps: int, **changes: Any) -> tuple[Any, Any, list[Tensor]]:
    """An engine on a recipe at a rate that shows, its TrainConfig, and batches."""
    data = [3 * x for x in rows(steps * B, torch.float64).split(B)]
    sae_config, train = saefast.preset(name, D, L, K, dtype="float64", settle_every=1, lr=1e-3, **changes)
    one = kind(SAE(sae_config, seed=2), train, steps)
    one.initialise(data[0])
    return one, train, data


@pytest.mark.parametrize("kind", ENGINES)
def test_towards_monosemanticity(kind: Any) -> None:
    """Mean over columns of e², plus 0.004 Σ acts: d_in times that is what we minimise."""
    steps = 25
    one, train, data = stepped("towards_monosemanticity", kind, steps)
    assert float((one.sae.encode(data[0]) > 0).sum(1).double().mean()) > 4 * K, "it begins with half of them active"
    recipe = dense.Recipe(lr=1e-3, steps=steps, loss="sum")
    trainer = dense.Trainer(dict(one.sae.named_parameters()), dense.relu_l1(0.004 * D, by_norm=False), recipe)
    for x in data:
        loss, _ = trainer.step(x)
        assert float(one.step(x).loss) == pytest.approx(float(loss), rel=1e-9)
    for name in PARAMETERS:
        torch.testing.assert_close(getattr(one.sae, name).detach(), trainer.p[name].detach(), rtol=1e-7, atol=1e-9)
    published = ((25_000, 50_000, 75_000, 100_000), 819_200, 12_500, "steps", "inputs", 8192)
    names = ("resample_steps", "resample_rows", "dead_after", "dead_unit", "resample", "batch_size")
    assert tuple(getattr(train, name) for name in names) == published


@pytest.mark.parametrize("kind", ENGINES)
def test_scaling_monosemanticity(kind: Any) -> None:
    """Σ e² + 5 Σ acts ‖row‖, warmed up over a twentieth; gradients clipped at 1; the rate falls over the last fifth."""
    steps = 40
    one, train, data = stepped("scaling_monosemanticity", kind, steps)
    assert (one.sae.b_dec == 0).all()
    assert torch.equal(one.sae.W_enc, one.sae.W_dec)
    p = {name: value.detach().clone().requires_grad_() for name, value in one.sae.named_parameters()}
    adam = torch.optim.Adam(p.values(), betas=(0.9, 0.999))
    statement = dense.relu_l1(dense.rising(5.0, steps // 20), by_norm=True, centred=False)
    clipped = 0
    for step, x in enumerate(data):
        loss = dense.total(statement(p, x, step), x, "sum")
        loss.backward()
        clipped += float(torch.nn.utils.clip_grad_norm_(p.values(), 1.0)) > 1
        adam.param_groups[0]["lr"] = 1e-3 * min(1.0, (steps - step) / (0.2 * steps))
        adam.step()
        adam.zero_grad()
        assert float(one.step(x).loss) == pytest.approx(float(loss.detach()), rel=1e-9)
    assert clipped > 5
    for name, value in p.items():
        torch.testing.assert_close(getattr(one.sae, name).detach(), value.detach(), rtol=1e-6, atol=1e-9)
    assert (saefast.preset("scaling_monosemanticity", D, L)[1].lr, train.resample_every) == (5e-5, 0)


# Under layers.


@pytest.mark.parametrize("sparse", [False, True])
def test_a_crosscoder_pays_by_the_sum_of_its_parts_norms(sparse: bool) -> None:
    """Against the dense statement with two blocks, in both engines."""
    data = rows(STEPS * B, torch.float64).split(B)
    settings = dict(
        crosscode_widths=(D // 2, D // 2), loss="sum", sparsity_coef=0.4, init="tied", sparsity_warmup_share=0.0,
        apply_b_dec_to_input=False, lr_decay_share=0.0,
    )  # fmt: skip
    for kind in ENGINES:
        one = engine(kind, **FREE, **settings, sparse_start=sparse)
        scale_rows(one)
        one.initialise(data[0])
        statement = dense.relu_l1(0.4, by_norm=True, centred=False, blocks=2)
        recipe = dense.Recipe(lr=2e-3, steps=STEPS, loss="sum", unit_rows=False)
        start = {name: getattr(one.sae, name) for name in PARAMETERS}
        trainer = dense.Trainer(start, statement, recipe)
        for x in data:
            loss, _ = trainer.step(x)
            assert float(one.step(x).loss) == pytest.approx(float(loss), rel=1e-9)


def test_nested_dictionaries_reconstruct_from_prefixes_in_both_engines() -> None:
    data = rows(STEPS * B, torch.float64).split(B)
    ends = []
    for kind in ENGINES:
        one = engine(kind, matryoshka=(12, L), sparse_start=True)
        one.initialise(data[0])
        ends.append([float(one.step(x).loss) for x in data])
    assert ends[0] == pytest.approx(ends[1], rel=1e-8)
