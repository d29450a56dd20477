"""One SAE for several numbers of latents a token, beside SAEs of each; and k that falls while an SAE is trained.

    python -m bench.budgets [--rows runs/recipe-rows] [--kind minilm-4] [--out DIR] [--quick]

The default recipe with HierarchicalTopK, with TopK at each k, and with k annealing: held-out FVU when a token has 8,
16, 32 or 64 latents (`SAE.with_k`), the latents that no held-out row fires at the SAE's own k, and processor time.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import common, recipe_rows
from bench.recipe_cells import Cell
from bench.recipe_runs import configs
from saefast.metrics.streaming import Reconstruction
from saefast.models.sae import SAE
from saefast.training.api import train

BUDGETS = (8, 16, 32, 64)
CASES: dict[str, dict[str, Any]] = {
    "TopK 8": {"k": 8},
    "TopK 16": {"k": 16},
    "TopK 32": {},
    "hierarchical (8, 16, 32)": {"hierarchical": (8, 16, 32)},
    'hierarchical "all"': {"hierarchical": "all"},
    "TopK 32, MultiTopK": {"multi_topk_coef": 0.125},
    "TopK 32, k_start 128": {"k_start": 128},
    "TopK 32, k_start 384": {"k_start": 384},
}
CHUNK = 1024


def fvu_at(sae: SAE, k: int, held: np.ndarray) -> float:
    found, cut = Reconstruction(), sae.with_k(k)
    for start in range(0, len(held), CHUNK):
        x = torch.from_numpy(held[start : start + CHUNK].astype(np.float32))
        found.update(x, cut(x).x_hat.float())
    return round(found.compute()["fvu"], 4)


def silent(sae: SAE, held: np.ndarray) -> float:
    fired = torch.zeros(sae.config.n_latents, dtype=torch.bool, device="cpu")
    for start in range(0, len(held), CHUNK):
        acts, idx = sae.encode_sparse(torch.from_numpy(held[start : start + CHUNK].astype(np.float32)))
        fired[idx[acts > 0].long()] = True
    return round(1 - float(fired.double().mean()), 4)


def measured(rows: Path, cell: Cell, label: str, override: dict[str, Any]) -> dict[str, Any]:
    settings = dict(override)
    sae_config, config = configs(rows, cell._replace(k=settings.pop("k", cell.k)), settings)
    begin = time.process_time()
    sae = train(recipe_rows.train_file(rows, cell.kind), sae_config, config, progress=False)
    taken = time.process_time() - begin
    held = np.load(recipe_rows.heldout_file(rows, cell.kind), mmap_mode="r")[:20_000]
    at = {f"FVU at {k}": fvu_at(sae, k, held) for k in BUDGETS}
    return {"trained": label, **at, "silent": silent(sae, held), "CPU s": round(taken)}


def main(argv: Sequence[str] | None = None) -> int:
    options = common.arguments(
        "bench.budgets", __doc__, argv,
        rows={"type": Path, "default": recipe_rows.FOLDER, "help": "folder of the rows"},
        kind={"default": "minilm-4", "choices": tuple(recipe_rows.KINDS), "help": "of rows"},
    )  # fmt: skip
    cell = Cell(options.kind, 512, 32, 20_000) if options.quick else Cell(options.kind, 4096, 32, 200_000)
    recipe_rows.make(options.rows, cell.kind)
    results: list[dict[str, Any]] = []
    for label, override in CASES.items():
        results.append(measured(options.rows, cell, label, override))
        common.print_table(results[-1:])
        # Runs take a while: what there is of them is kept.
        common.write_results(options.out, "cpu", "budgets", {"cell": cell._asdict(), "runs": results})
    common.print_table(results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
