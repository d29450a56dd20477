"""Two SAEs compared: best matches and pairs against a float64 product, the control, the file and damaged ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from allocations import Allocations
from torch import Tensor

from saefast.errors import InputError
from saefast.latents.matched import ALIKE, Matched, path_of, read
from saefast.latents.matching import CONTROL_ROWS, match, write


def best_of(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    cosines = torch.nn.functional.normalize(a.double(), dim=1) @ torch.nn.functional.normalize(b.double(), dim=1).T
    cosines[:, ~b.any(1)] = -9
    values, ids = cosines.sort(dim=1, descending=True, stable=True)
    dead = ~a.any(1)
    return ids[:, 0].masked_fill(dead, -1), values[:, 0].masked_fill(dead, 0)


def pair(shared: int = 40) -> tuple[Tensor, Tensor]:
    """Decoders of 90 and 70 rows with some in common but for noise and scale, in another order; each has a dead row."""
    a, b = torch.randn(90, 24), torch.randn(70, 24)
    b[:shared] = 3 * a[:shared].flip(0) + 0.1 * torch.randn(shared, 24)
    a[50], b[60] = 0, 0
    return a, b


def test_best_matches_are_those_of_all_products() -> None:
    a, b = pair()
    seen: list[int] = []
    found = match(a, b, advance=seen.append)
    assert sum(seen) == len(a) + len(b) + 2 * CONTROL_ROWS
    for ids, cosine, expected in (
        (found.a_best, found.a_cosine, best_of(a, b)),
        (found.b_best, found.b_cosine, best_of(b, a)),
    ):
        assert (ids.dtype, cosine.dtype) == (np.int32, np.float32)
        assert np.array_equal(ids, expected[0].numpy())
        np.testing.assert_allclose(cosine, expected[1].numpy(), atol=1e-6)


def test_pairs_and_those_that_only_one_has() -> None:
    a, b = pair()
    found = match(a, b)
    pairs = found.mutual()
    assert sorted(pairs.tolist()) == [[i, 39 - i] for i in range(40)]
    cosines = found.a_cosine[pairs[:, 0]]
    assert np.all(np.diff(cosines) <= 0)
    cos_a, cos_b = best_of(a, b)[1], best_of(b, a)[1]
    assert sorted(found.only("a").tolist()) == [i for i in range(90) if i != 50 and cos_a[i] < ALIKE]
    assert sorted(found.only("b").tolist()) == [i for i in range(70) if i != 60 and cos_b[i] < ALIKE]
    assert np.all(np.diff(found.a_cosine[found.only("a")]) >= 0)
    assert len(found.mutual(0.0)) >= 40
    assert len(found.only("a", -2)) == 0
    counts, control = found.histogram("a", 20)
    assert counts.sum() == 89
    assert control.sum() == CONTROL_ROWS
    assert counts[-1] == np.sum(found.a_cosine >= 0.95)


def test_an_sae_is_its_own_match_and_copies_go_to_the_lower_id() -> None:
    a = torch.randn(30, 16)
    a[7] = a[3]
    found = match(a, a)
    expected = np.arange(30)
    expected[7] = 3
    assert np.array_equal(found.a_best, expected)
    assert sorted(found.mutual().tolist()) == [[i, i] for i in range(30) if i != 7]
    assert len(found.only("a")) == 0
    opposite = match(torch.eye(1, 4), -torch.eye(1, 4))
    assert (opposite.a_best.tolist(), opposite.a_cosine.tolist()) == ([0], [-1.0])


def test_control_rows_have_the_covariance_of_the_latents() -> None:
    """Latents that lie in a plane are alike to any others there by chance, and the control says so."""
    narrow, other = torch.zeros(200, 32), torch.zeros(200, 32)
    narrow[:, :2], other[:, :2] = torch.randn(200, 2), torch.randn(200, 2)
    wide = torch.randn(200, 32)
    assert match(narrow, other).a_control.min() > 0.99
    by_chance = match(wide, torch.randn(200, 32)).a_control
    assert by_chance.max() < ALIKE
    found = match(wide, torch.randn(200, 32))
    # Random latents are matched as the control is.
    assert abs(float(np.median(found.a_cosine)) - float(np.median(found.a_control))) < 0.03
    assert np.all(np.diff(found.a_control) >= 0)
    assert np.array_equal(match(wide, wide).a_control, match(wide, wide).a_control)


def test_no_latent_in_the_other_has_a_direction() -> None:
    found = match(torch.randn(4, 3), torch.zeros(5, 3))
    assert found.a_best.tolist() == [-1] * 4
    assert found.b_best.tolist() == [-1] * 5
    assert len(found.mutual(-2)) == len(found.only("a")) == len(found.only("b")) == 0
    one = match(torch.ones(1, 3), torch.ones(1, 3) * 2)
    assert one.mutual().tolist() == [[0, 0]]


def test_widths_have_to_agree() -> None:
    with pytest.raises(InputError, match="vectors of 3 and of 4 numbers"):
        match(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(InputError, match=r"b has shape \(3,\)"):
        match(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(InputError, match="b has a value in row 1"):
        match(torch.ones(2, 3), torch.tensor([[1.0, 1, 1], [1, torch.nan, 1]]))


def written(folder: Path) -> tuple[Path, Matched]:
    found = match(*pair(), {"a": "aa11", "b": "bb22", "names": ["one", "two"]})
    return write(folder, found), found


def test_the_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, found = written(tmp_path)
    assert path == path_of(tmp_path, "aa11", "bb22")
    again = read(path)
    assert again.facts["names"] == ["one", "two"]
    assert (again.facts["a"], again.facts["b"]) == ("aa11", "bb22")
    for name in Matched._fields[:-1]:
        assert np.array_equal(getattr(again, name), getattr(found, name))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_a_file_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    path, _ = written(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match="damaged"):
        read(path)


def test_altered_bytes_are_refused_or_change_nothing(tmp_path: Path) -> None:
    path, found = written(tmp_path)
    whole = bytearray(path.read_bytes())
    rng = np.random.default_rng(0)
    refused = 0
    for place in [*range(100), *rng.integers(0, len(whole), 150), *range(len(whole) - 100, len(whole))]:
        altered = whole.copy()
        altered[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(altered)
        try:
            again = read(path)
        except InputError:
            refused += 1
        else:
            assert again.facts == found.facts | {"version": 1}
            for name in Matched._fields[:-1]:
                assert np.array_equal(getattr(again, name), getattr(found, name))
    assert refused > 250


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="have not been compared"):
        read(tmp_path / "none.npz")
    path, found = written(tmp_path)
    np.savez(path, a_best=found.a_best)
    with pytest.raises(InputError, match="damaged"):
        read(path)
    write(tmp_path, found._replace(a_best=found.a_best + 70))
    with pytest.raises(InputError, match="do not go together"):
        read(path)
    with pytest.raises(InputError, match="facts lack"):
        write(tmp_path, found._replace(facts={"a": "x"}))
    with pytest.raises(InputError, match="no digest"):
        path_of(tmp_path, "..", "b")


def test_memory_is_linear_in_latents() -> None:
    a, b = torch.randn(8192, 32), torch.randn(4096, 32)
    with Allocations(a, b) as watched:
        match(a, b)
    block = 2048 * (32 * 8 * 4 + 64 * 40) + CONTROL_ROWS * 2048 * 4 * 2
    assert watched.peak < 2 * (a.nbytes + b.nbytes) + block + 64 * (len(a) + len(b))
