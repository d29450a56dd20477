"""Latents that fire together: C++ against NumPy and dense products, chance against what was planted, samples."""

import numpy as np
import pytest
import torch

from saefast import extension
from saefast.errors import InputError
from saefast.latents import cofiring as module
from saefast.latents.cofiring import Cofiring, certain, cofiring, counted
from saefast.latents.spool import Spool


def spool_of(rows: list[np.ndarray], n_latents: int) -> Spool:
    """A spool of rows' latents, without places."""
    idx = np.concatenate([np.zeros(0), *rows]).astype(np.int32)
    lengths = np.array([len(row) for row in rows], np.int64)
    ptr = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
    fired = np.bincount(idx, minlength=n_latents).astype(np.int64)
    none = np.zeros(0, np.int64)
    acts = np.ones(len(idx), np.float32)
    return Spool(n_latents, len(rows), ptr, idx, acts, none.astype(np.int32), none.astype(np.uint16), none, fired)


def dense_of(spool: Spool) -> np.ndarray:
    fires = np.zeros((spool.n_rows, spool.n_latents))
    fires[np.repeat(np.arange(spool.n_rows), np.diff(spool.row_ptr)), spool.idx] = 1
    return fires


def random_spool(seed: int, n_latents: int = 60, n_rows: int = 900, most: int = 12) -> Spool:
    """Rows of any number of latents, some of them none; latents of very different density, some dead, some alike."""
    rng = np.random.default_rng(seed)
    weight = 1 / np.arange(1, n_latents + 1) ** 1.2
    weight[-3:] = 0
    rows = []
    for _ in range(n_rows):
        row = rng.choice(n_latents, rng.integers(0, most), replace=False, p=weight / weight.sum())
        # Each latent that is a multiple of five brings some of those after it along, and so on.
        along = [latent + 1 + i for latent in row for i in range(4) if latent % 5 == 0 and rng.random() < 0.8]
        rows.append(rng.permutation(np.union1d(row, along)))
    return spool_of(rows, n_latents)


