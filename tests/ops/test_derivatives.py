"""Derivatives of the ops that have one: float64 gradcheck, dense autograd, and what asks for none."""

import pytest
import torch
from torch.autograd import gradcheck

import saefast
from saefast import ops


def leaves(B=4, D=3, L=12):
    return [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((B, D), (L, D), (L,))]


@pytest.mark.parametrize("k", [1, 4, 9, 12])  # 9 and 12 keep clipped latents inside the top k
@pytest.mark.parametrize("relu", [True, False])
def test_encode_topk_passes_gradcheck(k, relu):
    assert gradcheck(lambda *a: ops.encode_topk(*a, k, relu=relu)[0], leaves())


def test_encode_topk_of_some_latents_passes_gradcheck():
    latents = torch.tensor([0, 3, 4, 10])
    assert gradcheck(lambda *a: ops.encode_topk(*a, 2, latents=latents)[0], leaves())


def test_decode_passes_gradcheck():
    x, W, b = leaves()
    assert gradcheck(lambda x, W, b, V: ops.spmm(*ops.encode_topk(x, W, b, 9), V), (x, W, b, leaves()[1]))


def test_whole_autoencoder_equals_dense_autograd():
    x, W_enc, b_enc = leaves(B=32, D=8, L=64)
    W_dec = leaves(D=8, L=64)[1]
    b_dec = torch.randn(8, dtype=torch.float64, requires_grad=True)
    acts, idx = ops.encode_topk(x - b_dec, W_enc, b_enc, 40)
    (x - ops.spmm(acts, idx, W_dec) - b_dec).square().sum().backward()
    sparse = [t.grad.clone() for t in (x, W_enc, b_enc, W_dec, b_dec)]
    for t in (x, W_enc, b_enc, W_dec, b_dec):
        t.grad = None
    pre = (x - b_dec) @ W_enc.T + b_enc
    top = pre.topk(40, dim=1)
    assert (top.values <= 0).any(), "the case must hold clipped latents"
    codes = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    (x - codes @ W_dec - b_dec).square().sum().backward()
    for ours, t in zip(sparse, (x, W_enc, b_enc, W_dec, b_dec), strict=True):
        torch.testing.assert_close(ours, t.grad)


def test_clip_grad_false_lets_gradients_through_clipped_latents():
    x, W, b = leaves()
    grads = []
    for clip in (True, False):
        acts, _ = ops.encode_topk(x, W, b, 12, clip_grad=clip)
        grads.append(torch.autograd.grad(acts.sum(), b)[0])
    assert torch.equal(grads[1], torch.full_like(b, 4.0))
    assert (grads[0] < grads[1]).any()


def test_only_requested_gradients_are_made():
    x, W, b = leaves()
    acts, _ = ops.encode_topk(x.detach(), W, b.detach(), 4)
    acts.sum().backward()
    assert W.grad is not None
    assert x.grad is None
    assert b.grad is None


def test_without_a_bias_and_through_options_that_pick_kernels():
    x, W, _ = leaves()
    assert gradcheck(lambda x, W: ops.encode_topk(x, W, None, 5, method="chunked", max_scratch_bytes=10**6)[0], (x, W))


def test_no_graph_where_none_is_asked_for():
    x, W, b = leaves()
    with torch.no_grad():
        assert ops.encode_topk(x, W, b, 4)[0].grad_fn is None
    acts, idx = ops.encode_topk(x.detach(), W.detach(), b.detach(), 4)
    assert acts.grad_fn is None
    assert ops.spmm(acts, idx, W.detach()).grad_fn is None


def test_a_fused_step_builds_no_graph(monkeypatch):
    """The fused engine has the gradients in closed form: nothing that it calls asks autograd."""

    def refused(*args, **kwargs):
        raise AssertionError("the fused engine asked autograd")

    monkeypatch.setattr(torch.autograd.Function, "apply", refused)
    monkeypatch.setattr(torch.autograd, "grad", refused)
    monkeypatch.setattr(torch.Tensor, "backward", refused)
    settings = dict(lr=1e-3, batch_size=100, n_tokens=800, dead_after=150)
    rows, sae = torch.randn(1000, 16), saefast.SAEConfig(16, 64, 4)
    saefast.train(rows, sae, saefast.TrainConfig(engine="fused", **settings))
    with pytest.raises(AssertionError, match="asked autograd"):
        saefast.train(rows, sae, saefast.TrainConfig(engine="autograd", **settings))
