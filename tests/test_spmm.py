"""spmm and its transpose on Triton kernels, against the reference."""

import interp
import pytest
import torch
from closeness import assert_close_to_reference

from saefast.ops import reference, triton_spmm

interp.speed_up()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning", "ignore:invalid value")

SHAPES = [(1, 1, 1, 1), (3, 37, 50, 7), (5, 64, 20, 32), (2, 1100, 9, 3), (4, 130, 300, 65)]
LARGE = [(8192, 768, 32768, 32), (1000, 4096, 131072, 64), (3001, 1001, 999, 65)]


def sparse_problem(B, D, L, K, dtype, device, idx_dtype=torch.int32):
    acts = torch.randn(B, K, device=device)
    idx = torch.randint(L, (B, K), device=device, dtype=idx_dtype)
    return acts, idx, torch.randn(L, D, device=device).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("B", "D", "L", "K"), SHAPES)
def test_close_to_reference(B, D, L, K, dtype, device):
    acts, idx, W = sparse_problem(B, D, L, K, dtype, device)
    out = triton_spmm.spmm(acts, idx, W)
    assert out.dtype == dtype
    assert_close_to_reference(out, reference.spmm, acts, idx, W, per_row=True)


@pytest.mark.parametrize("acts_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64])
def test_types_of_the_code(acts_dtype, idx_dtype, device):
    acts, idx, W = sparse_problem(3, 40, 30, 5, torch.float32, device, idx_dtype)
    acts = acts.to(acts_dtype)
    assert_close_to_reference(triton_spmm.spmm(acts, idx, W), reference.spmm, acts, idx, W)


@pytest.mark.parametrize(("B", "D", "K"), [(0, 8, 3), (3, 8, 0), (2, 0, 3)])
def test_nothing_to_add(B, D, K, device):
    acts, idx, W = sparse_problem(B, D, 5, K, torch.float32, device)
    assert torch.equal(triton_spmm.spmm(acts, idx, W), torch.zeros(B, D, device=device))


def test_a_row_does_not_depend_on_the_others_nor_on_how_launches_are_cut(device, monkeypatch):
    acts, idx, W = sparse_problem(7, 1030, 40, 9, torch.float32, device)
    whole = triton_spmm.spmm(acts, idx, W)
    assert torch.equal(whole, triton_spmm.spmm(acts, idx, W))
    assert torch.equal(whole[3:4], triton_spmm.spmm(acts[3:4].clone(), idx[3:4].clone(), W))
    monkeypatch.setattr(triton_spmm, "MAX_PROGRAMS", 4)
    assert torch.equal(whole, triton_spmm.spmm(acts, idx, W))


def test_repeated_and_last_latents_count_as_often_as_they_stand(device):
    W = torch.arange(12.0, device=device).view(4, 3)
    acts = torch.tensor([[1.0, 2.0, 4.0]], device=device)
    idx = torch.tensor([[3, 3, 0]], device=device, dtype=torch.int32)
    assert torch.equal(triton_spmm.spmm(acts, idx, W), 3 * W[3:] + 4 * W[:1])


@pytest.mark.parametrize("K", [1, 3, 8, 13])
def test_what_a_row_does_not_name_stays_out_of_it(K, device):
    # Loops over entries run past a row's end: neither its neighbour's values nor latent 0 may come in.
    acts, idx, W = sparse_problem(2, 20, 9, K, torch.float32, device)
    idx = idx.clamp(min=1)
    W[0] = float("nan")
    acts[1] = float("inf")
    assert torch.isfinite(triton_spmm.spmm(acts, idx, W)[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("B", "D", "L", "K"), [(1, 1, 1, 1), (9, 37, 25, 7), (0, 5, 4, 3), (40, 33, 3, 2)])
def test_transpose_close_to_reference_and_in_a_fixed_order(B, D, L, K, dtype, device):
    acts, idx, _ = sparse_problem(B, 1, L, K, dtype, device)
    x = torch.randn(B, D, device=device).to(dtype)
    out = triton_spmm.spmm_t(acts, idx, x, L)
    assert out.dtype == torch.float32
    assert_close_to_reference(out, reference.spmm_t, acts, idx, x, L)
    sums = triton_spmm.sum_by_latent(acts, idx, L)
    assert_close_to_reference(sums, reference.sum_by_latent, acts, idx, L)
    for _ in range(3 if torch.cuda.is_available() else 1):
        assert torch.equal(out, triton_spmm.spmm_t(acts, idx, x, L))
        assert torch.equal(sums, triton_spmm.sum_by_latent(acts, idx, L))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("B", "D", "L", "K"), [(8192, 768, 32768, 32), (1000, 4096, 131072, 64), (3001, 1001, 999, 65)]
)
def test_gpu_large_shapes_repeat_bit_for_bit(B, D, L, K, dtype):
    acts, idx, W = sparse_problem(B, D, L, K, dtype, "cuda")
    out = triton_spmm.spmm(acts, idx, W)
    assert_close_to_reference(out, reference.spmm, acts, idx, W, per_row=True)
    x = torch.randn(B, D, device="cuda", dtype=dtype)
    transposed = triton_spmm.spmm_t(acts, idx, x, L)
    assert_close_to_reference(transposed, reference.spmm_t, acts, idx, x, L)
    for _ in range(10):
        assert torch.equal(out, triton_spmm.spmm(acts, idx, W))
        assert torch.equal(transposed, triton_spmm.spmm_t(acts, idx, x, L))
