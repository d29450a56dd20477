"""The map: principal directions against float64, clusters and their names, UMAP where it is installed, PCA else."""

import importlib.metadata
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from allocations import Allocations
from torch import Tensor

from saefast.errors import InputError
from saefast.latents import layout as module
from saefast.latents.layout import cluster_names, clusters, how_many, layout, principal, squared
from saefast.latents.neighbours import neighbours
from saefast.latents.products import unit_rows


def families(n: int, each: int, d: int = 24, noise: float = 0.25) -> Tensor:
    """n directions, and `each` rows near every one of them; a row's family is its number modulo n."""
    centres = torch.linalg.qr(torch.randn(d, d)).Q[:n] * 3
    rows = centres.repeat(each, 1)
    return (rows + noise * torch.randn_like(rows)) * torch.rand(len(rows), 1).add(0.1)


def mapped(decoder: Tensor, seed: int = 0) -> module.Layout:
    cosines, ids = neighbours(decoder)
    return layout(decoder, ids, cosines, seed)


@pytest.fixture
def without_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        assert name == "umap-learn"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)


@pytest.mark.parametrize(("L", "d"), [(500, 30), (40, 5), (3000, 100), (9, 2)])
def test_principal_directions_are_those_of_the_covariance(L: int, d: int) -> None:
    rows = unit_rows(torch.randn(L, d) * torch.linspace(3, 0.1, d) + 0.5, "rows")
    points, held = principal(rows)
    exact = rows.double() - rows.double().mean(0)
    values, vectors = torch.linalg.eigh(exact.T @ exact)
    directions = vectors[:, -2:].flip(1)
    expected = exact @ (directions * directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign())
    np.testing.assert_allclose(points, expected.float().numpy(), atol=2e-3)
    assert held == pytest.approx(float(values[-2:].sum() / values.sum()), rel=1e-4)
    assert points.dtype == np.float32
    assert all(map(np.array_equal, principal(rows), (points, held)))


def test_rows_without_a_direction_of_their_own_still_give_the_two_of_most_variance() -> None:
    units = unit_rows(torch.randn(3000, 40), "rows")
    variances = torch.linalg.eigvalsh(torch.cov(units.double().T))
    assert principal(units)[1] == pytest.approx(float(variances[-2:].sum() / variances.sum()), rel=1e-4)


def test_points_of_few_or_equal_rows_are_finite(without_umap: None) -> None:
    for decoder in (
        torch.ones(1, 3),
        torch.ones(5, 3),
        torch.eye(2, 3),
        torch.ones(4, 1),
        torch.zeros(3, 2),
        -torch.eye(3),
    ):
        found = mapped(decoder)
        assert np.isfinite(found.points).all()
        assert found.points.shape == (len(decoder), 2)
        assert np.abs(found.points).max() <= 1.35
    nothing = mapped(torch.zeros(0, 4))
    assert nothing.points.shape == (0, 2)
    assert nothing.n_clusters == 0


def test_without_umap_the_map_is_a_pca(without_umap: None) -> None:
    decoder = families(4, 60)
    decoder[7], decoder[100] = 0, 0
    found = mapped(decoder)
    assert found.method == "pca"
    alive = np.setdiff1d(np.arange(240), [7, 100])
    points, held = principal(unit_rows(decoder[alive], "rows"))
    assert found.variance == held
    assert np.array_equal(found.points[alive], squared(points))
    assert found.cluster[[7, 100]].tolist() == [-1, -1]
    # Below all others, apart from each other.
    assert found.points[[7, 100], 1].max() < found.points[alive, 1].min()
    assert found.points[7, 0] != found.points[100, 0]
    assert (found.points.dtype, found.cluster.dtype) == (np.float32, np.int16)
    again = mapped(decoder)
    assert np.array_equal(again.points, found.points)
    assert np.array_equal(again.cluster, found.cluster)


def test_an_installed_umap_that_does_not_work_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_umap_installed", lambda: True)
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.warns(RuntimeWarning, match="the map of latents is a PCA: umap-learn is installed but cannot be used"):
        assert mapped(families(4, 60)).method == "pca"


