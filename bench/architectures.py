"""Every architecture against a dense torch run of the same maths: what it is worth, and what a step of it costs.

    python -m bench.architectures [--rows runs/recipe-rows] [--only topk ...] [--ks 8 16] [--dense-at 32] [--quick]

Quality: each is trained at every k of KS on rows of MiniLM, through the fused engine; at the k of --dense-at also by
the plain loop of tests/dense_statements.py, from the same start, on the same batches, at the same rates and
coefficients. Steps: the fused engine and the dense statement take turns, in processes of their own
(bench/architectures_child.py), timed at k active latents, and where an architecture was published as beginning with
half of them, at that too. Both write a file of results, and quality docs/architectures.png, FVU against L0. All of it
takes about half an hour on two idle cores.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import common, recipe_rows, step_child
from bench.architecture_kinds import (
    COMPETING,
    ELSEWHERE,
    PAYING,
    Kind,
    Setting,
    dense,
    kinds,
    own_names,
    sae_fields,
)  # fmt: skip
from bench.architectures_plot import draw
from bench.step import Shape, interleaved
from saefast.data.opening import open_source
from saefast.engines.config import preset
from saefast.engines.fused import FusedEngine
from saefast.metrics.streaming import Reconstruction
from saefast.models.sae import SAE

KS = (8, 16, 32, 64)
# Of an SAE that serves every one of these: what it is trained to serve.
ONE_K = 32
N_LATENTS, BATCH, STEPS = 2048, 512, 200
# How much worse than the dense run the held-out FVU may be.
ALLOWED = 0.01
# Rows that a run begins from, and rows that it is judged by.
FIRST, JUDGED = 4096, 16384
CPU_SHAPES = (Shape(1024, 384, 8192, 32), Shape(1024, 768, 16384, 32))
# Of all shapes but the first these alone are timed.
AT_EVERY_SHAPE = ("topk", "relu", "jumprelu")
GPU_SHAPES = (Shape(8192, 768, 32768, 32),)
TINY = (Shape(16, 24, 256, 4),)
CONTENDERS = ("saefast", "torch fp32", "torch bf16 autocast")
# Two rounds of settling.
ROUNDS = 8
# Of the picture: what is judged by the same rows stands together.
PANELS = (
    ("Latents that compete", [kind.label for kind in COMPETING.values()]),
    ("Latents that are paid for", ["TopK", *(kind.label for kind in PAYING.values())]),
    ("Another target, or two layers", [kind.label for kind in ELSEWHERE.values()]),
)


class Trained(NamedTuple):
    """What is timed, as `bench.step.Kind` is there."""

    name: str
    fresh: bool = False
    """As it begins, and not as sparse as after training."""

    script = "architectures_child.py"


class Rows(NamedTuple):
    """Of two layers, row for row of the same tokens, each scaled to a median distance of √D from its centre."""

    early: Tensor
    late: Tensor
    early_heldout: Tensor
    late_heldout: Tensor

    def of(self, kind: Kind) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a kind reads and what it is to give, in training and held out."""
        if kind.data == "one layer":
            return self.late, self.late, self.late_heldout, self.late_heldout
        if kind.data == "layer to layer":
            return self.early, self.late, self.early_heldout, self.late_heldout
        both, held = torch.cat([self.early, self.late], 1), torch.cat([self.early_heldout, self.late_heldout], 1)
        return both, both, held, held


def rows_of_minilm(folder: Path, n: int) -> Rows:
    """n rows to train on, of the layers that bench.recipe_rows harvests; it does so if they are not there."""
    acts = folder / "minilm-acts"
    if not harvested(folder):
        recipe_rows.make(folder, "minilm-4", lambda line: print(line, file=sys.stderr, flush=True))
    hooks = dict(zip(("x", "target"), recipe_rows.MINILM_HOOKS.values(), strict=True))
    source = open_source(acts, hooks=hooks, shuffle="mapped")
    batch = next(iter(source.batches(n, seed=0)))
    held = next(iter(source.heldout(JUDGED)))
    (early, early_held), (late, late_held) = (scaled(batch[name], held[name]) for name in ("x", "target"))
    return Rows(early, late, early_held, late_held)


def harvested(folder: Path) -> bool:
    return (folder / "minilm-acts" / "index.json").exists()


