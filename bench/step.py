"""The whole training step against dense PyTorch and the peers: time, peak memory, growth with L, time by stage.

    python -m bench.step [--device cpu|cuda] [--rounds 9] [--out DIR] [--quick] [--no-check] [--no-peers]
    python -m bench.step --activation batchtopk [--matryoshka 2048 8192 32768]

Every contender is a process of its own that takes one step when its turn comes (bench/step_child.py), so rounds
interleave and memory is told apart. The peers run where `make peers` put them. B = 1024 at (D, L, k) = (768, 32768, 32)
and (384, 16384, 32) on a CPU.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch

from bench import common, step_child
from bench.step_child import batches
from bench.step_stages import by_stage, settle_ms
from saefast.engines.config import preset
from saefast.engines.fused import FusedEngine
from saefast.models.sae import SAE

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


class Kind(NamedTuple):
    """What an SAE is: its activation, and the prefixes that Matryoshka reconstructs from."""

    activation: str = "topk"
    matryoshka: tuple[int, ...] = ()

    # Without an annotation it is no field: what the contenders of such a kind are.
    script = "step_child.py"

    def label(self, what: str) -> str:
        """What its results are called; those of TopK alone are `what`."""
        parts = [self.activation] * (self.activation != "topk") + ["matryoshka"] * bool(self.matryoshka)
        return "-".join([what, *parts])

    def fields(self) -> dict[str, Any]:
        """Those of SAEConfig that say so."""
        return step_child.kind(**self._asdict())

    def has(self, name: str) -> bool:
        """Whether a contender trains such SAEs: sparsify only TopK, the others Matryoshka only with BatchTopK."""
        if name in PEERS and self != Kind():
            return name != "sparsify" and self.activation == "batchtopk"
        return True


TOPK = Kind()
KIND_OPTIONS: dict[str, Any] = dict(
    activation=dict(choices=("topk", "batchtopk"), default="topk", help="of the SAEs that are trained"),
    matryoshka=dict(type=int, nargs="*", default=(), help="widths of nested prefixes, ascending, the last one L"),
)
CPU_SHAPES = (Shape(1024, 768, 32768, 32), Shape(1024, 384, 16384, 32))
GPU_SHAPES = (Shape(8192, 768, 32768, 32), Shape(8192, 4096, 131072, 64))
TINY = (Shape(16, 24, 256, 4),)
SETTLE = "settling, a step's share"
GROWTH = (8192, 16384, 32768, 65536)


class Contender:
    """A child process that waits for orders."""

    def __init__(self, name: str, shape: Shape, device: str, kind: Kind = TOPK, python: Path | None = None) -> None:
        python = python or (PEERS_PYTHON if name in PEERS else Path(sys.executable))
        sizes = json.dumps(shape._asdict() | kind._asdict() | {"device": device})
        environment = os.environ | {"PYTHONPATH": str(common.ROOT)}
        self.name, self.process = name, subprocess.Popen(
            [str(python), str(common.ROOT / "bench" / kind.script), name, sizes],
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
def contenders(
    names: Sequence[str], shape: Shape, device: str, kind: Kind = TOPK, python: Path | None = None
) -> Iterator[list[Contender]]:
    with ExitStack() as stack:
        found = []
        for name in names:
            one = Contender(name, shape, device, kind, python)
            stack.callback(one.close)
            found.append(one)
        yield found


def groups(names: Sequence[str], device: str) -> list[list[str]]:
    """Who takes turns with whom: all of them, or on a GPU, whose memory does not hold all, each with ours."""
    if device == "cpu":
        return [list(names)]
    return [["saefast", name] for name in names if name != "saefast"] or [["saefast"]]


def compare(names: Sequence[str], shape: Shape, device: str, rounds: int, kind: Kind = TOPK) -> list[dict[str, Any]]:
    """All contenders at a shape; a group that fails is left out. Ours is timed in every group and stands here once."""
    found: dict[str, dict[str, Any]] = {}
    for group in groups(names, device):
        case = f"{', '.join(group)} {tuple(shape)}"
        for row in common.attempt(case, partial(interleaved, group, shape, device, rounds, kind)) or ():
            found.setdefault(row["what"], row)
    return list(found.values())


def interleaved(
    names: Sequence[str], shape: Shape, device: str, rounds: int, kind: Kind = TOPK
) -> list[dict[str, Any]]:
    """Interleaved rounds of some contenders, all of them in memory."""
    with contenders(names, shape, device, kind) as found:
        for one in found:
            for _ in range(WARM_UP):
                one.ask("step")
        seconds: dict[str, list[float]] = {one.name: [] for one in found}
        last: dict[str, dict[str, float]] = {}
        for number in range(rounds):
            # Another one begins each round: what runs first finds other things in the caches.
            for one in found[number % len(found) :] + found[: number % len(found)]:
                time.sleep(PAUSE if device == "cpu" else 0)
                last[one.name] = one.ask("step")
                seconds[one.name].append(last[one.name]["seconds"])
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
            # Some steps settle all rows of W_enc, which a median may miss.
            "mean ms": round(mean(seconds[name]) * 1e3, 1),
            "L0": last[name].get("l0"),
            "seconds": list(taken),
        }
        for name, taken in spreads.items()
    ]


def verdict(rows: list[dict[str, Any]], stages: list[dict[str, Any]]) -> dict[str, Any]:
    """Ours against the fastest and the leanest of the others, each measured beside ours."""
    settle = next(stage["ms"] for stage in stages if stage["stage"] == SETTLE) / 1e3
    others = [row for row in rows if row["what"] not in OURS]
    ours = next((row for row in rows if row["what"] == "saefast"), None)
    if ours is None or not others:
        return {"nothing to compare": [row["what"] for row in rows]}
    fastest = min(others, key=lambda row: row["times saefast's"])
    return {
        "fastest other": fastest["what"],
        "speed-up over it": fastest["times saefast's"],
        "the same, settling counted": round(
            fastest["times saefast's"] * ours["seconds"][0] / (ours["seconds"][0] + settle), 2
        ),
        "lowest other peak MB": min(row["peak MB"] for row in others),
        "peak MB": ours["peak MB"],
    }


def new_engine(shape: Shape, device: str, kind: Kind = TOPK) -> FusedEngine:
    sae_config, config = preset("saefast", shape.D, shape.L, shape.k, **kind.fields())
    return FusedEngine(SAE(sae_config, seed=0, device=device), config, 100_000)


def profile(shape: Shape, device: str, steps: int, kind: Kind = TOPK) -> list[dict[str, Any]]:
    """Median milliseconds of each stage of our step, in this process, and what settling adds to a step on average."""
    engine, data = new_engine(shape, device, kind), batches(shape.B, shape.D, device)
    for number in range(WARM_UP):
        engine.step(data[number % len(data)])
    table = by_stage(engine, data, device, steps)
    whole = table["whole step"]
    table[SETTLE] = settle_ms(engine, data, device)
    return [{"stage": name, "ms": round(ms, 2), "share": round(ms / whole, 3)} for name, ms in table.items()]


def growth(shape: Shape, device: str, rounds: int) -> list[dict[str, Any]]:
    """How the step's time grows with L, and the encoder's, and that of its product alone in bf16 (x Wᵀ, by torch)."""
    data = batches(shape.B, shape.D, device)
    engines = {L: new_engine(shape._replace(L=L), device) for L in GROWTH}
    found: dict[int, list[dict[str, float]]] = {L: [] for L in GROWTH}
    for number in range(WARM_UP + rounds):
        for L, engine in engines.items():
            x = data[number % len(data)]
            table = by_stage(engine, [x], device, 1)
            encode = sum(ms for name, ms in table.items() if name.startswith("encode_topk"))
            product = product_ms(x.bfloat16(), engine.sae.W_enc.detach().bfloat16(), device)
            if number >= WARM_UP:
                found[L].append({"step ms": table["whole step"], "encode ms": encode, "product ms": product})
    return [{"L": L} | {name: median(one[name] for one in lines) for name in lines[0]} for L, lines in found.items()]


def product_ms(x: torch.Tensor, W: torch.Tensor, device: str) -> float:
    common.synchronize(device)
    begin = time.perf_counter()
    torch.mm(x, W.T)
    common.synchronize(device)
    return (time.perf_counter() - begin) * 1e3


def slopes(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds a latent, by least squares: of the whole step, its encoder, and the product alone."""
    L = torch.tensor([line["L"] for line in lines], dtype=torch.float64)
    centred = L - L.mean()
    found = {}
    for name in ("step ms", "encode ms", "product ms"):
        times = torch.tensor([line[name] for line in lines], dtype=torch.float64)
        found[name.replace("ms", "us per latent")] = float((centred * times).sum() / centred.square().sum() * 1e3)
    return found


