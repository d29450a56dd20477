"""Peak memory of whole training steps against what `saefast plan` says, and against dense PyTorch and the peers.

    python -m bench.memory [--device cpu|cuda] [--out DIR] [--quick] [--no-check] [--no-peers]

Every figure comes from a process of its own (bench/step_child.py): what it grew by since before the model was made.
"""

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from bench import common
from bench.step import GPU_SHAPES, OF_TORCH, OURS, PEERS, PEERS_PYTHON, Shape, contenders
from saefast.training.plan import Sizes, memory_of

CPU_SHAPES = (
    Shape(1024, 384, 16384, 32),
    Shape(1024, 768, 32768, 32),
    Shape(1024, 768, 131072, 32),
    Shape(256, 1024, 262144, 64),
)
MEMORY_GPU_SHAPES = (*GPU_SHAPES, Shape(8192, 4096, 1 << 20, 64))
TINY = (Shape(16, 24, 256, 4),)
STEPS = 3
# Dense contenders hold several (B, L) and (L, D) tensors: beyond this they are left out.
LARGEST_DENSE = {"cpu": 40e6, "cuda": 1e9}


def planned(shape: Shape, name: str, device: str) -> int:
    optimizer = "adam-lean" if name.endswith("lean") else "adam"
    parts = memory_of(Sizes(shape.D, shape.L, shape.k, shape.B, optimizer), device)
    return round(sum(parts.values()))


def measured(shape: Shape, name: str, device: str) -> int:
    with contenders([name], shape, device) as (child,):
        for _ in range(STEPS):
            child.ask("step")
        return round(child.ask("memory")["peak"])


def fits(shape: Shape, name: str, device: str) -> bool:
    """Whether a contender is worth trying: dense ones up to a size, ours as far as the plan fits."""
    if name not in OURS:
        return LARGEST_DENSE[device] >= shape.L * shape.D
    return device == "cpu" or planned(shape, name, device) < torch.cuda.mem_get_info()[0]


def row_of(shape: Shape, name: str, device: str) -> dict[str, Any]:
    peak = measured(shape, name, device)
    line = {"B": shape.B, "D": shape.D, "L": shape.L, "k": shape.k, "what": name, "peak MB": round(peak / 1e6)}
    if name in OURS:
        plan = planned(shape, name, device)
        line |= {"planned MB": round(plan / 1e6), "measured / planned": round(peak / plan, 3)}
        line["bytes a parameter"] = round(peak / (2 * shape.L * shape.D), 2)
    return line


def main(argv: Sequence[str] | None = None) -> int:
    options = common.arguments(
        "bench.memory", __doc__, argv, **{"no-peers": dict(action="store_true", help="leave the peers out")}
    )
    if not options.no_check:
        common.check(options.device, "training/test_plan.py")
    names = [*OURS, *OF_TORCH] + (list(PEERS) if PEERS_PYTHON.exists() and not options.no_peers else [])
    shapes = CPU_SHAPES if options.device == "cpu" else MEMORY_GPU_SHAPES
    shapes = TINY if options.rehearse else shapes[:1] if options.quick else shapes
    found = [
        common.attempt(f"{name} {tuple(shape)}", partial(row_of, shape, name, options.device))
        for shape in shapes
        for name in (OURS if options.rehearse else names)
        if fits(shape, name, options.device)
    ]
    table = [line for line in found if line]
    common.print_table(table)
    common.write_results(options.out, options.device, "memory", table)
    return int(None in found)


if __name__ == "__main__":
    sys.exit(main())
