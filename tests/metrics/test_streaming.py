"""Streaming metrics against the one-shot float64 formulas of their sources."""

import math

import pytest
import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.metrics.ordinary import Ordinary
from saefast.metrics.streaming import METRICS, Reconstruction, SAEMetrics, Sparsity, density_histogram

D, L, K = 12, 50, 5
# A good part of the rows that `draw` gives without a shift lie beyond.
ORDINARY = Ordinary(torch.linspace(-1, 1, D, dtype=torch.float64), usual=2.0, multiple=2.5)


def one_shot(x: Tensor, x_hat: Tensor, f: Tensor, batches: list[slice]) -> dict[str, float]:
    """The definitions, written down plainly over the whole data. x, x_hat (N, D); f (N, L) dense."""
    error = x - x_hat
    fvu = error.square().sum() / (x - x.mean(0)).square().sum()
    legacy = [1 - error[b].square().sum(1) / (x[b] - x[b].mean(0)).square().sum(1) for b in batches if len(x[b])]
    p = (f != 0).double().mean(0)
    distance = (x - ORDINARY.centre).norm(dim=1)
    near, y = distance <= 5.0, x[distance <= 5.0]
    assert 0.1 < float(near.double().mean()) < 0.9
    values = {
        "fvu": fvu,
        "fvu_ordinary": error[near].square().sum() / (y - y.mean(0)).square().sum(),
        "fvu_median": (error.square().sum(1) / distance.square()).quantile(0.5),
        "explained_variance": 1 - fvu,
        "explained_variance_legacy": torch.cat(legacy).mean(),
        "frac_variance_explained": 1 - error.var(0).sum() / x.var(0).sum(),
        "normalized_mse": (error.square().sum(1) / x.square().sum(1)).mean(),
        "mse": error.square().sum(1).mean(),
        "cosine": torch.nn.functional.cosine_similarity(x, x_hat, dim=1).mean(),
        "l2_ratio": (x_hat.norm(dim=1) / x.norm(dim=1)).mean(),
        "relative_reconstruction_bias": x_hat.square().sum(1).mean() / (x * x_hat).sum(1).mean(),
        "l0": (f != 0).sum(1).double().mean(),
        "l1": f.abs().sum(1).mean(),
        "mean_log10_feature_sparsity": (p + 1e-10).log10().mean(),
        "dead_share": (p == 0).double().mean(),
        "below_1e-5_share": (p < 1e-5).double().mean(),
        "below_1e-6_share": (p < 1e-6).double().mean(),
        "dense_share_1pct": (p > 0.01).double().mean(),
        "dense_share_10pct": (p > 0.1).double().mean(),
    }
    return {name: float(value) for name, value in values.items()}


