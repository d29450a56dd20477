"""What `bench.recipe` runs: cells of a grid that is sampled rather than filled, and other settings to try at each."""

import random
from collections.abc import Mapping
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """kind: of rows (bench/recipe_rows.py)."""

    kind: str
    n_latents: int
    k: int
    tokens: int
    seed: int = 0

    @property
    def label(self) -> str:
        return f"{self.kind}, L {self.n_latents:,}, k {self.k}, {self.tokens / 1e6:g}M" + f", seed {self.seed}" * (
            self.seed > 0
        )


CELLS = (
    Cell("minilm-4", 2048, 32, 400_000),
    Cell("minilm-4", 8192, 32, 400_000),
    Cell("minilm-4", 8192, 32, 400_000, seed=1),
    Cell("minilm-4", 8192, 64, 400_000),
    Cell("minilm-4", 32768, 64, 400_000),
    Cell("minilm-2", 2048, 16, 1_200_000, seed=1),
    Cell("minilm-2", 8192, 32, 400_000),
    Cell("causal", 4096, 64, 200_000),
    Cell("causal", 4096, 32, 400_000),
    Cell("causal", 4096, 32, 400_000, seed=1),
    Cell("causal", 16384, 32, 400_000),
    Cell("one-layer", 1024, 16, 400_000),
    Cell("one-layer", 1024, 16, 400_000, seed=1),
    Cell("one-layer", 4096, 16, 400_000),
    Cell("world", 1024, 8, 400_000),
    Cell("world", 4096, 8, 400_000),
    Cell("world", 4096, 8, 2_000_000, seed=1),
    Cell("world", 4096, 8, 5_000_000),
    Cell("minilm-4", 131072, 64, 200_000),
)
QUICK = tuple(cell for cell in CELLS if cell.n_latents <= 2048 and cell.tokens <= 400_000)
# Beyond so many latents times tokens a run takes a minute or more, and a cell gets no variants but ALWAYS.
LIGHT = 6e9

# Every cell tries these; of the others, some.
ALWAYS = ("lr × 1/2", "lr × 2")
# What the same rule has to suit as well; at cells that are quick.
LIKE_DEFAULT: dict[str, dict[str, Any]] = {"adam-lean": {"optimizer": "adam-lean"}, "autograd": {"engine": "autograd"}}
INITS = ("tied", "tied_0.1", "kaiming")
# What hand-set runs of such lengths have used: points that do not depend on what the default chooses.
BY_HAND: dict[str, dict[str, Any]] = {
    "batch 2048, lr 4e-3, tied_0.1": {"batch_size": 2048, "lr": 4e-3, "init": "tied_0.1"},
    "batch 1024, lr 2e-3": {"batch_size": 1024, "lr": 2e-3},
    "batch 512, lr 2e-3, tied_0.1": {"batch_size": 512, "lr": 2e-3, "init": "tied_0.1"},
    "batch 256, lr 1e-3": {"batch_size": 256, "lr": 1e-3},
}


def variants(cell: Cell, default: Mapping[str, Any], others: int) -> dict[str, dict[str, Any]]:
    """What to override at a cell, by name: ALWAYS, at a light one as many `others`, drawn by the cell, and at a quick
    one LIKE_DEFAULT.

    default: the settings that the default chose there, of SAEConfig and TrainConfig.
    """
    every = all_variants(cell, default)
    drawn = random.Random(repr(cell)).sample([name for name in every if name not in ALWAYS], len(every) - len(ALWAYS))
    light = cell.n_latents * cell.tokens < LIGHT
    found = {name: every[name] for name in (*ALWAYS, *drawn[: others * light])}
    return found | (LIKE_DEFAULT if cell in QUICK else {})


def all_variants(cell: Cell, default: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    lr, batch = float(default["lr"]), int(default["batch_size"])
    steps = max(1, cell.tokens // batch)
    tenth = max(1, round(0.1 * steps))
    found: dict[str, dict[str, Any]] = {
        **{f"lr × {name}": {"lr": lr * factor} for name, factor in FACTORS.items()},
        # A larger batch at the same rate, and one that takes the rate along.
        "batch × 1/2": {"batch_size": max(1, batch // 2), "lr": lr},
        "batch × 2": {"batch_size": 2 * batch, "lr": lr},
        "batch × 1/2, lr × 1/2": {"batch_size": max(1, batch // 2), "lr": lr / 2},
        "batch × 2, lr × 2": {"batch_size": 2 * batch, "lr": 2 * lr},
        "no warm-up": {"lr_warmup_steps": 0},
        "warm-up over a tenth": {"lr_warmup_steps": tenth},
        **{f"decay over {share:g}": {"lr_decay_share": share} for share in (0.2, 0.5, 1.0)},
        **{f"init {init}": {"init": init} for init in INITS},
        "no resampling": {"resample_every": 0},
        "AuxK, no resampling": {"resample_every": 0, "auxk_coef": 1 / 32},
        "beta1 0.9": {"beta1": 0.9},
        **BY_HAND,
    }
    return {name: values for name, values in found.items() if any(default.get(key) != values[key] for key in values)}


FACTORS = {"1/4": 0.25, "1/2": 0.5, "2": 2.0, "4": 4.0}
