"""What fine-tuning through the language model gains, on the run that `saefast demo --lm` leaves: KL, loss and FVU.

    python -m bench.finetune [--run runs/demo-lm] [--tokens 20480] [--heldout 4000] [--cells default ...] [--out DIR]

Cells: the default; each share of the loss alone; other learning rates. Every one begins with the same SAE and reads the
same text in the same order; figures are of held-out text and rows. What a results file of the same sizes has already is
not measured again.
"""

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench import common
from saefast.analysis.evaluation import Evaluation, evaluate_run, load_finished
from saefast.data.shards import ShardFolder
from saefast.harvest.harvested_model import causal_language_model
from saefast.training.finetune import finetune
from saefast.training.finetune_config import FinetuneConfig, chosen

RUN = common.ROOT / "runs" / "demo-lm"
LM, ROWS = ("kl_sae", "ce_clean", "ce_sae", "loss_recovered"), ("fvu", "fvu_ordinary", "l0", "dead_share")
# What differs from the default; "rate" multiplies its learning rate.
CELLS: dict[str, dict[str, float]] = {
    "default": {},
    "reconstruction alone": {"kl_share": 0.0},
    "KL alone": {"kl_share": 1.0},
    "a quarter of the rate": {"rate": 0.25},
    "5.8 times the rate": {"rate": 5.8020833},
}


def figures(found: Evaluation) -> dict[str, float]:
    return {name: found.lm[name] for name in LM} | {name: found.metrics[name] for name in ROWS}


def measured(run: Path, model: Any, tokens: int, heldout: int, change: dict[str, float] | None) -> dict[str, Any]:
    """A cell's figures; of the SAE as it is where nothing is changed."""
    folder = ShardFolder(run / "activations")
    asked = {"data": str(folder.path), "lm_tokens": heldout, "model": model, "write": False}
    if change is None:
        return figures(evaluate_run(run, **asked))
    sae = load_finished(run)
    config = chosen(FinetuneConfig(n_tokens=tokens, kl_share=change.get("kl_share", 0.5)), sae.config, tokens)
    config = replace(config, lr=config.lr * change.get("rate", 1.0))
    begun = time.perf_counter()
    tuned = finetune(sae, model, folder, config, progress=False)
    seconds = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as there:
        tuned.save(there)
        found = figures(evaluate_run(there, **asked))
    return found | {"lr": config.lr, "steps": config.steps, "kl_share": config.kl_share, "seconds": seconds}


def table(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a cell, and by how much KL and FVU changed."""
    before = results["before"]
    return [
        {
            "cell": name,
            "lr": found.get("lr"),
            "KL": round(found["kl_sae"], 4),
            "against before": f"{found['kl_sae'] / before['kl_sae'] - 1:+.1%}",
            "loss lost": round(found["ce_sae"] - found["ce_clean"], 4),
            "FVU": round(found["fvu"], 4),
            "of ordinary rows": round(found["fvu_ordinary"], 4),
            "FVU against before": f"{found['fvu_ordinary'] / before['fvu_ordinary'] - 1:+.1%}",
            "L0": round(found["l0"], 2),
        }
        for name, found in results.items()
    ]


def known(path: Path, sizes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The cells that a results file of these sizes has."""
    if not path.exists():
        return {}
    kept = json.loads(path.read_text(encoding="utf-8"))["results"]
    return dict(kept["cells"]) if kept["sizes"] == sizes else {}


def main(argv: Sequence[str] | None = None) -> None:
    options = common.arguments(
        "bench.finetune", __doc__, argv,
        run=dict(type=Path, default=RUN), tokens=dict(type=int, default=20_480),
        heldout=dict(type=int, default=4000), cells=dict(nargs="*", default=list(CELLS), choices=list(CELLS)),
    )  # fmt: skip
    tokens, heldout = (1024, 300) if options.quick or options.rehearse else (options.tokens, options.heldout)
    sizes = {"tokens": tokens, "heldout": heldout}
    label = "finetune"
    file = options.out / f"{common.file_name(common.device_name(options.device), label)}"
    results = known(file, sizes)
    model = causal_language_model(ShardFolder(options.run / "activations").index, device=options.device)
    for name in ("before", *options.cells):
        if name not in results:
            change = None if name == "before" else CELLS[name]
            found = common.attempt(name, partial(measured, options.run, model, tokens, heldout, change))
            if found is not None:
                results[name] = found
                common.write_results(options.out, options.device, label, {"sizes": sizes, "cells": results})
                common.print_table(table(results))


if __name__ == "__main__":
    main()
