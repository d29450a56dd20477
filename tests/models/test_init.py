"""How weights begin: norms, ties, and the pre-bias against a brute-force optimum."""

import pytest
import torch
from torch import Tensor

from saefast.models.config import SAEConfig
from saefast.models.init import geometric_median, init_weights
from saefast.models.sae import SAE
from saefast.models.start import scale_encoder_, start_b_dec_


@pytest.mark.parametrize(("init", "norm"), [("tied", 1.0), ("tied_0.1", 0.1)])
def test_tied(init: str, norm: float) -> None:
    W_enc, W_dec = init_weights((300, 17), (300, 17), init)  # type: ignore[arg-type]
    torch.testing.assert_close(W_enc.norm(dim=1), torch.full((300,), norm))
    assert torch.equal(W_enc, W_dec)


def test_kaiming_encoder_is_linears_default_and_decoder_its_unit_rows() -> None:
    W_enc, W_dec = init_weights((4000, 25), (4000, 25), "kaiming")
    bound = 1 / 25**0.5
    assert float(W_enc.abs().max()) <= bound
    assert float(W_enc.abs().max()) > 0.999 * bound
    assert float(W_enc.std()) == pytest.approx(bound / 3**0.5, rel=0.01)
    linear = torch.nn.Linear(25, 4000)
    assert float(linear.weight.detach().std()) == pytest.approx(float(W_enc.std()), rel=0.02)
    torch.testing.assert_close(W_dec.norm(dim=1), torch.ones(4000))
    torch.testing.assert_close(W_dec * W_enc.norm(dim=1, keepdim=True), W_enc)


def test_the_encoder_and_decoder_of_an_sae_do_not_share_memory() -> None:
    sae = SAE(SAEConfig(8, 16, 2, init="tied"), seed=0)
    before = sae.W_dec.detach().clone()
    sae.W_enc.data += 1
    assert torch.equal(sae.W_dec, before)


def test_a_seed_gives_the_same_weights() -> None:
    first, again, other = (SAE(SAEConfig(8, 16, 2), seed=s).W_enc for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def summed_distance(rows: Tensor, point: Tensor) -> float:
    return float((rows.double() - point.double()).norm(dim=1).sum())


def best_point(rows: Tensor) -> Tensor:
    """Subgradient descent in float64 from the mean and from every one of the first rows; the best point it met."""
    rows = rows.double()
    best, best_value = rows.mean(0), float("inf")
    for start in [rows.mean(0), rows.median(0).values, *rows[:5]]:
        point, step = start.clone(), float((rows - rows.mean(0)).norm(dim=1).mean())
        for _ in range(3000):
            difference = point - rows
            distance = difference.norm(dim=1, keepdim=True)
            slope = torch.where(distance > 0, difference / distance, torch.zeros_like(difference)).mean(0)
            value = float(distance.sum())
            if value < best_value:
                best, best_value = point.clone(), value
            point = point - step * slope
            step *= 0.995
    return best


def skewed(n: int, d: int) -> Tensor:
    """Rows whose mean is far from their median."""
    rows = torch.randn(n, d, dtype=torch.float64) + 2
    rows[: n // 8] *= 30
    return rows


def held_by_a_row() -> Tensor:
    """The mean falls on a row which is not the median: plain Weiszfeld would stay there for ever."""
    others = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.1, 0.0], [-0.1, 0.3], [0.05, -0.3], [12.0, 0.0]])
    return torch.cat([others, others.mean(0, keepdim=True)]).double()


CASES = {
    "skewed": lambda: skewed(64, 5),
    "one dimension": lambda: torch.tensor([[0.0], [1.0], [2.0], [50.0], [900.0]], dtype=torch.float64),
    "row is the median": lambda: torch.cat([torch.eye(4), -torch.eye(4), torch.zeros(3, 4)]).double(),
    "mean falls on a row": held_by_a_row,
    "mean is the median": lambda: torch.cat([torch.eye(4), -torch.eye(4)]).double(),
    "tiny": lambda: 1e-7 * skewed(64, 5),
    "huge": lambda: 1e7 * skewed(64, 5),
}


