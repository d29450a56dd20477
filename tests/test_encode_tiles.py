"""encode_tiles alone, in each of its forms: what it says about a group, which values it stores, which form is taken.

Integer values make every sum exact, so the reference must be met to the bit.
"""

import math
from functools import partial

import interp
import numpy as np
import pytest
import torch
import triton.language as tl
from tile_forms import FORMS, force, integers, misaligned, sliced

from saefast.kernels import encode_tiles
from saefast.ops import reference
from saefast.ops import triton_encode_tiles as tiles

interp.speed_up()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning", "ignore:invalid value")
B, D, L = 5, 24, 600
UNTOUCHED = -7e7


@pytest.fixture
def use_form(monkeypatch, device):
    return partial(force, monkeypatch, device)


class Chunk:
    """Columns start .. start + n of an encoder, through one form of the kernel."""

    def __init__(self, method, device, *, start=0, n=L, scale=None, theta=None):
        self.x, self.W, self.b = integers(B, D), integers(L, D, low=-2, high=3), integers(L, dtype=torch.float32)
        moved = [None if t is None else t.to(device) for t in (self.x, self.W, self.b, scale, theta)]
        self.enc = tiles.make_encoder(*moved[:3], None, moved[3], method, "ieee")
        self.enc = tiles.replace(self.enc, theta=moved[4])
        self.on, self.start, self.n, self.group = moved, start, n, self.enc.group
        self.stride = -(-n // self.group) * self.group
        self.pre = reference.pre_activations(self.x, self.W, self.b)[:, start : start + n]

    def run(self, tau=None):
        """-> (B, groups) numbers, (B, groups, group) values, UNTOUCHED where none was stored."""
        x, numbers = self.on[0], torch.int32 if self.enc.theta is not None else torch.float32
        scratch = torch.full((B * self.stride,), UNTOUCHED, device=x.device)
        groups = torch.full((B * self.stride // self.group,), -5, dtype=numbers, device=x.device)
        tau = None if tau is None else tau.to(x.device)
        # Library products of other widths than the chunk's.
        tiles.run_tiles(self.enc, x, self.start, self.n, tau, groups, scratch, product=96)
        return groups.view(B, -1).cpu(), scratch.view(B, -1, self.group).cpu()

    def assert_stored(self, values, passed, method):
        """Values of exactly the groups that pass; a library's product stands in scratch already."""
        if method == "fused":
            assert torch.equal((values != UNTOUCHED).any(2), passed)
        inside = passed.repeat_interleave(self.group, 1)[:, : self.n]
        assert torch.equal(values.view(B, -1)[:, : self.n][inside], self.pre[inside])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("start", "n"), [(0, L), (32, 256), (160, L - 160)])
def test_maxima_of_all_groups_and_values_of_those_that_pass(start, n, scaled, form, use_form, device):
    method = use_form(form)
    scale = torch.pow(2.0, integers(L, low=-2, high=3, dtype=torch.float32)) if scaled else None
    chunk = Chunk(method, device, start=start, n=n, scale=scale)
    factor = None if scale is None else scale[start : start + n]
    ranks = chunk.pre if factor is None else chunk.pre * factor
    tau = ranks.topk(8).values[:, -1].clone()
    tau[1], tau[2] = math.nan, math.inf  # none yet, and one that nothing passes
    best, passed = reference.encode_tiles(chunk.pre, tau, chunk.group, scale=factor)
    assert 0 < int(passed[0].sum()) < passed.shape[1], "this threshold separates nothing"
    found, values = chunk.run(tau)
    # The last group's number may be of columns past the edge, where it is not whole.
    whole = n // chunk.group
    assert torch.equal(found[:, :whole], best[:, :whole])
    assert (found >= best).all()
    chunk.assert_stored(values, ~(found <= tau[:, None]), method)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("each", [False, True], ids=["one threshold", "one a latent"])
def test_counts_of_what_beats_its_threshold(each, form, use_form, device):
    method = use_form(form)
    theta = integers(L if each else 1, low=26, high=34, dtype=torch.float32)
    chunk = Chunk(method, device, start=160, n=L - 160, theta=theta)
    counts, passed = reference.encode_tiles(chunk.pre, theta.expand(L)[160:], chunk.group, count=True)
    assert 0 < int(passed.sum()) < passed.numel(), "these thresholds separate nothing"
    found, values = chunk.run()
    assert torch.equal(found, counts)
    chunk.assert_stored(values, passed, method)


def test_the_reference_says_what_the_definition_says():
    pre = torch.tensor([[1.0, 5.0, -2.0, math.nan, 0.0], [1.0, 2.0, 3.0, 4.0, 9.0]])
    best, passed = reference.encode_tiles(pre, torch.tensor([1e9, 4.0]), 2)
    torch.testing.assert_close(best, torch.tensor([[5.0, math.nan, 0.0], [2.0, 4.0, 9.0]]), equal_nan=True)
    assert passed.tolist() == [[False, True, False], [False, False, True]]
    counts, some = reference.encode_tiles(pre, torch.tensor([0.0, 4.0, 0.0, 0.0, 0.0]), 2, count=True)
    assert counts.tolist() == [[2, 1, 0], [1, 2, 1]]
    assert torch.equal(some, counts > 0)


@pytest.mark.parametrize(
    ("make", "shape", "dtype", "described"),
    [
        (torch.Tensor.clone, (40, 24), torch.float16, True),
        (sliced, (1, 24), torch.float16, True),
        (misaligned, (40, 24), torch.float16, False),
        (torch.Tensor.clone, (40, 25), torch.float16, False),
        (torch.Tensor.clone, (40, 12), torch.float32, True),
        (torch.Tensor.clone, (40, 13), torch.float32, False),
    ],
)
def test_descriptors_take_what_they_can_address(make, shape, dtype, described, use_form, device):
    use_form("descriptor")
    W, precision = make(torch.zeros(shape, dtype=dtype, device=device)), "tf32" if dtype == torch.float32 else "ieee"
    x = torch.zeros(2, shape[1], dtype=dtype, device=device)
    enc = tiles.make_encoder(x, W, None, None, None, "fused", precision)
    assert enc.described == described
    assert (enc.tiles().per_sm > 0) == described, "the pointer form has settings of its own"


def test_operands_that_cannot_be_loaded_wide_take_the_library():
    for D, base, expected in ((768, 0, "fused"), (1000, 0, "fused"), (1001, 0, "chunked"), (768, 1, "chunked")):
        W = torch.empty(base + 8 * D, dtype=torch.float16)[base:].view(8, D)
        for arch in (80, 90):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tiles, "architecture", lambda _, arch=arch: arch)
                enc = tiles.make_encoder(torch.zeros(1, D).half(), W, None, None, None, "auto", "ieee")
                # Without descriptors the compiler wants to see rows of a multiple of 16 elements.
                assert enc.method == ("chunked" if arch == 80 and D == 1000 else expected), (arch, D)


@pytest.mark.skipif(not interp.INTERPRETED, reason="compares two ways to interpret")
def test_quick_reductions_are_the_interpreters_own():
    from triton.runtime.interpreter import ReduceOps, TensorHandle

    floats = np.array([[1, 2, np.nan, 4], [4, -np.inf, 3, np.inf]], np.float32)
    ints = np.array([[1, 7, -3, 2**40], [4, 4, 9, -1]], np.int64)
    for data, dtype, combine in (
        (floats, tl.float32, encode_tiles.nan_max),
        (ints, tl.int64, tl.standard._xor_combine),
    ):
        tensor = tl.core.tensor(TensorHandle(data, dtype), tl.block_type(dtype, [2, 4]))
        reduction = ReduceOps(1, combine, False)
        quick = reduction.generic_reduce((tensor,))[0].handle.data
        with interp.language_patched():
            slow = reduction.slow_reduce((tensor,))[0].handle.data
        assert np.array_equal(quick, slow, equal_nan=data is floats)
