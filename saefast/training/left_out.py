"""LeftOut: rows far outside all others, which a run does not train on.

Where a batch holds some, its other rows take their places, from the first on: every step has as many rows as the recipe
says, nothing has to be drawn anew, and a GPU need not be waited for. A batch without such rows is trained on as it is.
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from saefast.data.source import Batch, X, n_rows_of
from saefast.errors import InputError
from saefast.metrics.ordinary import Ordinary
from saefast.models.outliers import FAR, FIRST_ROWS, MOST, Multiple, ordinary_rows, variance_of_few

# "auto" expects MOST of the rows at most: where several times as many are left out, the data is no longer what it was.
_TOO_MANY = 5 * MOST


class LeftOut:
    """What TrainConfig.max_norm_multiple leaves out of a run's batches.

    Attributes:
        ordinary: by tensor of a batch, which of its rows are ordinary, unscaled. Fixed by `look_at` on the first rows;
            with multiple None it is what "auto" says, for figures alone.
    """

    def __init__(self, multiple: Multiple) -> None:
        self.multiple = multiple
        self.ordinary: dict[str, Ordinary] = {}
        self._n_left_out: Tensor | int = 0
        self._n_seen = 0
        self._warned = False

    def look_at(self, first: Batch) -> Batch:
        """Fixes on the first rows of a run which are ordinary. -> Those of them that are trained on.

        Warns where a few of them hold most of the variance.
        """
        self.ordinary = {
            name: ordinary_rows(rows, "auto" if self.multiple is None else self.multiple)
            for name, rows in first.items()
        }
        for name, rows in first.items():
            share, held = variance_of_few(rows)
            if held > 0.5:
                of = "" if name == X else f" in {name!r}"
                few = f"{share:.2%} of the first {min(len(rows), FIRST_ROWS):,} rows{of}"
                what = f"{few} hold {held:.2%} of their variance: {self._what_is_done(name)}"
                warnings.warn(what, RuntimeWarning, stacklevel=5)
        keep = ~self.far(first)
        return {name: rows[keep] for name, rows in first.items()} if bool(keep.any()) else first

    def _what_is_done(self, name: str) -> str:
        """About rows that hold most of the variance."""
        multiple = self.ordinary[name].multiple
        if self.multiple is None:
            return "losses and FVU are about them alone; max_norm_multiple='auto' leaves such rows out of training"
        if multiple == math.inf:
            return (
                f"losses and FVU are about them alone: max_norm_multiple='auto' leaves out {MOST:.0%} of rows at most, "
                f"beyond {FAR:g} times the median distance from the centre; set a number to leave out more"
            )
        return (
            f"rows beyond {multiple:g} times the median distance from the centre are left out of training "
            "(max_norm_multiple; None keeps them in)"
        )

    def trained_on(self, batch: Batch) -> tuple[Batch, Tensor | None]:
        """The batch (unscaled) with ordinary rows in the places of others.

        Returns:
            It, and how many ordinary rows it had (0-d int64, where the batch lies); None where all rows stay.
        """
        if self.multiple is None or all(ordinary.multiple == math.inf for ordinary in self.ordinary.values()):
            return batch, None
        far = self.far(batch)
        n_kept = (~far).sum()
        self._n_left_out = self._n_left_out + (len(far) - n_kept)
        self._n_seen += len(far)
        if far.device.type == "cpu" and n_kept == len(far):
            return batch, n_kept
        # Ordinary rows first, each in its order: of n_kept such rows, row i takes the place n_kept + i as well.
        order = far.int().argsort(stable=True)
        places = torch.arange(len(far), dtype=torch.int64, device=far.device) % n_kept.clamp_min(1)
        return {name: rows[order[places]] for name, rows in batch.items()}, n_kept

    def far(self, batch: Batch) -> Tensor:
        """(B,) bool: rows that are left out."""
        far = torch.zeros(n_rows_of(batch), dtype=torch.bool, device=batch[X].device)
        if self.multiple is not None:
            for name, ordinary in self.ordinary.items():
                far |= ordinary.far(batch[name])
        return far

    @property
    def n_left_out(self) -> int:
        """Rows left out of training so far. Waits for the device."""
        return int(self._n_left_out)

    def watch(self) -> None:
        """Warns, once, where far more rows are left out than the first ones promised."""
        if self.multiple == "auto" and not self._warned and self.n_left_out > _TOO_MANY * self._n_seen:
            self._warned = True
            warnings.warn(
                f"{self.n_left_out:,} of {self._n_seen:,} rows so far are left out of training, {MOST:.0%} at most "
                "were to be by the first ones: the data changes as it goes; shuffle it, or set max_norm_multiple=None",
                RuntimeWarning,
                stacklevel=5,
            )

    def state_dict(self) -> dict[str, Any]:
        """Numbers and centres, to go on from."""
        ordinary = {
            name: {"centre": o.centre, "usual": o.usual, "multiple": None if o.multiple == math.inf else o.multiple}
            for name, o in self.ordinary.items()
        }
        return {"ordinary": ordinary, "n_left_out": self.n_left_out, "n_seen": self._n_seen, "warned": self._warned}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.ordinary = {
            name: Ordinary(o["centre"].to(device), o["usual"], math.inf if o["multiple"] is None else o["multiple"])
            for name, o in state["ordinary"].items()
        }
        self._n_left_out, self._n_seen, self._warned = state["n_left_out"], state["n_seen"], state["warned"]


def none_left(where: str) -> InputError:
    """The error for a batch of which no row is ordinary."""
    return InputError(
        f"{where}: all rows of the batch lie beyond max_norm_multiple times the median distance of the first rows from "
        "their centre, so nothing is left to train on: the data changes as it goes; shuffle it, or set "
        "max_norm_multiple=None"
    )
