"""BatchTopK: the choice over a batch, the threshold that serves, and training in both engines."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from classic import CLASSIC
from torch import Tensor

import saefast
from saefast.engines.autograd import AutogradEngine
from saefast.engines.base import PARAMETERS
from saefast.engines.fused import FusedEngine
from saefast.engines.recipe import choose
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.training.loop import fold
from saefast.training.plan import Sizes, memory_of

D, L, K, B = 12, 48, 3, 40


def config(**changes: Any) -> SAEConfig:
    return SAEConfig(D, L, K, activation="batchtopk", **changes)


def rows(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sources of very different frequency, so that tokens want very different numbers of latents."""
    code = torch.rand(n, 30) * (torch.rand(n, 30) < torch.linspace(0.02, 0.3, 30)) * (1 + 3 * (torch.rand(n, 1) < 0.1))
    return (code @ torch.randn(30, D) + 0.01 * torch.randn(n, D)).to(dtype)


OF_THE_SAE = ("init", "rescale_acts_by_decoder_norm", "apply_b_dec_to_input")


def engine(kind: Any, dtype: str = "float64", **settings: Any) -> Any:
    settings = CLASSIC | dict(lr=1e-3, dead_after=3 * B, settle_every=1) | settings
    own = {key: settings.pop(key) for key in OF_THE_SAE if key in settings}
    train = saefast.TrainConfig(**settings)
    return kind(SAE(config(dtype=dtype, **own), seed=3), train, 60)


SETTINGS: dict[str, dict[str, Any]] = {
    "ours": {},
    "all selected count": dict(fired_above=None),
    "dead before the batch": dict(dead_update_first=False, dead_after=1, dead_unit="steps", fired_above=0.5),
    "ranked by norms": dict(rescale_acts_by_decoder_norm=True, decoder_norm="never", project_decoder_grad=False),
    "not centred, clipped": dict(apply_b_dec_to_input=False, max_grad_norm=0.01),
    "OpenAI's AuxK, averaged": dict(auxk_b_dec_grad=True, ema_decay=0.9, decoder_norm="pre_step"),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_both_engines_train_alike(name: str, dtype: str) -> None:
    data = rows(50 * B, getattr(torch, dtype)).split(B)
    tolerance = 1e-9 if dtype == "float64" else 2e-4
    ours, dense = engine(FusedEngine, dtype, **SETTINGS[name]), engine(AutogradEngine, dtype, **SETTINGS[name])
    auxk = 0
    for one in (ours, dense):
        one.initialise(data[0])
    for x in data[: 50 if dtype == "float64" else 25]:
        a, b = ours.step(x), dense.step(x)
        for figure in ("loss", "fvu", "l0", "auxk_loss", "dead_share"):
            assert float(getattr(a, figure)) == pytest.approx(float(getattr(b, figure)), rel=tolerance), figure
        assert float(a.l0) <= K
        auxk += float(a.auxk_loss) > 0
        assert float(ours.sae.threshold) == pytest.approx(float(dense.sae.threshold), rel=1e-5)
    assert auxk >= 3, "AuxK never ran, so nothing was tested"
    if dtype == "float64":
        for parameter in PARAMETERS:
            a, b = (getattr(one.sae, parameter).detach() for one in (ours, dense))
            assert (a - b).abs().max() <= 1e-9 * b.abs().max(), parameter


@pytest.mark.parametrize("scaled", [False, True])
def test_training_chooses_the_k_b_largest_of_the_batch(scaled: bool) -> None:
    """Against a sort of all B · L pre-activations."""
    sae = SAE(config(rescale_acts_by_decoder_norm=scaled, unit_norm_decoder=False, dtype="float64"), seed=1)
    with torch.no_grad():
        sae.W_dec *= torch.rand(L, 1, dtype=torch.float64) + 0.5
    x = rows(B, torch.float64)
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc) * (sae.decoder_norms() if scaled else 1)
    flat = pre.detach().relu().flatten()
    best = flat.sort(descending=True, stable=True).indices[: K * B]
    dense = torch.zeros_like(flat).index_copy(0, best, flat[best]).view(B, L)
    # No threshold yet, so that what serves is what trains.
    assert float(sae.threshold) == -1
    torch.testing.assert_close(sae.encode(x).detach(), dense)
    acts, idx = sae.encode_sparse(x)
    assert acts.shape == idx.shape == (B, int((dense > 0).sum(1).max()))
    assert all(len(set(row.tolist())) == idx.shape[1] for row in idx)
    torch.testing.assert_close(sae.decode_sparse(acts, idx), sae.decode(dense))


def test_a_token_is_served_by_the_threshold_whatever_lies_beside_it() -> None:
    sae = SAE(config(), seed=1)
    sae.threshold.fill_(1.5)
    x = rows(200)
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).detach()
    expected = torch.where(pre > 1.5, pre, 0)
    assert len({int(n) for n in (expected > 0).sum(1)}) > 3, "all tokens have as many latents"
    together, alone = sae.encode(x), torch.cat([sae.encode(row[None]) for row in x])
    torch.testing.assert_close(together, expected)
    torch.testing.assert_close(alone, expected)
    assert sae(x[:0]).x_hat.shape == (0, D)
    nothing = SAE(config(), seed=1)
    nothing.threshold.fill_(1e9)
    out = nothing(x[:4])
    assert out.acts.shape == out.idx.shape == (4, 0)
    torch.testing.assert_close(out.x_hat, nothing.b_dec.expand(4, D))


