"""Where a run begins: weights from rows, stated in float64; the fitted scale against a scan; the first loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from saefast.engines.autograd import AutogradEngine
from saefast.engines.config import TrainConfig
from saefast.engines.fused import FusedEngine
from saefast.engines.recipe import choose
from saefast.models.config import SAEConfig
from saefast.models.init import geometric_median
from saefast.models.sae import SAE
from saefast.models.start import (
    active_subspace,
    discriminant,
    fit_encoder_,
    start_b_dec_,
    start_from_rows_,
    start_in_subspace_,
)
from saefast.training.api import train

D, N = 10, 300


def rows(n: int = N, d: int = D) -> Tensor:
    """float64, with dimensions of very different spread, all correlated, around a mean far from 0."""
    mixed = torch.randn(d, d, dtype=torch.float64) * torch.logspace(-2, 1, d, dtype=torch.float64)
    return torch.randn(n, d, dtype=torch.float64) @ mixed + 30 * torch.randn(d, dtype=torch.float64)


def begun(x: Tensor, n_latents: int, target: Tensor | None = None, seed: int = 5, **config: Any) -> SAE:
    config = dict(dtype=str(x.dtype).removeprefix("torch."), k=2) | config
    sae = SAE(SAEConfig(x.shape[1], n_latents, **config), seed=seed)
    target = x if target is None else target
    start_b_dec_(sae, target, "geometric_median")
    start_from_rows_(sae, x, target, seed)
    return sae


def rows_of(sae: SAE, target: Tensor) -> Tensor:
    """(L,) which row each decoder row points at: the one with the largest cosine, which is to be 1."""
    cosine = sae.W_dec.detach() @ normalize(target - sae.b_dec.detach(), dim=1).T
    best = cosine.max(1)
    torch.testing.assert_close(best.values, torch.ones_like(best.values), rtol=0, atol=1e-9)
    return best.indices


# Weights from rows.


@pytest.mark.parametrize("n_latents", [7, N])
def test_each_decoder_row_points_at_a_row_of_its_own(n_latents: int) -> None:
    x = rows()
    sae = begun(x, n_latents)
    torch.testing.assert_close(sae.decoder_norms().detach(), torch.ones(n_latents, dtype=torch.float64))
    found = rows_of(sae, x)
    assert len(found.unique()) == n_latents
    # Drawn from all of them, and by the seed.
    assert n_latents == N or int(found.max()) > N // 2
    assert torch.equal(rows_of(begun(x, n_latents), x), found)
    assert n_latents == N or not torch.equal(rows_of(begun(x, n_latents, seed=6), x), found)


def stated_encoder(x: Tensor, directions: Tensor) -> Tensor:
    """(C + λ)⁻¹ directionᵀ, one direction at a time, to unit length."""
    centred = x - x.mean(0)
    C = sum(torch.outer(row, row) for row in centred) / len(x)
    ridge = C.trace() / len(x)
    found = [torch.linalg.solve(C + ridge * torch.eye(x.shape[1], dtype=torch.float64), row) for row in directions]
    return normalize(torch.stack(found), dim=1)


def test_encoder_rows_are_the_discriminant_of_their_row() -> None:
    x = rows()
    sae = begun(x, 40)
    expected = stated_encoder(x, x[rows_of(sae, x)] - x.mean(0))
    torch.testing.assert_close(sae.W_enc.detach(), expected, rtol=0, atol=1e-9)
    # Far from the rows' own directions, or this would say nothing.
    assert float((expected * sae.W_dec.detach()).sum(1).abs().median()) < 0.7
    assert float(sae.b_enc.abs().max().detach()) == 0


def test_the_discriminant_tells_a_row_from_the_others() -> None:
    """What it is for: a row fires its own latent more than nearly all others do, where plain directions fire on all."""
    x = rows(600)
    sae = begun(x, 50)
    chosen = rows_of(sae, x)
    centred = x - x.mean(0)
    own = []
    for W in (sae.W_enc.detach(), normalize(centred[chosen], dim=1)):
        pre = centred @ W.T
        own.append(float((pre[chosen].diagonal() >= pre.quantile(0.95, dim=0)).double().mean()))
    assert own[0] > 0.6
    assert own[0] > own[1] + 0.2


def test_more_latents_than_rows_begin_at_differences() -> None:
    x = rows(20)
    sae = begun(x, 150)
    W_dec, W_enc = sae.W_dec.detach(), sae.W_enc.detach()
    t = x - sae.b_dec.detach()
    assert len(rows_of_first := (W_dec[:20] @ normalize(t, dim=1).T).max(1).indices.unique()) == 20, rows_of_first
    differences = torch.stack([t[i] - t[j] for i in range(20) for j in range(20) if i != j])
    best = (W_dec[20:] @ normalize(differences, dim=1).T).max(1)
    equal = best.values < 1 - 1e-9  # a row drawn together with itself
    assert int(equal.sum()) < 25
    kept = ~equal
    torch.testing.assert_close(W_enc[20:][kept], stated_encoder(x, differences[best.indices[kept]]), rtol=0, atol=1e-8)
    drawn = SAE(sae.config, seed=5)
    assert torch.equal(W_dec[20:][equal], drawn.W_dec.detach()[20:][equal])
    torch.testing.assert_close(W_dec.norm(dim=1), torch.ones(150, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["all equal", "one row", "zeros", "two kinds"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_without_a_direction_leave_what_was_drawn(kind: str, dtype: torch.dtype) -> None:
    one, other = torch.randn(2, D, dtype=torch.float64)
    x = {
        "all equal": one.expand(50, D), "one row": one[None], "zeros": torch.zeros(50, D, dtype=torch.float64),
        "two kinds": torch.where(torch.arange(50)[:, None] < 30, one, other),
    }[kind].to(dtype)  # fmt: skip
    sae = begun(x, 80)
    drawn = SAE(sae.config, seed=5)
    for name in ("W_enc", "W_dec"):
        W, was = (getattr(s, name).detach().double() for s in (sae, drawn))
        assert W.isfinite().all()
        torch.testing.assert_close(W.norm(dim=1), torch.ones(80, dtype=torch.float64), rtol=0.01, atol=0)
        same = (was == W).all(1)
        # Rows that lie at the centre, within rounding of it, have no direction; differences of equal rows never have.
        assert int(same.sum()) >= (30 if kind != "two kinds" else 5), name
        assert kind != "two kinds" or int((~same).sum()) >= 20
    assert sae.b_enc.isfinite().all()


def test_targets_that_are_not_the_rows() -> None:
    """The decoder begins at targets, the encoder tells apart the rows that are mapped to them."""
    x, target = rows(), 1e3 * rows()
    sae = begun(x, 60, target, apply_b_dec_to_input=False)
    pairs = rows_of(sae, target)
    torch.testing.assert_close(sae.W_enc.detach(), stated_encoder(x, x[pairs] - x.mean(0)), rtol=0, atol=1e-9)
    torch.testing.assert_close(sae.b_dec.detach(), geometric_median(target))


def test_centring_is_in_b_enc_where_b_dec_does_not_do_it() -> None:
    """Pre-activations are W_enc (x - mean) in either form."""
    x = rows()
    found = []
    for centred in (True, False):
        sae = SAE(SAEConfig(D, 400, 2, dtype="float64", apply_b_dec_to_input=centred), seed=5)
        start_b_dec_(sae, x, "mean")
        start_from_rows_(sae, x, x, seed=5)
        given = x - sae.b_dec if centred else x
        found.append((given @ sae.W_enc.T + sae.b_enc).detach())
        expected = (x - x.mean(0)) @ sae.W_enc.detach().T
        torch.testing.assert_close(found[-1], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_fewer_bits_it_is_the_same_to_rounding(dtype: torch.dtype) -> None:
    x = rows().to(dtype)
    sae = begun(x, 500)
    exact = SAE(SAEConfig(D, 500, 2, dtype="float64"), seed=5)
    with torch.no_grad():
        exact.b_dec.copy_(sae.b_dec)
    start_from_rows_(exact, x.double(), x.double(), seed=5)
    tolerance = 1e-3 if dtype == torch.float32 else 2**-7
    for name in ("W_enc", "W_dec"):
        W, expected = (getattr(s, name).detach().double() for s in (sae, exact))
        off = (W - expected).norm(dim=1)
        assert float(off.quantile(0.98)) < tolerance, name
        assert float(off.max()) < 0.1, name


def test_any_number_of_latents_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is cut, each latent begins at a row or at a difference of two."""
    x = rows(30)
    for size in (1, 7, 64):
        monkeypatch.setattr("saefast.models.start._LATENTS", size)
        sae = begun(x, 64, apply_b_dec_to_input=False)
        assert len((sae.W_dec[:30].detach() @ normalize(x - sae.b_dec.detach(), dim=1).T).max(1).indices.unique()) == 30
        expected = -(sae.W_enc.detach() @ x.mean(0))
        torch.testing.assert_close(sae.b_enc.detach(), expected, rtol=1e-12, atol=1e-12)


