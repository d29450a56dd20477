"""The input norm: the published maths, what is served and trained by it, and what has not such a norm."""

from pathlib import Path
from typing import Any

import pytest
import torch
from family import ENGINES, PLAIN, assert_both_engines_agree, assert_goes_on_bit_for_bit, rows
from torch import Tensor

import saefast
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

D, L, K, B = 12, 48, 4, 40
NORMS = pytest.mark.parametrize("norm", ["layer_norm", "constant_norm"])


def config(norm: str, **changes: Any) -> SAEConfig:
    return SAEConfig(D, **dict(n_latents=L, k=K, input_norm=norm) | changes)


def uneven(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows of very different size, and of different mean."""
    return rows(n, D, dtype) * torch.logspace(-1, 2, n, dtype=dtype)[:, None] + torch.randn(n, 1, dtype=dtype)


def stated(norm: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows as they are encoded, and what a reconstruction is multiplied by, and is added to it: as published."""
    if norm == "layer_norm":  # OpenAI's LN, SAELens' and BatchTopK's
        mu = x.mean(dim=-1, keepdim=True)
        std = ((x - mu) ** 2).sum(-1, keepdim=True).div(x.shape[-1] - 1).sqrt()
        return (x - mu) / (std + 1e-5), std, mu
    coefficient = x.shape[-1] ** 0.5 / (x**2).sum(-1, keepdim=True).sqrt()
    return x * coefficient, 1 / coefficient, torch.zeros_like(coefficient)


def off_centre(sae: SAE) -> SAE:
    """With biases that are not 0."""
    with torch.no_grad():
        for bias in (sae.b_enc, sae.b_dec):
            bias.copy_(torch.randn_like(bias) * 0.3)
    return sae


@NORMS
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_what_is_served_is_the_published_maths(norm: str, centred: bool, dtype: str) -> None:
    sae = off_centre(SAE(config(norm, dtype=dtype, apply_b_dec_to_input=centred), seed=1))
    x = uneven(60, sae.dtype)
    z, spread, centre = stated(norm, x)
    pre = (z - sae.b_dec if centred else z) @ sae.W_enc.T + sae.b_enc
    best = pre.topk(K, dim=1)
    dense = torch.zeros_like(pre).scatter(1, best.indices, best.values.relu())
    expected = (dense @ sae.W_dec + sae.b_dec) * spread + centre

    acts, idx = sae.encode_sparse(x)
    found = sae(x)
    torch.testing.assert_close(sae.encode(x), dense)
    for x_hat in (found.x_hat, sae.decode(dense, x), sae.decode_sparse(acts, idx, x)):
        torch.testing.assert_close(x_hat, expected)
    deep = sae(x.view(3, 20, D))
    assert torch.equal(deep.x_hat.view(60, D), found.x_hat)
    assert torch.equal(deep.idx.view(60, K), found.idx)


@NORMS
def test_a_code_does_not_depend_on_a_tokens_size(norm: str) -> None:
    sae = off_centre(SAE(config(norm, dtype="float64"), seed=1))
    x = uneven(50) * 100
    same = x * 1000 if norm == "constant_norm" else x * 1000 + torch.arange(50, dtype=x.dtype)[:, None]
    torch.testing.assert_close(sae.encode(same), sae.encode(x), rtol=1e-4, atol=1e-6)
    plain = off_centre(SAE(SAEConfig(D, L, K, dtype="float64"), seed=1))
    assert not torch.allclose(plain.encode(same), plain.encode(x), rtol=1e-2)


@NORMS
def test_a_code_alone_is_not_decoded(norm: str) -> None:
    sae = SAE(config(norm), seed=1)
    x = uneven(5, torch.float32)
    acts, idx = sae.encode_sparse(x)
    for decode in (lambda: sae.decode_sparse(acts, idx), lambda: sae.decode(sae.encode(x))):
        with pytest.raises(InputError, match="x is not given: this SAE gives its mean and norm back to"):
            decode()
    with pytest.raises(InputError, match="the code is of"):
        sae.decode_sparse(acts, idx, x[:3])
    assert sae(x[:0]).x_hat.shape == (0, D)


@NORMS
def test_gradients(norm: str) -> None:
    sae = off_centre(SAE(SAEConfig(5, 8, k=2, input_norm=norm, dtype="float64"), seed=1))
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    own = dict(sae.named_parameters())

    def served(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(sae, dict(zip(own, parameters, strict=True)), x).x_hat

    assert torch.autograd.gradcheck(served, (x, *own.values()))


@NORMS
def test_half_precision_weights_see_rows_normalised_in_full(norm: str) -> None:
    sae = SAE(config(norm, dtype="bfloat16"), seed=1)
    # Between neighbouring bf16 numbers, whose mean is what all their columns round to.
    x = 1000 + torch.rand(20, D)
    z = stated(norm, x)[0]
    acts, idx = sae.encode_sparse(x)
    pre = z.to(torch.bfloat16).float() @ sae.W_enc.float().T
    torch.testing.assert_close(acts, pre.topk(K).values.relu())
    assert sae.decode_sparse(acts, idx, x).dtype == torch.bfloat16


@NORMS
def test_rows_without_spread_are_given_back(norm: str) -> None:
    sae = SAE(config(norm), seed=1)
    x = torch.zeros(2, D) if norm == "constant_norm" else torch.full((2, D), 7.0)
    out = sae(x)
    assert out.acts.isfinite().all()
    torch.testing.assert_close(out.x_hat, x if norm == "layer_norm" else sae.decode(sae.encode(x), x))


@NORMS
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_a_step_is_one_of_normalised_rows(norm: str, engine: str, activation: str) -> None:
    """Bit for bit that of an SAE without the norm that gets them."""
    settings = saefast.TrainConfig(**PLAIN | dict(max_grad_norm=1.0))
    kind, shape = ENGINES[engine], dict(activation=activation, dtype="float64")
    ours = kind(SAE(config(norm, **shape), seed=3), settings, 30)
    plain = kind(SAE(SAEConfig(D, L, K, **shape), seed=3), settings, 30)
    data = uneven(8 * B)[torch.randperm(8 * B)].split(B)
    ours.initialise(data[0])
    # What the architecture itself makes of them, for the published form differs by rounding.
    normed = [ours.sae.architecture.row_norm(x).normed(x) for x in data]
    torch.testing.assert_close(normed[0], stated(norm, data[0])[0])
    plain.initialise(normed[0])
    for x, z in zip(data, normed, strict=True):
        a, b = ours.step(x), plain.step(z)
        assert [float(value) for value in a] == [float(value) for value in b]
    for one in (ours, plain):
        one.finish()
    for (name, value), other in zip(ours.sae.state_dict().items(), plain.sae.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


@NORMS
def test_both_engines_train_alike(norm: str) -> None:
    settings = dict(auxk_coef=1 / 32, dead_after=3 * B)
    assert_both_engines_agree(config(norm, dtype="float64", init="tied", n_latents=200, k=2), settings, steps=10)


@NORMS
@pytest.mark.parametrize("optimizer", ["adam", "adam-lean"])
def test_a_run_is_saved_and_goes_on_bit_for_bit(norm: str, optimizer: str, tmp_path: Path) -> None:
    sae = assert_goes_on_bit_for_bit(config(norm), dict(optimizer=optimizer), tmp_path)
    assert saefast.load(tmp_path / "whole").config.input_norm == norm
    # Served as trained: rows as they are, whatever normalize says.
    x = rows(200, D)
    with torch.no_grad():
        found = sae(x)
    assert float((x - found.x_hat).square().sum() / (x - x.mean(0)).square().sum()) < 0.9
    torch.testing.assert_close(saefast.load(tmp_path / "whole")(x).x_hat, found.x_hat)


def test_figures_of_a_run_are_of_normalised_rows(tmp_path: Path) -> None:
    data = uneven(400, torch.float32)
    lines: list[dict[str, Any]] = []
    settings = saefast.TrainConfig(
        n_tokens=400, batch_size=400, loss="sum", log_every=1, auxk_coef=0.0, max_norm_multiple=None
    )
    saefast.train(data, config("layer_norm"), settings, on_log=lines.append)
    assert lines[-1]["losses/mse_loss"] == pytest.approx(lines[-1]["losses/overall_loss"], rel=1e-5)


def test_thresholds_are_calibrated_on_normalised_rows() -> None:
    sae = off_centre(SAE(config("layer_norm"), seed=1))
    x = uneven(500, torch.float32)
    found = saefast.models.as_jumprelu(sae, x)
    assert found.sae.config.input_norm == "layer_norm"
    assert found.after.l0 == pytest.approx(K, abs=0.1)
    assert found.after.fvu == pytest.approx(found.before.fvu, rel=0.5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(d_out=6), "a transcoder or crosscoder has not that row"),
        (dict(skip=True), "a transcoder or crosscoder has not that row"),
        (dict(crosscode_widths=(6, 6)), "a transcoder or crosscoder has not that row"),
        (dict(input_norm="batch_norm"), "input_norm"),
    ],
)
def test_who_has_no_such_norm(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        config("layer_norm", **changes)
    with pytest.raises(InputError, match="has no standard deviation"):
        SAEConfig(1, L, K, input_norm="layer_norm")


@pytest.mark.parametrize("engine", ENGINES)
def test_another_target_is_refused(engine: str) -> None:
    ours = ENGINES[engine](SAE(config("layer_norm", apply_b_dec_to_input=False), seed=3), saefast.TrainConfig(), 10)
    x = rows(B, D)
    for act in (ours.initialise, ours.step):
        with pytest.raises(InputError, match="target is another tensor than x, which this SAE \\(input_norm\\)"):
            act(x, x + 1)
