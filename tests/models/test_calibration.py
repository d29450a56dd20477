"""as_jumprelu: thresholds calibrated on data, against sorts of all pre-activations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import saefast
from saefast.errors import InputError
from saefast.models.calibration import served
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

D, L, K = 12, 48, 4


def rows(n: int) -> Tensor:
    code = torch.rand(n, 30) * (torch.rand(n, 30) < torch.linspace(0.02, 0.3, 30)) * (1 + 3 * (torch.rand(n, 1) < 0.1))
    return code @ torch.randn(30, D) + 0.01 * torch.randn(n, D)


KINDS: dict[str, dict[str, Any]] = {
    "topk": dict(activation="topk"),
    "batchtopk": dict(activation="batchtopk"),
    "groupmax": dict(activation="groupmax"),
    "matryoshka": dict(activation="batchtopk", matryoshka=(8, 20)),
    "hierarchical": dict(activation="topk", hierarchical=(2, 4)),
    "in units of norms": dict(activation="topk", rescale_acts_by_decoder_norm=True, unit_norm_decoder=False),
}


def made(name: str) -> SAE:
    sae = SAE(SAEConfig(D, L, K, **KINDS[name]), seed=1)
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1)
        sae.b_dec.normal_(0, 0.1)
        if not sae.config.unit_norm_decoder:
            sae.W_dec *= torch.rand(L, 1) + 0.5
    if name == "batchtopk":
        sae.threshold.fill_(0.123)  # of other data: not what is calibrated
    return sae


def ranked(sae: SAE, x: Tensor) -> Tensor:
    """(n, L) all pre-activations, in units of norms where the SAE is."""
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()
    return pre * sae.decoder_norms().detach() if sae.config.rescale_acts_by_decoder_norm else pre


def chosen(sae: SAE, x: Tensor) -> Tensor:
    """(n, L) bool: the definition of each kind."""
    pre = ranked(sae, x)
    if sae.config.activation == "batchtopk":
        return pre >= pre.flatten().sort(descending=True).values[K * len(x) - 1]
    if sae.config.activation == "groupmax":
        groups = pre.unflatten(1, (K, -1))
        return ((groups == groups.amax(2, keepdim=True)) & (groups > 0)).flatten(1)
    best = pre.topk(K, dim=1).indices
    return torch.zeros_like(pre, dtype=torch.bool).scatter(1, best, True) & (pre > 0)


@pytest.mark.parametrize("name", KINDS)
def test_one_threshold_lets_as_many_entries_pass_as_were_chosen(name: str) -> None:
    sae, x = made(name), rows(500)
    found = saefast.as_jumprelu(sae, x)
    pre, n = ranked(sae, x), int(chosen(sae, x).sum())
    assert found.sae.config.activation == "jumprelu"
    on = pre >= pre.flatten().sort(descending=True).values[n - 1]
    assert torch.equal(found.sae.encode(x) > 0, on)
    torch.testing.assert_close(found.sae.encode(x).detach(), torch.where(on, pre, 0), rtol=1e-4, atol=1e-5)
    assert (found.sae.log_threshold == found.sae.log_threshold[0]).all()
    assert found.after.l0 == n / len(x)


@pytest.mark.parametrize("name", KINDS)
def test_each_latent_is_active_as_often_as_it_was_chosen(name: str) -> None:
    sae, x = made(name), rows(500)
    found = saefast.as_jumprelu(sae, x, per_latent=True)
    before, after = chosen(sae, x).sum(0), (found.sae.encode(x) > 0).sum(0)
    used = before > 0
    assert used.sum() > 5
    assert torch.equal(before[used], after[used])
    assert len(set(found.sae.log_threshold.tolist())) > 5
    # A latent that was never chosen has the threshold of all.
    common = saefast.as_jumprelu(sae, x).sae.log_threshold
    assert torch.equal(found.sae.log_threshold[~used], common[~used])


@pytest.mark.parametrize("per_latent", [False, True])
def test_what_is_reported_is_what_is_served(per_latent: bool) -> None:
    sae, x = made("topk"), rows(500)
    found = saefast.as_jumprelu(sae, x, per_latent=per_latent)
    for which, report in ((sae, found.before), (found.sae, found.after)):
        e = (x - which(x).x_hat).detach().double()
        fvu = e.square().sum() / (x.double() - x.double().mean(0)).square().sum()
        assert report.fvu == pytest.approx(float(fvu), rel=1e-5)
        assert report.l0 == float((which.encode(x) > 0).sum()) / len(x)
    assert served(found.sae, x, x) == found.after


def test_weights_decode_as_before(tmp_path: Path) -> None:
    """With the norms of decoder rows folded in, the same entries reconstruct the same; a file of it is like any."""
    sae, x = made("in units of norms"), rows(200)
    found = saefast.as_jumprelu(sae, x)
    f = found.sae.encode(x)
    torch.testing.assert_close(found.sae.decode(f), sae.decode(f), rtol=1e-4, atol=1e-4)
    assert (found.sae.decoder_norms() - 1).abs().max() < 1e-5
    found.sae.save(tmp_path)
    torch.testing.assert_close(saefast.load(tmp_path).encode(x), f)
    assert sae.config.activation == "topk", "the SAE that was given is another one now"


def test_a_trained_batchtopk_sae_loses_nothing() -> None:
    data = rows(12_000)
    config = SAEConfig(D, L, K, activation="batchtopk")
    sae = saefast.train(data[:10_000], config, saefast.TrainConfig(n_tokens=10_000, batch_size=64))
    found = saefast.as_jumprelu(sae, data[10_000:])
    assert found.after.l0 == K
    # BatchTopK is served by a threshold that ran along in training, so that its L0 is not quite k.
    worse = found.before.l0 / K if found.before.l0 > K else 1.0
    assert found.after.fvu < 1.1 * worse * found.before.fvu


def test_what_cannot_be_calibrated_is_refused() -> None:
    x = rows(50)
    jumprelu = saefast.as_jumprelu(made("topk"), x).sae
    with pytest.raises(InputError, match="activation is 'jumprelu', which decides over each latent alone already"):
        saefast.as_jumprelu(jumprelu, x)
    with pytest.raises(InputError, match=r"rows has shape \(50, 11\): expected \(n, 12\)"):
        saefast.as_jumprelu(made("topk"), x[:, 1:])
    with pytest.raises(InputError, match=r"targets has shape \(49, 12\): expected \(n, 12\)"):
        saefast.as_jumprelu(made("topk"), x, x[1:])
    with pytest.raises(InputError, match="rows holds NaN or inf"):
        saefast.as_jumprelu(made("topk"), x.where(x < 1, torch.nan))
    silent = made("topk")
    with torch.no_grad():
        silent.b_enc.fill_(-1e6)
    with pytest.raises(InputError, match="rows have no positive pre-activation"):
        saefast.as_jumprelu(silent, x)