def all_of(spool: Spool, n: int, entries: int = 1 << 24) -> Cofiring:
    parts = [cofiring(spool, spool.by_latent(*reach), reach[0], n) for reach in spool.ranges(entries)]
    return Cofiring(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def by_products(spool: Spool, n: int) -> Cofiring:
    """From the (L, L) matrix of meetings, in float64."""
    fires = dense_of(spool)
    met, fired, L = fires.T @ fires, fires.sum(0), spool.n_latents
    chance = np.outer(fired, fired) / spool.n_rows
    sure = certain(spool.n_rows, L)[met.astype(int)] / np.maximum(chance, 1e-300)
    np.fill_diagonal(sure, 0)
    ids, lift, rows = np.full((L, n), -1), np.zeros((L, n)), np.zeros((L, n))
    for i in range(L):
        best = [j for j in np.argsort(-np.round(sure[i], 9), kind="stable")[:n] if sure[i, j] > 1]
        ids[i, : len(best)], rows[i, : len(best)] = best, met[i, best]
        lift[i, : len(best)] = met[i, best] / chance[i, best]
    return Cofiring(ids, lift, rows)


@pytest.mark.parametrize("seed", range(4))
def test_lists_are_those_of_the_whole_matrix(seed: int) -> None:
    spool = random_spool(seed)
    found, expected = all_of(spool, 8), by_products(spool, 8)
    assert (found.ids >= 0).sum() > 100
    assert np.array_equal(found.ids, expected.ids)
    assert np.array_equal(found.rows, expected.rows)
    np.testing.assert_allclose(found.lift, expected.lift, rtol=1e-6)
    assert [column.dtype for column in found] == [np.int32, np.float32, np.int64]


@pytest.mark.skipif(not extension.available(), reason="needs the C++ extension")
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("n", [1, 5, 200])
def test_cpp_gives_the_same_bits_as_numpy(threads: int, n: int) -> None:
    spool = random_spool(9, n_latents=300, n_rows=3000, most=20)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for start, stop in [(0, 300), (40, 41), (100, 200), (10, 10)]:
            entries = spool.by_latent(start, stop)
            worth = certain(int(np.diff(entries.ptr).max(initial=0)), 300)
            least = np.diff(entries.ptr) / spool.n_rows / 50
            args = (spool, entries.ptr, entries.row, start, worth, least, n)
            plain, native = counted(*args), module._counted(*args)
            assert np.array_equal(plain[0], native[0])
            assert np.array_equal(plain[1], native[1])
            assert stop - start < 2 or (native[0] >= 0).sum() > 50
    finally:
        torch.set_num_threads(before)


def test_ranges_make_no_difference_nor_does_a_missing_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    spool = random_spool(2)
    whole = all_of(spool, 6)
    assert all(map(np.array_equal, whole, all_of(spool, 6, entries=40)))
    monkeypatch.setattr(extension, "load", lambda: None)
    assert all(map(np.array_equal, whole, all_of(spool, 6)))


def test_chance_fills_no_list_and_what_is_planted_is_found() -> None:
    """5000 latents that fire without regard to each other, most of them rarely, and five pairs that do not."""
    rng = np.random.default_rng(3)
    L, N = 5000, 40_000
    weight = 1 / np.arange(1, L + 1) ** 0.7
    cumulated = np.cumsum(weight) / weight.sum()
    codes = np.searchsorted(cumulated, rng.random((N, 8)))
    rows = [np.unique(row) for row in codes]
    for pair in range(5):
        for row in rng.choice(N, 12, replace=False):
            rows[row] = np.union1d(rows[row], [4000 + pair, 4900 + pair])
    spool = spool_of(rows, L)
    fired = spool.n_fired
    met_once = sum(len(row) * (len(row) - 1) for row in rows)
    assert met_once > 1_000_000
    found = all_of(spool, 10)
    for pair in range(5):
        assert found.ids[4000 + pair, 0] == 4900 + pair
        assert found.ids[4900 + pair, 0] == 4000 + pair
        assert found.rows[4000 + pair, 0] >= 12
    listed = (found.ids >= 0).sum() - 10
    # One list of twenty may hold one.
    assert listed < L / 20
    assert found.rows[found.ids >= 0].min() > 1
    # By lift alone every list would be full of pairs that met once.
    assert (fired > 0).mean() > 0.99


def test_the_certain_part_grows_and_is_never_more_than_all() -> None:
    sure = certain(10_000, 131_072)
    assert sure[0] == sure[1] == 0
    assert np.all(np.diff(sure) >= 0)
    assert np.all(sure <= np.arange(10_001))
    assert sure[10_000] > 9_500
    # Poisson's lower limit at that level, from its own sum: P(X >= n) at the limit is about 1 / (20 L).
    n, mean = 30, sure[30]
    terms = np.cumsum([-mean, *np.log(mean / np.arange(1, 400))])
    tail = np.exp(terms[n:]).sum() * 20 * 131_072
    assert 0.5 < tail < 2
    assert np.all(certain(50, 10) >= certain(50, 10_000))


def test_dense_latents_are_followed_on_a_sample_that_does_not_lean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent 0 fires everywhere, 1 on every fourth row, 2 and 3 on half of latent 1's, 4 on rows without 1."""
    N = 40_000
    rows = []
    for r in range(N):
        row = [0]
        if r % 4 == 0:
            row += [1, 2 + (r // 4) % 2]
        elif r % 8 == 3:
            row += [4]
        rows.append(np.array(row))
    spool = spool_of(rows, 6)
    exact = all_of(spool, 5)
    monkeypatch.setattr(module, "MOST_ROWS", 3000)
    sampled = all_of(spool, 5)
    assert np.array_equal(all_of(spool, 5, entries=7000).rows, sampled.rows)
    # 2 and 3 are equals, of which the sample may have more of either.
    assert sorted(sampled.ids[1].tolist()[:2]) == exact.ids[1].tolist()[:2] == [2, 3]
    assert sampled.ids[0].tolist() == [-1] * 5
    # 10,000 rows, of which some 3,000 are followed: each share to within four standard errors.
    for estimate, truth in zip(sampled.rows[1, :2].tolist(), exact.rows[1, :2].tolist(), strict=True):
        assert estimate != truth or truth == 0
        assert abs(estimate - truth) < 4 * 10_000 * (0.25 / 3000) ** 0.5
    np.testing.assert_allclose(sampled.lift[1, :2], exact.lift[1, :2], rtol=0.08)
    kept = module._followed(np.array([0, N]), np.arange(N))[1]
    assert abs(len(kept) - 3000) < 4 * 3000**0.5
    # No rhythm of rows is preferred.
    assert abs((kept % 16 == 0).mean() - 1 / 16) < 4 * (1 / 16 / len(kept)) ** 0.5


def test_few_latents_no_rows_and_refusals() -> None:
    one = all_of(spool_of([np.array([0])] * 5, 1), 3)
    assert one.ids.tolist() == [[-1, -1, -1]]
    assert one.lift.tolist() == one.rows.tolist() == [[0, 0, 0]]
    empty = all_of(spool_of([], 4), 3)
    assert (empty.ids == -1).all()
    spool = random_spool(0)
    with pytest.raises(InputError, match="n is 0"):
        cofiring(spool, spool.by_latent(0, 3), 0, 0)


@pytest.mark.skipif(not extension.available(), reason="needs the C++ extension")
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"idx": [0, 1, 2, 3]}, r"idx\[3\] is 3, outside \[0, 3\)"),
        ({"idx": [0, -1, 2, 0]}, r"idx\[1\] is -1"),
        ({"row": [0, 1, 2]}, r"row\[2\] is 2, outside \[0, 2\)"),
        ({"row_ptr": [0, 5, 4]}, r"row_ptr\[2\] is less"),
        ({"row_ptr": [1, 2, 4]}, "row_ptr does not begin at 0"),
        ({"ptr": [0, 4, 3]}, r"ptr\[2\] is less"),
        ({"worth": [0, 0]}, "worth is for up to 1 rows: expected up to 2"),
        ({"first": 2}, "there are no latents 2 to 4"),
        ({"first": -1}, "there are no latents"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_cpp_refuses_numbers_that_lead_outside(changes: dict, says: str) -> None:
    def call(given: dict) -> torch.Tensor:
        whole = {name: torch.tensor(given[name]) for name in ("row_ptr", "ptr", "row", "n_fired")}
        ids = torch.zeros(2, 2, dtype=torch.int32)
        native = extension.load()
        assert native is not None
        native.cofiring(
            **whole, idx=torch.tensor(given["idx"], dtype=torch.int32), first=given["first"], n_latents=3, ids=ids,
            worth=torch.tensor(given["worth"], dtype=torch.float64), least=torch.zeros(2, dtype=torch.float64),
            counts=torch.zeros(2, 2, dtype=torch.int64), n_threads=1,
        )  # fmt: skip
        return ids

    sound = {"row_ptr": [0, 2, 4], "ptr": [0, 2, 3], "row": [0, 1, 0], "idx": [0, 1, 2, 0], "n_fired": [2, 1, 1]}
    sound |= {"worth": [0, 1, 2], "first": 0}
    assert call(sound).tolist() == [[1, 2], [0, -1]]
    with pytest.raises((IndexError, ValueError), match=says):
        call(sound | changes)
