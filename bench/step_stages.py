"""Where a training step's time goes, by the functions it is made of: those of `saefast.ops` and of the row backend.

Names come from the modules themselves, so a function that a step gains is found here without a change. What a step does
between them counts as "rest".
"""

import sys
from inspect import isfunction
from statistics import median
from types import ModuleType
from typing import Any

from torch import Tensor

from bench.kernel_times import Stages
from saefast.engines.fused import FusedEngine
from saefast.ops import encoder, mixed
from saefast.optim import reference as rows
from saefast.optim.dispatch import row_ops


def encode_label(name: str, *args: Any, **options: Any) -> str:
    return f"{name} of the dead" if options.get("latents") is not None else name


def row_functions(backend: ModuleType) -> list[str]:
    """The row operations that a backend has: what `saefast.optim.reference` declares, which every backend follows."""
    return [name for name in rows.__all__ if isfunction(getattr(backend, name, None))]


def by_stage(engine: FusedEngine, data: list[Tensor], device: str, steps: int, prepare: Any = None) -> dict[str, float]:
    """Median milliseconds of each stage over `steps` steps, "rest" and "whole step" last.

    Stages are told apart by stamps in the stream; the host waits for the device only between steps.
    """
    backend, stages = row_ops(engine.weights.enc.w), Stages(device)
    stages.watch(mixed, ["encode_topk_mixed"], encode_label)
    stages.watch(encoder, ["encode_topk", "encode_batch_topk", "encode_group_max"], encode_label)
    # The choice over a batch encodes row by row: what is left under its own name is the choice.
    stages.watch(sys.modules["saefast.ops.encode_batch_topk"], ["encode_topk", "encode_topk_mixed"], encode_label)
    stages.watch(backend, row_functions(backend))
    found: list[dict[str, float]] = []
    try:
        for number in range(steps):
            if prepare is not None:
                prepare()
            stages.take()
            with stages.stage("rest"):
                engine.step(data[number % len(data)])
            found.append(stages.take())
    finally:
        stages.close()
    names = dict.fromkeys(name for one in found for name in one)
    whole = median(sum(one.values()) for one in found)
    table = {name: median(one.get(name, 0.0) for one in found) for name in names if name != "rest"}
    return dict(sorted(table.items(), key=lambda item: -item[1])) | {
        "rest": median(one["rest"] for one in found),
        "whole step": whole,
    }


def settle_ms(engine: FusedEngine, data: list[Tensor], device: str) -> float:
    """What settling W_enc adds to a step, spread over the steps between two: medians do not see every fourth step."""
    backend, stages = row_ops(engine.weights.enc.w), Stages(device)
    while (engine.step_count + 1) % engine.settle_every:
        engine.step(data[engine.step_count % len(data)])
    stages.watch(
        backend, ["catch_up"], lambda name, matrix, *_, **__: "settle" if matrix is engine.weights.enc else name
    )
    try:
        engine.step(data[0])
    finally:
        stages.close()
    return stages.take()["settle"] / engine.settle_every
