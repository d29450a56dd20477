"""What harvests of text and of other items share: a model, the places that rows are taken from, whose rows they are."""

import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from saefast.data.shards import ACT_DTYPES, Identity
from saefast.errors import InputError
from saefast.harvest.capture import Runner, runner_for
from saefast.harvest.config import FORWARD, HarvestConfig, check_config, device_of, forward_dtype
from saefast.harvest.identity import dtype_of, identity_of, why_other
from saefast.harvest.kept import Overflow, multiple_of, say_overflow
from saefast.harvest.language_models import load_model
from saefast.harvest.sequences import Window


class HarvestBatch(NamedTuple):
    """Rows of one forward pass: per hook (n, d), row-aligned, with seq (n,) int64 and pos (n,) int64 of each.

    split: "train" or "heldout". counts (sequences,): rows kept of each sequence; dropped (sequences, len(DROPPED)):
    tokens left out, in the order of DROPPED. done: how many sequences of window.order() are now run. tokens: run,
    without padding. overflow: the first row that was not finite, if any, and where it stood.
    """

    rows: dict[str, Tensor]
    seq: Tensor
    pos: Tensor
    split: str
    counts: np.ndarray
    dropped: np.ndarray
    window: Window
    done: int
    tokens: int
    overflow: tuple[Overflow, str] | None = None


class Reader:
    """A model and the places in it whose rows are harvested, whatever it reads. `model` overrides the name in config.

    stored: rows will be stored in config.dtype, and have to be finite in it. Raises InputError for a model that does
    not load and an unknown hook.
    """

    tokenizer: Any = None
    kind = "text"

    def __init__(self, config: HarvestConfig, model: Any, stored: bool) -> None:
        check_config(config)
        self.config = config
        self.model_name = config.model if model is None else given_model_name(model)
        if model is None:
            model = load_for(config)
        self.model = model
        self.runner: Runner = runner_for(model, config.hooks)
        # int8 has a scale per row, and no overflow.
        self._stored = ACT_DTYPES[config.dtype] if stored and config.dtype != "int8" else None
        # Of each hook, over the first rows: known before the first batch.
        self._median_norms: dict[str, float] = {}
        self._says_identity, self._said_overflow = True, False

    @cached_property
    def identity(self) -> Identity:
        """Digests of the model and its tokenizer, as they are when it is first asked for."""
        return identity_of(self.model, self.tokenizer)

    def go_on(self, begun: Mapping[str, Any], folder: Any) -> None:
        """Takes over what an index.json that rows were committed to has fixed. For a new one nothing happens.

        Raises:
            InputError: its rows are another model's or tokenizer's, or kept by another rule for norms.
        """
        if not begun.get("cursor"):
            return
        check_same(begun.get("identity"), self.identity, folder)
        if begun.get("identity") is None:
            # Whose the earlier rows are is not known, so nothing is said of all.
            self._says_identity = False
            warnings.warn(
                f"{folder} was begun before digests of models were kept: that its rows are this model's is not checked",
                RuntimeWarning,
                stacklevel=3,
            )
        if self.config.max_norm_multiple is not None:
            if not (medians := begun.get("median_norms")):
                raise InputError(
                    f"{folder} was begun when max_norm_multiple went by each batch's median norm, which is now one for "
                    "the whole harvest: choose another folder"
                )
            self._median_norms = dict(medians)

    def model_facts(self) -> dict[str, Any]:
        """What the index says of the model and of the rows that were kept."""
        return {
            "model": self.model_name,
            "revision": getattr(getattr(self.model, "config", None), "_commit_hash", None) or self.config.revision,
            "model_class": type(self.model).__name__,
            "forward": dtype_of(self.model),
            "max_norm_multiple": self.config.max_norm_multiple,
            **({"median_norms": self._median_norms} if self._median_norms else {}),
            **({"identity": self.identity} if self._says_identity else {}),
        }

    def limits(self) -> dict[str, float]:
        """The largest norm at each hook that is kept; empty where all are, or none is known yet."""
        multiple = multiple_of(self.config.max_norm_multiple or "auto")
        return {hook: multiple * median for hook, median in self._median_norms.items()}

    def _say_overflow(self, batch: HarvestBatch) -> None:
        """Once: a warning about rows that are not finite."""
        if batch.overflow is not None and not self._said_overflow:
            self._said_overflow = True
            say_overflow(*batch.overflow, dtype_of(self.model), self._stored)


def check_same(kept: Mapping[str, Any] | None, now: Mapping[str, Any], folder: Any) -> None:
    """Raises InputError where what a folder's index says of its model and tokenizer is not what is there now."""
    if kept is not None and (why := why_other(kept, now)):
        raise InputError(f"{folder} was harvested from another model than this one, {why}: choose another folder")


def load_for(config: HarvestConfig, place: str | Path | None = None) -> nn.Module:
    """The model of a config, or the one at another place, as a harvest runs it."""
    device = device_of(config.device)
    return load_model(
        config.model if place is None else place,
        revision=config.revision if place is None else None,
        dtype=FORWARD[forward_dtype(config.forward, device)],
        device=device,
    )


def given_model_name(model: Any) -> str:
    """A name for a model that was given as an object."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    return str(name or getattr(getattr(model, "cfg", None), "model_name", "") or type(model).__name__)


def without_first(batch: HarvestBatch, n: int) -> HarvestBatch:
    """The batch without the rows of its first n sequences."""
    first = int(batch.counts[:n].sum())
    return batch._replace(
        rows={name: values[first:] for name, values in batch.rows.items()},
        seq=batch.seq[first:],
        pos=batch.pos[first:],
        counts=batch.counts[n:],
        dropped=batch.dropped[n:],
    )
