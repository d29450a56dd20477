"""Quality at equal tokens: held-out FVU and dead share of the fused step against the plain dense one.

    python -m bench.quality [--device cpu|cuda] [--out DIR] [--quick] [--no-check] [--data FOLDER]

Trains the demo's SAE on the demo's activations (harvested first where they are not there) with engine="autograd", with
the fused step's adam and with adam-lean, from the same seeds, and evaluates all held-out rows in float64.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from bench import common
from saefast.cli_demo import DemoArgs, recipe
from saefast.cli_harvest import HarvestArgs, run_harvest
from saefast.data.sources import open_source
from saefast.evaluate import evaluate
from saefast.recipe import TrainConfig
from saefast.sae import SAEConfig
from saefast.train import train

KINDS = {
    "autograd, dense Adam": {"engine": "autograd"},
    "fused, adam": {"engine": "fused"},
    "fused, adam-lean": {"engine": "fused", "optimizer": "adam-lean"},
}
BASE = "autograd, dense Adam"


def run(data: Path, kind: str, seed: int, device: str, quick: bool) -> dict[str, Any]:
    """One training and its evaluation."""
    source = open_source(data, shuffle="mapped")
    values = recipe(n_tokens=(20 if quick else 200) * 2048).to_dict()
    config = TrainConfig.from_dict(
        values | KINDS[kind] | {"seed": seed, "device": device, "save_every": 0, "eval_every": 0}
    )
    sae = train(source, SAEConfig(d_in=source.d_in, n_latents=1024 if quick else 8192, k=32), config, progress=False)
    metrics = evaluate(sae, source.heldout(4096, device)).compute()
    row = {
        "what": kind,
        "seed": seed,
        "heldout_fvu": metrics["fvu"],
        "dead_share": metrics["dead_share"],
        "l0": metrics["l0"],
    }
    print(f"{kind}, seed {seed}: FVU {row['heldout_fvu']:.5f}, dead {row['dead_share']:.3%}", flush=True)
    return row


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and each kind's FVU over the dense one's."""
    base = mean(row["heldout_fvu"] for row in rows if row["what"] == BASE)
    out = []
    for kind in KINDS:
        mine = [row for row in rows if row["what"] == kind]
        fvu = mean(row["heldout_fvu"] for row in mine)
        out.append(
            {
                "what": kind,
                "seeds": len(mine),
                "heldout_fvu": fvu,
                "over dense": fvu / base,
                "dead_share": mean(row["dead_share"] for row in mine),
            }
        )
    return out


def main(argv: Sequence[str] | None = None) -> int:
    default = DemoArgs.out / "activations"
    args = common.arguments("bench.quality", __doc__, argv, data={"type": Path, "default": default})
    if not args.no_check:
        common.check(args.device, "test_step.py")
    run_harvest(HarvestArgs(out=args.data))
    rows = [
        run(args.data, kind, seed, args.device, args.quick) for seed in range(1 if args.quick else 3) for kind in KINDS
    ]
    table = summary(rows)
    common.print_table(table)
    common.write_results(args.out, args.device, "quality", {"summary": table, "runs": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
