"""The reference ops against the formulas they state, written densely, and float64 gradchecks of each."""

import pytest
import torch
from torch.autograd import gradcheck

from saefast.ops import reference


def dense_topk(pre, k):
    """Stable: value descending, then index ascending, NaN first."""
    values, idx = torch.sort(pre, dim=1, descending=True, stable=True)
    return values[:, :k], idx[:, :k].int()


def integers(*shape, low=-3, high=4, dtype=torch.float32):
    return torch.randint(low, high, shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("B", "D", "L", "k", "chunk"), [(4, 8, 50, 5, 7), (1, 3, 9, 9, 4), (0, 3, 9, 2, 4), (5, 1, 33, 1, 33)]
)
def test_encode_topk_is_the_stable_sort_on_integers(B, D, L, k, chunk, dtype):
    x, W, b = integers(B, D, dtype=dtype), integers(L, D, dtype=dtype), integers(L, dtype=dtype)
    acts, idx = reference.encode_topk(x, W, b, k, relu=False, chunk=chunk)
    values, order = dense_topk(x.double() @ W.double().T + b.double(), k)
    assert torch.equal(acts.double(), values)
    assert torch.equal(idx, order)
    assert acts.dtype == reference.accumulate_dtype(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_ranks_above_inf_and_zeros_of_either_sign_tie(dtype):
    b = torch.tensor([0.0, -0.0, float("inf"), -1.0, float("nan"), float("-inf"), -float("nan")], dtype=dtype)
    x, W = torch.zeros(1, 2, dtype=dtype), torch.zeros(7, 2, dtype=dtype)
    _, idx = reference.encode_topk(x, W, b, 7, relu=False, chunk=3)
    assert idx[0].tolist() == [4, 6, 2, 0, 1, 3, 5]


def test_latents_restricts_the_competition_and_keeps_global_ids():
    x, W, b = integers(6, 4), integers(40, 4), integers(40)
    latents = torch.tensor([1, 5, 6, 20, 39])
    acts, idx = reference.encode_topk(x, W, b, 3, latents=latents, relu=False, chunk=2)
    values, order = dense_topk((x @ W.T + b)[:, latents], 3)
    assert torch.equal(acts, values)
    assert torch.equal(idx, latents[order.long()].int())


def test_scale_ranks_but_returns_unscaled_values():
    x, W, b, scale = torch.randn(6, 4), torch.randn(40, 4), torch.randn(40), torch.rand(40) + 0.1
    acts, idx = reference.encode_topk(x, W, b, 5, scale=scale, relu=False, chunk=16)
    pre = x @ W.T + b
    _, order = dense_topk(pre * scale, 5)
    assert torch.equal(idx, order)
    torch.testing.assert_close(acts, pre.gather(1, order.long()))


def test_relu_clips_values_and_keeps_distinct_indices():
    acts, idx = reference.encode_topk(torch.ones(2, 3), -torch.ones(10, 3), None, 4)
    assert torch.equal(acts, torch.zeros(2, 4))
    assert idx.tolist() == [[0, 1, 2, 3]] * 2


def test_threshold_encode_is_nonzero_of_the_dense_comparison():
    x, W, b = torch.randn(7, 5), torch.randn(33, 5), torch.randn(33)
    theta = torch.rand(33)
    pre = x @ W.T + b
    for threshold in (theta, 0.5):
        row_ptr, idx, acts = reference.threshold_encode(x, W, b, threshold, chunk=8)
        dense = torch.zeros(7, 33)
        for row in range(7):
            part = slice(int(row_ptr[row]), int(row_ptr[row + 1]))
            assert idx[part].tolist() == sorted(idx[part].tolist())
            dense[row, idx[part].long()] = acts[part]
        torch.testing.assert_close(dense, torch.where(pre > threshold, pre, 0.0))


def code(B, K, L, dtype=torch.float64):
    idx = torch.stack([torch.randperm(L)[:K] for _ in range(B)]).int() if B else torch.zeros(0, K, dtype=torch.int32)
    return torch.randn(B, K, dtype=dtype), idx


@pytest.mark.parametrize(("B", "K", "L", "D"), [(5, 3, 11, 7), (0, 3, 11, 7), (2, 11, 11, 1), (4, 1, 3, 5)])
def test_sparse_products_equal_their_dense_forms(B, K, L, D):
    acts, idx = code(B, K, L)
    x, W = torch.randn(B, D, dtype=torch.float64), torch.randn(L, D, dtype=torch.float64)
    dense = torch.zeros(B, L, dtype=torch.float64).scatter(1, idx.long(), acts)
    torch.testing.assert_close(reference.spmm(acts, idx, W), dense @ W)
    torch.testing.assert_close(reference.spmm_t(acts, idx, x, L), dense.T @ x)
    torch.testing.assert_close(reference.sddmm(x, idx, W), (x @ W.T).gather(1, idx.long()))
    torch.testing.assert_close(reference.sum_by_latent(acts, idx, L), dense.sum(0))


def test_every_reference_op_passes_gradcheck():
    x, W, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 3), (12, 3), (12,)))
    acts, idx = code(4, 3, 12)
    acts.requires_grad_()
    latents = torch.arange(0, 12, 2)
    # k = 9 of 12 keeps latents that ReLU clips inside the top k.
    assert gradcheck(lambda *a: reference.encode_topk(*a, 9, chunk=5)[0], (x, W, b))
    assert gradcheck(lambda *a: reference.encode_topk(*a, 4, latents=latents, relu=False, chunk=4)[0], (x, W, b))
    assert gradcheck(lambda *a: reference.threshold_encode(*a, 0.2, chunk=5)[2], (x, W, b))
    assert gradcheck(lambda a, w: reference.spmm(a, idx, w), (acts, W))
    assert gradcheck(lambda a, w: reference.sddmm(a, idx, w), (x, W))
    assert gradcheck(lambda a, y: reference.spmm_t(a, idx, y, 12), (acts, x))
    assert gradcheck(lambda a: reference.sum_by_latent(a, idx, 12), (acts,))
