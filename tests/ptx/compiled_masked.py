"""Loads that leave lanes out without `other`: the compiler says which, and what they give is followed to memory."""

import pytest
import torch
import triton
import triton.language as tl

from ptx.emulate import emulated


@triton.jit
def careless(x_ptr, out_ptr, n, SUM: tl.constexpr, BLOCK: tl.constexpr):
    """A row's sum, or the row: the second does not need what the mask left out."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    if SUM:
        tl.store(out_ptr, tl.sum(x, 0))
    else:
        tl.store(out_ptr + offs, x, mask=offs < n)


@triton.jit
def careful(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + offs, mask=offs < n, other=0.0), 0))


@pytest.mark.parametrize(("sum_", "expected"), [(True, True), (False, False)])
def test_what_depends_on_a_lane_left_out(sum_: bool, expected: bool) -> None:
    with emulated(90) as found:
        careless[(1,)](torch.randn(100), torch.zeros(128), 100, SUM=sum_, BLOCK=128)
    kinds = {line.split()[0] for lines in found.faults.values() for line in lines}
    assert kinds == ({"masked"} if expected else set())


def test_other_is_enough() -> None:
    with emulated(90) as found:
        careful[(1,)](torch.randn(100), torch.zeros(1), 100, BLOCK=128)
    assert not found.faults
