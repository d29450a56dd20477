"""Every kernel at row numbers beyond 32 bits of addresses: the same results, and nothing touched but the far rows."""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from ptx.compiled_training import batches, trained
from ptx.emulate import Emulation, Watched, emulated, run
from ptx.far import MOVES, OTHERWISE, ROWS, moved
from saefast import kernels, triton_encode, triton_ops
from saefast.kernels import tuning


def launched_kernels() -> Iterator[str]:
    """Kernels that a launch may name: those that no other kernel of their module calls."""
    for module in pkgutil.iter_modules(kernels.__path__):
        names = vars(importlib.import_module(f"saefast.kernels.{module.name}"))
        functions = {n: f for n, f in names.items() if isinstance(f, triton.JITFunction)}
        called = {name for f in functions.values() for name in f.fn.__code__.co_names}
        yield from (n for n in functions if n not in called)


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
        result = run(launch.binary, far.given, (far.grid,), far.shifts, far.first)
        assert not result.faults, (name, result.faults.lines())
        for argument, near in launch.given.items():
            if isinstance(near, torch.Tensor) and argument not in OTHERWISE.get(name, ()):
                assert same(argument, near, far.given[argument], far.raised), (name, argument)


def encodes(dtype: torch.dtype, method: str) -> None:
    """Top-k in several chunks, of a list and with scales, thresholds, and the sparse products behind an encode."""
    x, W, b = torch.randn(6, 48).to(dtype), torch.randn(300, 48).to(dtype), torch.randn(300)
    scale, latents = torch.rand(300), torch.randperm(300)[:100].sort().values.int()
    triton_encode.encode_topk(x, W, b, 8, scale=scale, chunk=96, method=method)
    triton_encode.encode_topk(x, W, b, 8, latents=latents, method=method)
    triton_encode.threshold_encode(x, W, b, torch.full((300,), 9.0), method=method)
    acts, idx = triton_encode.encode_topk(x, W, b, 8, method=method)
    triton_ops.spmm(acts, idx, W)
    triton_ops.sddmm(x, idx, W)
    triton_ops.spmm_t(acts, idx, x, 300)


def several_steps(recipe: str) -> Callable[[], Any]:
    return lambda: trained(recipe, batches())


SCENES: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "fused encode": (
        lambda: encodes(torch.bfloat16, "fused"),
        {"tiles_descriptor", "tiles_pointer", "merge_topk", "fill_csr", "spmm", "sddmm"},
    ),
    "chunked encode": (lambda: encodes(torch.float32, "chunked"), {"tiles_library", "merge_topk", "fill_csr"}),
    "clipped": (
        several_steps("hot"),
        {"decode_loss", "gradient_squares", "row_update", "settle_rows", "piece_sums"},
    ),
    "several prefixes": (several_steps("several prefixes"), {"decode_loss", "row_update", "settle_rows"}),
    "lean": (several_steps("lean"), {"decode_loss", "lean_row_update", "lean_settle_rows", "piece_sums"}),
}


@pytest.mark.parametrize("scene", SCENES)
def test_far_rows(scene: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches, expected = SCENES[scene]
    monkeypatch.setattr(tuning, "CUT", 12)
    mover = Mover()
    with emulated(90, mover) as found:
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
        result = run(launch.binary, launch.before, launch.grid, {"x_ptr": ROWS * 48})
        assert result.faults.kinds == {"bounds"}
        checked.append(launch)

    checked: list[Watched] = []
    with emulated(90, watch) as found:
        narrow[(2,)](torch.tensor([0, 2], dtype=torch.int32), torch.randn(3, 48), torch.zeros(2, 48), 48, BLOCK_D=64)
    assert isinstance(found, Emulation)
    assert not found.faults
    assert checked
