"""fill_csr alone, on counts and scratch made by hand: values of groups without hits are poison, as tiles leave them."""

import math

import interp
import pytest
import torch

from saefast.kernels import fill_csr
from saefast.ops import reference

interp.speed_up()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
GROUP = 32


def filled(pre, threshold, start, device, visit):
    """idx and acts (nnz,) of a chunk, latents from `start` on; threshold has one number, or one a latent from 0 on."""
    (B, n), each = pre.shape, len(threshold) > 1
    bound = threshold[start : start + n] if each else threshold.expand(n)
    counts, passed = reference.encode_tiles(pre, bound, GROUP, count=True)
    stride = counts.shape[1] * GROUP
    scratch = torch.full((B, stride), math.nan)
    scratch[:, :n] = torch.where(passed.repeat_interleave(GROUP, 1)[:, :n], pre, math.nan)
    ends = counts.flatten().cumsum(0).view(counts.shape)
    idx = torch.full((int(counts.sum()),), -1, dtype=torch.int32, device=device)
    acts = torch.full(idx.shape, math.nan, device=device)
    fill_csr.fill_csr[(B * -(-counts.shape[1] // visit),)](
        counts.to(device), ends.to(device), scratch.to(device), threshold.to(device), idx, acts, n, start, stride,
        int(each), GROUP=GROUP, VISIT=visit, num_warps=4,
    )  # fmt: skip
    return idx.cpu(), acts.cpu()


@pytest.mark.parametrize("visit", [1, 4, 64])
@pytest.mark.parametrize(("B", "n", "start"), [(1, 1, 0), (3, 32, 64), (4, 333, 32), (2, 700, 0)])
@pytest.mark.parametrize("each", [False, True], ids=["one threshold", "one a latent"])
def test_is_the_reference(each, B, n, start, visit, device):
    pre = torch.randint(-9, 10, (B, n)).float()
    threshold = torch.randint(3, 9, (start + n if each else 1,)).float()
    bound = threshold[start:] if each else threshold.expand(n)
    _, idx, acts = reference.fill_csr(pre, bound, start)
    if n > 1:
        assert 0 < len(idx) < pre.numel(), "these thresholds separate nothing"
    found = filled(pre, threshold, start, device, visit)
    assert torch.equal(found[0], idx.int())
    assert torch.equal(found[1], acts)


def test_nan_counts_as_a_hit_and_infinities_compare(device):
    pre = torch.tensor([[math.nan, -math.inf, math.inf, 1.0], [0.0, -0.0, math.inf, -math.nan]])
    for threshold in (-math.inf, 0.0, math.inf, math.nan):
        bound = torch.tensor([threshold])
        _, idx, acts = reference.fill_csr(pre, bound.expand(4), 0)
        found = filled(pre, bound, 0, device, 1)
        assert torch.equal(found[0], idx.int())
        torch.testing.assert_close(found[1], acts, rtol=0, atol=0, equal_nan=True)


def test_rows_and_groups_without_hits_take_no_place(device):
    pre = torch.full((3, 96), -1.0)
    pre[0, 40], pre[2, 0], pre[2, 95] = 5.0, 6.0, 7.0
    idx, acts = filled(pre, torch.zeros(1), 10, device, 2)
    assert idx.tolist() == [50, 10, 105]
    assert acts.tolist() == [5.0, 6.0, 7.0]
