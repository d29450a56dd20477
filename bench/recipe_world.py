"""A world of sparse features that are known: rows that are sums of a few of many directions, of very unequal frequency.

x = Σ_i z_i a_i d_i + b + ε: directions d_i are unit Gaussians, z_i fires with p_i = min(p_max, c · i^-alpha) where c is
such that L0 of them fire in a row on average, sizes a_i = max(0.05, 1 + 0.25 N(0, 1)), b is a unit vector, and ε has
N(0, sigma²/D) in every dimension.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

FOUND = 0.9


def probabilities(N: int, L0: float, alpha: float, p_max: float) -> Tensor:
    """p (N,) float64 with the sum L0, by bisection in log c."""
    powers = torch.arange(1, N + 1, dtype=torch.float64, device="cpu") ** -alpha
    low, high = 1e-9, 1e9
    for _ in range(200):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if float((middle * powers).clamp(max=p_max).sum()) < L0 else (low, middle)
    return (low * powers).clamp(max=p_max)


class World:
    """directions (N, D) float32 of length 1, p (N,) float64, bias (D,): the same for every stream of rows."""

    def __init__(
        self,
        N: int = 32_768,
        D: int = 256,
        L0: float = 8,
        alpha: float = 1.0,
        sigma: float = 0.1,
        p_max: float = 0.25,
        seed: int = 0,
    ) -> None:
        made: dict[str, Any] = dict(generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        self.N, self.D, self.sigma = N, D, sigma
        self.directions = F.normalize(torch.randn(N, D, **made), dim=1)
        self.bias = F.normalize(torch.randn(D, **made), dim=0)
        self.p = probabilities(N, L0, alpha, p_max)

    def batches(self, n: int, seed: int, size: int = 20_000) -> Iterator[Tensor]:
        """Rows (size, D) float32 without end, of the stream that the seed names. `n` is not more than is drawn."""
        for number in range(-(-n // size)):
            yield self.rows(size, np.random.default_rng((seed, number)))

    def rows(self, B: int, rng: np.random.Generator) -> Tensor:
        token, feature = self.fired(B, rng)
        size = np.maximum(0.05, 1 + 0.25 * rng.standard_normal(len(token)))
        offsets = np.searchsorted(token, np.arange(B))
        clean = F.embedding_bag(
            torch.from_numpy(feature), self.directions, torch.from_numpy(offsets), mode="sum",
            per_sample_weights=torch.from_numpy(size).float(),
        )  # fmt: skip
        noise = torch.from_numpy(rng.standard_normal((B, self.D), dtype=np.float32))
        return clean + self.bias + noise * (self.sigma / self.D**0.5)

    def fired(self, B: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """token, feature (n,) int64: which features fire in B rows, by row. Exact, in O(B · L0) rather than O(B · N).

        Hits of a (token, feature) cell are Poisson with rate -ln(1 - p): none with probability 1 - p, so a cell that
        is hit at all has fired, independently of the others.
        """
        rate = np.cumsum(-np.log1p(-self.p.numpy()))
        hits = int(rng.poisson(B * rate[-1]))
        # The last rate may be less than a draw by rounding.
        feature = np.minimum(np.searchsorted(rate, rng.random(hits) * rate[-1], side="right"), self.N - 1)
        cells = np.unique(rng.integers(0, B, hits) * self.N + feature)
        return cells // self.N, cells % self.N


def best_cosines(directions: Tensor, W_dec: Tensor, chunk: int = 4096) -> Tensor:
    """(N,) float32: for each direction (N, D) of length 1 the largest cosine of a decoder row (L, D)."""
    rows = F.normalize(W_dec.float(), dim=1)
    return torch.cat([(part @ rows.T).amax(1) for part in directions.split(chunk)])


def found_by_frequency(cosines: Tensor, p: Tensor, edges: Tensor) -> dict[str, list[float]]:
    """Share of features with a latent of cosine over 0.9, in bins of log10 p; NaN-free: empty bins are left out."""
    place = torch.bucketize(p.log10(), edges) - 1
    found: dict[str, list[float]] = {"log10_p": [], "share": [], "features": []}
    for number in range(len(edges) - 1):
        inside = place == number
        if inside.any():
            found["log10_p"].append(float((edges[number] + edges[number + 1]) / 2))
            found["share"].append(float((cosines[inside] > FOUND).float().mean()))
            found["features"].append(int(inside.sum()))
    return found
