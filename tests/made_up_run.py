"""What a run leaves in its folder, made up: latents.db, metrics.jsonl and eval.json, with no model behind them."""

import json
from pathlib import Path
from typing import Any

from latents_db import make_db


def make_run(folder: Path, n_latents: int = 130, n_sequences: int = 30, **meta: Any) -> Path:
    """A run that has ended. meta: as make_db takes them."""
    make_db(folder, n_latents, n_sequences, **meta)
    write_metrics(folder, 60, 60)
    figures = {"metrics": {"fvu": 0.21, "l0": 32.0, "dead_share": 0.01}, "about": {"heldout_rows": 7244}}
    (folder / "eval.json").write_text(json.dumps(figures), encoding="utf-8")
    return folder


def write_metrics(folder: Path, lines: int, of: int) -> None:
    """metrics.jsonl of a run that has done `lines` of `of` steps."""
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, lines + 1):
            line = {
                "step": step,
                "tokens": 256 * step,
                "seconds": 0.5 * step,
                "details/total_steps": of,
                "fvu": 0.2 + 0.7 / step,
                "losses/overall_loss": 0.3 + 1 / step,
                "metrics/l0": 32.0,
                "sparsity/silent_share": 0.1 / step,
                "details/current_learning_rate": 1e-3 * (1 - step / of),
                "tokens_per_second": 500.0 + step,
            }
            if step % 20 == 0:
                line |= {"heldout/fvu": 0.25 + 0.7 / step, "heldout/rows": 1000}
            file.write(json.dumps(line) + "\n")
