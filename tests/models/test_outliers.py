"""Which rows are ordinary: against plain float64 formulas, on rows far from zero, of any size, and with huge ones."""

import math

import pytest
import torch
from torch import Tensor

from saefast.models.init import geometric_median
from saefast.models.outliers import FAR, MOST, ordinary_rows, variance_of_few


def made(n: int = 2000, d: int = 16, sinks: int = 0, times: float = 1000.0) -> Tensor:
    """(n, d) float64 around 0; every `sinks`-th row lies `times` the median norm away, all in one direction."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    if sinks:
        x[::sinks] = x[0] / x[0].norm() * x.norm(dim=1).median() * times
    return x


@pytest.mark.parametrize("offset", [0.0, 3e5])
def test_centre_and_distance_are_the_medians(offset: float) -> None:
    x = made() + offset
    found = ordinary_rows(x)
    centre = geometric_median(x)
    torch.testing.assert_close(found.centre, centre, rtol=1e-12, atol=1e-6)
    assert found.usual == pytest.approx(float((x - centre).norm(dim=1).median()), rel=1e-6)
    torch.testing.assert_close(found.times(x), (x - centre).norm(dim=1) / found.usual)


def test_auto_finds_a_few_far_rows_and_no_others() -> None:
    x = made(sinks=128)
    found = ordinary_rows(x)
    assert found.multiple == FAR
    assert found.far(x).nonzero().squeeze(1).tolist() == list(range(0, 2000, 128))
    assert found.usual == pytest.approx(ordinary_rows(made()).usual, rel=0.02)
    assert not ordinary_rows(made()).far(made()).any()


def test_auto_leaves_what_is_not_rare() -> None:
    every = round(1 / MOST) // 2
    assert ordinary_rows(made(sinks=every)).multiple == math.inf
    assert not ordinary_rows(made(sinks=every)).far(made(sinks=every)).any()
    assert ordinary_rows(made(sinks=every), 30.0).far(made(sinks=every)).sum() == len(range(0, 2000, every))
    assert not ordinary_rows(made(sinks=128), None).far(made(sinks=128)).any()


@pytest.mark.parametrize("size", [1e-300, 1e-20, 1e-3, 1e3, 1e20, 1e300])
def test_any_size(size: float) -> None:
    x = made(sinks=128)
    found = ordinary_rows(x * size)
    assert found.usual == pytest.approx(ordinary_rows(x).usual * size, rel=1e-9)
    assert torch.equal(found.far(x * size), ordinary_rows(x).far(x))
    assert torch.equal(found.scaled(1 / size).far(x), ordinary_rows(x).far(x))


def test_float32_rows_of_3000_times_their_spread() -> None:
    x = made(sinks=128)
    found = ordinary_rows((x + 3000 * 4).float())
    assert found.usual == pytest.approx(ordinary_rows(x).usual, rel=1e-3)
    assert torch.equal(found.far((x + 3000 * 4).float()), ordinary_rows(x).far(x))


def test_copies_of_one_row() -> None:
    x = made()
    x[:1500] = x[0]
    found = ordinary_rows(x)
    assert found.multiple == math.inf
    assert found.usual == pytest.approx(float((x - x[0]).norm(dim=1).mean()), rel=1e-6)
    assert ordinary_rows(torch.ones(50, 3)).usual == 0
    assert ordinary_rows(torch.zeros(50, 3)).usual == 0


def test_how_few_rows_hold_most_of_the_variance() -> None:
    x = made(sinks=128)
    squares = (x - geometric_median(x)).square().sum(1).sort(descending=True).values
    share, held = variance_of_few(x)
    assert share == 20 / 2000
    assert held == pytest.approx(float(squares[:20].sum() / squares.sum()), rel=1e-9)
    assert held > 0.99
    assert variance_of_few(x * 1e-200) == pytest.approx((share, held))
    assert variance_of_few(made(sinks=16))[0] == 125 / 2000
    assert variance_of_few(made())[1] < 0.05
    assert variance_of_few(made(99)) == (0, 0)
    assert variance_of_few(made(99, sinks=50))[0] == 2 / 99
    assert variance_of_few(torch.ones(200, 3)) == (0.01, 0)


@pytest.mark.parametrize("size", [1e-30, 1e-18, 1.0, 1e18, 1e30])
def test_any_size_in_float32(size: float) -> None:
    x = made(sinks=128)
    small = (x * size).float()
    assert torch.equal(ordinary_rows(small).far(small), ordinary_rows(x).far(x))
