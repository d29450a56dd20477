"""The encoder at the first shapes of the design's table: both methods against the product alone, and where time goes.

Each contender takes turns with the product alone in a case of its own, so that one that fails costs no other. On a GPU
everything is timed twice: as a CUDA graph, which leaves out what the host takes to launch, and call by call.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import common
from bench.cases import Case, Settings
from bench.encode_topk import GPU_SHAPES, Problem, Shape
from bench.kernel_times import by_kernel
from saefast.ops import triton_encode_topk

TINY = (Shape(4, 32, 128, 4), Shape(4, 40, 96, 4))
METHODS = ("fused", "chunked")
# Calls that the profiler looks at.
PROFILED = 5


def cases(settings: Settings) -> list[Case]:
    shapes = TINY if settings.rehearse else GPU_SHAPES[:2]
    return [Case(name, run) for shape in shapes for name, run in at(shape, settings)]


def at(shape: Shape, settings: Settings) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    name = "x".join(map(str, shape))
    yield f"product {name}", partial(against_product, shape, settings, None)
    for what in METHODS:
        yield f"encode {what} {name}", partial(against_product, shape, settings, what)
    for what in METHODS:
        yield f"encode {what} by kernel {name}", partial(kernels_of, shape, settings, what)
    yield f"encode dense {name}", partial(against_product, shape, settings, "dense")


def problem_of(shape: Shape, settings: Settings) -> Problem:
    # Triton's interpreter computes on the bit patterns of bfloat16.
    return Problem(shape, torch.float16 if settings.rehearse else torch.bfloat16, settings.device)


def contender(problem: Problem, what: str) -> Callable[[], tuple[Tensor, Tensor]]:
    if what == "dense":
        return problem.dense
    return lambda: triton_encode_topk.encode_topk(problem.x, problem.W, problem.b, problem.shape.k, method=what)


def against_product(shape: Shape, settings: Settings, what: str | None) -> dict[str, Any]:
    """A contender and the product alone in turn; the product by itself where there is no contender."""
    problem, device = problem_of(shape, settings), settings.device
    if what == "dense" and not problem.dense_fits():
        return {"outcome": "skipped", "message": "the (B, L) matrix and its top-k do not fit"}
    calls: dict[str, common.Call] = {"product": problem.product}
    if what is not None:
        calls[what] = contender(problem, what)
    found: dict[str, Any] = {"shape": shape._asdict(), "dtype": str(problem.x.dtype)}
    found |= timed(calls, device, settings.seconds)
    own = found["seconds"][what or "product"]["median"]
    found["TFLOP/s"] = 2 * shape.B * shape.D * shape.L / own / 1e12
    if what is not None:
        found["times the product"] = own / found["seconds"]["product"]["median"]
    if device == "cuda":
        found["peak_bytes"] = common.peak_bytes(calls[what or "product"], device)
    return found


def timed(calls: dict[str, common.Call], device: str, seconds: float) -> dict[str, Any]:
    """Call by call, and on a GPU as graphs too, where a call can be captured."""
    found: dict[str, Any] = {"seconds": fields(common.measure(calls, device, seconds, capture=False))}
    if device == "cuda":
        graphs = {name: common.graphed(call) for name, call in calls.items()}
        captured = {name: call for name, call in graphs.items() if call is not calls[name]}
        found["captured"] = list(captured)
        if captured:
            found["seconds of a graph"] = fields(common.measure(captured, device, seconds, capture=False))
    return found


def fields(spreads: dict[str, common.Spread]) -> dict[str, dict[str, float]]:
    return {name: spread._asdict() for name, spread in spreads.items()}


def kernels_of(shape: Shape, settings: Settings, what: str) -> dict[str, Any]:
    """Device time of each kernel of one call: the tiles, the merge, what torch adds."""
    problem = problem_of(shape, settings)
    call = contender(problem, what)
    repeats = 1 if settings.rehearse else PROFILED
    return {"shape": shape._asdict(), "of a call": by_kernel(call, settings.device, repeats)}
