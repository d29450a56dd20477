"""Statistics of activations, summed in float64 as rows come: count, mean, norms, and Σ x xᵀ where that is cheap."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Σ x xᵀ costs 2·d² flops a row; beyond this width it would slow the harvest down.
PRODUCTS_UP_TO = 768


@dataclass
class ActivationStats:
    """Sums over rows x of width d: count, Σx (d,), Σ‖x‖², Σ‖x‖, and Σ x xᵀ (d, d) or None; all float64."""

    count: int
    sum: Tensor
    sum_sq_norm: Tensor
    sum_norm: Tensor
    products: Tensor | None

    @classmethod
    def empty(cls, d: int, products: bool | None = None) -> "ActivationStats":
        wanted = d <= PRODUCTS_UP_TO if products is None else products
        shapes = ((d,), (), ()) + (((d, d),) if wanted else ())
        total, squares, norms, *matrix = (torch.zeros(shape, dtype=torch.float64, device="cpu") for shape in shapes)
        return cls(0, total, squares, norms, matrix[0] if matrix else None)

    def add(self, rows: Tensor) -> None:
        """Takes in rows (n, d). Products are formed in float32 over at most 16384 rows, then summed in float64."""
        for part in rows.split(16384):
            x = part.float()
            self.count += len(x)
            self.sum += x.sum(0, dtype=torch.float64)
            sq_norms = (x * x).sum(1, dtype=torch.float64)
            self.sum_sq_norm += sq_norms.sum()
            self.sum_norm += sq_norms.sqrt().sum()
            if self.products is not None:
                self.products += x.T @ x

    @property
    def mean(self) -> Tensor:
        return self.sum / max(self.count, 1)

    @property
    def mean_norm(self) -> float:
        return float(self.sum_norm) / max(self.count, 1)

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """As stored in stats.safetensors: {prefix}/count, sum, sum_sq_norm, sum_norm, mean_norm[, second]."""
        out = {
            "count": torch.tensor(self.count, dtype=torch.int64, device="cpu"),
            "sum": self.sum,
            "sum_sq_norm": self.sum_sq_norm,
            "sum_norm": self.sum_norm,
            "mean_norm": torch.tensor(self.mean_norm, dtype=torch.float64, device="cpu"),
        }
        if self.products is not None:
            out["second"] = self.products
        return {f"{prefix}/{name}": tensor for name, tensor in out.items()}

    @classmethod
    def from_tensors(cls, prefix: str, tensors: dict[str, Tensor]) -> "ActivationStats":
        """Raises KeyError where `tensors` has none of this prefix."""
        count, total, sq_norm, norm = (
            tensors[f"{prefix}/{name}"] for name in ("count", "sum", "sum_sq_norm", "sum_norm")
        )
        return cls(int(count), total, sq_norm, norm, tensors.get(f"{prefix}/second"))
