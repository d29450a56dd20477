"""Every kernel at row numbers beyond 32 bits of addresses: the same results, and nothing touched but the far rows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from ptx.emulate import Emulation, Watched, emulated, run
from ptx.far import MOVES, OTHERWISE, ROWS, moved
from ptx.record import launched_kernels
from ptx.scenes import decoding, decoding_csr, encoding, selecting, soon, training, updating_along


def test_every_kernel_can_be_moved() -> None:
    assert set(launched_kernels()) == set(MOVES)


def same(name: str, near: Any, far: Any, raised: dict[str, int]) -> bool:
    if name in raised:
        near = near + raised[name] * (near >= 0)
    return bool(torch.equal(near.nan_to_num(), far.nan_to_num()))


class Mover:
    """Moves each kernel's first launches, by what is None and constant in them."""

    def __init__(self) -> None:
        self.seen: set[Any] = set()
        self.kernels: set[str] = set()

    def __call__(self, launch: Watched) -> None:
        name, constants = launch.call.kernel, launch.binary.parameters
        key = name, constants, str(sorted(launch.call.options.items()))
        if key in self.seen or launch.grid[0] > 400:
            return
        self.seen.add(key)
        self.kernels.add(name)
        far = moved(name, launch.before, launch.grid[0])
        result = run(launch.binary, far.given, (far.grid,), shifts=far.shifts, first=far.first)
        assert not result.faults, (name, result.faults.lines())
        for argument, near in launch.given.items():
            if isinstance(near, torch.Tensor) and argument not in OTHERWISE.get(name, ()):
                assert same(argument, near, far.given[argument], far.raised), (name, argument)


SCENES: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "fused encode": (
        lambda: encoding(torch.bfloat16, "fused"),
        {"tiles_descriptor", "tiles_pointer", "merge_topk", "fill_csr", "spmm", "sddmm"},
    ),
    "chunked encode": (lambda: encoding(torch.float32, "chunked"), {"tiles_library", "merge_topk", "fill_csr"}),
    "clipped": (
        training("hot"),
        {"decode_loss", "gradient_rows", "row_update", "settle_rows", "piece_sums"},
    ),
    "selection": (selecting, {"count_from"}),
    "many entries a row": (decoding, {"decode_loss"}),
    "rows of any length": (decoding_csr, {"decode_loss_csr", "fill_entries", "sum_groups"}),
    "several prefixes": (training("several prefixes"), {"decode_loss", "row_update", "settle_rows"}),
    "along": (updating_along, {"gradient_rows", "row_update", "piece_sums"}),
    "lean, along": (lambda: updating_along(lean=True), {"gradient_rows", "lean_row_update", "piece_sums"}),
    "lean": (training("lean"), {"decode_loss", "lean_row_update", "lean_settle_rows", "piece_sums"}),
}


@pytest.mark.parametrize("scene", SCENES)
def test_far_rows(scene: str) -> None:
    launches, expected = SCENES[scene]
    mover = Mover()
    with soon(), emulated(90, mover) as found:
        launches()
    assert not found.faults, found.faults
    assert mover.kernels >= expected


@triton.jit
def narrow(idx_ptr, x_ptr, out_ptr, D, BLOCK_D: tl.constexpr):
    """What must not be done: a row's address in 32 bits."""
    r, offs_d = tl.load(idx_ptr + tl.program_id(0)), tl.arange(0, BLOCK_D)
    row = tl.load(x_ptr + r * D + offs_d, mask=offs_d < D, other=0.0)
    tl.store(out_ptr + tl.program_id(0) * D + offs_d, row, mask=offs_d < D)


def test_a_product_of_32_bits_is_found() -> None:
    def watch(launch: Watched) -> None:
        launch.before["idx_ptr"] += ROWS
        result = run(launch.binary, launch.before, launch.grid, shifts={"x_ptr": ROWS * 48})
        assert result.faults.kinds == {"bounds"}
        checked.append(launch)

    checked: list[Watched] = []
    with emulated(90, watch) as found:
        narrow[(2,)](torch.tensor([0, 2], dtype=torch.int32), torch.randn(3, 48), torch.zeros(2, 48), 48, BLOCK_D=64)
    assert isinstance(found, Emulation)
    assert not found.faults
    assert checked
