"""The whole training step against dense PyTorch and the peers: time, peak memory, growth with L, time by stage.

    python -m bench.step [--device cpu|cuda] [--rounds 9] [--out DIR] [--quick] [--no-check] [--no-peers]

Every contender is a process of its own that takes one step when its turn comes (bench/step_child.py), so rounds
interleave and memory is told apart. The peers run where `make peers` put them. B = 1024 at (D, L, k) = (768, 32768, 32)
and (384, 16384, 32) on a CPU.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch

from bench import common
from bench.step_child import batches

PEERS_PYTHON = common.ROOT / ".peers" / "bin" / "python"
OURS, OF_TORCH, PEERS = ("saefast", "saefast lean"), ("torch fp32", "torch bf16 autocast"), (
    "sparsify", "dictionary_learning", "SAELens",
)  # fmt: skip
WARM_UP = 3
# Threads of a process that waits may spin for a while after their last work.
PAUSE = 0.25


class Shape(NamedTuple):
    B: int
    D: int
    L: int
    k: int


CPU_SHAPES = (Shape(1024, 768, 32768, 32), Shape(1024, 384, 16384, 32))
GPU_SHAPES = (Shape(8192, 768, 32768, 32), Shape(8192, 4096, 131072, 64))
GROWTH = (8192, 16384, 32768, 65536)


class Contender:
    """A child process that waits for orders."""

    def __init__(self, name: str, shape: Shape, device: str) -> None:
        python = str(PEERS_PYTHON) if name in PEERS else sys.executable
        sizes = json.dumps(shape._asdict() | {"device": device})
        environment = os.environ | {"PYTHONPATH": str(common.ROOT)}
        self.name, self.process = name, subprocess.Popen(
            [python, str(common.ROOT / "bench" / "step_child.py"), name, sizes],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self._reply()

    def ask(self, order: str) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            assert self.process.stderr is not None
            raise SystemExit(f"{self.name} failed:\n{self.process.stderr.read()[-2000:]}")
        found: dict[str, float] = json.loads(line)
        return found

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextmanager
def contenders(names: Sequence[str], shape: Shape, device: str) -> Iterator[list[Contender]]:
    with ExitStack() as stack:
        found = []
        for name in names:
            one = Contender(name, shape, device)
            stack.callback(one.close)
            found.append(one)
        yield found


def compare(names: Sequence[str], shape: Shape, device: str, rounds: int) -> list[dict[str, Any]]:
    """Interleaved rounds of all contenders at a shape."""
    with contenders(names, shape, device) as found:
        seconds: dict[str, list[float]] = {one.name: [] for one in found}
        for number in range(WARM_UP + rounds):
            # Another one begins each round: what runs first finds other things in the caches.
            for one in found[number % len(found) :] + found[: number % len(found)]:
                time.sleep(PAUSE if device == "cpu" else 0)
                taken = one.ask("step")["seconds"]
                if number >= WARM_UP:
                    seconds[one.name].append(taken)
        peaks = {one.name: one.ask("memory")["peak"] for one in found}
    spreads = {name: common.spread(taken) for name, taken in seconds.items()}
    ours = spreads["saefast"].median
    return [
        {
            "what": name,
            "ms [p20, p80]": taken.ms,
            "tokens/s": round(shape.B / taken.median),
            "times saefast's": round(taken.median / ours, 2),
            "peak MB": round(peaks[name] / 1e6),
            "seconds": list(taken),
        }
        for name, taken in spreads.items()
    ]


def verdict(rows: list[dict[str, Any]], stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Ours against the fastest and the leanest of the others."""
    sweep = next(stage["ms"] for stage in stages if stage["stage"].startswith("sweep")) / 1e3
    others = [row for row in rows if row["what"] not in OURS]
    fastest = min(others, key=lambda row: row["seconds"][0])
    ours = next(row for row in rows if row["what"] == "saefast")
    return {
        "fastest other": fastest["what"],
        "speed-up over it": round(fastest["seconds"][0] / ours["seconds"][0], 2),
        "the same, sweeps counted": round(fastest["seconds"][0] / (ours["seconds"][0] + sweep), 2),
        "lowest other peak MB": min(row["peak MB"] for row in others),
        "peak MB": ours["peak MB"],
    }


