"""What belongs to whom in a crosscoder: how well each layer or model is reconstructed, and whose its latents are.

A latent's decoder has a part for each layer or model (`saefast.models.crosscoder`). All of this is about scaled rows,
as training saw them, so that parts can be compared.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.metrics.streaming import Metric, Spread
from saefast.models.sae import SAE
from saefast.ops import sddmm
from saefast.ops.reference import accumulate_dtype
from saefast.typed import typed

# Minder et al. 2025: a relative norm below or above these is of a latent that one of two models has alone; between the
# other two both have it.
ONLY_FIRST, SHARED, ONLY_SECOND = 0.1, (0.4, 0.6), 0.9

CROSSCODER: dict[str, Metric] = {
    "fvu": Metric("fvu of the rows of one part alone", "saefast"),
    "norm_share": Metric("mean over latents that fired of ‖d_m‖ / Σ_m ‖d_m‖, d_m the decoder row of part m", "saefast"),
    "span": Metric("mean over latents that fired of (Σ_m ‖d_m‖²)² / Σ_m ‖d_m‖⁴: parts that a latent is in", "saefast"),
    "relative_norm": Metric(
        "½ ((‖d_2‖ − ‖d_1‖) / max(‖d_1‖, ‖d_2‖) + 1): below 0.1 the first has it alone, 0.4 to 0.6 both have it, above "
        "0.9 the second alone",
        "Minder et al., arXiv 2504.02922",
    ),
    "nu_error": Metric(
        "β_weak / β_strong, β = argmin Σ ‖β f d − y‖² for d of the stronger part and y the part's error with the "
        "latent left out; near 1 the weaker part's decoder has shrunk",
        "Minder et al., arXiv 2504.02922",
    ),
    "nu_reconstruction": Metric(
        "the same for y the part's reconstruction; near 1 other latents stand in for this one in the weaker part",
        "Minder et al., arXiv 2504.02922",
    ),
}


@typed
def part_norms(sae: SAE) -> Tensor:
    """(n_latents, M) float64 norms of the parts of a crosscoder's decoder rows, as they were in training.

    Raises:
        InputError: the SAE is no crosscoder.
    """
    _check(sae)
    return sae.architecture.norms(sae.W_dec.detach().double(), dict(sae.named_buffers()))


@typed
def relative_norms(sae: SAE) -> Tensor:
    """(n_latents,) float64 in 0 ... 1: 0 where the first of two layers or models has a latent alone, 1 the second.

    Δ = ½ ((‖d_2‖ − ‖d_1‖) / max(‖d_1‖, ‖d_2‖) + 1) (Minder et al. 2025, arXiv 2504.02922); NaN for rows of zeros.

    Raises:
        InputError: the SAE is no crosscoder of two.
    """
    norms = part_norms(sae)
    if norms.shape[1] != 2:
        raise InputError(f"sae has {norms.shape[1]} parts: relative norms compare two; see part_norms")
    first, second = norms.unbind(1)
    return ((second - first) / norms.amax(dim=1) + 1) / 2


class Scaling(NamedTuple):
    """How strongly each part holds what a latent stands for, in units of its activation; NaN where it did not fire."""

    strongest: Tensor
    """(n_latents,) int64, the part with the largest decoder norm: β is of its direction in every part."""
    error: Tensor
    """(n_latents, M) float64 β for the part's error with the latent left out."""
    reconstruction: Tensor
    """(n_latents, M) float64 β for the part's reconstruction."""

    @property
    def nu_error(self) -> Tensor:
        """(n_latents, M) β of each part over that of the strongest."""
        return self.error / self.error.gather(1, self.strongest[:, None])

    @property
    def nu_reconstruction(self) -> Tensor:
        return self.reconstruction / self.reconstruction.gather(1, self.strongest[:, None])


class PartMetrics:
    """How well each part of a target is reconstructed, where several layers or models lie side by side in it.

    Args:
        widths: of the parts.
    """

    def __init__(self, widths: tuple[int, ...], device: torch.device | str = "cpu") -> None:
        self.widths = widths
        self.targets = [Spread() for _ in widths]
        self.sq_error = torch.zeros(len(widths), dtype=torch.float64, device=device)

    def update(self, target: Tensor, x_hat: Tensor, acts: Tensor, idx: Tensor) -> None:
        """Takes in rows target and x_hat (B, D), scaled as in training, and their code acts, idx (B, K)."""
        for m, (y, y_hat) in enumerate(self._parts(target, x_hat)):
            self.targets[m].update(y)
            self.sq_error[m] += (y - y_hat).square().sum()

    def _parts(self, *rows: Tensor) -> Iterable[tuple[Tensor, ...]]:
        return zip(*(one.double().split(self.widths, dim=1) for one in rows), strict=True)

    def fvu(self) -> list[float]:
        """Of each part."""
        variances = [float(spread.sq) for spread in self.targets]
        return [e / v if v else float("nan") for e, v in zip(self.sq_error.tolist(), variances, strict=True)]

    def compute(self) -> dict[str, Any]:
        """Figures for people; `CROSSCODER` says what each is."""
        return {"parts": [{"fvu": fvu} for fvu in self.fvu()]}

    def latents(self) -> dict[str, Tensor]:
        """What there is to say of each latent, by name: (n_latents, M) float64."""
        return {}