def synthetic(n: int, D: int) -> Rows:
    """Rows for a rehearsal."""
    rows = torch.cat(step_child.batches(-(-(n + JUDGED // 64) // step_child.N_BATCHES), D, "cpu"))
    train, held = scaled(rows[:n], rows[n:])
    return Rows(train.roll(1, 1), train, held.roll(1, 1), held)


def scaled(train: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    size = (train - train.mean(0)).norm(dim=1).median() / train.shape[1] ** 0.5
    return train / size, held / size


class Settings(NamedTuple):
    """Of the runs that quality is measured by."""

    n_latents: int
    batch: int
    steps: int
    ks: tuple[int, ...]
    dense_at: tuple[int, ...]
    device: str


def begin(kind: Kind, d_in: int, k: int, s: Settings) -> FusedEngine:
    """An engine before its first step. No latent is resampled: the dense loop does not either."""
    sae_config, config = preset(
        "saefast", d_in, s.n_latents, k, batch_size=s.batch, **sae_fields(kind, s.n_latents, d_in),
        **{"resample_every": 0} | dict(kind.train),
    )  # fmt: skip
    return FusedEngine(SAE(sae_config, seed=0, device=s.device), config, s.steps)


def quality(kind: Kind, rows: Rows, s: Settings) -> list[dict[str, Any]]:
    """A line for every k: held-out FVU and L0, ours and where asked for the dense run's."""
    if not kind.one_for_all:
        return [at_k(kind, rows, k, s)[0] for k in s.ks]
    trained = ONE_K if ONE_K in s.ks else s.ks[-1]
    line, sae = at_k(kind, rows, trained, s)
    held = [part.to(s.device) for part in rows.of(kind)[2:]]
    others = [said(kind, k, *judged(partial(served, sae.with_k(k)), *held)) for k in s.ks if k != trained]
    return sorted([line, *others], key=lambda one: one["k"])


def at_k(kind: Kind, rows: Rows, k: int, s: Settings) -> tuple[dict[str, Any], SAE]:
    """What a run comes to, and the SAE that it leaves."""
    x, target, *held = (part.to(s.device) for part in rows.of(kind))
    pairs = list(zip(x.split(s.batch), target.split(s.batch), strict=True))[: s.steps]
    engine = begin(kind, x.shape[1], k, s)
    engine.initialise(x[:FIRST], target[:FIRST])
    start = {name: p.detach().clone() for name, p in engine.sae.named_parameters()}
    coefs = [float(engine.step(*given).sparsity_coef) for given in pairs]
    engine.finish()
    found = said(kind, k, *judged(partial(served, engine.sae), *held))
    if k in s.dense_at:
        setting = Setting(k, s.n_latents, coefs.__getitem__, engine.config)
        trainer = dense.Trainer(own_names(kind, start), kind.dense(setting), recipe(engine, len(pairs)))
        found |= beside(kind, trainer, pairs, held, found["FVU"])
    print(found, file=sys.stderr, flush=True)
    return found, engine.sae


def said(kind: Kind, k: int, fvu: float, l0: float) -> dict[str, Any]:
    return {"what": kind.label, "k": k, "L0": round(l0, 2), "FVU": round(fvu, 5)}


def beside(
    kind: Kind, trainer: Any, pairs: list[tuple[Tensor, Tensor]], held: Sequence[Tensor], ours: float
) -> dict[str, Any]:
    """What the dense run comes to, and how our FVU compares."""
    threshold = None
    for x, target in pairs:
        _, found = trainer.step(x, target)
        if kind.batch:
            threshold = dense.running(threshold, found.code)
    serve = trainer.statement if threshold is None else dense.above(threshold, centred=kind.data != "layer to layer")

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        found = serve(trainer.p, x, len(pairs) - 1)
        return found.x_hat, found.l0

    fvu, l0 = judged(run, *held)
    return {
        "dense L0": round(l0, 2), "dense FVU": round(fvu, 5), "FVU against dense": f"{ours / fvu - 1:+.2%}",
        "within": ours <= fvu * (1 + ALLOWED),
    }  # fmt: skip


def recipe(engine: FusedEngine, steps: int) -> Any:
    """How the dense loop goes about it, as our engine does."""
    config, rates = engine.config, getattr(engine, "rates", {})
    return dense.Recipe(
        lr=config.lr, steps=steps, warmup=config.lr_warmup_steps, betas=(config.beta1, config.beta2), eps=config.eps,
        decay_from=steps - round(config.lr_decay_share * steps), loss=config.loss,
        unit_rows=config.decoder_norm == "post_step", rates=rates,
    )  # fmt: skip


def served(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    out = sae(x)
    return out.x_hat, (out.acts > 0).sum(-1).float().mean()


@torch.no_grad()
def judged(run: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor, target: Tensor) -> tuple[float, float]:
    """FVU of the target, and mean L0, of what makes reconstructions and L0 of rows."""
    found, l0s = Reconstruction(), []
    for part, wanted in zip(x.split(BATCH), target.split(BATCH), strict=True):
        x_hat, l0 = run(part)
        found.update(wanted, x_hat.to(wanted.dtype))
        l0s.append(float(l0) * len(part))
    return found.compute()["fvu"], sum(l0s) / len(x)


def steps(name: str, kind: Kind, shape: Shape, device: str, rounds: int, fresh: bool) -> list[dict[str, Any]]:
    """Our step and the dense statement's, in turn, and what that comes to."""
    what = f"{kind.label}, as it begins" if fresh else kind.label
    rows = interleaved(CONTENDERS, shape, device, rounds, Trained(name, fresh))
    ours, others = rows[0], rows[1:]
    print(f"\n{what} {tuple(shape)}")
    common.print_timed(rows)
    # By means, so that ours pays for the steps that settle.
    fp32, bf16 = (other["mean ms"] / ours["mean ms"] for other in others)
    least = 1.0 if fresh else kind.least
    # A dense pass of ours multiplies in fp32, as the statement itself does; the sparse step is held to the faster one.
    judged_by = fp32 if fresh else min(fp32, bf16)
    found = {
        "what": what, **shape._asdict(), "times as fast as fp32": round(fp32, 2), "as bf16 autocast": round(bf16, 2),
        "at least": least, "peak MB": ours["peak MB"], "dense peak MB": min(other["peak MB"] for other in others),
        "holds": judged_by >= least,
    }  # fmt: skip
    return [found | {"contenders": rows}]


def arguments(argv: Sequence[str] | None) -> Any:
    every = tuple(kinds())
    return common.arguments(
        "bench.architectures", __doc__, argv,
        rows=dict(type=Path, default=recipe_rows.FOLDER, help="folder of bench.recipe_rows"),
        only=dict(nargs="+", choices=every, default=every),
        picture=dict(type=Path, default=common.ROOT / "docs" / "architectures.png"),
        ks=dict(type=int, nargs="+", default=KS, help="numbers of active latents that are trained for"),
        **{"dense-at": dict(type=int, nargs="*", default=(32,), help="every k that the dense run is made at")},
        **{"no-quality": dict(action="store_true"), "no-steps": dict(action="store_true")},
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    o = arguments(argv)
    if o.rehearse:
        # One of each sort of step.
        o.only = [name for name in o.only if name in AT_EVERY_SHAPE]
    if not o.no_check:
        common.check(o.device, "test_dense_statements.py")
    found: dict[str, list[dict[str, Any]]] = {"quality": [], "steps": []}
    failed = False
    # A file for each, so that one may be measured again without the other.
    for what, run, left_out in (
        ("quality", measure_quality, o.no_quality),
        ("steps", measure_steps, o.no_steps),
    ):
        if left_out:
            continue
        failed |= run(o, found)
        common.write_results(o.out, o.device, f"architectures-{what}", found[what])
    whole = tuple(o.only) == tuple(kinds()) and tuple(o.ks) == KS and not (o.quick or o.rehearse)
    if found["quality"] and whole:
        draw(found["quality"], o.picture, PANELS)
    return int(failed)


def measure_quality(o: Any, found: dict[str, list[dict[str, Any]]]) -> bool:
    """Whether an architecture failed."""
    s = Settings(N_LATENTS, BATCH, STEPS, tuple(o.ks), tuple(o.dense_at), o.device)
    if o.quick:
        s = s._replace(steps=60, ks=(32,), dense_at=(32,))
    if o.rehearse:
        s = Settings(256, 64, 4, (8,), (8,), o.device)
    n = s.steps * s.batch
    if not (o.rehearse or harvested(o.rows) or find_spec("transformers")):
        print("no rows of MiniLM, and transformers is not there to harvest them: quality is left out")
        return False
    make = partial(synthetic, n, 64) if o.rehearse else partial(rows_of_minilm, o.rows, n)
    rows = common.attempt("rows", make)
    if rows is None:
        return True
    failed = False
    for name in o.only:
        lines = common.attempt(f"{name}, quality", partial(quality, kinds()[name], rows, s))
        found["quality"] += lines or []
        failed |= lines is None
    print(f"\n{s.steps} steps of {s.batch} tokens, {s.n_latents} latents")
    common.print_table(found["quality"])
    return failed


def measure_steps(o: Any, found: dict[str, list[dict[str, Any]]]) -> bool:
    """Whether an architecture failed."""
    shapes = TINY if o.rehearse else CPU_SHAPES if o.device == "cpu" else GPU_SHAPES
    rounds, failed = 1 if o.rehearse else ROUNDS // 2 if o.quick else ROUNDS, False
    for shape in shapes[:1] if o.quick else shapes:
        for name in o.only if shape == shapes[0] else [name for name in o.only if name in AT_EVERY_SHAPE]:
            kind = kinds()[name]
            for fresh in (False, True) if kind.begins_dense else (False,):
                case = f"{name}{', as it begins' if fresh else ''} {tuple(shape)}"
                lines = common.attempt(case, partial(steps, name, kind, shape, o.device, rounds, fresh))
                found["steps"] += lines or []
                failed |= lines is None
    print()
    common.print_table([{k: v for k, v in line.items() if k != "contenders"} for line in found["steps"]])
    return failed


if __name__ == "__main__":
    sys.exit(main())