def test_the_discriminant_of_few_rows_is_finite() -> None:
    for n in (1, 2, D // 2):
        assert discriminant(rows(n) - rows(n).mean(0)).isfinite().all()
    flat = rows()
    flat[:, 3] = 7.0  # a dimension that never moves
    assert discriminant(flat - flat.mean(0)).isfinite().all()


def test_other_starts_stay_as_they_were_drawn() -> None:
    x = rows().float()
    for init in ("tied", "tied_0.1", "kaiming"):
        config = SAEConfig(D, 30, 2, init=init)
        for kind in (FusedEngine, AutogradEngine):
            engine = kind(SAE(config, seed=3), TrainConfig(fit_encoder=False), 10)
            engine.initialise(x)
            for name in ("W_enc", "W_dec", "b_enc"):
                assert torch.equal(getattr(engine.sae, name), getattr(SAE(config, seed=3), name))


# The encoder's scale.

KINDS: dict[str, dict[str, Any]] = {
    "topk": {},
    "batchtopk": dict(activation="batchtopk"),
    "matryoshka": dict(matryoshka=(6, 15)),
    "matryoshka of batchtopk": dict(activation="batchtopk", matryoshka=(6, 15)),
    "ranked by norms": dict(rescale_acts_by_decoder_norm=True, unit_norm_decoder=False),
    "not centred": dict(apply_b_dec_to_input=False),
}


def error(sae: SAE, x: Tensor, target: Tensor, scale: float = 1.0) -> float:
    """Σ (target - x_hat)² of the batch's own code, by dense matrices, with encoder and b_enc times `scale`."""
    centred = x - sae.b_dec if sae.config.apply_b_dec_to_input else x
    pre = scale * (centred @ sae.W_enc.T + sae.b_enc).detach()
    ranked = pre * sae.decoder_norms().detach() if sae.config.rescale_acts_by_decoder_norm else pre
    k, mask = sae.config.k, torch.zeros_like(pre)
    if sae.config.activation == "batchtopk":
        mask.view(-1)[ranked.flatten().topk(k * len(x)).indices] = 1
    else:
        mask.scatter_(1, ranked.topk(k, dim=1).indices, 1.0)
    x_hat = (pre.relu() * mask) @ sae.W_dec.detach() + sae.b_dec.detach()
    return float((target - x_hat).square().sum())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("init", ["rows", "tied", "kaiming"])
@pytest.mark.parametrize("mapped", [False, True])
def test_the_scale_is_the_least_squares_optimum(name: str, init: Any, mapped: bool) -> None:
    """Against a fine scan, and no worse than b_dec alone."""
    x = rows()
    target = x @ torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))[0] if mapped else x
    if mapped and KINDS[name].get("apply_b_dec_to_input", True):
        target = x + 0.3 * target
    config = SAEConfig(D, 40, 4, dtype="float64", init=init, **KINDS[name])
    sae = SAE(config, seed=2)
    start_b_dec_(sae, target, "geometric_median")
    if init == "rows":
        start_from_rows_(sae, x, target, seed=2)
    with torch.no_grad():
        if name == "ranked by norms":
            sae.W_dec *= torch.linspace(0.5, 1.5, 40, dtype=torch.float64)[:, None]
        sae.b_enc += 0.01
    before, alone = sae.W_enc.detach().clone(), float((target - sae.b_dec).square().sum().detach())
    directions, tiny = normalize(before, dim=1), error(sae, x, target, 1e-6)
    fit_encoder_(sae, x, target, choose(config, TrainConfig(), N))
    if tiny > alone:
        # What fires points away from the targets: no number above 0 helps.
        assert torch.equal(sae.W_enc.detach(), before)
        assert init != "rows"
        return
    torch.testing.assert_close(normalize(sae.W_enc.detach(), dim=1), directions)
    best = error(sae, x, target)
    assert best <= alone * (1 + 1e-12)
    scan = [error(sae, x, target, float(scale)) for scale in torch.linspace(0.01, 3, 600)]
    assert best <= min(scan) * (1 + 1e-9)
    for near in (0.99, 1.01):
        assert best < error(sae, x, target, near)


