"""The training loop's side of a source: batches checked, scaled and timed, and the position after each."""

import math
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saefast import ambient
from saefast.data.source import TARGET, Batch, Source, X, first_bad_row, n_rows_of, where_it_ends
from saefast.engines.recipe import Recipe
from saefast.errors import InputError
from saefast.metrics.ordinary import Ordinary
from saefast.models.outliers import ordinary_rows
from saefast.ops.reference import accumulate_dtype
from saefast.training.left_out import LeftOut, none_left

# Share of the first rows' variance that may be lost when they are rounded to the SAE's dtype before a warning says so.
LOST = 0.01


class Rows(NamedTuple):
    """What an engine takes: rows x (B, d_in), and what they are to be mapped to, (B, d_out): x itself, or another."""

    x: Tensor
    target: Tensor


class Feed:
    """Draws a source's batches for one run.

    The rows that initialisation looks at are drawn ahead and then trained on like all others, so nothing is skipped and
    a generator works as well as a file.

    Attributes:
        cursor: the source's position after the batch returned last.
        waited: seconds spent waiting for data.
        levels: by tensor, (width,) what its columns are multiplied by before anything else, where several layers or
            models lie side by side in it; empty where that is not so.
        scale: x of every batch is multiplied by this number.
        target_scale: as scale, of a target that is not x.
        has_target: whether the source has a target besides x.
        left_out: what of the batches is not trained on.
        ahead: batches that were drawn ahead at the start of the run.
        deferred: whether NaN and inf are reported by `confirm` rather than at once: on a GPU, where looking waits.
    """

    def __init__(
        self,
        source: Source,
        config: Recipe,
        device: torch.device,
        dtype: torch.dtype,
        cursor: dict[str, Any] | None = None,
    ) -> None:
        self.source, self.device, self.dtype = source, device, dtype
        self.deferred = device.type != "cpu"
        self._batch_size, self._seed = config.batch_size, config.seed
        self._raw_dtype = accumulate_dtype(dtype)
        self.has_target = TARGET in source.widths
        if unused := set(source.widths) - {X, TARGET}:
            raise InputError(
                f"{source.source_name} has the tensors {', '.join(source.widths)}: expected {X!r}, perhaps with "
                f"{TARGET!r}; training makes no use of {min(unused)!r}"
            )
        # A source may be the caller's own class: its code runs in their modes.
        with ambient.theirs():
            if cursor is not None:
                source.load_state_dict(cursor)
            batches = source.batches(config.batch_size, config.seed, device, self._raw_dtype)
        self._batches: Iterator[Batch] = ambient.drawn(batches)
        self._pending: deque[tuple[Batch, dict[str, Any]]] = deque()
        self._drawn = cursor
        self._first_bad: Tensor | None = None
        self._none_left: Tensor | None = None
        self._unconfirmed: dict[int, dict[str, Any] | None] = {}
        self.cursor, self.waited, self.ahead = cursor, 0.0, 0
        self.scale = self.target_scale = 1.0
        self.levels: dict[str, Tensor] = {}
        self.left_out = LeftOut(config.max_norm_multiple)

    def look_ahead(self, n_rows: int) -> Rows:
        """At the start of a run: draws batches until there are n_rows (or the source ends).

        Returns:
            Their first n_rows rows, unscaled.

        Raises:
            InputError: the source is empty, or a row is not finite.
        """
        drawn = 0
        while drawn < n_rows and self._draw_ahead(0):
            drawn += n_rows_of(self._pending[-1][0])
        if not self._pending:
            raise InputError(f"{self.source.source_name} is empty: no batch came out of it")
        self.confirm()
        self.ahead = len(self._pending)
        first = {name: torch.cat([batch[name] for batch, _ in self._pending])[:n_rows] for name in self.source.widths}
        return Rows(first[X], first.get(TARGET, first[X]))

    def fit_levels(self, first: Rows, kind: str, parts: tuple[int, ...], target_parts: tuple[int, ...]) -> Rows:
        """Brings what lies side by side in x, and in a target, to one scale: each part as `input_scale` does it.

        Args:
            first: the first rows, unscaled.
            parts, target_parts: widths of what lies side by side.

        Returns:
            The first rows with their columns multiplied by `levels`.
        """
        given = {X: (first.x, parts)} | ({TARGET: (first.target, target_parts)} if self.has_target else {})
        for name, (rows, widths) in given.items():
            if kind != "none" and len(widths) > 1:
                columns = rows.split(widths, dim=1)
                found = [part.new_tensor(input_scale(part, kind)).expand(part.shape[1]) for part in columns]
                self.levels[name] = torch.cat(found)
        batch = self._levelled({name: rows for name, (rows, _) in given.items()})
        return Rows(batch[X], batch.get(TARGET, batch[X]))

    def _levelled(self, batch: Batch) -> Batch:
        return {name: rows * self.levels[name] if name in self.levels else rows for name, rows in batch.items()}

    def fit_scales(self, first: Rows, kind: str) -> None:
        """Sets the scales of x and target, each from its own first rows, unscaled; see `input_scale`."""
        self.scale = self.target_scale = input_scale(first.x, kind)
        if self.has_target:
            self.target_scale = input_scale(first.target, kind)

    def look_at(self, first: Rows) -> Rows:
        """Fixes on the first rows, unscaled, which rows are trained on. -> Those of them; see `LeftOut.look_at`."""
        batch = self.left_out.look_at({X: first.x} | ({TARGET: first.target} if self.has_target else {}))
        self._warn_of_rounding(batch)
        return Rows(batch[X], batch.get(TARGET, batch[X]))

    def _warn_of_rounding(self, first: Batch) -> None:
        """Where the mean is so far from zero that the SAE's dtype rounds away what is to be explained."""
        if self.dtype == self._raw_dtype:
            return
        x = _times(first[X], self.scale)
        spread, rounded = x - x.mean(0), x.to(self.dtype).to(x.dtype)
        lost = (spread - (rounded - rounded.mean(0))).square().sum() / spread.square().sum()
        if lost > LOST:
            times = float(x.mean(0).norm() / spread.norm(dim=1).median())
            dtype = str(self.dtype).removeprefix("torch.")
            warnings.warn(
                f"{dtype} rounds away {float(lost):.0%} of the variance of the first {len(x):,} rows, whose mean is "
                f"{times:.0f} times their spread: train in float32 (optimizer='adam'), or subtract the mean",
                RuntimeWarning,
                stacklevel=5,
            )

    @property
    def ordinary(self) -> Ordinary | None:
        """Which scaled targets are ordinary rows; None before the first rows were looked at."""
        found = self.left_out.ordinary.get(TARGET if self.has_target else X)
        return None if found is None else found.scaled(self.target_scale)

    def restore_ahead(self, ahead: int, step: int) -> None:
        """After a resume at `step`: draws again what the run had drawn ahead, so that the source is where it was."""
        self.ahead = ahead
        while len(self._pending) < ahead - step and self._draw_ahead(step):
            pass

    def next(self, step: int) -> Rows | None:
        """The batch of `step`, scaled, in the SAE's dtype, without what is left out; None where the source has ended.

        Raises:
            InputError: a row holds NaN or inf, or all rows are to be left out.
        """
        drawn = self._pending.popleft() if self._pending else self._draw(step)
        if drawn is None:
            return None
        batch, self.cursor = drawn
        batch, n_kept = self.left_out.trained_on(self._levelled(batch))
        if n_kept is not None:
            self._check_some(n_kept, step)
        return self._scaled(batch)

    def heldout(self) -> Iterator[Rows]:
        """The held-out rows as `next` would give them.

        Raises:
            InputError: a row holds NaN or inf.
        """
        seen = 0
        for batch in ambient.drawn(self.source.heldout(self._batch_size, self.device, self._raw_dtype)):
            if (bad := first_bad(batch)) is not None:
                name, row = bad
                where = self.source.describe_heldout(seen + row, name)
                raise InputError(
                    f"held-out row {seen + row} holds NaN or inf{_in(name)}: {where}; drop or repair that "
                    f"row{where_it_ends(batch[name][row], self.source.stored_dtype(name))}"
                )
            seen += n_rows_of(batch)
            yield self._scaled(self._levelled(batch))

    def confirm(self) -> None:
        """On a GPU: raises InputError where a batch since the last call held NaN or inf, or nothing to train on.

        Waits for the device.
        """
        step = -1 if self._first_bad is None else int(self._first_bad)
        cursor = self._unconfirmed.get(step)
        self._unconfirmed.clear()
        if step >= 0:
            self._first_bad = None
            raise InputError(self._describe_again(step, cursor))
        if self._none_left is not None and (step := int(self._none_left)) >= 0:
            raise none_left(f"step {step}")
        self.left_out.watch()

    def _draw_ahead(self, step: int) -> bool:
        drawn = self._draw(step + len(self._pending))
        if drawn is not None:
            self._pending.append(drawn)
        return drawn is not None

    def _draw(self, step: int) -> tuple[Batch, dict[str, Any]] | None:
        start = time.perf_counter()
        drawn = next(self._batches, None)
        self.waited += time.perf_counter() - start
        if drawn is None:
            return None
        # Made in inference mode, a tensor takes part in no gradient.
        batch = {name: t.clone() if t.is_inference() else t for name, t in self._checked(drawn).items()}
        if self.deferred:
            self._note(batch, step)
        elif (bad := first_bad(batch)) is not None:
            raise InputError(self._describe(step, *bad, batch))
        self._drawn = self.source.state_dict()
        return batch, self._drawn

    def _checked(self, batch: Any) -> Batch:
        """A source may be the caller's own class."""
        if not isinstance(batch, Mapping) or batch.keys() != self.source.widths.keys():
            given = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise InputError(
                f"{self.source.source_name} gave a batch of {given}: expected a dict of {', '.join(self.source.widths)}"
            )
        return dict(batch)

    def _note(self, batch: Batch, step: int) -> None:
        """Looks for NaN and inf without waiting for the device: the answer stays there until `confirm` reads it."""
        for tensor in batch.values():
            if self._first_bad is None:
                self._first_bad = torch.full((), -1, dtype=torch.int64, device=tensor.device)
            low, high = torch.aminmax(tensor)
            bad = ~(low.isfinite() & high.isfinite()) & (self._first_bad < 0)
            self._first_bad = torch.where(bad, step, self._first_bad)
        self._unconfirmed[step] = self._drawn

    def _check_some(self, n_kept: Tensor, step: int) -> None:
        """Raises InputError where no row of the batch is trained on; on a GPU that is for `confirm` to say."""
        if not self.deferred:
            if n_kept == 0:
                raise none_left(f"step {step}")
            return
        before = torch.full_like(n_kept, -1) if self._none_left is None else self._none_left
        self._none_left = torch.where((n_kept == 0) & (before < 0), step, before)

    def _describe_again(self, step: int, cursor: dict[str, Any] | None) -> str:
        """The message for a batch that is gone: draws it once more where the source allows that."""
        try:
            if cursor is not None:
                self.source.load_state_dict(cursor)
            batch = next(self.source.batches(self._batch_size, self._seed, "cpu", self._raw_dtype))
            bad = first_bad(batch)
        except (InputError, StopIteration):
            bad = None
        if bad is None:
            return f"step {step}: the batch from {self.source.source_name} holds NaN or inf; drop or repair its rows"
        return self._describe(step, *bad, batch)

    def _describe(self, step: int, name: str, row: int, batch: Batch) -> str:
        where = f"row {row} of the batch holds NaN or inf{_in(name)}: {self.source.describe_row(row, name)}"
        ends = where_it_ends(batch[name][row], self.source.stored_dtype(name))
        return f"step {step}: {where}; drop or repair that row{ends}"

    def _scaled(self, batch: Batch) -> Rows:
        return self.scaled(Rows(batch[X], batch.get(TARGET, batch[X])))

    def scaled(self, rows: Rows) -> Rows:
        """The rows as an engine takes them: in its dtype, multiplied by the scales."""
        x = _times(rows.x, self.scale).to(self.dtype)
        return Rows(x, _times(rows.target, self.target_scale).to(self.dtype) if self.has_target else x)