@pytest.mark.parametrize("case", CASES)
def test_geometric_median_is_the_optimum(case: str) -> None:
    rows = CASES[case]()
    found, best = geometric_median(rows), best_point(rows)
    # Within 1e-4 of the optimum's own summed distance, where the mean is off by percents.
    assert summed_distance(rows, found) <= summed_distance(rows, best) * (1 + 1e-4)
    if case in ("skewed", "tiny", "huge", "mean falls on a row"):
        assert summed_distance(rows, rows.mean(0)) > summed_distance(rows, best) * 1.01


def test_a_row_that_is_the_median_is_found_exactly() -> None:
    """The others pull on it, off balance, but with less than its own force of 1."""
    rows = torch.tensor([[0.0, 0.0], [1.25, 0.0], [-0.625, 0.5], [-0.625, -0.5]])
    assert geometric_median(rows).tolist() == [0.0, 0.0]


def test_geometric_median_of_equal_rows_and_of_one() -> None:
    assert geometric_median(torch.full((5, 3), 2.5)).tolist() == [2.5] * 3
    assert geometric_median(torch.tensor([[1.0, -4.0]])).tolist() == [1.0, -4.0]


def test_geometric_median_of_bf16_rows_is_found_in_fp32() -> None:
    rows = skewed(200, 6).bfloat16()
    found = geometric_median(rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, geometric_median(rows.double()).float(), rtol=1e-4, atol=1e-4)


def test_b_dec_from_rows() -> None:
    sae, rows = SAE(SAEConfig(6, 12, 2), seed=0), skewed(100, 6)
    start_b_dec_(sae, rows, "mean")
    torch.testing.assert_close(sae.b_dec.detach(), rows.mean(0).float())
    start_b_dec_(sae, rows, "geometric_median")
    torch.testing.assert_close(sae.b_dec.detach(), geometric_median(rows).float())
    start_b_dec_(sae, rows, "zeros")
    assert not sae.b_dec.any()
    assert sae.b_dec.requires_grad


def test_scaled_encoder_returns_random_directions_at_unit_length() -> None:
    sae = SAE(SAEConfig(32, 512, 32, init="kaiming"), seed=0)
    sae.b_dec.data = torch.randn(32) * 5

    def length() -> float:
        directions = torch.nn.functional.normalize(torch.randn(4000, 32))
        return float((sae(directions + sae.b_dec).x_hat - sae.b_dec).norm(dim=1).mean().detach())

    assert abs(length() - 1) > 0.1
    scale_encoder_(sae, seed=7)
    assert length() == pytest.approx(1, rel=0.02)  # 256 directions estimate the mean to about 0.5 %
    once = sae.W_enc.detach().clone()
    scale_encoder_(sae, seed=7)
    torch.testing.assert_close(sae.W_enc.detach(), once, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_geometric_median_of_rows_far_from_zero_and_with_huge_ones(dtype: torch.dtype) -> None:
    """A mean 3000 times the spread costs no more than the rounding of the rows, and sinks do not hold the centre."""
    torch.manual_seed(0)
    x = torch.randn(1024, 24, dtype=torch.float64)
    exact = geometric_median(x, max_iterations=2000, tolerance=1e-12)
    found = geometric_median((x + 3000).to(dtype)).double() - 3000
    assert float((found - exact).norm()) < (2e-3 if dtype == torch.float32 else 1e-5)
    sink = torch.randn(24, dtype=torch.float64)
    x[::128] = 3000 * x.norm(dim=1).median() * sink / sink.norm()
    assert float(x.mean(0).norm()) > 20 * float(x.norm(dim=1).median())
    # One row in 128 pulls with a force of 1 / 128, so by about that share of the usual distance.
    assert float((geometric_median(x.to(dtype)).double() - exact).norm()) < 0.01 * float(x.norm(dim=1).median())
