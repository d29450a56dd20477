"""batch_sums on its Triton kernel, against float64 and the definitions."""

import interp
import pytest
import torch

from saefast.optim import triton_batch as batch_triton

interp.speed_up()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


@pytest.mark.parametrize(("B", "D"), [(1, 1), (5, 33), (128, 64), (300, 130)])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_moments(B: int, D: int, mean: float, device: torch.device) -> None:
    x = (torch.randn(B, D) + mean).to(device)
    variance, squares = batch_triton.batch_sums(x)
    wide = x.double()
    assert variance.dtype == squares.dtype == torch.float64
    expected = (wide - wide.mean(0)).square().sum()
    torch.testing.assert_close(variance, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(squares, wide.square().sum(), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("bad", "place"), [(float("nan"), 0), (float("inf"), 0), (float("-inf"), 7), (float("nan"), 7)]
)
def test_moments_of_what_is_not_finite_are_not_below_any_bound(bad: float, place: int, device: torch.device) -> None:
    x = torch.randn(9, 40, device=device)
    x[place, 3] = bad
    variance, squares = batch_triton.batch_sums(x)
    assert not variance <= squares < 1e30


def test_equal_rows_have_no_variance(device: torch.device) -> None:
    x = torch.randn(1, 70, device=device).expand(200, 70).contiguous()
    assert batch_triton.batch_sums(x)[0] == 0