def first_bad(batch: Batch) -> tuple[str, int] | None:
    """The tensor and the row that hold NaN or inf, the first of them; None where all is finite."""
    for name, tensor in batch.items():
        if (row := first_bad_row(tensor)) is not None:
            return name, row
    return None


def _in(name: str) -> str:
    return "" if name == X else f" in {name!r}"


def _times(rows: Tensor, scale: float) -> Tensor:
    return rows * scale if scale != 1 else rows


def input_scale(rows: Tensor, kind: str) -> float:
    """The number s that inputs are multiplied by, from sample rows (n, d): estimated in float64.

    "median": median ‖s·(x - c)‖ = √d, c the geometric median of the rows: what an SAE has to explain, wherever the rows
    lie and however large a few of them are. "sqrt_d": mean ‖s·x‖ = √d. "unit_mean_square": mean ‖s·x‖² = 1. "none": 1.

    Raises:
        InputError: all rows are zero, or too small for their dtype.
    """
    if kind == "none":
        return 1.0
    size = ordinary_rows(rows, None).usual / rows.shape[1] ** 0.5 if kind == "median" else _size(rows, kind)
    if kind == "median" and not size > 0:
        # They are all equal: that is said by the loss, which they leave nothing to explain. Zeros are told below.
        size = _size(rows, "sqrt_d")
    if not 0 < size < math.inf:  # squares that vanish or overflow even in float64
        largest = float(rows.abs().max())
        size = largest * _size(rows.double() / largest, kind) if largest > 0 else 0.0
    if not size > 0:
        raise InputError(
            f"the first {len(rows)} rows are all zero in {rows.dtype}: they cannot be scaled to a norm; check the data"
        )
    if size < torch.finfo(rows.dtype).tiny:
        raise InputError(
            f"the first {len(rows)} rows are too small for {rows.dtype} ({size:.1e}, and it holds numbers in full from "
            f"{torch.finfo(rows.dtype).tiny:.1e}): multiply the data by a constant"
        )
    return 1.0 / size


def _size(rows: Tensor, kind: str) -> float:
    """What input_scale sets to 1."""
    sq_norms = rows.double().square().sum(1)
    return float(sq_norms.sqrt().mean()) / rows.shape[1] ** 0.5 if kind == "sqrt_d" else float(sq_norms.mean()) ** 0.5
