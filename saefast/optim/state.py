"""Adam on rows: the state of a weight matrix, one step's constants, and how a row without a gradient drifts.

Dense Adam moves every row at every step, also rows without a gradient: their moments decay and their weights drift on
with the old momentum. A row-wise step touches only rows that have a gradient, and settles the rest when a row is next
touched: moments by powers of beta, the drift by `DriftTable`. `reference.py` holds the operations themselves.
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from saefast.errors import InputError

# Terms of a drift smaller than this share of its first one are left out of the table.
NEGLIGIBLE = 1e-18


class Norm(IntEnum):
    """When an update scales its row to unit norm."""

    never = 0
    before_update = 1
    after_update = 2


class AdamStep(NamedTuple):
    """The constants of one step."""

    step: int
    """Counts from 1."""
    beta1: float
    beta2: float
    lr: float
    eps: float
    drift: Tensor
    """(>= step,) float64, see `DriftTable`."""
    drift_eps: Tensor
    """(>= step,) float64."""
    grad_scale: float = 1.0
    project: bool = False
    norm: Norm = Norm.never


class RowGradient(NamedTuple):
    """Where gradient rows come from: row r is Σ coef[e] · source[row[e]] over e in offsets[r] .. offsets[r + 1].

    Where there is `along`, a part along the row's own weights w is added, block by block of D / M columns:
    along[r, m] · w[block m], w being the row as the forward pass read it: settled, and not yet scaled to unit norm by
    Norm.before_update. What depends on a row's norm has such a gradient.
    """

    source: Tensor
    """(n, D)."""
    offsets: Tensor
    """(rows + 1,) int32."""
    row: Tensor
    """(entries,) int32."""
    coef: Tensor
    """(entries,) in source's dtype."""
    along: Tensor | None = None
    """(rows, M) in source's dtype, M a divisor of D; None for none."""


@dataclass
class Matrix:
    """A weight matrix with Adam's state. A vector is a matrix of one row.

    Attributes:
        w: (R, D) the weights.
        m, v: (R, D) Adam's moments.
        last_step: (R,) int32, the step each row's weights and moments stand at.
        shadow: (R, D) bfloat16 copy of w, or None.
        norms: (R,) norms of the rows, or None.
    """

    w: Tensor
    m: Tensor
    v: Tensor
    last_step: Tensor
    shadow: Tensor | None = None
    norms: Tensor | None = None

    @classmethod
    def of(cls, w: Tensor, *, shadow: bool = False, norms: bool = False) -> "Matrix":
        """Fresh state for weights w (R, D), or (D,) taken as one row; w itself is not copied."""
        rows = w.view(1, -1) if w.dim() == 1 else w
        return cls(
            rows,
            torch.zeros_like(rows),
            torch.zeros_like(rows),
            torch.zeros(len(rows), dtype=torch.int32, device=w.device),
            rows.to(torch.bfloat16) if shadow else None,
            rows.norm(dim=1) if norms else None,
        )

    def copies_changed(self) -> None:
        """Renews shadow and norms after w was changed from outside."""
        if self.shadow is not None:
            self.shadow.copy_(self.w)
        if self.norms is not None:
            self.norms.copy_(self.w.norm(dim=1))

    def restart(self, rows: Tensor, w: Tensor, like: Tensor | None, step: int, beta2: float) -> None:
        """Rows (n,) begin anew at w (n, D): no momentum, and the mean second moment of the rows `like` (R,) bool.

        With a second moment of 0, which None asks for, the first updates are several times longer.

        Args:
            step: updates done. Rows may stand at an earlier one: their second moments have decayed since, by beta2 a
                step.
        """
        self.w[rows] = w.to(self.w.dtype)
        self.m[rows] = 0
        decayed = beta2 ** (step - self.last_step).to(self.v.dtype)
        self.v[rows] = 0.0 if like is None else (self.v.mean(dim=1) * decayed)[like].mean()
        self.last_step[rows] = step
        if self.shadow is not None:
            self.shadow[rows] = w.to(torch.bfloat16)
        if self.norms is not None:
            self.norms[rows] = w.norm(dim=1).to(self.norms.dtype)

    def state(self) -> dict[str, Tensor]:
        """What a continuation needs beside w."""
        return {"m": self.m, "v": self.v, "last_step": self.last_step}

    def bytes(self) -> int:
        """Memory of weights, state and copies."""
        tensors = (self.w, self.m, self.v, self.last_step, self.shadow, self.norms)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


