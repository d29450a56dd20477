"""Metrics of an SAE over any number of batches, accumulated in float64; every formula is named after its source.

Notation: x (D,) an activation, x̂ its reconstruction, f (L,) its sparse code, x̄ the mean of x over all rows.
Nothing of size (rows, L) is held; two accumulators over different rows merge into the one over all of them.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.metrics.ordinary import Ordinary


class Metric(NamedTuple):
    """What a number means: its formula and who defines it so."""

    formula: str
    source: str


METRICS: dict[str, Metric] = {
    "fvu": Metric("Σ‖x−x̂‖² / Σ‖x−x̄‖²", "Gemma Scope, arXiv 2408.05147; sparsify's is this per batch"),
    "fvu_ordinary": Metric("as fvu, over ordinary rows alone", "saefast; ordinary: see max_norm_multiple"),
    "fvu_median": Metric("median over rows of ‖x−x̂‖² / ‖x−c‖², c the rows' geometric median", "saefast"),
    "explained_variance": Metric("1 − Σ‖x−x̂‖² / Σ‖x−x̄‖²", "SAELens 6.54 metrics/explained_variance"),
    "explained_variance_legacy": Metric(
        "mean over rows of 1 − ‖x−x̂‖² / ‖x−x̄_batch‖²",
        "SAELens (its legacy form); depends on batching",
    ),
    "frac_variance_explained": Metric("1 − Σ_d Var(x−x̂) / Σ_d Var(x)", "dictionary_learning; forgives a constant bias"),
    "normalized_mse": Metric("mean over rows of ‖x−x̂‖² / ‖x‖²", "Engels et al., arXiv 2410.14670"),
    "mse": Metric("mean over rows of Σ_d (x−x̂)²", "SAELens losses/mse_loss"),
    "cosine": Metric("mean over rows of x·x̂ / ‖x‖‖x̂‖", "SAELens, dictionary_learning, SAEBench"),
    "l2_ratio": Metric("mean over rows of ‖x̂‖ / ‖x‖", "SAELens, dictionary_learning, SAEBench"),
    "relative_reconstruction_bias": Metric("Σ‖x̂‖² / Σ x·x̂", "Rajamanoharan et al., arXiv 2404.16014, eq. 10"),
    "l0": Metric("mean over rows of #(f ≠ 0)", "SAELens metrics/l0, dictionary_learning, SAEBench"),
    "l1": Metric("mean over rows of Σ|f|", "SAELens metrics/l1, dictionary_learning, SAEBench"),
    "mean_log10_feature_sparsity": Metric(
        "mean over latents of log10(p + 1e-10), p = rows it fires on / rows",
        "SAELens",
    ),
    "dead_share": Metric("share of latents with p = 0", "not fired on any of the rows evaluated"),
    "below_1e-5_share": Metric("share of latents with p < 1e-5", "SAELens sparsity/below_1e-5, as a share"),
    "below_1e-6_share": Metric("share of latents with p < 1e-6", "SAELens sparsity/below_1e-6, as a share"),
    "dense_share_1pct": Metric("share of latents with p > 0.01", "delphi CacheStatistics"),
    "dense_share_10pct": Metric("share of latents with p > 0.1", "delphi CacheStatistics"),
}

# SAELens' offset: a latent that never fired counts as log10 density -10.
DENSITY_OFFSET = 1e-10


class Spread:
    """Count, mean and Σ‖v−mean‖² of rows v (D,), by Chan, Golub and LeVeque's pairwise update (1979).

    Means are kept as offsets from the first batch's mean, so a common shift of all rows, however large, cancels
    before anything is squared or subtracted.
    """

    def __init__(self) -> None:
        self.n = 0
        self.centre = self.offset = torch.zeros(0, dtype=torch.float64, device="cpu")
        self.sq = torch.zeros((), dtype=torch.float64, device="cpu")

    @property
    def mean(self) -> Tensor:
        return self.centre + self.offset

    def update(self, rows: Tensor) -> None:
        """Takes in rows (n, D), any float dtype."""
        if len(rows) == 0:
            return
        rows = rows.double()
        batch = Spread()
        batch.n, batch.centre = len(rows), rows.mean(0) if self.n == 0 else self.centre
        rows = rows - batch.centre
        batch.offset = rows.mean(0)
        batch.sq = (rows - batch.offset).square().sum()
        self.merge(batch)

    def merge(self, other: "Spread") -> None:
        if other.n == 0:
            return
        if self.n == 0:
            self.n, self.centre, self.offset, self.sq = other.n, other.centre, other.offset, other.sq
            return
        total = self.n + other.n
        apart = (other.centre - self.centre) + other.offset - self.offset
        self.sq = self.sq + other.sq + apart.square().sum() * (self.n * other.n / total)
        self.offset = self.offset + apart * (other.n / total)
        self.n = total


class MeanRatio:
    """Mean over rows of numerator / denominator; rows whose denominator is 0 have no ratio and are left out."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.n: Tensor | int = 0

    def update(self, numerator: Tensor, denominator: Tensor) -> None:
        there = denominator != 0
        self.total = self.total + torch.where(there, numerator / denominator, 0.0).sum()
        self.n = self.n + there.sum()

    def merge(self, other: "MeanRatio") -> None:
        self.total, self.n = self.total + other.total, self.n + other.n

    def value(self) -> float:
        return _ratio(float(self.total), float(self.n))