def who(device: str, kind: Kind, with_peers: bool) -> list[str]:
    """The contenders that this machine and this kind of SAE have."""
    names = [*OURS, *OF_TORCH] + ["torch.compile bf16"] * (device == "cuda")
    if with_peers and not PEERS_PYTHON.exists():
        print("the peers' environment is not there (make peers): they are left out")
        with_peers = False
    return names + [name for name in PEERS if with_peers and kind.has(name)]


def main(argv: Sequence[str] | None = None) -> int:
    options = common.arguments(
        "bench.step", __doc__, argv,
        rounds=dict(type=int, default=9, help="steps of each contender that are timed"),
        **KIND_OPTIONS, **{"no-peers": dict(action="store_true", help="leave the peers out")},
    )  # fmt: skip
    if not options.no_check:
        common.check(options.device, "engines/test_fused.py", "optim/test_row_ops.py")
    device, rounds = options.device, 3 if options.quick else options.rounds
    kind = Kind(options.activation, tuple(options.matryoshka))
    names, shapes = who(device, kind, not options.no_peers), CPU_SHAPES if device == "cpu" else GPU_SHAPES
    if kind.matryoshka:
        shapes = tuple(shape for shape in shapes if kind.matryoshka[-1] == shape.L)
    if options.rehearse:
        names, shapes, rounds = ["saefast", "torch fp32"], TINY, 1
    results: list[dict[str, Any] | None] = []
    for shape in shapes[-1:] if options.quick and device == "cpu" else shapes:
        print(f"\nB = {shape.B}, D = {shape.D}, L = {shape.L}, k = {shape.k}")
        results.append(common.attempt(f"all of {tuple(shape)}", partial(at_shape, names, shape, device, rounds, kind)))
    if kind == TOPK and not options.quick and not options.rehearse:
        lines = common.attempt("growth", partial(growth, shapes[-1 if device == "cpu" else 0], device, rounds))
        if lines is not None:
            results.append({"growth": lines, "slopes": slopes(lines)})
            print("\nGrowth with L")
            common.print_table(lines)
            print(slopes(lines))
    common.write_results(options.out, device, kind.label("step"), [result for result in results if result])
    return int(None in results or not results)


def at_shape(names: Sequence[str], shape: Shape, device: str, rounds: int, kind: Kind = TOPK) -> dict[str, Any]:
    """The contenders' table, our step by stage, and what both come to."""
    table, stages = compare(names, shape, device, rounds, kind), profile(shape, device, rounds, kind)
    common.print_timed(table)
    print()
    common.print_table(stages)
    found = verdict(table, stages)
    print(f"\n{found}")
    return {"shape": shape._asdict(), "kind": kind._asdict(), "steps": table, "verdict": found, "profile": stages}


if __name__ == "__main__":
    sys.exit(main())