# Columns that share one scale of the 8-bit first moment, at most.
LEAN_BLOCK = 512


@dataclass
class LeanMatrix:
    """A weight matrix with a lean optimiser's state: 3.02 bytes a parameter, everything counted, at D = 768.

    The first moment is an 8-bit integer times the scale of its block; blocks never cross rows. The second moment is one
    number a row, of the row's mean squared gradient (as in Adam-mini, arXiv 2406.16793). Weights and first moments are
    rounded stochastically, so that steps far below their resolution add up; the random bits are a hash of seed, step,
    row and column.

    Attributes:
        w: (R, D) bfloat16 the weights.
        m: (R, D) int8; scale: (R, blocks) bfloat16.
        v: (R,) float32.
        last_step: (R,) int32.
        seed: of the rounding; different for every matrix.
        norms: (R,) float32 norms of the rows, or None.
    """

    w: Tensor
    m: Tensor
    scale: Tensor
    v: Tensor
    last_step: Tensor
    seed: int
    norms: Tensor | None = None

    @classmethod
    def of(cls, w: Tensor, seed: int, *, norms: bool = False) -> "LeanMatrix":
        """Fresh state for weights w (R, D) bfloat16, which are not copied."""
        (R, D), device = w.shape, w.device
        return cls(
            w,
            torch.zeros(R, D, dtype=torch.int8, device=device),
            torch.zeros(R, -(-D // LEAN_BLOCK), dtype=torch.bfloat16, device=device),
            torch.zeros(R, dtype=torch.float32, device=device),
            torch.zeros(R, dtype=torch.int32, device=device),
            seed,
            w.float().norm(dim=1) if norms else None,
        )

    @property
    def shadow(self) -> Tensor:
        return self.w

    def copies_changed(self) -> None:
        """Renews norms after w was changed from outside."""
        if self.norms is not None:
            self.norms.copy_(self.w.float().norm(dim=1))

    def restart(self, rows: Tensor, w: Tensor, like: Tensor | None, step: int, beta2: float) -> None:
        """As `Matrix.restart`."""
        self.w[rows] = w.to(self.w.dtype)
        self.m[rows] = 0
        decayed = beta2 ** (step - self.last_step).to(self.v.dtype)
        self.v[rows] = 0.0 if like is None else (self.v * decayed)[like].mean()
        self.last_step[rows] = step
        if self.norms is not None:
            self.norms[rows] = self.w[rows].float().norm(dim=1)

    def state(self) -> dict[str, Tensor]:
        """What a continuation needs beside w."""
        return {"m": self.m, "scale": self.scale, "v": self.v, "last_step": self.last_step}

    def bytes(self) -> int:
        """Memory of weights, state and copies."""
        tensors = (self.w, self.m, self.scale, self.v, self.last_step, self.norms)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


AnyMatrix = Matrix | LeanMatrix


class Job(NamedTuple):
    """One matrix's part in an update: `rows` (n,) int32 ascending, or None for all, with a gradient row for each.

    Where `rows` comes from `Groups.latents`, -1 may follow the last row: there is nothing to update.
    """

    matrix: AnyMatrix
    step: AdamStep
    gradient: RowGradient
    rows: Tensor | None
    squares: Tensor
    """(n,) -> Σ grad² of each row, after projection and before scaling."""


class DriftTable:
    """How far a row that stands at step s has to drift for the steps s + 1 .. t.

    Dense Adam with a gradient of 0 does, n steps after s: m = β1ⁿ m_s, v = β2ⁿ v_s, and with learning rate lr and
    bias corrections c1 = 1 - β1^(s+n), c2 = 1 - β2^(s+n)

        w -= (lr / c1) m / (√(v / c2) + eps)  =  lr √c2 / c1 · rⁿ · m_s / (√v_s + eps √c2 β2^(-n/2)),   r = β1 / √β2.

    Summed over n that is drift[s] · m_s / √v_s for eps = 0, under any schedule of lr: a table over s, to which a step
    adds a geometrically falling term for each of the last few hundred entries. eps enters by its mean,
    drift_eps[s] = eps · Σ(weight · √c2 β2^(-n/2)) / Σ weight, which is right to first order in eps / √v and errs by at
    most a share eps / (√v + eps) of the drift where eps dominates. A decoder whose rows are set to unit norm after
    each step is scaled once after the whole drift, which differs to second order in the drift.

    Args:
        device: where the table lies and is kept up to date: that of the rows that are settled by it.
    """

    def __init__(self, beta1: float, beta2: float, eps: float, device: torch.device | str = "cpu") -> None:
        self.beta1, self.beta2, self.eps, self.device = beta1, beta2, eps, device
        # What a term falls by from step to step, in the sum of weights and in that of the means of eps.
        self.ratio, self.eps_ratio = (beta1 / beta2**power if beta1 > 0 else 0.0 for power in (0.5, 1.0))
        self.steps = 0
        # Row 0: Σ weight. Row 1: Σ weight · √c2 β2^(-n/2).
        self.sums = torch.zeros(2, 1024, dtype=torch.float64, device=device)
        # As read: drift and drift_eps. Entry `steps` is 0: such a row misses nothing.
        self.table = torch.zeros(2, 1024, dtype=torch.float64, device=device)
        self.window = self._window()

    def _window(self) -> int:
        """How many steps after s a term still counts."""
        falls = max(self.ratio, self.eps_ratio)
        if falls <= 0:
            return 1
        return math.ceil(math.log(NEGLIGIBLE) / math.log(falls)) if falls < 1 else 2**31

    def add(self, lr: float) -> None:
        """Step `steps` + 1 has been taken with this learning rate: rows that were not in it have it to drift by."""
        self.steps += 1
        self._grow()
        t = self.steps
        first = max(t - self.window, 0)
        n = torch.arange(t - first, 0, -1, dtype=torch.float64, device=self.device)
        c1, c2 = 1 - self.beta1**t, 1 - self.beta2**t
        rate, part = lr * math.sqrt(c2) / c1, slice(first, t)
        self.sums[0, part] += rate * self.ratio**n
        # weight · √c2 β2^(-n/2) in one power: apart, one factor vanishes and the other overflows after many steps.
        self.sums[1, part] += rate * math.sqrt(c2) * self.eps_ratio**n
        self._read(part)

    def _read(self, part: slice) -> None:
        total = self.sums[0, part]
        self.table[0, part] = total
        self.table[1, part] = torch.where(total > 0, self.eps * self.sums[1, part] / total, self.eps)

    def _grow(self) -> None:
        if self.steps >= self.sums.shape[1]:
            self.sums = torch.cat([self.sums, torch.zeros_like(self.sums)], dim=1)
            self.table = torch.cat([self.table, torch.zeros_like(self.table)], dim=1)

    @property
    def drift(self) -> Tensor:
        return self.table[0]

    @property
    def drift_eps(self) -> Tensor:
        return self.table[1]

    def state(self) -> Tensor:
        """(2, steps + 1) float64."""
        return self.sums[:, : self.steps + 1].clone()

    def load(self, sums: Tensor) -> None:
        """Takes back a `state()`."""
        if sums.dim() != 2 or sums.shape[0] != 2 or sums.shape[1] < 1 or sums.dtype != torch.float64:
            raise InputError(f"drift is {sums.dtype} {tuple(sums.shape)}: expected float64 (2, steps + 1)")
        self.steps = sums.shape[1] - 1
        capacity = max(1024, 1 << (self.steps + 1).bit_length())
        self.sums = torch.zeros(2, capacity, dtype=torch.float64, device=self.device)
        self.sums[:, : self.steps + 1] = sums
        self.table = torch.zeros_like(self.sums)
        self._read(slice(0, self.steps))
