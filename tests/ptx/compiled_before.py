"""Two faults that kernels once had, which Triton's interpreter lets pass: both are found in the old text."""

import pytest
import torch
import triton
from torch import Tensor

from ptx import before
from ptx.build import DoesNotCompile
from ptx.emulate import Emulation, emulated
from saefast.kernels import tuning


def settle(D: int, norm: int, sm: int) -> tuple[Emulation, Tensor]:
    """lean_settle_rows of three rows that are behind; the weights it leaves."""
    n, blocks = 3, -(-D // 512)
    w, m = torch.randn(n, D).bfloat16(), torch.randint(-127, 128, (n, D), dtype=torch.int8)
    scale, v = (torch.rand(n, blocks) * 1e-3).bfloat16(), torch.rand(n) * 1e-3
    missed = torch.tensor([3.0, 1e-3, 1e-8, 0.5, 0.9])[:, None].expand(5, n).contiguous()
    config = tuning.rows(D, True)
    with emulated(sm) as found:
        before.lean_settle_rows[(n,)](
            None, missed, w, m, scale, v, None, n, D, 7, NORM=norm, WIDTH=-(-D // blocks), BLOCKS=blocks,
            BLOCK_D=config.block_d, num_warps=config.warps, num_stages=1, maxnreg=tuning.ROW_REGISTERS,
        )  # fmt: skip
    return found, w


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("D", [512, 768])
def test_the_race_of_lean_settle_rows(D: int, sm: int) -> None:
    found, _ = settle(D, 0, sm)
    lines = found.faults["lean_settle_rows"]
    assert {line.split()[0] for line in lines} == {"race"}
    # Line by line: v, and the scales.
    assert any("v_ptr" in line for line in lines)
    assert any("scale_ptr" in line for line in lines)


def test_one_warp_has_no_race() -> None:
    assert tuning.rows(256, True).warps == 1
    assert not settle(256, 0, 90)[0].faults


@pytest.mark.parametrize("norm", [0, 2])
def test_races_that_no_order_shows_are_told_apart(norm: int) -> None:
    """The scales are read again only by the threads that write them: a race in form, which changes nothing stored."""
    found, _ = settle(2304, norm, 90)
    assert not found.faults
    assert {fault.kind for fault in found.formal} == {"race"}


@pytest.mark.parametrize("sm", [80, 90])
def test_a_pointer_that_is_none_behind_an_early_return_does_not_compile(sm: int) -> None:
    source, offsets = torch.randn(5, 32), torch.tensor([0, 2, 5], dtype=torch.int32)
    row, coef = torch.arange(5, dtype=torch.int32), torch.ones(5)
    config = tuning.rows(32, True)
    with emulated(sm), pytest.raises(DoesNotCompile, match=r"gradient_squares for sm_\d+ without \['pieces_ptr'"):
        before.gradient_squares[(2,)](
            source, offsets, row, coef, None, None, None, torch.randn(2, 32), torch.zeros(2, 1), 32, PROJECT=True,
            BLOCK_D=config.block_d, UNROLL=config.unroll, num_warps=config.warps, num_stages=1,
        )  # fmt: skip


def test_they_are_the_kernels_that_are_compiled_here() -> None:
    assert isinstance(before.lean_settle_rows, triton.JITFunction)
