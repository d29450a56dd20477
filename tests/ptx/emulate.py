"""saefast's GPU drivers on CPU tensors, their kernels compiled for a GPU and run as PTX.

Inside `emulated(90)` every `kernel[grid](...)` is compiled for sm_90 with what the launcher would derive from its
arguments, and run by the machine on the tensors' own bytes; drivers take CPU tensors for a device's, so bf16 stays bf16
and settings are the architecture's. In processes without TRITON_INTERPRET alone.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton import JITFunction

from ptx.build import Binary, compiled
from ptx.call import Call, bound, call_of
from ptx.faults import Fault
from ptx.launch import Result, execute, judged
from ptx.machine import Schedule
from ptx.memory import Memory
from ptx.poison import Poison
from ptx.storage import bytes_of
from ptx.tma import TensorMap


@dataclass
class Emulation:
    sm: int
    launches: int = 0
    steps: int = 0
    faults: dict[str, list[str]] = field(default_factory=dict)
    """By kernel, as lines."""
    formal: set[Fault] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)
    watch: Callable[["Watched"], None] | None = None
    """Called after each launch."""

    def launch(self, kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any) -> None:
        given = bound(kernel.fn, args, kwargs)
        constexprs = {p.name for p in kernel.params if p.is_constexpr}
        call = call_of(kernel.fn, constexprs, given, kwargs)
        grid, binary = grid(given) if callable(grid) else grid, compiled(call, self.sm)
        before = copied(given) if self.watch else {}
        result = run(binary, given, grid)
        if self.watch:
            self.watch(Watched(call, binary, before, given, grid, result))
        self.calls.append(call)
        self.launches += 1
        self.steps += result.steps
        self.formal.update(result.formal)
        if result.faults:
            self.faults.setdefault(call.kernel, []).extend(result.faults.lines())


@dataclass
class Watched:
    """A launch that is over."""

    call: Call
    binary: Binary
    before: dict[str, Any]
    """Its arguments as they were."""
    given: dict[str, Any]
    grid: tuple[int, ...]
    result: Result


def copied(given: dict[str, Any]) -> dict[str, Any]:
    """Tensors that share memory do so in the copy."""
    return copy.deepcopy(given, {})


def run(
    binary: Binary,
    given: dict[str, Any],
    grid: tuple[int, ...],
    *,
    shifts: Mapping[str, int] = {},
    first: int = 0,
    programs: int | None = None,
    schedule: Schedule = None,
    judge: bool = True,
) -> Result:
    """Runs a launch on its tensors' bytes.

    Args:
        shifts: elements that a pointer lies before its tensor's start, for addresses far away.
        first: number of the first program, of a grid with one axis.
        programs: how many of them run, on one axis; None: all.
        schedule: one order of threads; None: all together, and others where there are races if they are judged.
    """
    memory, at, storages = Memory(), {}, {}
    for name, value in given.items():
        for tensor in [t for t in (value, getattr(value, "base", None)) if isinstance(t, Tensor)]:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in at:
                storages[storage.data_ptr()] = bytes_of(tensor)
                at[storage.data_ptr()] = memory.add(storages[storage.data_ptr()], name)

    def address(tensor: Tensor) -> int:
        return at[tensor.untyped_storage().data_ptr()] + tensor.storage_offset() * tensor.element_size()

    arguments = []
    for name in binary.parameters:
        far = shifts.get(name, 0)
        arguments += words_of(given[name], binary.types[name], lambda t, far=far: address(t) - far * t.element_size())
    whole = not first and programs is None
    blocks = None if whole else [(first + n, 0, 0) for n in range(min(grid[0], programs or grid[0]))]
    sizes = (grid[0] + first, *grid[1:])
    poison = Poison(binary.unfilled) if binary.unfilled else None
    launch = dict(grid=sizes, warps=binary.warps, shared=binary.shared, blocks=blocks, poison=poison)
    if schedule is None and judge:
        result = judged(binary.program, memory, arguments, **launch)
    else:
        result = execute(binary.program, memory, arguments, schedule=schedule, **launch)
    for storage, raw in storages.items():
        np.copyto(raw, memory.take(at[storage], raw))
    return result


def words_of(value: Any, kind: str, address: Any) -> list[Any]:
    """What one argument puts into the parameters."""
    if isinstance(value, Tensor):
        return [address(value)]
    if kind.startswith("tensordesc"):
        (rows, columns), stride = value.shape, value.strides[0]
        element = value.base.element_size()
        map_ = TensorMap(address(value.base), rows, columns, element, tuple(value.block_shape), stride)
        return [map_, rows, columns, stride, 1]
    return [float(value)] if kind == "fp32" else [int(value)]


@contextmanager
def emulated(sm: int, watch: Callable[[Watched], None] | None = None) -> Iterator[Emulation]:
    found = Emulation(sm, watch=watch)

    def run_kernel(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.launch(self, args, kwargs, grid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", run_kernel)
        as_on_a_gpu(patch, sm)
        yield found


def as_on_a_gpu(patch: pytest.MonkeyPatch, sm: int, rows_backend: Any = None) -> None:
    """saefast takes CPU tensors of fp32 and 2-byte types for those of a GPU of architecture sm.

    Args:
        rows_backend: what serves row operations; None: the GPU's driver.
    """
    from saefast.ops import backends, mixed, triton_launch
    from saefast.optim import triton as rows_triton
    from saefast.optim.dispatch import row_ops

    plain_rows, plain_backend = row_ops, backends.backend

    replaced = {
        triton_launch.check_device: lambda x: None,
        triton_launch.readable: lambda t: t,
        triton_launch.written: lambda dtype, W: dtype,
        triton_launch.architecture: lambda device: sm,
        row_ops: lambda w: (rows_backend or rows_triton) if w.dtype in backends.NATIVE else plain_rows(w),
    }
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and module.__name__.startswith("saefast."):
            for name, value in list(vars(module).items()):
                if callable(value) and (other := _lookup(replaced, value)) is not None:
                    patch.setattr(module, name, other)
    # Candidates by bf16 products, as on every GPU, and not by the CPU's own.
    patch.setattr(mixed, "pays_off", lambda W: W.dtype == torch.float32)
    patch.setattr(
        backends, "backend", lambda x, served=backends.NATIVE: "triton" if x.dtype in served else plain_backend(x)
    )


def _lookup(table: dict[Any, Any], value: Any) -> Any:
    try:
        return table.get(value)
    except TypeError:  # not hashable
        return None