class CrosscoderMetrics(PartMetrics):
    """Figures of a crosscoder, accumulated in float64 over any number of batches.

    Latent scaling is Minder et al.'s (2025, arXiv 2504.02922, section 3): β = argmin_β Σ_tokens ‖β f d − y‖², in closed
    form Σ f ⟨d, y⟩ / (‖d‖² Σ f²), f being a latent's activation and d its decoder row in the part where it is longest.
    Parts of several widths have no direction in common: then there is none.

    Raises:
        InputError: the SAE is no crosscoder.
    """

    def __init__(self, sae: SAE) -> None:
        self.norms = part_norms(sae)
        super().__init__(sae.architecture.target_parts(), sae.device)
        self.sae = sae
        L, M = self.norms.shape
        levels = sae.architecture.levels(dict(sae.named_buffers()))
        assert levels is not None
        # Products are taken in what they are summed in elsewhere; float64 would be twice the decoder's memory.
        self.dtype = accumulate_dtype(sae.dtype)
        W_dec = (sae.W_dec.detach().to(self.dtype) * levels.to(self.dtype)).split(self.widths, dim=1)
        self.strongest = self.norms.argmax(dim=1)
        self.squares = torch.zeros(L, dtype=torch.float64, device=sae.device)
        self.error, self.reconstruction = (torch.zeros(L, M, dtype=torch.float64, device=sae.device) for _ in range(2))
        self.directions: Tensor | None = None
        if len(set(self.widths)) == 1:
            stacked = torch.stack(W_dec)
            self.directions = stacked[self.strongest, torch.arange(L, dtype=torch.int64, device=sae.device)]
            self.products = torch.stack([(self.directions * part).sum(1).double() for part in W_dec], dim=1)

    def update(self, target: Tensor, x_hat: Tensor, acts: Tensor, idx: Tensor) -> None:
        """Takes in scaled rows target and x_hat (B, D), and their code acts, idx (B, K) of `SAE.encode_sparse`."""
        super().update(target, x_hat, acts, idx)
        acts = (acts / self._units()[idx.long()]).double() if self.sae.architecture.ranks_by_norm else acts.double()
        self.squares.index_add_(0, idx.flatten().long(), acts.square().flatten())
        if self.directions is None:
            return
        for m, (y, y_hat) in enumerate(self._parts(target, x_hat)):
            for found, rows in ((self.error, y - y_hat), (self.reconstruction, y_hat)):
                along = acts * sddmm(rows.to(self.dtype), idx, self.directions)
                found[:, m].index_add_(0, idx.flatten().long(), along.flatten())

    def _units(self) -> Tensor:
        norms = self.norms.sum(1)
        return torch.where(norms > 0, norms, 1)

    def scaling(self) -> Scaling | None:
        """None for parts of several widths."""
        if self.directions is None:
            return None
        # With the latent left out, its own part f d_m is in the error.
        error = self.error + self.squares[:, None] * self.products
        scale = (self.directions.double().square().sum(1) * self.squares)[:, None]
        return Scaling(self.strongest, error / scale, self.reconstruction / scale)

    def latents(self) -> dict[str, Tensor]:
        found, scaling = {"part_norms": self.norms}, self.scaling()
        if scaling is not None:
            found |= {"nu_error": scaling.nu_error, "nu_reconstruction": scaling.nu_reconstruction}
        return found

    def compute(self) -> dict[str, Any]:
        """Figures for people; `CROSSCODER` says what each is. NaN where no latent fired."""
        fired = self.squares > 0
        norms = self.norms[fired]
        shares = (norms / norms.sum(1, keepdim=True)).mean(0).tolist()
        squares = norms.square()
        figures: dict[str, Any] = {
            "parts": [{"fvu": fvu, "norm_share": share} for fvu, share in zip(self.fvu(), shares, strict=True)],
            "span": float((squares.sum(1).square() / squares.square().sum(1)).mean()),
        }
        return figures | {"latents": self._whose(fired)} if len(self.widths) == 2 else figures

    def _whose(self, fired: Tensor) -> dict[str, Any]:
        """Of two parts: how many latents that fired are whose, and the median ν of those that one has alone."""
        delta, scaling = relative_norms(self.sae), self.scaling()
        low, high = SHARED
        alone = {"only_first": delta < ONLY_FIRST, "only_second": delta > ONLY_SECOND}
        found: dict[str, Any] = {name: int((mask & fired).sum()) for name, mask in alone.items()}
        found["shared"] = int(((delta >= low) & (delta <= high) & fired).sum())
        found["between"] = int(fired.sum()) - sum(found.values())
        for weak, (name, mask) in zip((1, 0), alone.items(), strict=True):
            if scaling is not None and found[name]:
                found[f"{name}_nu_error"] = float(scaling.nu_error[mask & fired, weak].median())
                found[f"{name}_nu_reconstruction"] = float(scaling.nu_reconstruction[mask & fired, weak].median())
        return found


def metrics_by_part(sae: SAE) -> PartMetrics | None:
    """An accumulator for what the SAE reconstructs; None where that is one layer of one model."""
    widths = sae.architecture.target_parts()
    if is_crosscoder(sae):
        return CrosscoderMetrics(sae)
    return PartMetrics(widths, sae.device) if len(widths) > 1 else None


def is_crosscoder(sae: SAE) -> bool:
    return sae.config.crosscode_widths is not None


def _check(sae: SAE) -> None:
    if not is_crosscoder(sae):
        raise InputError("sae is no crosscoder: its crosscode_widths is None, so its rows have no parts to compare")