def test_gradients_of_what_is_served() -> None:
    sae = SAE(config(dtype="float64"), seed=1)
    sae.threshold.fill_(0.8)
    x = rows(6, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sae(x).x_hat, (x,))


@pytest.mark.parametrize("name", ["saefast", "dictionary_learning", "saelens"])
def test_the_threshold_is_the_published_mean(name: str) -> None:
    sae_config, train = saefast.preset(name, D, L, K, activation="batchtopk", auxk_coef=0.0)
    if name == "dictionary_learning":
        assert (train.threshold_start, train.threshold_decay) == (1001, 0.999)
        train.threshold_start = 3
    running = FusedEngine(SAE(sae_config, seed=3), train, 60)
    expected, start, decay = -1.0, train.threshold_start, train.threshold_decay
    for step, x in enumerate(rows(9 * B).split(B)):
        sae = running.sae
        norms = sae.decoder_norms() if sae_config.rescale_acts_by_decoder_norm else torch.ones(L)
        pre = (((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc) * norms).detach().relu()
        smallest = float(pre.flatten().sort(descending=True).values[: K * B][-1])
        running.step(x)
        if step >= start:
            if name == "saelens":
                expected = max(expected, 0) * decay + smallest * (1 - decay)
            else:
                expected = smallest if expected < 0 else expected * decay + smallest * (1 - decay)
        # Rows of W_enc that wait to be settled are the one thing this sum has not.
        assert float(sae.threshold) == pytest.approx(expected, rel=1e-3 if step else 1e-5)


def test_a_batch_without_a_positive_activation_leaves_the_threshold() -> None:
    sae = SAE(config(), seed=1)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    sae.threshold.fill_(0.25)
    running = FusedEngine(sae, saefast.TrainConfig(auxk_coef=0.0), 60)
    stats = running.step(rows(B))
    assert float(stats.l0) == 0
    assert float(sae.threshold) == 0.25


def test_scaled_inputs_are_folded_into_the_threshold() -> None:
    sae = SAE(config(), seed=1)
    with torch.no_grad():
        sae.b_enc.normal_()
        sae.b_dec.normal_()
    sae.threshold.fill_(0.7)
    x, scale = rows(50), 3.0
    raw = fold(sae, scale)
    torch.testing.assert_close(raw.encode(x), sae.encode(x * scale) / scale)
    torch.testing.assert_close(raw(x).x_hat, sae(x * scale).x_hat / scale)
    sae.threshold.fill_(-1)
    assert float(fold(sae, scale).threshold) == -1


@pytest.mark.parametrize("optimizer", ["adam", "adam-lean"])
def test_a_run_is_saved_loaded_and_resumed(optimizer: Any, tmp_path: Path) -> None:
    data = rows(2000)
    train = saefast.TrainConfig(n_tokens=2000, batch_size=B, lr=3e-3, save_every=6, optimizer=optimizer)

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
    assert float(loaded.threshold) == float(whole.threshold) > 0
    assert loaded.threshold.dtype == torch.float32
    torch.testing.assert_close(loaded.encode(data[:50]), whole.encode(data[:50]))
    served = float((loaded.encode(data) > 0).sum()) / len(data)
    assert 0.5 * K < served < 2 * K


def test_the_threshold_keeps_its_precision_where_weights_lose_theirs() -> None:
    sae = SAE(config(), seed=1)
    sae.threshold.fill_(1.0009765625)
    assert float(sae.to(torch.bfloat16).threshold) == 1.0009765625
    assert float(sae.half().threshold) == 1.0009765625


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(threshold_decay=1.0), "threshold_decay is 1.0: expected at least 0 and less than 1"),
        (dict(threshold_decay=math.nan), "threshold_decay is nan"),
        (dict(threshold_start=-1), "threshold_start is -1: expected at least 0"),
    ],
)
def test_settings_out_of_bounds(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        saefast.TrainConfig(**changes)


def test_the_plan_counts_what_the_encoder_ranks() -> None:
    sae = SAEConfig(768, 1 << 15, 64, activation="batchtopk")
    sizes = Sizes.of(sae, choose(sae, saefast.TrainConfig(), n_rows=1 << 30))
    assert (sizes.k, sizes.ranked) == (64, 4 * 64)
    plain = sizes._replace(ranked=None)
    assert memory_of(sizes, "h200")["encoder scratch"] > memory_of(plain, "h200")["encoder scratch"]
    assert memory_of(sizes, "h200")["sparse code"] == memory_of(plain, "h200")["sparse code"]


def test_multi_topk_has_no_meaning_here() -> None:
    with pytest.raises(InputError, match=r"multi_topk_coef is 0\.1, which needs activation='topk'"):
        engine(FusedEngine, multi_topk_coef=0.1)
