"""The whole training step at the first shapes of the design's table: undisturbed, then by stage, then by kernel.

Adam and the lean optimiser after their first steps; Adam with an eighth of the latents dead, so
that AuxK runs; Adam late in a run, whose drift table is long. The undisturbed time comes from an engine that nothing
watches; it waits for the device once, and counts settling as often as it comes.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import common
from bench.cases import Case, Settings
from bench.encode_topk import GPU_SHAPES, Problem, Shape
from bench.gpu_smoke_steps import make_dead
from bench.kernel_times import by_kernel
from bench.step_child import batches
from bench.step_stages import by_stage, settle_ms
from saefast.engines.config import preset
from saefast.engines.fused import FusedEngine
from saefast.models.sae import SAE

TINY = (Shape(6, 16, 64, 3),)
VARIANTS = ("adam", "adam-lean", "adam AuxK", "adam late")
LATE, WARM_UP = 100_000, 10
ORDER = (
    (VARIANTS[:2], ("", "by stage ")),
    (VARIANTS[2:], ("", "by stage ")),
    (VARIANTS, ("by kernel ",)),
)
# In the interpreter a step takes a second, so that each variant and each measure comes up once or twice.
REHEARSED = {
    ("adam", ""), ("adam", "by stage "), ("adam", "by kernel "), ("adam-lean", "by stage "), ("adam AuxK", "by stage "),
    ("adam late", "by stage "),
}  # fmt: skip


class Run(NamedTuple):
    engine: FusedEngine
    data: list[Tensor]
    prepare: Callable[[], None] | None
    """Called before a step."""

    def step(self, number: int) -> None:
        if self.prepare is not None:
            self.prepare()
        self.engine.step(self.data[number % len(self.data)])


def cases(settings: Settings) -> list[Case]:
    """The two optimisers at every shape first, and how kernels share a step's time last."""
    shapes = TINY if settings.rehearse else GPU_SHAPES[:2]
    return [
        Case(f"step {what} {how}{'x'.join(map(str, shape))}", partial(MEASURES[how], shape, what, settings))
        for variants, hows in ORDER
        for what in variants
        for shape in shapes
        for how in hows
        if not settings.rehearse or (what, how) in REHEARSED
    ]


def new_run(shape: Shape, what: str, settings: Settings) -> Run:
    """An engine that has taken its first steps."""
    lean, device = what == "adam-lean", settings.device
    torch.manual_seed(0)
    sae_config, config = preset(
        "saefast", shape.D, shape.L, shape.k,
        optimizer="adam-lean" if lean else "adam", dtype="bfloat16" if lean else "float32",
        auxk_coef=1 / 32 if what == "adam AuxK" else 0.0,
    )  # fmt: skip
    engine = FusedEngine(SAE(sae_config, seed=0, device=device), config, 2 * LATE)
    if what == "adam late":
        make_late(engine, 20 if settings.rehearse else LATE)
    prepare = partial(make_dead, engine, every=8) if what == "adam AuxK" else None
    run = Run(engine, batches(shape.B, shape.D, device), prepare)
    for number in range(1 if settings.rehearse else WARM_UP):
        run.step(number)
    return run


def make_late(engine: FusedEngine, steps: int) -> None:
    """As if so many steps had been taken, all rows in each."""
    for _ in range(steps):
        engine.weights.drift.add(engine.lr())
    engine.step_count = engine.weights.step = steps
    for matrix in engine.weights.matrices.values():
        matrix.last_step.fill_(steps)


def undisturbed(shape: Shape, what: str, settings: Settings) -> dict[str, Any]:
    """Seconds of a step: a row of them by the host's clock, waiting once, and the product alone beside it."""
    device = settings.device
    run = new_run(shape, what, settings)
    every = run.engine.settle_every
    begin = time.perf_counter()
    run.step(0)
    common.synchronize(device)
    once = time.perf_counter() - begin
    n = every * max(1, min(25, round(settings.seconds / 5 / max(once, 1e-6) / every)))
    rounds = [seconds_of(run, n, device) for _ in range(1 if settings.rehearse else 5)]
    found = {"shape": shape._asdict(), "steps a round": n, "seconds": common.spread(rounds)._asdict()}
    found |= {"tokens/s": shape.B / found["seconds"]["median"]}
    if device == "cuda":
        held = sum(x.numel() * x.element_size() for x in run.data)
        torch.cuda.reset_peak_memory_stats()
        run.step(0)
        torch.cuda.synchronize()
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - held
    del run
    problem = Problem(shape, torch.float16 if settings.rehearse else torch.bfloat16, device)
    product = common.measure({"product": problem.product}, device, settings.seconds / 3, capture=False)["product"]
    return found | {"product": product._asdict(), "times the product": found["seconds"]["median"] / product.median}


def seconds_of(run: Run, n: int, device: str) -> float:
    common.synchronize(device)
    begin = time.perf_counter()
    for number in range(n):
        run.step(number)
    common.synchronize(device)
    return (time.perf_counter() - begin) / n


def staged(shape: Shape, what: str, settings: Settings) -> dict[str, Any]:
    run = new_run(shape, what, settings)
    steps = 1 if settings.rehearse else 4 * run.engine.settle_every
    table = by_stage(run.engine, run.data, settings.device, steps, run.prepare)
    settling = settle_ms(run.engine, run.data, settings.device)
    return {"shape": shape._asdict(), "ms": table, "settling ms, a step's share": settling}


def kernels(shape: Shape, what: str, settings: Settings) -> dict[str, Any]:
    """Over as many steps as lie between two times that W_enc is settled."""
    run = new_run(shape, what, settings)
    steps = 1 if settings.rehearse else run.engine.settle_every
    return {"shape": shape._asdict(), "of a step": by_kernel(partial(run.step, 0), settings.device, steps)}


MEASURES = {"": undisturbed, "by stage ": staged, "by kernel ": kernels}
