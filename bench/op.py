"""What the benchmarks of single ops and kernels share: contenders on one problem, in turn, at a few shapes and dtypes.

A module bench/x.py states the problem of op x as a function that returns a Contest, and `run` is the rest of its main.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from bench import common


class Shape(NamedTuple):
    B: int
    D: int
    L: int
    k: int


class Contest(NamedTuple):
    """calls: by name, saefast's first. The last is what the others are compared with.
    moved: bytes that have to be read and written once. flops: of the products, where those take the time."""

    calls: dict[str, common.Call]
    moved: float
    flops: float = 0.0


State = Callable[[Shape, torch.dtype, str], Contest]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GPU_SHAPES = (Shape(8192, 768, 32768, 32), Shape(8192, 4096, 131072, 64), Shape(8192, 4096, 1 << 20, 64))
CPU_SHAPES = (Shape(1024, 768, 32768, 32), Shape(1024, 2304, 16384, 64))
# Of kernels that work on a chunk of columns.
CHUNKS = (Shape(8192, 768, 16384, 32), Shape(8192, 4096, 8192, 64))
TINY = (Shape(16, 24, 128, 4),)


def compare(state: State, shape: Shape, dtype: str, device: str, budget: float) -> dict[str, Any]:
    calls, moved, flops = state(shape, DTYPES[dtype], device)
    taken = common.measure(calls, device, budget)
    rows = []
    for name, spread in taken.items():
        peak = common.peak_bytes(calls[name], device) if device == "cuda" else None
        operands = common.kind(DTYPES[dtype])
        rows.append(common.timed_row(name, spread, device, operands=operands, flops=flops, moved=moved, peak=peak))
    first, *_, last = taken
    ratio = taken[first].median / taken[last].median
    return {"shape": shape._asdict(), "dtype": dtype, "rows": rows, f"{first} / {last}": ratio}


def run(
    name: str,
    about: str | None,
    state: State,
    argv: Sequence[str] | None,
    *,
    shapes: Sequence[Shape] | None = None,
    dtypes: Sequence[str] = tuple(DTYPES),
    gpu_only: bool = False,
) -> int:
    """The main of bench/<name>.py; 1 where a case failed.

    Args:
        shapes: on a GPU; None: GPU_SHAPES.
        gpu_only: a kernel whose work no other backend has by itself.
    """
    options = common.arguments(f"bench.{name}", about, argv)
    if gpu_only and options.device == "cpu" and not options.rehearse:
        raise SystemExit(f"{name} is a kernel of GPUs alone: --device cuda, or --rehearse with TRITON_INTERPRET=1")
    if not options.no_check:
        common.check(options.device, f"test_{name}.py")
    chosen = TINY if options.rehearse else (shapes or GPU_SHAPES) if options.device == "cuda" else CPU_SHAPES
    budget = 0.1 if options.rehearse else 2.0 if options.quick else 10.0
    results = []
    for shape in chosen[: 1 if options.quick else None]:
        for dtype in dtypes:
            case = f"{tuple(shape)} {dtype}"
            result = common.attempt(case, lambda s=shape, t=dtype: compare(state, s, t, options.device, budget))
            results.append(result)
            if result:
                print(f"\n{result['shape']} {dtype}")
                common.print_timed(result["rows"])
                print("\n".join(f"    {what} = {ratio:.3f}" for what, ratio in result.items() if " / " in what))
    common.write_results(options.out, options.device, name, [r for r in results if r])
    return int(None in results)


def once(benchmark: Any, state: State, what: str, dtype: str) -> None:
    """A pytest-benchmark case: one contender at the first shape of the device at hand."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    call = state((GPU_SHAPES if device == "cuda" else CPU_SHAPES)[0], DTYPES[dtype], device).calls[what]

    def waited() -> None:
        call()
        common.synchronize(device)

    waited()
    benchmark.pedantic(waited, rounds=3)
