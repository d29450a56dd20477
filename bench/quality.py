"""What speed costs in quality: the same tokens through the autograd engine and the fused one, three seeds each.

    python -m bench.quality [--data runs/demo/activations] [--steps 600] [--seeds 3] [--out DIR] [--quick]
    python -m bench.quality --activation batchtopk [--matryoshka 512 2048 8192]

Data: the demo's activations (`saefast demo` leaves them in runs/demo/activations); without them they are harvested
first. Recipe: SETTINGS, at a high learning rate, and for TopK alone at a low one. Reported: FVU on the
held-out share, the dead share as training counts it (silent for the last `dead_after` tokens), and latents silent on
the held-out share, which is ten times shorter.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from bench import common
from bench.step import KIND_OPTIONS, TOPK, Kind
from saefast.data.opening import open_source
from saefast.engines.config import TrainConfig
from saefast.engines.recipe import choose
from saefast.metrics.streaming import Reconstruction
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.training.api import train
from saefast.training.loop import Line

DATA = common.ROOT / "runs" / "demo" / "activations"
N_LATENTS, K, BATCH = 8192, 32, 2048
# Fixed, so that figures of different days compare. What the default chooses is measured by bench.recipe.
SAE_SETTINGS: dict[str, Any] = {"init": "tied"}
SETTINGS: dict[str, Any] = {
    "batch_size": BATCH, "lr_rule": "latents", "lr_warmup_steps": 20, "lr_decay_share": 0.5, "dead_after": 200_000,
    "auxk_coef": 1 / 32, "resample_every": 0, "fit_encoder": False, "init_rows": BATCH, "normalize": "sqrt_d",
    "max_norm_multiple": None,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "autograd, dense Adam": {"engine": "autograd"},
    "fused adam": {"engine": "fused"},
    "fused adam-lean": {"engine": "fused", "optimizer": "adam-lean"},
    # Why W_enc is not settled more rarely: rows that wait longer stay dead more often.
    "fused adam, settled every 16": {"engine": "fused", "settle_every": 16},
}
RATES = (("a high learning rate", 2e-3), ("a low learning rate", None))
# How much worse than the dense run the held-out FVU may be.
ALLOWED = {"fused adam": 0.01, "fused adam-lean": 0.02}


def measure(sae: SAE, data: Path) -> tuple[float, float]:
    """Held-out FVU, and the share of latents that fire on none of the held-out tokens."""
    found, fired = Reconstruction(), torch.zeros(N_LATENTS, dtype=torch.bool)
    with torch.no_grad():
        for batch in open_source(data).heldout(BATCH):
            x = batch["x"]
            # Dense: codes of every kind of SAE have this form in common.
            f = sae.encode(x)
            found.update(x, sae.decode(f).to(x.dtype))
            fired |= (f > 0).any(0)
    return found.compute()["fvu"], 1 - float(fired.float().mean())


def one(data: Path, config: TrainConfig, kind: Kind) -> dict[str, Any]:
    begin = time.perf_counter()
    d_in = open_source(data).d_in
    lines: list[Line] = []
    sae_config = SAEConfig(d_in=d_in, n_latents=N_LATENTS, k=K, **SAE_SETTINGS, **kind.fields())
    sae = train(data, sae_config, config, progress=False, on_log=lines.append)
    seconds = time.perf_counter() - begin
    fvu, silent = measure(sae, data)
    return {"seed": config.seed, "fvu": fvu, "dead": lines[-1]["dead_share"], "silent": silent, "seconds": seconds}


def summary(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One line a variant: means over seeds, and against the dense run."""
    base = mean(run["fvu"] for run in runs["autograd, dense Adam"])
    return [
        {
            "what": name,
            "held-out FVU": round(mean(run["fvu"] for run in found), 5),
            "by seed": " ".join(f"{run['fvu']:.5f}" for run in found),
            "FVU against dense": f"{mean(run['fvu'] for run in found) / base - 1:+.2%}",
            "dead": f"{mean(run['dead'] for run in found):.2%}",
            "silent": f"{mean(run['silent'] for run in found):.2%}",
            "allowed": f"{ALLOWED[name]:+.0%}" if name in ALLOWED else "",
            "seconds a run": round(mean(run["seconds"] for run in found)),
        }
        for name, found in runs.items()
    ]


def harvest(data: Path) -> None:
    from saefast.cli.harvest import HarvestArgs, run_harvest

    print(f"{data} is not there: harvesting it, as `saefast demo` would")
    run_harvest(HarvestArgs(out=data))


def main(argv: Sequence[str] | None = None) -> None:
    options = common.arguments(
        "bench.quality", __doc__, argv,
        data=dict(type=Path, default=DATA), steps=dict(type=int, default=600), seeds=dict(type=int, default=3),
        **KIND_OPTIONS,
    )  # fmt: skip
    if not (options.data / "index.json").exists():
        harvest(options.data)
    steps, seeds = (40, 1) if options.quick else (options.steps, options.seeds)
    kind, results = Kind(options.activation, tuple(options.matryoshka)), {}
    # All of this for TopK alone; another kind of SAE gets the first two.
    rates = RATES if kind == TOPK else RATES[:1]
    variants = VARIANTS if kind == TOPK else dict(list(VARIANTS.items())[:2])
    for label, lr in rates:
        config = TrainConfig(
            n_tokens=steps * BATCH, lr=lr, eval_every=0, save_every=0, device=options.device, **SETTINGS
        )
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
        for seed in range(seeds):
            for name, change in variants.items():
                runs[name].append(one(options.data, replace(config, seed=seed, **change), kind))
                print(f"{label}: {name} {runs[name][-1]}", file=sys.stderr, flush=True)
        table = summary(runs)
        lr = choose(SAEConfig(d_in=1, n_latents=N_LATENTS, k=K), config).lr
        print(f"\n{label}: lr = {lr:.2g}, {steps} steps of {BATCH} tokens, {seeds} seeds")
        common.print_table(table)
        results[label] = {"lr": lr, "steps": steps, "summary": table, "runs": runs}
        common.write_results(options.out, options.device, kind.label("quality"), results)


if __name__ == "__main__":
    main()
