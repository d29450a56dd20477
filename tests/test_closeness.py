import pytest
import torch
from closeness import assert_close_to_reference


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_row", [False, True])
def test_another_order_of_summation_passes(dtype: torch.dtype, per_row: bool) -> None:
    a, b = torch.randn(6, 256).to(dtype), torch.randn(256, 32).to(dtype)
    shuffled = torch.randperm(256)
    out = (a[:, shuffled].float() @ b[shuffled].float()).to(dtype)
    assert_close_to_reference(out, product, a, b, per_row=per_row)


def test_an_exact_torch_leaves_room_for_one_rounding() -> None:
    a, b = torch.eye(4), torch.randn(4, 4)
    assert_close_to_reference(torch.nextafter(a @ b, torch.tensor(9.0)), product, a, b)


@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), 1.0])
def test_one_wrong_element_fails(spoil: float) -> None:
    a, b = torch.randn(6, 32), torch.randn(32, 8)
    out = a @ b
    out[4, 3] += spoil
    with pytest.raises(AssertionError, match="element 35: off by"):
        assert_close_to_reference(out, product, a, b)


def test_a_wrong_row_of_small_norm_shows_only_in_maxima_by_row() -> None:
    a, b = torch.randn(6, 32), torch.randn(32, 8)
    a[2] *= 1e-9
    out = a @ b
    out[2] = 0
    assert_close_to_reference(out, product, a, b)
    with pytest.raises(AssertionError, match="row 2"):
        assert_close_to_reference(out, product, a, b, per_row=True)


def test_a_wrong_shape_fails_and_nothing_is_close_to_nothing() -> None:
    a, b = torch.randn(0, 4), torch.randn(4, 5)
    assert_close_to_reference(a @ b, product, a, b, per_row=True)
    with pytest.raises(AssertionError, match="shape"):
        assert_close_to_reference(torch.zeros(5, 0), product, a, b)
