"""HierarchicalTopK: one SAE for many budgets of latents (Balagansky et al. 2025, arXiv 2505.24473, EMNLP 2025).

The j best latents of a token reconstruct it by themselves, for every budget j, and the loss is the mean over budgets:
the best latents say the most, and the SAE can be cut to any of its budgets when it is used.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from saefast.errors import InputError
from saefast.models.architecture import At, Layer, Term, Terms


@dataclass
class HierarchicalFields:
    """What a HierarchicalTopK SAE is.

    Attributes:
        hierarchical: budgets of a topk SAE, ascending: for each, so many best latents of a token reconstruct the input;
            k, which is served, is always one of them. "all" is every number up to k, as in the paper; None is k alone.
    """

    hierarchical: tuple[int, ...] | Literal["all"] | None = None

    def check(self) -> None:
        budgets = self.hierarchical
        if isinstance(budgets, tuple) and (
            not budgets or any(a >= b for a, b in zip((0, *budgets), budgets, strict=False))
        ):
            raise InputError(
                f"hierarchical is {budgets}: expected ascending numbers of at least 1, such as (8, 16, 32)"
            )


class Hierarchical(Layer):
    """Terms for every budget, over TopK; k of the config is what is served."""

    Fields = HierarchicalFields

    @classmethod
    def wanted(cls, config: Any) -> bool:
        return config.hierarchical is not None

    def check(self) -> None:
        super().check()
        if self.config.activation != "topk" or self.config.matryoshka is not None:
            over = "matryoshka" if self.config.activation == "topk" else f"activation={self.config.activation!r}"
            raise InputError(
                f"hierarchical is {self.config.hierarchical!r}, which {over} cannot have: its budgets are the best "
                "latents of each token; use activation='topk' without matryoshka"
            )
        if self._budgets(self.config.k)[-1] > self.config.n_latents:
            raise InputError(
                f"hierarchical is {self.config.hierarchical}, but n_latents only {self.config.n_latents}: expected "
                "budgets up to that"
            )

    def check_training(self, train: Any) -> None:
        super().check_training(train)
        if train.multi_topk_coef:
            raise InputError(
                f"multi_topk_coef is {train.multi_topk_coef}, which a hierarchical SAE has not: name the budget 4k in "
                "hierarchical, and set multi_topk_coef to 0"
            )

    def _budgets(self, k: int) -> list[int]:
        """All numbers of latents that reconstruct, ascending; k is what a token has to be served with."""
        given = self.config.hierarchical
        return list(range(1, k + 1)) if given == "all" else sorted({*given, k})

    def width(self, train: Any) -> int:
        return self._budgets(super().width(train))[-1]

    def code(self, encoder: Any, train: Any, at: At) -> Any:
        # Columns come best first, so that one selection serves all budgets.
        return encoder.topk(self.terms(train, at).bounds[-1])

    def with_k(self, k: int) -> Any:
        served = super().with_k(k)
        # Budgets are what training was for: they stay, but for "all", which says them by k.
        given = tuple(self._budgets(self.config.k)) if self.config.hierarchical == "all" else self.config.hierarchical
        return dataclasses.replace(served, hierarchical=given)

    def terms(self, train: Any, at: At) -> Terms:
        inner = super().terms(train, at)
        k = inner.bounds[inner.main]
        budgets = self._budgets(k)
        return Terms(tuple(Term(budget, 1 / len(budgets)) for budget in budgets), main=budgets.index(k))