def test_fitting_twice_changes_nothing() -> None:
    x = rows()
    sae = begun(x, 40)
    recipe = choose(sae.config, TrainConfig(), N)
    fit_encoder_(sae, x, x, recipe)
    once = sae.W_enc.detach().clone()
    fit_encoder_(sae, x, x, recipe)
    torch.testing.assert_close(sae.W_enc.detach(), once, rtol=1e-9, atol=0)


def test_a_lean_encoder_is_fitted_too() -> None:
    x = rows().to(torch.bfloat16)
    for config in (
        SAEConfig(D, 40, 4, dtype="bfloat16"),
        SAEConfig(D, 40, 4, dtype="bfloat16", activation="batchtopk"),
    ):
        sae = SAE(config, seed=2)
        start_b_dec_(sae, x, "geometric_median")
        start_from_rows_(sae, x, x, seed=2)
        fit_encoder_(sae, x, x, choose(config, TrainConfig(optimizer="adam-lean"), N))
        wide = SAE(SAEConfig(**config.to_dict() | dict(dtype="float64")), seed=2)
        wide.load_state_dict(sae.state_dict())
        best = error(wide, x.double(), x.double())
        assert best <= 1.01 * min(error(wide, x.double(), x.double(), s / 20) for s in range(1, 60))