def draw(n: int, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, x_hat (n, D), acts, idx (n, K) with zeros among the acts, and the same code dense (n, L)."""
    x = torch.randn(n, D, dtype=torch.float64) * torch.linspace(0.1, 3, D, dtype=torch.float64) + shift
    x_hat = x + 0.3 * torch.randn_like(x) + 0.1
    idx = torch.rand(n, L - 7).argsort(1)[:, :K].int()  # the last 7 latents never fire
    acts = torch.rand(n, K, dtype=torch.float64) * 4
    acts[torch.rand(n, K) < 0.2] = 0
    dense = torch.zeros(n, L, dtype=torch.float64).scatter(1, idx.long(), acts)
    return x, x_hat, acts, idx, dense


def slices(n: int, sizes: tuple[int, ...]) -> list[slice]:
    out, start = [], 0
    while start < n:
        size = sizes[len(out) % len(sizes)]
        out.append(slice(start, min(start + size, n)))
        start += size
    return out


@pytest.mark.parametrize("sizes", [(1000,), (64,), (7, 100, 2)])
def test_streaming_equals_the_one_shot_formulas(sizes: tuple[int, ...]) -> None:
    x, x_hat, acts, idx, dense = draw(1000)
    batches = slices(1000, sizes)
    metrics = SAEMetrics(L, ordinary=ORDINARY)
    for b in batches:
        metrics.update(x[b], x_hat[b], acts[b], idx[b])
    expected = one_shot(x, x_hat, dense, batches)
    assert list(metrics.compute()) == list(METRICS)
    assert metrics.compute() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("shift", [1e4, -1e6])
def test_a_large_common_shift_does_not_cost_digits(shift: float) -> None:
    # Multiples of 2^-20 stay exact under the shift, so the exact answer is that of the unshifted rows.
    x = torch.randint(-(2**21), 2**21, (999, D)).double() / 2**20
    error = torch.randint(-(2**18), 2**18, (999, D)).double() / 2**20
    near, far = Reconstruction(), Reconstruction()
    for b in slices(999, (100, 3, 57)):
        near.update(x[b], x[b] + error[b])
        far.update(x[b] + shift, x[b] + shift + error[b])
    for name in ("fvu", "frac_variance_explained", "explained_variance_legacy", "mse"):
        assert far.compute()[name] == pytest.approx(near.compute()[name], rel=1e-12), name
    fvu = error.square().sum() / (x - x.mean(0)).square().sum()
    assert far.compute()["fvu"] == pytest.approx(float(fvu), rel=1e-12)
    # What the sum-of-squares form would have lost: it is no stand-in for the stable one.
    y = x + shift
    naive = float(y.square().sum() - len(y) * y.mean(0).square().sum())
    assert abs(naive / float(far.inputs.sq) - 1) > 1e-12


def test_merge_is_the_accumulator_over_all_rows() -> None:
    x, x_hat, acts, idx, _ = draw(500, shift=300.0)
    parts = slices(500, (50, 13))
    far = Ordinary(ORDINARY.centre + 300, 2.0, 2.5)
    whole, left, right = (SAEMetrics(L, ordinary=far) for _ in range(3))
    for i, b in enumerate(parts):
        whole.update(x[b], x_hat[b], acts[b], idx[b])
        (left if i < 3 else right).update(x[b], x_hat[b], acts[b], idx[b])
    left.merge(right)
    assert left.compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert torch.equal(left.sparsity.counts, whole.sparsity.counts)
    assert torch.equal(left.sparsity.max_act, whole.sparsity.max_act)
    assert left.reconstruction.n_far == whole.reconstruction.n_far > 0
    empty = SAEMetrics(L, ordinary=far)
    empty.merge(whole)
    whole.merge(SAEMetrics(L, ordinary=far))
    assert empty.compute() == whole.compute()


def test_each_formula_sees_what_it_is_for() -> None:
    x = torch.randn(400, D, dtype=torch.float64)
    biased = Reconstruction()
    biased.update(x, x + 1.0)
    out = biased.compute()
    assert out["frac_variance_explained"] == pytest.approx(1)  # forgives a constant
    assert out["fvu"] > 0.5  # does not
    shrunk = Reconstruction()
    shrunk.update(x, 0.5 * x)
    out = shrunk.compute()
    assert out["relative_reconstruction_bias"] == pytest.approx(0.5)
    assert out["l2_ratio"] == pytest.approx(0.5)
    assert out["cosine"] == pytest.approx(1)
    assert out["normalized_mse"] == pytest.approx(0.25)
    mean_only = Reconstruction()
    mean_only.update(x, x.mean(0).expand_as(x))
    assert mean_only.compute()["fvu"] == pytest.approx(1)


def test_rows_without_a_ratio_are_left_out() -> None:
    x, x_hat, *_ = draw(20)
    x[3] = 0
    x_hat[5] = 0
    metrics = Reconstruction(ORDINARY)
    metrics.update(x, x_hat)
    keep = x.norm(dim=1) > 0
    out = metrics.compute()
    assert out["l2_ratio"] == pytest.approx(float((x_hat[keep].norm(dim=1) / x[keep].norm(dim=1)).mean()))
    assert all(math.isfinite(value) for value in out.values())


def test_half_precision_rows_are_summed_in_float64() -> None:
    x = torch.randn(3000, D).bfloat16()
    x_hat = (x + 0.1 * torch.randn(3000, D).bfloat16()).bfloat16()
    metrics = Reconstruction()
    for b in slices(3000, (128,)):
        metrics.update(x[b], x_hat[b])
    xd, xh = x.double(), x_hat.double()
    assert metrics.compute()["fvu"] == pytest.approx(
        float((xd - xh).square().sum() / (xd - xd.mean(0)).square().sum()), rel=1e-12
    )


def test_per_latent_counts_and_maxima() -> None:
    _, _, acts, idx, dense = draw(300)
    one = Sparsity(L)
    for b in slices(300, (41,)):
        one.update(acts[b], idx[b])
    assert torch.equal(one.counts, (dense != 0).sum(0))
    assert torch.equal(one.max_act, dense.max(0).values)
    torch.testing.assert_close(one.total_act, dense.sum(0), rtol=1e-12, atol=1e-12)
    flat = Sparsity(L)
    flat.update(acts.flatten(), idx.flatten(), n_rows=300)
    assert flat.compute() == pytest.approx(one.compute())


def test_rows_may_have_any_number_of_entries_and_padding_is_none() -> None:
    x, x_hat, acts, idx, dense = draw(300)
    metrics = SAEMetrics(L, ordinary=ORDINARY)
    for width, b in enumerate(slices(300, (41,))):
        n = len(acts[b])
        padding = acts.new_zeros(n, width), torch.randint(0, L, (n, width), dtype=torch.int32)
        metrics.update(x[b], x_hat[b], torch.cat([padding[0], acts[b]], 1), torch.cat([padding[1], idx[b]], 1))
    expected = one_shot(x, x_hat, dense, slices(300, (41,)))
    assert metrics.compute() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_density_histogram_covers_every_latent_once() -> None:
    counts = torch.tensor([0, 0, 1, 9, 10, 100, 1000])
    edges, heights, never = density_histogram(counts, 1000, bins_per_decade=1)
    assert never == 2
    assert edges[-1] == 0
    assert len(edges) == len(heights) + 1
    assert sum(heights) == 5
    assert dict(zip(edges, heights, strict=False)) == {-4: 0, -3: 2, -2: 1, -1: 2}


def test_sinks_are_told_from_ordinary_rows() -> None:
    """One row in 128 holds nearly all of the variance: FVU says nothing of the others, the two figures beside it do."""
    x = torch.randn(1280, D, dtype=torch.float64)
    x[::128] += 1000
    x_hat = torch.where(torch.arange(1280)[:, None] % 128 == 0, x, 0.5 * x)
    metrics = Reconstruction(Ordinary(torch.zeros(D, dtype=torch.float64), D**0.5, 10.0))
    metrics.update(x, x_hat)
    out = metrics.compute()
    assert out["fvu"] < 1e-3
    assert out["fvu_ordinary"] == pytest.approx(0.25, rel=0.01)
    assert out["fvu_median"] == pytest.approx(0.25, rel=1e-9)
    assert metrics.n_far == 10


def test_without_a_centre_all_rows_are_ordinary_and_none_has_a_ratio() -> None:
    x, x_hat, *_ = draw(50)
    metrics = Reconstruction()
    metrics.update(x, x_hat)
    out = metrics.compute()
    assert out["fvu_ordinary"] == out["fvu"]
    assert math.isnan(out["fvu_median"])
    assert metrics.n_far == 0
    on_it = Reconstruction(Ordinary(x[3], 1.0))
    on_it.update(x[3:4], x[3:4])
    assert math.isnan(on_it.compute()["fvu_median"])


def test_nothing_fed_gives_nan_and_bad_shapes_an_error() -> None:
    metrics = SAEMetrics(L)
    metrics.update(torch.zeros(0, D), torch.zeros(0, D), torch.zeros(0, K), torch.zeros(0, K, dtype=torch.int32))
    assert all(math.isnan(value) for value in metrics.compute().values())
    with pytest.raises(InputError, match=r"x has shape \(2, 3\)"):
        metrics.reconstruction.update(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(InputError, match="acts has shape"):
        metrics.sparsity.update(torch.zeros(2, 3), torch.zeros(2, 4, dtype=torch.int32))
    with pytest.raises(InputError, match="merge"):
        metrics.sparsity.merge(Sparsity(L + 1))
