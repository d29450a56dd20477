"""Why a JumpReLU SAE stays dense, and what makes it sparse: its L0 over a run, one setting after the other changed.

    python -m bench.jumprelu [--rows runs/recipe-rows] [--tokens 100000] [--quick]

Rows of MiniLM, of bench.recipe_rows. Writes a JSON file, and docs/jumprelu.png.
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import saefast
from bench import common, recipe_rows
from saefast.analysis.plots import GREY, figure
from saefast.models.sae import SAE

KIND, N_LATENTS = "minilm-4", 2048
PICTURE = Path("docs/jumprelu.png")
# What others begin with: thresholds and windows of 0.001, one rate for all, a target weighed with 1.
THRESHOLD, WINDOW = dict(jumprelu_threshold=0.001), dict(jumprelu_bandwidth=0.001)
ONE_RATE: dict[str, Any] = dict(jumprelu_threshold_lr=None)
PUBLISHED: dict[str, Any] = dict(jumprelu_penalty="target", sparsity_coef=1.0) | ONE_RATE | THRESHOLD | WINDOW
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "default": ("jumprelu", 32, {}),
    "thresholds learn at the rate of all else": ("jumprelu", 32, ONE_RATE),
    "thresholds begin at 0.001": ("jumprelu", 32, THRESHOLD),
    "windows are 0.001 wide": ("jumprelu", 32, WINDOW),
    "all three, (L0 / k - 1)²": ("jumprelu", 32, PUBLISHED),
    "BatchTopK": ("batchtopk", 32, {}),
    "default, k = 8": ("jumprelu", 8, {}),
    "BatchTopK, k = 8": ("batchtopk", 8, {}),
}


def run(rows: Tensor, heldout: Tensor, case: str, tokens: int) -> dict[str, Any]:
    """Trains one case; its L0 over the run, and what it is worth on held-out rows."""
    activation, k, changes = CASES[case]
    of_the_sae = {name: value for name, value in changes.items() if name == "jumprelu_bandwidth"}
    of_training = {name: value for name, value in changes.items() if name not in of_the_sae}
    config = saefast.SAEConfig(rows.shape[1], min(N_LATENTS, len(rows)), k, activation=activation, **of_the_sae)
    lines: list[dict[str, Any]] = []
    began = time.process_time()
    train = saefast.TrainConfig(n_tokens=tokens, log_every=5, **of_training)
    sae = saefast.train(rows, config, train, on_log=lines.append)
    taken = time.process_time() - began
    curve = [(line["step"], round(float(line["metrics/l0"]), 2)) for line in lines if "metrics/l0" in line]
    return dict(case=case, k=k, processor_s=round(taken, 1), **worth(sae, heldout), curve=curve)


@torch.no_grad()
def worth(sae: SAE, heldout: Tensor) -> dict[str, float]:
    on, active, squares = torch.zeros(sae.config.n_latents, dtype=torch.bool, device="cpu"), 0, 0.0
    for x in heldout.split(2048):
        out = sae(x)
        active += int((out.acts > 0).sum())
        squares += float((x - out.x_hat).double().square().sum())
        on[out.idx[out.acts > 0].long()] = True
    variance = float((heldout.double() - heldout.double().mean(0)).square().sum())
    silent = 1 - float(on.float().mean())
    return dict(l0=round(active / len(heldout), 2), fvu=round(squares / variance, 4), silent=round(silent, 4))


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    with figure(path, 7.5, 4.4) as fig:
        axis = fig.subplots()
        for one in found:
            if one["k"] == 32 and one["case"] != "BatchTopK":
                label = f"{one['case']}: FVU {one['fvu']:.3f}, L0 {one['l0']:.0f}"
                axis.plot(*zip(*one["curve"], strict=True), label=label)
        axis.axhline(32, color=GREY, lw=0.8, ls=":")
        axis.set(yscale="log", xlabel="step", ylabel="L0 of the batch", title="JumpReLU at k = 32")
        axis.legend(fontsize=8)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=Path("runs/recipe-rows"))
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=Path("bench/results"))
    parser.add_argument("--quick", action="store_true", help="two cases on few tokens, and no files")
    args = parser.parse_args(argv)
    if not recipe_rows.train_file(args.rows, KIND).is_file():
        recipe_rows.make(args.rows, KIND)
    rows = torch.from_numpy(np.load(recipe_rows.train_file(args.rows, KIND), mmap_mode="r")[: args.tokens].copy())
    heldout = torch.from_numpy(np.load(recipe_rows.heldout_file(args.rows, KIND))[:16384]).float()
    cases = itertools.islice(CASES, 2) if args.quick else CASES
    found = []
    for case in cases:
        found.append(run(rows, heldout, case, 4096 if args.quick else args.tokens))
        common.print_table([{name: value for name, value in found[-1].items() if name != "curve"}])
    if not args.quick:
        about = dict(rows=KIND, tokens=args.tokens, n_latents=N_LATENTS)
        device = common.device_name("cpu")
        print(
            "written:", common.write_named(args.out, device, "jumprelu", common.versions() | about, {"results": found})
        )
        draw(found, PICTURE)


if __name__ == "__main__":
    main()