class Reconstruction:
    """How well x̂ stands for x. Feed `update`, read `compute`; see METRICS for the formulas.

    One number a row is kept, for a median.

    Args:
        ordinary: which rows are ordinary, and c; None takes all rows to be, and knows no c, so fvu_median is NaN.
    """

    def __init__(self, ordinary: Ordinary | None = None) -> None:
        self.ordinary = ordinary
        self.inputs, self.errors, self.ordinary_inputs = Spread(), Spread(), Spread()
        self.ordinary_sq_error: Tensor | float = 0.0
        self.ratios: list[Tensor] = []
        self.sq_error: Tensor | float = 0.0
        self.sq_x_hat: Tensor | float = 0.0
        self.dot: Tensor | float = 0.0
        self.cosine, self.l2_ratio, self.normalized_mse, self.legacy = (MeanRatio() for _ in range(4))

    @property
    def n_rows(self) -> int:
        return self.inputs.n

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Takes in rows x and x_hat, both (B, D), any float dtype.

        Raises:
            InputError: the shapes differ or are not (B, D).
        """
        if x.dim() != 2 or x.shape != x_hat.shape:
            raise InputError(f"x has shape {tuple(x.shape)}, x_hat {tuple(x_hat.shape)}: expected (B, D) for both")
        if len(x) == 0:
            return
        x, x_hat = x.double(), x_hat.double()
        error = x - x_hat
        self.inputs.update(x)
        self.errors.update(error)
        sq_error, sq_x, sq_x_hat = (rows.square().sum(1) for rows in (error, x, x_hat))
        self._tell_apart(x, sq_error)
        dot = (x * x_hat).sum(1)
        self.sq_error, self.sq_x_hat = self.sq_error + sq_error.sum(), self.sq_x_hat + sq_x_hat.sum()
        self.dot = self.dot + dot.sum()
        self.cosine.update(dot, sq_x.sqrt() * sq_x_hat.sqrt())
        self.l2_ratio.update(sq_x_hat.sqrt(), sq_x.sqrt())
        self.normalized_mse.update(sq_error, sq_x)
        spread = (x - x.mean(0)).square().sum(1)
        self.legacy.update(spread - sq_error, spread)

    def _tell_apart(self, x: Tensor, sq_error: Tensor) -> None:
        """Ordinary rows by themselves, and every row's own ratio. x (B, D), sq_error (B,), float64."""
        if self.ordinary is None:
            return
        keep = ~self.ordinary.far(x)
        self.ordinary_inputs.update(x[keep])
        self.ordinary_sq_error = self.ordinary_sq_error + sq_error[keep].sum()
        self.ratios.append(sq_error / (x - self.ordinary.centre.to(x)).square().sum(1))

    @property
    def n_far(self) -> int:
        """Rows that are not ordinary."""
        return self.n_rows - self.ordinary_inputs.n if self.ordinary is not None else 0

    def merge(self, other: "Reconstruction") -> None:
        """Takes in another accumulator with the same `ordinary`, as if its rows had been fed here."""
        self.ratios += other.ratios
        for name in ("inputs", "errors", "ordinary_inputs", "cosine", "l2_ratio", "normalized_mse", "legacy"):
            getattr(self, name).merge(getattr(other, name))
        for name in ("sq_error", "ordinary_sq_error", "sq_x_hat", "dot"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def compute(self) -> dict[str, float]:
        """Floats named as in METRICS; NaN where nothing was fed or a denominator is 0."""
        fvu = ordinary_fvu = _ratio(float(self.sq_error), float(self.inputs.sq))
        if self.ordinary is not None:
            ordinary_fvu = _ratio(float(self.ordinary_sq_error), float(self.ordinary_inputs.sq))
        return {
            "fvu": fvu,
            "fvu_ordinary": ordinary_fvu,
            "fvu_median": _median(self.ratios),
            "explained_variance": 1 - fvu,
            "explained_variance_legacy": self.legacy.value(),
            "frac_variance_explained": 1 - _ratio(float(self.errors.sq), float(self.inputs.sq)),
            "normalized_mse": self.normalized_mse.value(),
            "mse": _ratio(float(self.sq_error), self.n_rows),
            "cosine": self.cosine.value(),
            "l2_ratio": self.l2_ratio.value(),
            "relative_reconstruction_bias": _ratio(float(self.sq_x_hat), float(self.dot)),
        }


class Sparsity:
    """How often and how strongly each latent fires.

    Attributes:
        counts: (L,) int64 rows each latent fired on.
        total_act: (L,) float64 sum of its activations.
        max_act: (L,) float64 largest activation; 0 for a latent that never fired.
    """

    def __init__(self, n_latents: int, device: torch.device | str = "cpu") -> None:
        self.n_rows = 0
        self.counts = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.total_act, self.max_act = (torch.zeros(n_latents, dtype=torch.float64, device=device) for _ in range(2))
        self.total_abs: Tensor | float = 0.0

    def update(self, acts: Tensor, idx: Tensor, n_rows: int | None = None) -> None:
        """Takes in a sparse code: acts and idx of one shape, (B, K), or flat (nnz,) with `n_rows` given.

        Within a row indices are distinct; zeros count as not fired.
        """
        if acts.shape != idx.shape or (acts.dim() != 2 and n_rows is None):
            raise InputError(f"acts has shape {tuple(acts.shape)}, idx {tuple(idx.shape)}: expected (B, K) for both")
        self.n_rows += acts.shape[0] if n_rows is None else n_rows
        fired = acts != 0
        values, latents = acts[fired].double(), idx[fired].long()
        self.counts += torch.bincount(latents, minlength=len(self.counts))
        self.total_act.index_add_(0, latents, values)
        self.max_act.scatter_reduce_(0, latents, values, "amax")
        self.total_abs = self.total_abs + values.abs().sum()

    def merge(self, other: "Sparsity") -> None:
        """Takes in another accumulator, as if its rows had been fed here."""
        if len(self.counts) != len(other.counts):
            raise InputError(f"merge of {len(other.counts)} latents into {len(self.counts)}: expected the same SAE")
        self.n_rows += other.n_rows
        self.counts += other.counts
        self.total_act += other.total_act
        self.max_act = torch.maximum(self.max_act, other.max_act)
        self.total_abs = self.total_abs + other.total_abs

    def density(self) -> Tensor:
        """(L,) float64: the share p of rows each latent fires on."""
        return self.counts.double() / max(self.n_rows, 1)

    def log10_density(self) -> Tensor:
        """(L,) float64: log10(p + 1e-10), SAELens' feature sparsity."""
        return (self.density() + DENSITY_OFFSET).log10()

    def compute(self) -> dict[str, float]:
        """Floats named as in METRICS; NaN where nothing was fed."""
        if self.n_rows == 0:
            return dict.fromkeys(_SPARSITY, float("nan"))
        p = self.density()
        values = {
            "l0": float(self.counts.sum()) / self.n_rows,
            "l1": float(self.total_abs) / self.n_rows,
            "mean_log10_feature_sparsity": float(self.log10_density().mean()),
            "dead_share": _share(p == 0),
            "below_1e-5_share": _share(p < 1e-5),
            "below_1e-6_share": _share(p < 1e-6),
            "dense_share_1pct": _share(p > 0.01),
            "dense_share_10pct": _share(p > 0.1),
        }
        return {name: values[name] for name in _SPARSITY}


_SPARSITY = list(METRICS)[list(METRICS).index("l0") :]


class SAEMetrics:
    """Reconstruction and sparsity of one SAE in one accumulator."""

    def __init__(self, n_latents: int, device: torch.device | str = "cpu", ordinary: Ordinary | None = None) -> None:
        self.reconstruction, self.sparsity = Reconstruction(ordinary), Sparsity(n_latents, device)

    def update(self, x: Tensor, x_hat: Tensor, acts: Tensor, idx: Tensor) -> None:
        """x, x_hat (B, D); acts, idx (B, K)."""
        self.reconstruction.update(x, x_hat)
        self.sparsity.update(acts, idx)

    def merge(self, other: "SAEMetrics") -> None:
        self.reconstruction.merge(other.reconstruction)
        self.sparsity.merge(other.sparsity)

    def compute(self) -> dict[str, float]:
        """All of METRICS, in its order."""
        return self.reconstruction.compute() | self.sparsity.compute()


def density_histogram(counts: Tensor, n_rows: int, bins_per_decade: int = 5) -> tuple[list[float], list[int], int]:
    """Histogram of log10 firing density over the latents that fired.

    Args:
        counts: (L,) int64 rows each latent fired on.
        n_rows: rows seen; the lowest possible density is 1 / n_rows.

    Returns:
        edges (log10 density, ascending, last one 0), latents per bin, and how many latents never fired.
    """
    decades = len(str(max(n_rows, 1)))
    fired = counts[counts > 0].double()
    n_bins = decades * bins_per_decade
    edges = [-decades + i / bins_per_decade for i in range(n_bins + 1)]
    place = ((fired / max(n_rows, 1)).log10() + decades).mul(bins_per_decade).floor().long()
    heights = torch.bincount(place.clamp(0, n_bins - 1), minlength=n_bins)
    return edges, heights.tolist(), int((counts == 0).sum())


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator != 0 else float("nan")


def _median(parts: list[Tensor]) -> float:
    """Of all numbers that are numbers; NaN where there is none."""
    if not parts:
        return float("nan")
    values = torch.cat([part.cpu() for part in parts]).numpy()
    values = values[~np.isnan(values)]  # a row on the centre, reconstructed exactly
    return float(np.median(values)) if len(values) else float("nan")


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())