class Stopwatch:
    """Seconds by stage, of functions replaced by timed ones for as long as it is open."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, {}  # type: tuple[str, dict[str, float]]
        self._undo: list[Callable[[], None]] = []

    def watch(self, owner: Any, name: str, stage: str) -> None:
        original = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = original(*args, **kwargs)
            common.synchronize(self.device)
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begin
            return result

        setattr(owner, name, timed)
        self._undo.append(lambda: setattr(owner, name, original))

    def close(self) -> None:
        for undo in self._undo:
            undo()


def profile(shape: Shape, device: str, steps: int) -> list[dict[str, Any]]:
    """Median milliseconds of each stage of our step, in this process."""
    from saefast import gradient, rows
    from saefast.recipe import preset
    from saefast.sae import SAE
    from saefast.step import FusedStep

    sae_config, config = preset("saefast", shape.D, shape.L, shape.k)
    engine = FusedStep(SAE(sae_config, seed=0, device=device), config, 100_000)
    data = batches(shape.B, shape.D, device)
    for x in data[:WARM_UP]:
        engine.step(x)
    backend, lines = rows.backend(engine.enc.w), []
    for number in range(steps):
        watch = Stopwatch(device)
        watch.watch(gradient.Pass, "_encode", "encode")
        stages = {
            "moments": "loss scale", "group_runs": "runs", "catch_up": "settle sleepers",
            "decode_loss": "decode + loss", "weighted_row_sum": "b_dec gradient", "fill_entries": "entries",
            "update_rows": "row update",
        }  # fmt: skip
        for name, stage in stages.items():
            watch.watch(backend, name, stage)
        begin = time.perf_counter()
        engine.step(data[number % len(data)])
        watch.seconds["whole step"] = time.perf_counter() - begin
        watch.close()
        lines.append(watch.seconds)
    names = dict.fromkeys(name for line in lines for name in line)
    table = {name: median(line.get(name, 0.0) for line in lines) for name in names}
    whole = table.pop("whole step")
    table["rest"] = whole - sum(table.values())
    table["whole step"] = whole
    # Medians do not see what happens at every fourth step only: timed where it would come next.
    while (engine.step_count + 1) % engine.sweep_every:
        engine.step(data[engine.step_count % len(data)])
    begin = time.perf_counter()
    backend.catch_up(engine.enc, engine._constants(engine.step_count))
    common.synchronize(device)
    table["sweep, a step's share"] = (time.perf_counter() - begin) / engine.sweep_every
    return [{"stage": n, "ms": round(s * 1e3, 2), "share": round(s / whole, 3)} for n, s in table.items()]


def growth(shape: Shape, device: str, rounds: int) -> list[dict[str, Any]]:
    """How the step's time grows with L, and the encoder's, and that of its product alone in bf16 (x Wᵀ, by torch)."""
    from saefast import gradient
    from saefast.recipe import preset
    from saefast.sae import SAE
    from saefast.step import FusedStep

    data, engines, seconds = batches(shape.B, shape.D, device), {}, {}
    for L in GROWTH:
        sae_config, config = preset("saefast", shape.D, L, shape.k)
        engines[L] = FusedStep(SAE(sae_config, seed=0, device=device), config, 100_000)
        seconds[L] = {"step ms": [], "encode ms": [], "product ms": []}
    for number in range(WARM_UP + rounds):
        for L, engine in engines.items():
            x, W = data[number % len(data)], engine.sae.W_enc.detach().bfloat16()
            low = x.bfloat16()
            watch = Stopwatch(device)
            watch.watch(gradient.Pass, "_encode", "encode ms")
            watch.watch(engine, "step", "step ms")
            watch.watch(torch, "mm", "product ms")
            engine.step(x)
            torch.mm(low, W.T)
            watch.close()
            for name, taken in watch.seconds.items() if number >= WARM_UP else ():
                seconds[L][name].append(taken * 1e3)
    return [{"L": L} | {name: median(taken) for name, taken in table.items()} for L, table in seconds.items()]


def slopes(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds a latent, by least squares: of the whole step, its encoder, and the product alone."""
    L = torch.tensor([line["L"] for line in lines], dtype=torch.float64)
    centred = L - L.mean()
    found = {}
    for name in ("step ms", "encode ms", "product ms"):
        times = torch.tensor([line[name] for line in lines], dtype=torch.float64)
        found[name.replace("ms", "us per latent")] = float((centred * times).sum() / centred.square().sum() * 1e3)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    options = common.arguments(
        "bench.step", __doc__, argv,
        rounds=dict(type=int, default=9, help="steps of each contender that are timed"),
        **{"no-peers": dict(action="store_true", help="leave the peers out")},
    )  # fmt: skip
    if not options.no_check:
        common.check(options.device, "test_step.py", "test_rows.py")
    device, rounds = options.device, 3 if options.quick else options.rounds
    names = [*OURS, *OF_TORCH]
    if device == "cuda":
        names.append("torch.compile bf16")
    if PEERS_PYTHON.exists() and not options.no_peers:
        names += PEERS
    elif not options.no_peers:
        print("the peers' environment is not there (make peers): they are left out")
    shapes = CPU_SHAPES if device == "cpu" else GPU_SHAPES
    results: list[dict[str, Any]] = []
    for shape in shapes[-1:] if options.quick else shapes:
        print(f"\nB = {shape.B}, D = {shape.D}, L = {shape.L}, k = {shape.k}")
        table = compare(names, shape, device, rounds)
        common.print_timed(table)
        stages = profile(shape, device, rounds)
        print()
        common.print_table(stages)
        results.append({"shape": shape._asdict(), "steps": table, "verdict": verdict(table, stages), "profile": stages})
        print(f"\n{results[-1]['verdict']}")
    if not options.quick:
        lines = growth(shapes[-1], device, rounds)
        results.append({"growth": lines, "slopes": slopes(lines)})
        print(f"\nGrowth with L at D = {shapes[-1].D}")
        common.print_table(lines)
        print(results[-1]["slopes"])
    common.write_results(options.out, device, "step", results)


if __name__ == "__main__":
    main()
