"""Peak memory of whole training steps against what `saefast plan` says, and against dense PyTorch and the peers.

    python -m bench.memory [--device cpu|cuda] [--out DIR] [--quick] [--no-check] [--no-peers]

Every figure comes from a process of its own (bench/step_child.py): what it grew by since before the model was made.
"""

from collections.abc import Sequence
from typing import Any

from bench import common
from bench.step import OF_TORCH, OURS, PEERS, PEERS_PYTHON, Shape, contenders
from saefast.plan import PlanArgs, memory_of

SHAPES = (
    Shape(1024, 384, 16384, 32),
    Shape(1024, 768, 32768, 32),
    Shape(1024, 768, 131072, 32),
    Shape(256, 1024, 262144, 64),
)
STEPS = 3
# Dense contenders hold several (B, L) and (L, D) tensors: beyond this they are left out.
LARGEST_DENSE = 40e6


def planned(shape: Shape, name: str, device: str) -> int:
    optimizer = "adam-lean" if name.endswith("lean") else "adam"
    parts = memory_of(PlanArgs(shape.D, shape.L, shape.k, shape.B, optimizer), device)
    return round(sum(parts.values()))


def measured(shape: Shape, name: str, device: str) -> int:
    with contenders([name], shape, device) as (child,):
        for _ in range(STEPS):
            child.ask("step")
        return round(child.ask("memory")["peak"])


def rows_of(shape: Shape, names: Sequence[str], device: str) -> list[dict[str, Any]]:
    lines = []
    for name in names:
        if name not in OURS and shape.L * shape.D > LARGEST_DENSE:
            continue
        peak = measured(shape, name, device)
        line = {"B": shape.B, "D": shape.D, "L": shape.L, "k": shape.k, "what": name, "peak MB": round(peak / 1e6)}
        if name in OURS:
            plan = planned(shape, name, device)
            line |= {"planned MB": round(plan / 1e6), "measured / planned": round(peak / plan, 3)}
            line["bytes a parameter"] = round(peak / (2 * shape.L * shape.D), 2)
        lines.append(line)
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    options = common.arguments(
        "bench.memory", __doc__, argv, **{"no-peers": dict(action="store_true", help="leave the peers out")}
    )
    if not options.no_check:
        common.check(options.device, "test_plan.py")
    names = [*OURS, *OF_TORCH] + (list(PEERS) if PEERS_PYTHON.exists() and not options.no_peers else [])
    shapes = SHAPES[:1] if options.quick else SHAPES
    table = [line for shape in shapes for line in rows_of(shape, names, options.device)]
    common.print_table(table)
    common.write_results(options.out, options.device, "memory", table)


if __name__ == "__main__":
    main()
