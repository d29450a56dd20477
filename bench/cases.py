"""The cases of a measuring stage, run one after another, each with its line."""

import gc
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from bench import lines


class Case(NamedTuple):
    name: str
    run: Callable[[], dict[str, Any]]
    """The fields of its line; "outcome" among them where it is not "ok"."""


@dataclass(frozen=True)
class Settings:
    device: str
    rehearse: bool
    """Tiny sizes, Triton's interpreter."""
    small: bool
    """Small sizes on a real device, for tools that slow it down a hundredfold."""
    seconds: float
    """How long a case measures."""


def run_cases(cases: Sequence[Case], device: str) -> None:
    """Runs those not begun before. A case that loses the CUDA context ends the process."""
    done = set(lines.begun())
    for case in cases:
        if case.name in done:
            continue
        lines.begin(case.name)
        try:
            fields = case.run()
            outcome = fields.pop("outcome", "ok")
            lines.record(case.name, outcome, **fields)
        except (Exception, SystemExit) as error:
            outcome = "failed"
            lines.record_failure(case.name, error)
            if context_lost(device):
                sys.stdout.flush()
                os._exit(lines.LOST)
        print(f"{case.name}: {outcome}", flush=True)
        gc.collect()
        if device == "cuda":
            torch().cuda.empty_cache()


def context_lost(device: str) -> bool:
    """Whether the device answers every call with the error of an earlier one."""
    if device != "cuda":
        return False
    try:
        torch().cuda.synchronize()
    except RuntimeError:
        return True
    return False


def torch() -> Any:
    """Imports torch only where there is a device to ask: some cases need none."""
    return importlib.import_module("torch")