def test_nothing_that_fires_is_left_alone() -> None:
    x = rows()
    sae = begun(x, 40)
    with torch.no_grad():
        sae.b_enc.fill_(-1e9)
    before = sae.W_enc.detach().clone()
    fit_encoder_(sae, x, x, choose(sae.config, TrainConfig(), N))
    assert torch.equal(sae.W_enc.detach(), before)


# A run's first loss.

AWFUL: dict[str, Any] = {
    "noise": lambda g: torch.randn(3000, 16, generator=g),
    "noise far from 0": lambda g: torch.randn(3000, 16, generator=g) + 500,
    "heavy tails": lambda g: torch.randn(3000, 16, generator=g) ** 5,
    "positive": lambda g: torch.rand(3000, 16, generator=g) ** 8,
    "one dimension is huge": lambda g: torch.randn(3000, 16, generator=g) * torch.tensor([1e4] + 15 * [1.0]),
    "copies": lambda g: torch.randn(5, 16, generator=g)[torch.randint(5, (3000,), generator=g)],
    "mostly zero": lambda g: torch.randn(3000, 16, generator=g) * (torch.rand(3000, 16, generator=g) < 0.02),
    "two clusters": lambda g: torch.randn(3000, 16, generator=g) + 100 * (torch.rand(3000, 1, generator=g) < 0.5),
}


@pytest.mark.filterwarnings("ignore:.*:RuntimeWarning")
@pytest.mark.parametrize("name", AWFUL)
@pytest.mark.parametrize(
    "change",
    [{}, {"activation": "batchtopk"}, {"matryoshka": (20,)}, {"optimizer": "adam-lean"}, {"engine": "autograd"},
     {"init": "tied"}],
    ids=str,
)  # fmt: skip
def test_no_run_begins_worse_than_its_mean(name: str, change: dict[str, Any], tmp_path: Path) -> None:
    x = AWFUL[name](torch.Generator().manual_seed(1))
    sae_names = ("activation", "matryoshka", "init")
    config = SAEConfig(16, 64, 4, **{key: value for key, value in change.items() if key in sae_names})
    rest = {key: value for key, value in change.items() if key not in sae_names}
    lines: list[dict[str, Any]] = []
    train(x, config, TrainConfig(n_tokens=512, batch_size=256, log_every=1, device="cpu", **rest), on_log=lines.append)
    # The pre-bias is the geometric median, which is not the mean.
    assert lines[0]["fvu"] <= 1.0 + 0.05, lines[0]["fvu"]


# Weights in the active subspace.


def flat_rows(n: int = N, r: int = 4, d: int = D) -> Tensor:
    """float64 rows of r dimensions in d, around a mean that lies outside of them."""
    return torch.randn(n, r, dtype=torch.float64) @ torch.randn(r, d, dtype=torch.float64) + 30 * torch.ones(d).double()


def begun_in_subspace(x: Tensor, n_latents: int, target: Tensor | None = None, seed: int = 5, **config: Any) -> SAE:
    config = dict(dtype=str(x.dtype).removeprefix("torch."), k=2, init="active_subspace") | config
    sae = SAE(SAEConfig(x.shape[1], n_latents, **config), seed=seed)
    target = x if target is None else target
    start_b_dec_(sae, target, "mean")
    start_in_subspace_(sae, x, target, seed)
    return sae


def outside(W: Tensor, x: Tensor, r: int) -> float:
    """The largest part of a row of W that lies outside of the r leading principal components of x."""
    components = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:r]
    W = W.detach()
    return float((W - W @ components.T @ components).norm(dim=1).max())


