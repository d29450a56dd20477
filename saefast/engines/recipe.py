"""What the recipe chooses where TrainConfig leaves it open, from the sizes of the SAE and the number of tokens.

docs/recipe.md says how each rule was found, and bench/recipe.py measures them anew.
"""

import dataclasses
import math
from typing import Any

from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.typed import typed


class Recipe(TrainConfig):
    """A TrainConfig whose every number is chosen: what a run trains by, and what its config.json holds."""

    n_tokens: int
    n_epochs: int
    batch_size: int
    lr: float
    lr_warmup_steps: int
    dead_after: int
    resample_every: int
    init_rows: int

    @property
    def steps(self) -> int:
        """Optimiser steps of the run: whole batches in n_tokens, at least one."""
        return max(self.n_tokens // self.batch_size, 1)


# What `choose` fills in.
CHOSEN = tuple(Recipe.__annotations__)

# Firings that a latent comes alive with. Data is gone through again until an average one has them, up to so many times.
FIRINGS, MOST_EPOCHS = 1000, 4
# Steps that a run should have, and the sizes of a batch that they are bought with.
STEPS, SMALLEST_BATCH, LARGEST_BATCH = 800, 256, 4096
# Of the learning rate, see `_lr`.
RATE, FEWEST, WARMUP_SHARE = 2.2, 8192, 0.05
# A latent is dead that has missed so many firings of an average one, and was silent for such a share of the run: one
# for something rare is not given up.
MISSED, SILENT_SHARE = 25, 1 / 32
RESAMPLE_EVERY = 10
INIT_ROWS = 8192


@typed
def choose(sae: SAEConfig, train: TrainConfig, n_rows: int | None = None, *, total_steps: int | None = None) -> Recipe:
    """The TrainConfig with a number wherever it holds None.

    Args:
        n_rows: of the data, where that is known; n_tokens None is so many, n_epochs times.
        total_steps: of the run, for a caller that counts in steps and not in tokens.

    Raises:
        InputError: the number of tokens follows from nothing.
    """
    if isinstance(train, Recipe):
        return train
    # Tokens between two firings of an average latent.
    interval = sae.n_latents / sae.k
    n_epochs = _n_epochs(interval, train, n_rows)
    n_tokens = _n_tokens(train, n_rows, n_epochs, total_steps)
    batch = train.batch_size if train.batch_size is not None else _batch_size(n_tokens)
    steps = max(n_tokens // batch, 1)
    chosen = {
        "n_epochs": n_epochs,
        "n_tokens": n_tokens,
        "batch_size": batch,
        "lr": _lr(sae, train, n_tokens),
        "lr_warmup_steps": round(WARMUP_SHARE * steps),
        "dead_after": _dead_after(interval, train, n_tokens, batch),
        "resample_every": RESAMPLE_EVERY,
        "init_rows": max(INIT_ROWS, batch),
    }
    given = {field.name: getattr(train, field.name) for field in dataclasses.fields(train)}
    return Recipe(**given | {name: value for name, value in chosen.items() if given[name] is None})


def _n_epochs(interval: float, train: TrainConfig, n_rows: int | None) -> int:
    if train.n_tokens is not None or n_rows is None:
        return 1
    return min(max(math.ceil(FIRINGS * interval / n_rows), 1), MOST_EPOCHS)


def _n_tokens(train: TrainConfig, n_rows: int | None, n_epochs: int, total_steps: int | None) -> int:
    if train.n_tokens is not None:
        return train.n_tokens
    if total_steps is not None:
        return total_steps * (train.batch_size or LARGEST_BATCH)
    if n_rows is None:
        raise InputError(
            "n_tokens is None and the data has no known length: set n_tokens, which the learning rate's decay is laid "
            "out over"
        )
    return n_rows * (train.n_epochs or n_epochs)


def _batch_size(n_tokens: int) -> int:
    """The power of two that makes at least STEPS steps of the run, within bounds."""
    size = 2 ** int(math.log2(max(n_tokens // STEPS, 1)))
    return min(max(size, SMALLEST_BATCH), LARGEST_BATCH, n_tokens)


def _lr(sae: SAEConfig, train: TrainConfig, n_tokens: int) -> float:
    """An entry of a unit row is 1/√d_in, so that is what a step is measured by; the rest fits the best rates found.

    Latents that the tokens are too few for do not come alive, and do not count. Less than FEWEST was not measured.
    """
    if train.lr_rule == "latents":
        return 2e-4 / (sae.n_latents / 2**14) ** 0.5
    alive = min(sae.n_latents, n_tokens * sae.k / FIRINGS)
    return RATE / (sae.d_in**0.5 * max(alive * sae.k, FEWEST) ** (1 / 3))


def _dead_after(interval: float, train: TrainConfig, n_tokens: int, batch: int) -> int:
    tokens = max(MISSED * interval, SILENT_SHARE * n_tokens, batch)
    return round(tokens if train.dead_unit == "tokens" else tokens / batch)


def as_begun(train: TrainConfig, recorded: dict[str, Any]) -> TrainConfig:
    """A TrainConfig for going on with a run: what it leaves open stays as the run's own settings have it.

    Args:
        recorded: the run's settings, of `TrainConfig.to_dict`.
    """
    left_open = [name for name in CHOSEN if getattr(train, name) is None]
    if train.n_epochs is not None and "n_tokens" in left_open:
        left_open.remove("n_tokens")
    values: dict[str, Any] = {name: recorded.get(name) for name in left_open}
    return dataclasses.replace(train, **values)


def described(recipe: Recipe) -> str:
    """What was chosen, in one line for people."""
    return (
        f"{recipe.n_tokens:,} tokens in {recipe.steps:,} steps of {recipe.batch_size:,}, lr {recipe.lr:.2g}, "
        f"{recipe.lr_warmup_steps} steps of warm-up, dead after {recipe.dead_after:,} {recipe.dead_unit}"
    )


def lr_factor(step: int, total_steps: int, config: Recipe) -> float:
    """The learning rate of optimiser step `step` (from 0) as a share of the peak rate."""
    warmup = config.lr_warmup_steps
    if step < warmup:
        return step / warmup if config.lr_warmup_from_zero else (step + 1) / warmup
    start = config.lr_decay_start
    if start is None:
        start = total_steps - round(config.lr_decay_share * total_steps)
    if start < 0 or step < (start := max(start, warmup)) or start >= total_steps:
        return 1.0
    left = max(total_steps - step, 0) / (total_steps - start)
    return config.lr_end + (1 - config.lr_end) * left
