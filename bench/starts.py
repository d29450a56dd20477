"""Where weights begin: at rows of the data, in its active subspace, or anywhere; what is left of it after a run.

    python -m bench.starts [--rows runs/recipe-rows] [--out DIR] [--quick]

Held-out FVU, and the latents that no held-out row fires, of the default recipe with each `SAEConfig.init`; and the same
without resampling, which otherwise begins anew what a start left dead. Rows of bench/recipe_rows.py. What the file of
results has already is not run again.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import common, recipe_rows
from bench.recipe_cells import Cell
from bench.recipe_runs import ours
from saefast.models.start import active_subspace

STARTS = ("rows", "active_subspace", "tied")
CELLS = (
    Cell("minilm-attention", 8192, 32, 200_000),
    Cell("minilm-4", 8192, 32, 200_000),
    Cell("causal", 4096, 32, 100_000),
    Cell("one-layer", 4096, 16, 100_000),
    Cell("world", 4096, 8, 100_000),
)
# Where nothing is resampled as well.
UNAIDED = CELLS[:1]
SAMPLE = 20_000


def cases(cells: Sequence[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Start by start, so that a run that is stopped has compared the first ones everywhere."""
    for init in STARTS:
        for cell in cells:
            yield cell, {"init": init}
            if cell in UNAIDED:
                yield cell, {"init": init, "resample_every": 0}


def named(cell: Cell, override: dict[str, Any]) -> dict[str, Any]:
    case = {"rows": cell.kind, "latents": cell.n_latents, "k": cell.k, "tokens": cell.tokens}
    return case | {"init": override["init"], "resampled": "resample_every" not in override}


def measured(rows: Path, cell: Cell, override: dict[str, Any]) -> dict[str, Any]:
    found = ours(rows, cell, override)
    first = np.load(recipe_rows.train_file(rows, cell.kind), mmap_mode="r")[:SAMPLE].astype(np.float32)
    return {
        "d_in": first.shape[1],
        "active": len(active_subspace(torch.from_numpy(first))),
        "FVU": round(found["fvu"], 4),
        "silent": round(found["silent"], 4),
        "CPU s": round(found["cpu_seconds"]),
    }


def there_already(out: Path) -> list[dict[str, Any]]:
    """What an earlier run that was stopped has measured."""
    files = [json.loads(file.read_text(encoding="utf-8")) for file in out.glob("*-starts.json")]
    return [result for file in files if file["device"] == common.device_name("cpu") for result in file["results"]]


def main(argv: Sequence[str] | None = None) -> int:
    options = common.arguments(
        "bench.starts", __doc__, argv, rows={"type": Path, "default": recipe_rows.FOLDER, "help": "folder of the rows"}
    )
    cells = [cell._replace(tokens=20_000, n_latents=1024) for cell in CELLS[-1:]] if options.quick else CELLS
    results = there_already(options.out)
    for cell, override in cases(cells):
        case = named(cell, override)
        if any(case.items() <= result.items() for result in results):
            continue
        recipe_rows.make(options.rows, cell.kind)
        results.append(case | measured(options.rows, cell, override))
        common.print_table(results[-1:])
        common.write_results(options.out, "cpu", "starts", results)
    common.print_table(results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