def test_weights_are_random_directions_of_the_active_subspace() -> None:
    x = flat_rows()
    sae = begun_in_subspace(x, 4000)
    assert outside(sae.W_dec, x, 4) < 1e-12
    assert torch.equal(sae.W_enc, sae.W_dec)
    torch.testing.assert_close(sae.decoder_norms().detach(), torch.ones(4000, dtype=torch.float64))
    # Isotropic in it: each of 4 components has a quarter of the square, within the spread of 4000 draws.
    components = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:4]
    shares = (sae.W_dec.detach() @ components.T).square().mean(0)
    assert float((shares - 0.25).abs().max()) < 0.02
    assert torch.equal(begun_in_subspace(x, 4000).W_dec, sae.W_dec)
    assert not torch.equal(begun_in_subspace(x, 4000, seed=6).W_dec, sae.W_dec)


def test_the_active_subspace_holds_99_percent_of_the_variance_and_no_more_than_that_takes() -> None:
    spread = torch.tensor([10.0, 5.0, 3.0, 1.0, 0.3, 0.1], dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    x = torch.randn(20_000, 6, dtype=torch.float64) * spread @ turned + 100
    variances = torch.linalg.svdvals(x - x.mean(0)).square()
    basis = active_subspace(x)
    held = float(((x - x.mean(0)) @ basis.T).square().sum() / variances.sum())
    assert len(basis) == 3
    assert held >= 0.99 > float(variances[:2].sum() / variances.sum())
    torch.testing.assert_close(basis @ basis.T, torch.eye(3, dtype=torch.float64))


def test_what_maps_rows_to_targets_begins_in_the_subspace_of_each() -> None:
    x, target = flat_rows(r=3), flat_rows(r=4)
    sae = begun_in_subspace(x, 50, target, apply_b_dec_to_input=False)
    assert outside(sae.W_dec, target, 4) < 1e-12
    assert outside(sae.W_enc, x, 3) < 1e-12
    pre = (x @ sae.W_enc.T + sae.b_enc).detach()
    assert float(pre.mean(0).abs().max()) < 1e-9


def test_latents_of_a_layer_begin_in_what_they_read_and_write() -> None:
    """Of a cross-layer transcoder: the second layer's latents neither read nor write the first layer's columns."""
    x, target = torch.cat([flat_rows(r=2), flat_rows(r=3)], 1), torch.cat([flat_rows(r=2), flat_rows(r=4)], 1)
    sae = begun_in_subspace(x, 40, target, n_layers=2, apply_b_dec_to_input=False)
    W_enc, W_dec = sae.W_enc.detach(), sae.W_dec.detach()
    assert outside(W_enc[:20], x[:, :D], 2) < 1e-12
    assert outside(W_enc[20:], x[:, D:], 3) < 1e-12
    assert outside(W_dec[:20], target, 6) < 1e-12
    assert not W_dec[20:, :D].any()
    assert outside(W_dec[20:, D:], target[:, D:], 4) < 1e-12
    pre = torch.cat([x[:, :D] @ W_enc[:20].T, x[:, D:] @ W_enc[20:].T], 1) + sae.b_enc.detach()
    assert float(pre.mean(0).abs().max()) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [1, 50])
def test_data_without_a_direction_leaves_what_was_drawn(n: int, dtype: torch.dtype) -> None:
    sae = begun_in_subspace(torch.zeros(n, D, dtype=dtype) + 3, 30)
    drawn = SAE(sae.config, seed=5)
    assert torch.equal(sae.W_dec, drawn.W_dec)
    assert torch.equal(sae.W_enc, drawn.W_enc)


def test_a_run_begins_there_and_revives_what_random_directions_leave_dead(tmp_path: Path) -> None:
    """What it is for: on rows of few dimensions fewer latents are silent than with directions of all of space."""
    sources = torch.randn(200, 6, dtype=torch.float64) @ torch.randn(6, 64, dtype=torch.float64)
    code = torch.rand(6000, 200, dtype=torch.float64) * (torch.rand(6000, 200) < 0.02)
    x = (code @ sources + 0.01 * torch.randn(6000, 64, dtype=torch.float64)).float()
    silent = {}
    for init in ("tied", "active_subspace"):
        config = TrainConfig(n_tokens=12_000, batch_size=200, resample_every=0, lr=1e-3)
        sae = train(x, SAEConfig(64, 1024, k=4, init=init), config)
        silent[init] = float((sae.encode(x) > 0).sum(0).eq(0).double().mean())
    assert silent["active_subspace"] < 0.7 * silent["tied"]
