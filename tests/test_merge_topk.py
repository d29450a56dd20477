"""merge_topk alone, on scratch made by hand: what a whole encoder would rarely or never put there."""

import math

import interp
import pytest
import torch

from saefast.kernels import merge_topk, tuning

interp.speed_up()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")]
if DEVICE == "cuda":
    # Lists written and read back within a program are what the interpreter cannot get wrong and a GPU can.
    pytestmark.append(pytest.mark.gpu)
GROUP = 32


class Rows:
    """A running top-k and the buffers of its merges."""

    def __init__(self, B, k):
        self.k, self.width = k, max(32, 1 << (k - 1).bit_length())
        self.acts = torch.full((B, k), math.nan, device=DEVICE)
        self.idx = torch.full((B, k), -(2**31), dtype=torch.int32, device=DEVICE)
        self.tau = torch.full((B,), math.nan, device=DEVICE)

    def merge(self, pre, start, maxima=None, scale=None, bound=0):
        """Merges columns start .. start + n of pre (B, n); groups at or below tau hold poison, as tiles leave them."""
        B, n = pre.shape
        stride = -(-n // GROUP) * GROUP
        scratch = torch.full((B, stride), math.nan)
        scratch[:, :n] = pre
        rank = scratch if scale is None else scratch * torch.cat([scale[start:], torch.ones(GROUP)])[:stride]
        grouped = rank.view(B, -1, GROUP)
        # torch's amax propagates NaN, so poison past column n is filled with what cannot win.
        filled = torch.where(torch.arange(stride).view(-1, GROUP) < n, grouped, -math.inf)
        maxima = filled.amax(2) if maxima is None else maxima
        scratch.view(B, -1, GROUP)[maxima <= self.tau.cpu()[:, None]] = math.nan
        config = tuning.merge(self.width, GROUP)
        passed = torch.full((B, stride // GROUP), -(2**31), dtype=torch.int32, device=DEVICE)
        # Keys above all others where nothing was written.
        keys = torch.full((B, self.width + config.visit * GROUP), 2**63 - 1, device=DEVICE)
        merge_topk.merge_topk[(B,)](
            maxima.contiguous().to(DEVICE), scratch.to(DEVICE), None if scale is None else scale.to(DEVICE),
            passed, keys, self.acts, self.idx, self.tau, n, start, self.k, stride,
            FIRST=start == 0, BOUND=bound, LOG=self.width.bit_length() - 1, GROUP=GROUP,
            BLOCK_G=config.block_g, VISIT=config.visit, num_warps=config.warps, num_stages=1, maxnreg=config.registers,
        )  # fmt: skip
        return (passed.cpu() >= 0).sum(1)


def assert_holds(rows, pre, scale=None):
    """The running top-k is that of all columns seen."""
    rank = pre if scale is None else pre * scale[: pre.shape[1]]
    order = torch.sort(rank + 0.0, dim=1, descending=True, stable=True)
    idx, found = order.indices[:, : rows.k], min(rows.k, pre.shape[1])
    assert torch.equal(rows.idx.cpu()[:, :found], idx.int())
    torch.testing.assert_close(rows.acts.cpu()[:, :found], pre.gather(1, idx), rtol=0, atol=0, equal_nan=True)
    if pre.shape[1] >= rows.k:
        kth = order.values[:, rows.k - 1]
        torch.testing.assert_close(rows.tau.cpu(), kth, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("k", [1, 31, 33, 100])
def test_chunk_after_chunk_is_the_top_k_of_all_seen(k):
    pre = torch.randint(-40, 40, (2, 700)).float()
    rows = Rows(2, k)
    for start, end in ((0, 7), (7, 160), (160, 161), (161, 700)):
        rows.merge(pre[:, start:end], start)
        assert_holds(rows, pre[:, :end])
        if end < k:
            assert rows.tau.isnan().all()
            assert (rows.idx[:, end:] == -1).all()


def test_zeros_of_either_sign_tie_and_every_nan_is_one():
    pre = torch.tensor([[-0.0, 0.0, -1.0, -math.nan, math.inf, math.nan, 0.0, -0.0, -math.inf, 1e-45]])
    rows = Rows(1, 9)
    rows.merge(pre, 0)
    assert rows.idx[0].tolist() == [3, 5, 4, 9, 0, 1, 6, 7, 2]
    late = Rows(1, 2)
    late.merge(pre[:, :2], 0)
    late.merge(pre[:, 6:8], 2)
    assert late.idx[0].tolist() == [0, 1], "zeros seen later lose their ties whatever their sign"


def test_scaled_ranks_keep_their_values_through_chunks():
    pre, scale = torch.randn(3, 400), torch.rand(400) * 3 + 0.01
    rows = Rows(3, 20)
    for start, end in ((0, 100), (100, 150), (150, 400)):
        rows.merge(pre[:, start:end], start, scale=scale)
        order = torch.sort(pre[:, :end] * scale[:end], dim=1, descending=True, stable=True).indices[:, :20]
        assert torch.equal(rows.idx.cpu(), order.int())
        assert torch.equal(rows.acts.cpu(), pre.gather(1, order))


@pytest.mark.parametrize("k", [1, 4, 8])
def test_the_bound_keeps_all_that_reaches_it(k):
    # One value a group stands out, and two of them are equal: as few values as can be reach the bound.
    pre = torch.full((1, 8 * GROUP), -9.0)
    pre[0, ::GROUP] = torch.tensor([1.0, 5.0, 2.0, 5.0, 3.0, -1.0, 0.0, 4.0])
    rows = Rows(1, k)
    visited = rows.merge(pre, 0, bound=8)
    assert_holds(rows, pre)
    assert visited[0] == int((pre[0, ::GROUP] >= pre[0, ::GROUP].sort(descending=True).values[k - 1]).sum())


def test_the_bound_ignores_a_group_that_ends_past_the_edge():
    # Tiles past the end of W_enc hold zeros, above all of these; four groups are whole and k is four.
    pre = -torch.arange(1.0, 4 * GROUP + 2)[None]
    pre[0, : 4 * GROUP : GROUP] = torch.tensor([-0.5, -0.6, -0.7, -0.8])
    maxima = torch.tensor([[-0.5, -0.6, -0.7, -0.8, 0.0]])
    rows = Rows(1, 4)
    rows.merge(pre, 0, maxima=maxima, bound=8)
    assert_holds(rows, pre)
    assert rows.idx[0].tolist() == [0, 32, 64, 96]


def test_more_survivors_than_a_list_holds_at_once():
    # Ascending: every value beats all before it, the worst there is.
    pre = torch.arange(900.0)[None]
    rows = Rows(1, 40)
    rows.merge(pre[:, :64], 0)
    rows.merge(pre[:, 64:], 64)
    assert_holds(rows, pre)


def test_groups_that_do_not_pass_are_not_read():
    pre = torch.randint(-9, 10, (2, 320)).float()
    rows = Rows(2, 5)
    rows.merge(pre[:, :160], 0)
    tau = rows.tau.cpu().clone()
    visited = rows.merge(pre[:, 160:], 160)
    assert_holds(rows, pre)
    passing = (pre[:, 160:].view(2, -1, GROUP).amax(2) > tau[:, None]).sum(1)
    assert torch.equal(visited, passing)
    assert (visited < 5).any(), "these data separate nothing"


def test_more_groups_than_are_compacted_at_once():
    k = 6
    pre = torch.full((1, 40 + 3 * tuning.merge(32, GROUP).block_g * GROUP), -1.0)
    winners = torch.tensor([3, 70, 8000, 9000, 17_000, 24_000, pre.shape[1] - 1])
    pre[0, winners] = torch.tensor([5.0, 9.0, 4.0, 9.0, 7.0, 8.0, 6.0])
    rows = Rows(1, k)
    rows.merge(pre[:, :40], 0)
    rows.merge(pre[:, 40:], 40)
    assert_holds(rows, pre)
