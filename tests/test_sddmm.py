"""sddmm on a Triton kernel, against the reference."""

import interp
import pytest
import torch
from closeness import assert_close_to_reference

from saefast.ops import reference, triton_sddmm

interp.speed_up()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

SHAPES = [(1, 1, 1, 1), (3, 37, 50, 7), (5, 64, 20, 32), (2, 1100, 9, 3), (4, 130, 300, 65)]
LARGE = [(8192, 768, 32768, 32), (1000, 4096, 131072, 64), (3001, 1001, 999, 65)]


def sampled_problem(B, D, L, K, dtype, device, idx_dtype=torch.int32):
    idx = torch.randint(L, (B, K), device=device, dtype=idx_dtype)
    return torch.randn(B, D, device=device).to(dtype), idx, torch.randn(L, D, device=device).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("B", "D", "L", "K"), SHAPES)
def test_close_to_reference(B, D, L, K, dtype, device):
    x, idx, W = sampled_problem(B, D, L, K, dtype, device)
    out = triton_sddmm.sddmm(x, idx, W)
    assert out.dtype == torch.float32
    assert_close_to_reference(out, reference.sddmm, x, idx, W)


@pytest.mark.parametrize(("x_dtype", "W_dtype"), [(torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_a_gradient_may_be_wider_than_the_weights(x_dtype, W_dtype, device):
    x, idx, W = sampled_problem(3, 70, 30, 5, torch.float32, device, torch.int64)
    x, W = x.to(x_dtype), W.to(W_dtype)
    assert_close_to_reference(triton_sddmm.sddmm(x, idx, W), reference.sddmm, x, idx, W)


@pytest.mark.parametrize(("B", "D", "K"), [(0, 8, 3), (3, 8, 0), (2, 0, 3)])
def test_nothing_to_add(B, D, K, device):
    x, idx, W = sampled_problem(B, D, 5, K, torch.float32, device)
    assert torch.equal(triton_sddmm.sddmm(x, idx, W), torch.zeros(B, K, device=device))


def test_a_row_does_not_depend_on_the_others_nor_on_how_launches_are_cut(device, monkeypatch):
    x, idx, W = sampled_problem(7, 530, 40, 19, torch.float32, device)
    whole = triton_sddmm.sddmm(x, idx, W)
    assert torch.equal(whole, triton_sddmm.sddmm(x, idx, W))
    assert torch.equal(whole[3:4], triton_sddmm.sddmm(x[3:4].clone(), idx[3:4].clone(), W))
    monkeypatch.setattr(triton_sddmm, "MAX_PROGRAMS", 7)
    assert torch.equal(whole, triton_sddmm.sddmm(x, idx, W))


def test_nan_and_infinity_stay_in_their_entries(device):
    x, idx, W = sampled_problem(2, 40, 6, 5, torch.float32, device)
    idx = torch.tensor([[0, 1, 2, 3, 4], [5, 4, 3, 2, 1]], device=device, dtype=torch.int32)
    W[2, 7], W[4, 0] = float("nan"), float("inf")
    out = triton_sddmm.sddmm(x, idx, W)
    expected = reference.sddmm(x, idx, W)
    torch.testing.assert_close(out, expected, equal_nan=True)
    assert out.isnan().sum() == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("B", "D", "L", "K"), [(8192, 768, 32768, 32), (1000, 4096, 131072, 64), (3001, 1001, 999, 65)]
)
def test_gpu_large_shapes_repeat_bit_for_bit(B, D, L, K, dtype):
    x, idx, W = sampled_problem(B, D, L, K, dtype, "cuda")
    out = triton_sddmm.sddmm(x, idx, W)
    assert_close_to_reference(out, reference.sddmm, x, idx, W)
    for _ in range(10):
        assert torch.equal(out, triton_sddmm.sddmm(x, idx, W))
