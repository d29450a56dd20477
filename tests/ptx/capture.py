"""Keeps what Triton's interpreter was given and what it left: a pytest plugin for processes that interpret.

    SAEFAST_PTX_LAUNCHES=FOLDER TRITON_INTERPRET=1 python -m pytest -p ptx.capture tests/test_row_update.py

Of each kernel, and each way it is specialised, the first few launches that are small enough to run as PTX.
"""

import os
import pickle
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import GridExecutor
from triton.tools.tensor_descriptor import TensorDescriptor

from ptx.call import Argument, Call, bound, call_of
from ptx.storage import bytes_of

KEEP, MOST_PROGRAMS, MOST_BYTES = 3, 24, 1 << 22


@dataclass
class Held:
    """An argument without its memory."""

    storage: int
    """Which memory; -1: it is a value."""
    offset: int = 0
    """Elements."""
    dtype: Any = None
    value: Any = None
    """Of an argument that is no tensor; of a descriptor, its shape, strides and box."""


@dataclass
class Launch:
    call: Call
    grid: tuple[int, ...]
    held: dict[str, Held]
    before: dict[int, np.ndarray]
    """Bytes, by memory."""
    after: dict[int, np.ndarray]


def key_of(call: Call) -> str:
    """What the compiler distinguishes, and the launcher of what it may: integers by 1, multiples of 16, others."""

    def reduced(a: Argument) -> Any:
        return (a.kind, a.value == 1, a.value % 16 == 0) if a.kind == "integer" else (a.kind, a.type, a.aligned)

    constants = [(n, a.value) for n, a in call.arguments.items() if a.kind == "constant"]
    return str((call.kernel, [reduced(a) for a in call.arguments.values()], constants, sorted(call.options.items())))


def tensors_in(given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors by name, a descriptor's matrix among them."""
    found = {n: v.base if isinstance(v, TensorDescriptor) else v for n, v in given.items()}
    return {n: v for n, v in found.items() if isinstance(v, torch.Tensor)}


def held(value: Any) -> Held:
    tensor = value.base if isinstance(value, TensorDescriptor) else value
    if not isinstance(tensor, torch.Tensor):
        return Held(-1, value=getattr(value, "value", value))
    shape = None
    if isinstance(value, TensorDescriptor):
        shape = list(value.shape), list(value.strides), list(value.block_shape)
    return Held(tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.dtype, shape)


class Recorder:
    """Args: folder, where launches are written."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, Counter[str]()

    def wants(self, call: Call, grid: tuple[int, ...], tensors: dict[str, torch.Tensor]) -> bool:
        size = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}.values())
        key = key_of(call)
        if not 0 < prod(grid) <= MOST_PROGRAMS or size > MOST_BYTES or self.seen[key] >= KEEP:
            return False
        self.seen[key] += 1
        return True

    def __call__(self, run: Any, executor: GridExecutor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = bound(executor.fn, args, kwargs)
        grid = tuple(executor.grid(given) if callable(executor.grid) else executor.grid)
        call = call_of(executor.fn, set(executor.constexprs), given, kwargs)
        tensors = tensors_in(given)
        if not self.wants(call, grid, tensors):
            run(executor, *args, **kwargs)
            return
        before = {t.untyped_storage().data_ptr(): bytes_of(t).copy() for t in tensors.values()}
        run(executor, *args, **kwargs)
        after = {t.untyped_storage().data_ptr(): bytes_of(t).copy() for t in tensors.values()}
        launch = Launch(call, grid, {n: held(v) for n, v in given.items()}, before, after)
        file = self.folder / f"{call.kernel}-{os.getpid()}-{sum(self.seen.values())}.pickle"
        file.write_bytes(pickle.dumps(launch))


def recording(patch: pytest.MonkeyPatch, recorder: Any) -> None:
    """Every launch goes through recorder(run, executor, args, kwargs)."""
    run = GridExecutor.__call__
    patch.setattr(GridExecutor, "__call__", lambda self, *args, **kwargs: recorder(run, self, args, kwargs))


def pytest_configure() -> None:
    folder = os.environ.get("SAEFAST_PTX_LAUNCHES")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        recording(pytest.MonkeyPatch(), Recorder(Path(folder)))
