"""The trend of the held-out FVU: right on curves whose fall is known, and silent where nothing can be known."""

import math
import random

import pytest

from saefast.training.trend import LEAST_VALUES, PLATEAU, Point, trend


def curve(fall: float, values: int = 20, noise: float = 0.0, seed: int = 0) -> list[Point]:
    """FVU that loses the share `fall` with every doubling of tokens, each value off by a share of about `noise`."""
    made = random.Random(seed)
    return [
        Point(1000 * i, 0.5 * (1 - fall) ** math.log2(i) * math.exp(made.gauss(0, noise)), 500)
        for i in range(1, values + 1)
    ]


@pytest.mark.parametrize("fall", [-0.05, 0.0, 0.005, 0.03, 0.3])
def test_a_power_law_comes_back(fall: float) -> None:
    found = trend(curve(fall))
    assert found is not None
    assert found.fall == pytest.approx(fall, abs=1e-12)
    assert found.error == pytest.approx(0, abs=1e-9)
    assert found.flat == found.surely_flat == (fall < PLATEAU)


def test_the_error_is_that_of_many_noisy_curves() -> None:
    found = [trend(curve(0.05, noise=0.01, seed=seed)) for seed in range(300)]
    falls, errors = [t.fall for t in found if t], [t.error for t in found if t]
    mean = sum(falls) / 300
    spread = math.sqrt(sum((fall - mean) ** 2 for fall in falls) / 299)
    # Of 300 means: within five standard errors. The spread itself is known to 1/√600 = 4 %, five times that.
    assert mean == pytest.approx(0.05, abs=5 * spread / math.sqrt(300))
    assert math.sqrt(sum(error**2 for error in errors) / 300) == pytest.approx(spread, rel=0.25)


def test_noise_ends_few_falling_curves_and_no_flat_one_for_long() -> None:
    """2 % of noise beside a fall of 3 %: taken for a plateau in less than 5 of 100 looks."""
    looks = [trend(curve(0.03, noise=0.02, seed=seed)) for seed in range(300)]
    assert sum(t.surely_flat for t in looks if t) < 15
    assert sum(t.flat for t in looks if t) > 15
    flat = [trend(curve(0.0, noise=0.005, seed=seed)) for seed in range(300)]
    assert sum(t.surely_flat for t in flat if t) > 150


def test_only_the_last_doubling_counts() -> None:
    steep = [Point(point.tokens, 100 * point.fvu / point.tokens, 500) for point in curve(0.02)[:9]]
    assert trend(steep + curve(0.02)[9:]) == trend(curve(0.02))


def test_a_fall_that_slows_down_to_a_floor_is_told_as_it_is_now() -> None:
    points = [Point(1000 * i, 0.1 + 0.4 / i, 500) for i in range(1, 400)]
    early, late = trend(points[:10]), trend(points)
    assert early is not None
    assert late is not None
    assert early.fall > 0.1
    assert late.flat


def test_values_over_other_rows_are_left_out() -> None:
    """As where held-out rows come with the data: the first values are over fewer of them."""
    points = curve(0.04)
    odd = [Point(tokens, 9 * fvu, 80 + i) for i, (tokens, fvu, _) in enumerate(points[:13])]
    assert trend(odd + points[13:]) is None  # 14 to 20 thousand tokens are no doubling to speak of
    assert trend(odd[:10] + points[10:]) == trend(points[10:])


@pytest.mark.parametrize("points", [[], curve(0.1)[: LEAST_VALUES - 1], curve(0.1)[-5:], curve(0.1, values=6)])
def test_too_little_to_tell(points: list[Point]) -> None:
    assert trend(points) is None


def test_words() -> None:
    assert str(trend(curve(0.03))) == "still falling (3.0% ±0.0% per doubling of tokens): train longer"
    assert str(trend(curve(0.002))).startswith("flat (0.2% ±0.0% per doubling of tokens): ")
