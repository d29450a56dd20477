"""Runs captured launches as PTX and compares them with what Triton's interpreter left."""

import pickle
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ptx.build import Binary, DoesNotCompile, compiled
from ptx.capture import Held, Launch
from ptx.compare import Gap, gap
from ptx.emulate import run
from ptx.parse import Unsupported
from ptx.storage import tensor_over


@dataclass
class Outcome:
    kernel: str
    sm: int
    file: str = ""
    steps: int = 0
    seconds: float = 0
    unsupported: str = ""
    does_not_compile: str = ""
    faults: list[str] = field(default_factory=list)
    formal: int = 0
    gaps: dict[str, Gap] = field(default_factory=dict)
    """Buffers that differ, by name."""

    @property
    def problem(self) -> str:
        """Why it fails, or nothing."""
        far = [f"{name} differs by {g.share:.2g} of what is allowed" for name, g in self.gaps.items() if g.share > 1]
        return "; ".join(filter(None, [self.does_not_compile, self.unsupported, *self.faults, *far]))


def load(file: Path) -> Launch:
    found: Launch = pickle.loads(file.read_bytes())
    return found


def given(launch: Launch) -> tuple[dict[str, Any], dict[int, Any]]:
    """The arguments, on copies of the memory that stood before."""
    memory = {storage: raw.copy() for storage, raw in launch.before.items()}

    def argument(h: Held) -> Any:
        if h.storage == -1:
            return h.value
        if h.value is None:
            return tensor_over(memory[h.storage], h.dtype, h.offset, [0], [1])
        shape, strides, box = h.value
        return TensorDescriptor(tensor_over(memory[h.storage], h.dtype, h.offset, shape, strides), shape, strides, box)

    return {name: argument(h) for name, h in launch.held.items()}, memory


def replay(launch: Launch, sm: int, binary: Binary | None = None) -> Outcome:
    outcome, start = Outcome(launch.call.kernel, sm), time.perf_counter()
    arguments, memory = given(launch)
    try:
        result = run(binary or compiled(launch.call, sm), arguments, launch.grid)
    except DoesNotCompile as error:
        outcome.does_not_compile = str(error)
    except Unsupported as error:
        outcome.unsupported = f"not modelled: {error}"
    else:
        outcome.steps, outcome.faults, outcome.formal = result.steps, result.faults.lines(), len(result.formal)
        outcome.gaps = gaps(launch, memory, result.rounds)
    outcome.seconds = time.perf_counter() - start
    return outcome


def gaps(launch: Launch, memory: dict[int, Any], rounds: int) -> dict[str, Gap]:
    found = {}
    for storage, want in launch.after.items():
        name, h = next((n, h) for n, h in launch.held.items() if h.storage == storage)
        one = gap(memory[storage], want, launch.before[storage], h.dtype or torch.uint8, rounds)
        if one.differing:
            found[name] = one
    return found
