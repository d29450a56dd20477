"""Matryoshka: nested dictionaries over every activation, in both engines."""

from pathlib import Path
from typing import Any

import pytest
import torch
from classic import CLASSIC_TRAIN
from torch import Tensor

import saefast
from saefast.cli.main import main
from saefast.engines.autograd import AutogradEngine, total_loss
from saefast.engines.base import PARAMETERS
from saefast.engines.dead import DeadLatents
from saefast.engines.fused import FusedEngine
from saefast.engines.recipe import choose
from saefast.errors import InputError
from saefast.models.architecture import At
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

D, L, K, B = 12, 48, 4, 40
WIDTHS = (6, 20)


def config(**changes: Any) -> SAEConfig:
    return SAEConfig(D, L, K, **(dict(matryoshka=WIDTHS) | changes))


def rows(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    code = torch.rand(n, 30) * (torch.rand(n, 30) < torch.linspace(0.02, 0.3, 30))
    return (code @ torch.randn(30, D) + 0.01 * torch.randn(n, D)).to(dtype)


def stated_loss(sae: SAE, x: Tensor, weights: list[float]) -> Tensor:
    """The sum over dictionaries of mean_b Σ_d e², by dense matrices. No AuxK."""
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
    if sae.config.activation == "topk":
        chosen = pre.topk(K, dim=1).indices
        mask = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, chosen, True)
    else:
        mask = torch.zeros_like(pre, dtype=torch.bool).flatten()
        mask[pre.flatten().topk(K * len(x)).indices] = True
        mask = mask.view_as(pre)
    f = torch.where(mask, pre, 0)
    widths = [*WIDTHS, L]
    errors = [x - f[:, :width] @ sae.W_dec[:width] - sae.b_dec for width in widths]
    return sum(w * e.square().sum() / len(x) for w, e in zip(weights, errors, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize(("how", "weight"), [("sum", 1.0), ("weighted_mean", 1 / 9)])
def test_loss_and_gradient_are_those_of_the_published_form(activation: Any, how: Any, weight: float) -> None:
    sae = SAE(config(activation=activation, dtype="float64"), seed=1)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_(std=0.1)
    x = rows(B)
    loose = saefast.TrainConfig(loss="sum", auxk_coef=0.0, matryoshka_loss=how, lr=0.0, settle_every=1)
    train = choose(sae.config, loose, total_steps=60)
    ours = total_loss(sae, x, DeadLatents(L, train), train)
    dense = stated_loss(sae, x, [weight] * 3)
    assert float(ours.total.detach()) == pytest.approx(float(dense.detach()), rel=1e-12)
    parameters = [getattr(sae, name) for name in PARAMETERS]
    expected = torch.autograd.grad(dense, parameters)
    for a, b in zip(torch.autograd.grad(ours.total, parameters), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    fused = FusedEngine(sae, train, 60)
    found = fused._gradient(x, x)
    assert float(found.loss) == pytest.approx(float(dense.detach()), rel=1e-12)
    torch.testing.assert_close(found.b_enc, expected[2], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.b_dec, expected[3], rtol=1e-10, atol=1e-12)


SETTINGS: dict[str, dict[str, Any]] = {
    "ours": {},
    "weighted mean, clipped": dict(matryoshka_loss="weighted_mean", max_grad_norm=0.05),
    "OpenAI's AuxK": dict(auxk_b_dec_grad=True, auxk_denominator="inputs"),
    "dead before the batch": dict(dead_update_first=False, dead_after=1, dead_unit="steps", fired_above=0.5),
}


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_both_engines_train_alike(activation: Any, name: str, dtype: str) -> None:
    data = rows(40 * B, getattr(torch, dtype)).split(B)
    settings = CLASSIC_TRAIN | dict(lr=1e-3, dead_after=B, settle_every=1) | SETTINGS[name]
    train = saefast.TrainConfig(**settings)
    ours, dense = (
        kind(SAE(config(activation=activation, dtype=dtype, init="tied"), seed=3), train, 60)
        for kind in (FusedEngine, AutogradEngine)
    )
    tolerance, auxk = 1e-9 if dtype == "float64" else 2e-4, 0
    for one in (ours, dense):
        one.initialise(data[0])
    for x in data[: 40 if dtype == "float64" else 20]:
        a, b = ours.step(x), dense.step(x)
        for figure in ("loss", "fvu", "l0", "auxk_loss", "grad_norm"):
            assert float(getattr(a, figure)) == pytest.approx(float(getattr(b, figure)), rel=tolerance), figure
        auxk += float(a.auxk_loss) > 0
    assert auxk >= 3, "AuxK never ran, so nothing was tested"
    if dtype == "float64":
        for parameter in PARAMETERS:
            a, b = (getattr(one.sae, parameter).detach() for one in (ours, dense))
            assert (a - b).abs().max() <= 1e-9 * b.abs().max(), parameter


def test_early_latents_reconstruct_by_themselves() -> None:
    """What it is for: with the first latents alone, a Matryoshka SAE explains more than a plain one of the same run."""
    data = rows(4000, torch.float32)
    train = saefast.TrainConfig(n_tokens=60_000, batch_size=100, lr=3e-3)
    explained = {}
    for widths in (None, WIDTHS):
        sae = saefast.train(data, config(matryoshka=widths), train)
        f = sae.encode(data).detach()
        f[:, WIDTHS[0] :] = 0
        explained[widths] = float((data - sae.decode(f)).detach().square().sum())
    assert explained[WIDTHS] < 0.8 * explained[None]


def test_the_whole_dictionary_is_always_the_last() -> None:
    train = saefast.TrainConfig()
    for widths in (WIDTHS, (*WIDTHS, L)):
        terms = config(matryoshka=widths).architecture().terms(train, At(0, 1))
        assert terms.bounds == [*WIDTHS, L]
        assert (terms.by_latent, terms.main) == (True, 2)
    assert config(matryoshka=None).architecture().terms(train, At(0, 1)).bounds == [K]
    assert config().architecture().name == "topk"
    preset = saefast.preset("dictionary_learning", D, L, K, activation="batchtopk", matryoshka=WIDTHS)[1]
    assert (preset.matryoshka_loss, preset.threshold_decay) == ("weighted_mean", 0.999)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ((), r"matryoshka is \(\): expected ascending sizes"),
        ((0, 5), "expected ascending sizes of at least 1"),
        ((5, 5), "expected ascending sizes"),
        ((9, 4), "expected ascending sizes"),
        ((9, L + 1), f"n_latents only {L}: expected sizes up to that"),
        ((2.5,), r"matryoshka\[0\] is 2\.5|expected a tuple"),
        ("512", "matryoshka is '512'"),
    ],
)
def test_sizes_out_of_order(widths: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        config(matryoshka=widths)


def test_multi_topk_has_no_meaning_here() -> None:
    with pytest.raises(InputError, match=r"multi_topk_coef is 0\.1, which a Matryoshka SAE has not"):
        FusedEngine(SAE(config(), seed=1), saefast.TrainConfig(multi_topk_coef=0.1), 60)


def test_at_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(rows(3000, torch.float32), tmp_path / "acts.pt")
    flags = [
        "--n-latents",
        "48",
        "--k",
        "4",
        "--batch-size",
        "100",
        "--activation",
        "batchtopk",
        "--matryoshka",
        "6,20",
        "--lr",
        "3e-3",
    ]
    assert main(["train", str(tmp_path / "acts.pt"), "--out", str(tmp_path / "run"), *flags]) == 0
    sae = saefast.load(tmp_path / "run")
    assert sae.config.matryoshka == WIDTHS
    assert sae.config.activation == "batchtopk"
    assert float(sae.threshold) > 0
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert main(["train", str(tmp_path / "acts.pt"), "--out", str(tmp_path / "bad"), "--matryoshka", "20,6"]) == 2
    assert "matryoshka is (20, 6): expected ascending sizes" in capsys.readouterr().err
    assert not (tmp_path / "bad").exists()


def test_a_run_resumes_to_the_bit(tmp_path: Path) -> None:
    """Its checkpoint's settings come back from JSON, which has no tuples."""

    def breaks(line: dict[str, Any]) -> None:
        if line["step"] == 20:
            raise ZeroDivisionError

    data, train = rows(1600, torch.float32), saefast.TrainConfig(batch_size=B, save_every=6)
    whole = saefast.train(data, config(), train, tmp_path / "whole")
    with pytest.raises(ZeroDivisionError):
        saefast.train(data, config(), train, tmp_path / "cut", on_log=breaks)
    resumed = saefast.train(data, config(), train, tmp_path / "cut", resume=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(InputError, match=r"matryoshka was \[6, 20\], is \[6, 21\]"):
        saefast.train(data, config(matryoshka=(6, 21)), train, tmp_path / "cut", resume=True)
