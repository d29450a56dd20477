"""FinetuneConfig: how a trained SAE is fine-tuned through its language model."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from saefast.engines.config import TrainConfig
from saefast.engines.recipe import Recipe, choose
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.outliers import check_multiple
from saefast.schema import Seed, check, check_fields

# Text is read once, but no more than this (Karvonen's figure).
MOST_TOKENS = 25_000_000
# Steps that a run should have, and the sizes of a batch that they are bought with.
STEPS, SMALLEST_BATCH, LARGEST_BATCH = 256, 512, 8192
# Of the peak rate with which a long run would train the SAE, however few tokens this one has: the weights have come to
# rest. For 16,384 latents of 2,304 numbers, k = 80, it makes 4e-5; Karvonen's code has 5e-5.
RATE_SHARE, LONG = 0.1, 1 << 40
WARMUP_SHARE = 0.05


@dataclass(frozen=True)
class FinetuneConfig:
    """Settings of `finetune()`. What is None is chosen when a run begins; docs/finetune.md says how it was found.

    Attributes:
        n_tokens: text that the model reads, padding included; None is what there is, once, at most 25 million tokens.
        batch_tokens: tokens per step, padding included; None chooses so that there are about 256 steps.
        lr: peak learning rate, reached after 5 % of the steps, from where it falls to 0; None is a tenth of
            the one that a long run would train such an SAE with.
        kl_share: share of the loss that the KL divergence has, both parts being brought to the size of the
            reconstruction's; 0 trains on reconstruction alone, 1 on KL alone.
        max_norm_multiple: rows farther from the centre than this many times the median distance, both of the first
            rows, keep their own activations and train nothing, as in training. "auto" is 5, unless more than 2 % are
            beyond; None leaves nothing out.
        seed: of the order of the text.
        log_every: steps between lines of metrics.jsonl; 0 is never.
        save_every: steps between checkpoints; 0 is never.
    """

    n_tokens: int | None = None
    batch_tokens: int | None = None
    lr: float | None = None
    kl_share: float = 0.5
    max_norm_multiple: float | Literal["auto"] | None = "auto"
    seed: Seed = 0
    log_every: int = 10
    save_every: int = 100

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("n_tokens", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**63:
                raise InputError(f"{name} is {value}: expected at least 1 and less than 2**63")
        for name in ("log_every", "save_every"):
            if not 0 <= getattr(self, name) < 2**63:
                raise InputError(f"{name} is {getattr(self, name)}: expected at least 0 and less than 2**63")
        if self.lr is not None and not 0 <= self.lr < math.inf:
            raise InputError(f"lr is {self.lr!r}: expected at least 0, and finite")
        if not 0 <= self.kl_share <= 1:
            raise InputError(f"kl_share is {self.kl_share!r}: expected a number between 0 and 1")
        check_multiple(self.max_norm_multiple)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "FinetuneConfig":
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(check(values, dict[str, Any], "fine-tuning config").keys() - known):
            raise InputError(f"fine-tuning config has unknown keys {unknown}: expected some of {sorted(known)}")
        return cls(**values)


class Chosen(FinetuneConfig):
    """A FinetuneConfig whose every number is chosen."""

    n_tokens: int
    batch_tokens: int
    lr: float

    @property
    def steps(self) -> int:
        """Optimiser steps: whole batches in n_tokens, at least one."""
        return max(self.n_tokens // self.batch_tokens, 1)


def chosen(config: FinetuneConfig, sae: SAEConfig, n_tokens: int) -> Chosen:
    """The config with a number wherever it holds None.

    Args:
        n_tokens: of the text, where the config does not say how many are to be read.
    """
    tokens = n_tokens if config.n_tokens is None else config.n_tokens
    batch, lr = config.batch_tokens, config.lr
    if batch is None:
        batch = min(max(2 ** int(math.log2(max(tokens // STEPS, 1))), SMALLEST_BATCH), LARGEST_BATCH, tokens)
    if lr is None:
        lr = RATE_SHARE * choose(sae, TrainConfig(n_tokens=LONG)).lr
    return Chosen(**config.to_dict() | {"n_tokens": tokens, "batch_tokens": batch, "lr": lr})


def recipe(config: Chosen, sae: SAEConfig, train: TrainConfig) -> Recipe:
    """How the engine takes the steps: dense Adam on whatever the architecture's loss is made of, nothing begun anew."""
    changed: dict[str, Any] = {
        "n_tokens": config.n_tokens,
        "batch_size": config.batch_tokens,
        "seed": config.seed,
        "engine": "autograd",
        "optimizer": "adam",
        "lr": config.lr,
        "beta1": 0.9,
        "beta2": 0.999,
        "lr_warmup_steps": round(WARMUP_SHARE * config.steps),
        "lr_warmup_from_zero": False,
        "lr_decay_start": 0,
        "lr_end": 0.0,
        "loss": "fvu",
        "max_norm_multiple": config.max_norm_multiple,
        "max_grad_norm": None,
        "auxk_coef": 0.0,
        "resample_every": 0,
        "ema_decay": None,
        "reproduce_bugs": False,
    }
    # Rates that parameters of an architecture have for themselves fall as lr does.
    slower = config.lr / choose(sae, TrainConfig(n_tokens=LONG)).lr
    own = {f.name: getattr(train, f.name) for f in dataclasses.fields(train) if f.name.endswith("_lr")}
    changed |= {name: rate * slower for name, rate in own.items() if rate is not None and slower > 0}
    if not sae.unit_norm_decoder:
        changed |= {"decoder_norm": "never", "project_decoder_grad": False}
    return choose(sae, dataclasses.replace(train, **changed), total_steps=config.steps)