def test_umap_is_given_the_neighbours_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments, without umap-learn: places among the rows that are not zeros, each row its own first neighbour."""
    given: dict = {}

    class Recorder:
        def __init__(self, **options: object) -> None:
            given.update(options)

        def fit_transform(self, start: np.ndarray) -> np.ndarray:
            made = start.copy()
            made[0] = np.nan
            return made

    monkeypatch.setattr(module, "_umap_installed", lambda: True)
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Recorder))
    decoder = families(5, 40)
    decoder[3] = 0
    cosines, ids = neighbours(decoder, 6)
    found = layout(decoder, ids, cosines, seed=4)
    assert (found.method, found.variance) == ("umap", None)
    alive = np.setdiff1d(np.arange(200), [3])
    places, distances = given["precomputed_knn"]
    assert given["random_state"] == 4
    assert given["n_neighbors"] == 7
    assert np.array_equal(alive[places[:, 1:]], ids[alive].numpy())
    assert np.array_equal(places[:, 0], np.arange(199))
    np.testing.assert_allclose(distances[:, 1:], 1 - cosines[alive].numpy(), atol=1e-6)
    assert not distances[:, 0].any()
    assert np.isfinite(found.points).all()


def test_umap_puts_families_apart() -> None:
    pytest.importorskip("umap.umap_", reason="needs umap-learn")
    decoder = families(6, 50)
    decoder[17] = 0
    found = mapped(decoder)
    assert found.method == "umap"
    assert np.array_equal(mapped(decoder).points, found.points)
    alive = np.arange(300) != 17
    distance = np.linalg.norm(found.points[:, None] - found.points[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    same = (distance.argmin(1) % 6 == np.arange(300) % 6)[alive]
    assert same.mean() > 0.98
    assert np.abs(found.points[alive]).max() <= 1.25


def test_clusters_are_the_families_and_each_row_is_nearest_to_its_own() -> None:
    units = unit_rows(families(8, 256, d=32, noise=0.15), "rows")
    found, n = clusters(units)
    assert n == 8
    sizes = np.bincount(found)
    assert np.all(np.diff(sizes) <= 0)
    for cluster in range(n):
        assert len(set((np.flatnonzero(found == cluster) % 8).tolist())) == 1
    centres = torch.stack([units[torch.from_numpy(found == cluster)].sum(0) for cluster in range(n)])
    cosines = units.double() @ torch.nn.functional.normalize(centres.double(), dim=1).T
    assert np.array_equal(cosines.argmax(1).numpy(), found)
    assert np.array_equal(clusters(units)[0], found)
    assert clusters(units, seed=1)[1] == 8


def test_a_sensible_number_of_clusters() -> None:
    assert [how_many(L) for L in (1, 40, 4096, 8192, 131_072, 1 << 20)] == [1, 1, 11, 16, 64, 64]
    found, seen = clusters(unit_rows(torch.randn(4096, 4), "rows"))
    assert 0 < seen <= 11
    assert set(np.unique(found)) == set(range(seen))


def test_rows_that_are_all_alike_are_one_cluster() -> None:
    found, n = clusters(torch.ones(500, 1))
    assert n == 1
    assert not found.any()


def test_points_keep_their_order_and_few_lie_far_out() -> None:
    points = np.random.default_rng(0).standard_cauchy((5000, 2))
    made = squared(points)
    assert np.abs(made).max() <= 1.25
    assert (np.abs(made) <= 1).mean() >= 0.98
    assert np.array_equal(np.argsort(points[:, 0], kind="stable"), np.argsort(made[:, 0], kind="stable"))
    # Where none lies far out, shapes stay what they are.
    disc = np.random.default_rng(1).uniform(-3, 7, (5000, 2))
    disc = disc[np.linalg.norm(disc - 2, axis=1) < 5]
    made = squared(disc)
    scale = (made[0] - made[1]) / (disc[0] - disc[1])
    np.testing.assert_allclose(made - made[0], (disc - disc[0]) * scale[0], atol=1e-5)
    assert 0.95 < np.abs(made).max() <= 1


def test_names_are_the_words_that_a_cluster_has_more_of_than_others() -> None:
    texts = ["the", "River", "river", "bank", "snow", " ice", ""]
    cluster = np.array([0, 0, 0, 1, 1, -1, 2], np.int16)
    own = [
        (0, 0, 0.5), (0, 1, 0.2), (1, 2, 0.3), (1, 3, 0.1), (2, 0, 0.5), (2, 2, 0.2), (3, 4, 0.6), (3, 0, 0.5),
        (4, 5, 0.7), (4, 6, 0.9), (5, 4, 0.9),
    ]  # fmt: skip
    latents, tokens, shares = (np.array(column) for column in zip(*own, strict=True))
    names = cluster_names(cluster, latents, tokens, shares, texts.__getitem__)
    assert names == ["river · the · bank", "ice · snow", ""]
    assert cluster_names(cluster, latents, tokens, shares, texts.__getitem__, words=1) == ["river", "ice", ""]
    none = np.zeros(0, np.int64)
    assert cluster_names(cluster, none, none, none.astype(float), texts.__getitem__) == ["", "", ""]
    one = cluster_names(np.zeros(7, np.int16), latents, tokens, shares, texts.__getitem__)
    assert one[0].split(" · ")[0] in ("snow", "the")
    assert cluster_names(np.full(7, -1, np.int16), latents, tokens, shares, texts.__getitem__) == []


def test_neighbours_of_another_decoder_are_refused() -> None:
    with pytest.raises(InputError, match="neighbour_ids has shape"):
        layout(torch.ones(4, 2), torch.zeros(5, 3), torch.zeros(5, 3))
    with pytest.raises(InputError, match="row 1"):
        layout(torch.tensor([[1.0], [torch.nan]]), torch.zeros(2, 1), torch.zeros(2, 1))


def test_memory_is_linear_in_latents(without_umap: None) -> None:
    decoder = torch.randn(8192, 64)
    cosines, ids = neighbours(decoder, 1)
    with Allocations(decoder, cosines, ids) as watched:
        layout(decoder, ids, cosines)
    assert watched.peak < 2 * decoder.nbytes + 2048 * (64 * 8 * 4 + 16 * 64) + 8192 * 200
