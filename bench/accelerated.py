"""What accelerate() gains: the peers' training loops and forward passes, as they come and accelerated, side by side.

    python -m bench.accelerated [--device cpu|cuda] [--python .peers/bin/python] [--rounds 9] [--quick]

A peer's loop is its forward pass, backward pass and optimiser's step with all that it does between them
(bench/accelerated_child.py). Each contender is a process that takes a step when its turn comes, all on the same batches
from the same weights; their losses have to stay together. A third one has nothing but Adam's fused form, which
accelerate() turns on as well: what is gained beyond it is the ops'. B = 1024 at (D, L, k) = (768, 32768, 32) on a CPU.
"""

import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bench import common
from bench.accelerated_child import JOBS
from bench.step import CPU_SHAPES, PAUSE, PEERS_PYTHON, Contender, Kind, Shape, contenders

FORMS = ("", "its Adam fused", "accelerated")
WARM_UP = 3
# Small steps of Adam from the same weights: what rounding does in a few of them is far below.
TOLERANCE = 1e-2
TINY = Shape(16, 24, 256, 4)
GPU_SHAPE = Shape(8192, 768, 32768, 32)


class Child(Kind):
    """Contenders of bench/accelerated_child.py."""

    script = "accelerated_child.py"


def compare(peer: str, shape: Shape, device: str, rounds: int, python: Path) -> dict[str, Any]:
    """A peer's contenders in turn: first all training steps, then forward passes.

    Raises:
        SystemExit: the losses have come apart, so that the timing means nothing.
    """
    names = [f"{peer}, {form}".removesuffix(", ") for form in FORMS]
    with contenders(names, shape, device, Child(), python=python) as found:
        losses: dict[str, list[float]] = {one.name: [] for one in found}
        for one in found:
            for _ in range(WARM_UP):
                losses[one.name].append(one.ask("step")["loss"])
        steps = in_turn(found, "step", device, rounds, losses)
        together(losses)
        for one in found:
            one.ask("serve")
        served = in_turn(found, "serve", device, rounds)
        peaks = {one.name: one.ask("memory")["peak"] for one in found}
    rows = []
    for name in names:
        training, inference = common.spread(steps[name]), common.spread(served[name])
        rows.append(
            {
                "what": name,
                "training ms [p20, p80]": training.ms,
                "tokens/s": round(shape.B / training.median),
                "training speed-up": round(common.spread(steps[names[0]]).median / training.median, 2),
                "inference ms [p20, p80]": inference.ms,
                "inference speed-up": round(common.spread(served[names[0]]).median / inference.median, 2),
                "peak MB": round(peaks[name] / 1e6),
                "last loss": losses[name][-1],
                "seconds": {"step": list(training), "serve": list(inference)},
            }
        )
    return {"peer": peer, "shape": shape._asdict(), "contenders": rows}


def in_turn(
    found: Sequence[Contender], order: str, device: str, rounds: int, losses: dict[str, list[float]] | None = None
) -> dict[str, list[float]]:
    """Seconds of each contender, interleaved."""
    seconds: dict[str, list[float]] = {one.name: [] for one in found}
    for number in range(rounds):
        # Another one begins each round: what runs first finds other things in the caches.
        for one in [*found[number % len(found) :], *found[: number % len(found)]]:
            time.sleep(PAUSE if device == "cpu" else 0)
            reply = one.ask(order)
            seconds[one.name].append(reply["seconds"])
            if losses is not None:
                losses[one.name].append(reply["loss"])
    return seconds


def together(losses: dict[str, list[float]]) -> None:
    first, *others = losses.values()
    for name, other in zip(list(losses)[1:], others, strict=True):
        apart = [abs(a - b) / abs(a) for a, b in zip(first, other, strict=True)]
        wrong = [share for share in apart if not share < TOLERANCE]  # NaN too
        if wrong:
            raise SystemExit(f"{name}: losses are up to {max(wrong):.1%} from the unaccelerated ones")


def main(argv: Sequence[str] | None = None) -> int:
    options = common.arguments(
        "bench.accelerated", __doc__, argv,
        rounds=dict(type=int, default=9, help="steps, and forward passes, of each contender that are timed"),
        python=dict(type=Path, default=PEERS_PYTHON, help="the interpreter of the peers' environment (make peers)"),
        peers=dict(nargs="+", choices=list(JOBS), default=list(JOBS), help="whose loops"),
    )  # fmt: skip
    if not options.python.exists():
        raise SystemExit(f"{options.python} is not there: make peers makes it, or name another one with --python")
    if not options.no_check:
        common.check(options.device, "integrations/test_accelerate.py")
    rounds = 1 if options.rehearse else 3 if options.quick else options.rounds
    shape = TINY if options.rehearse else CPU_SHAPES[0] if options.device == "cpu" else GPU_SHAPE
    results = []
    for peer in options.peers:
        print(f"\n{peer}: B = {shape.B}, D = {shape.D}, L = {shape.L}, k = {shape.k}")
        run = partial(compare, peer, shape, options.device, rounds, options.python)
        found = common.attempt(f"{peer} {tuple(shape)}", run)
        if found is not None:
            common.print_timed(found["contenders"])
            results.append(found)
    common.write_results(options.out, options.device, "accelerate", results)
    return int(len(results) < len(options.peers))


if __name__ == "__main__":
    sys.exit(main())
