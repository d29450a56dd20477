"""TopK: the k largest pre-activations of each token (Gao et al. 2024, arXiv 2406.04093)."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from saefast.errors import InputError
from saefast.models.architecture import Architecture, At, Term, Terms
from saefast.ops.code import Code
from saefast.ops.encoder import Encoder


@dataclass
class TopKTraining:
    """How TopK is trained.

    Attributes:
        multi_topk_coef: weight of the FVU with 4k latents (Gao et al. 2024, section 4.3); 0 turns it off.
        k_start: latents that a token has at the first step of topk and batchtopk, from where they fall linearly to k;
            None is k from the beginning.
        k_anneal_share: share of the run over which they fall.
    """

    multi_topk_coef: float = 0.0
    k_start: int | None = None
    k_anneal_share: float = 0.2

    def check(self) -> None:
        if self.k_start is not None and self.k_start < 1:
            raise InputError(f"k_start is {self.k_start}: expected at least 1, or None")
        if not 0 <= self.k_anneal_share <= 1:
            raise InputError(f"k_anneal_share is {self.k_anneal_share!r}: expected a number between 0 and 1")
        if not 0 <= self.multi_topk_coef < math.inf:
            raise InputError(f"multi_topk_coef is {self.multi_topk_coef!r}: expected at least 0, and finite")


class TopK(Architecture):
    """Exactly k entries a token, best first; ReLU leaves zeros where fewer are positive."""

    name = "topk"
    TrainFields = TopKTraining

    def check_training(self, train: Any) -> None:
        check_annealing(self.config, train)

    def width(self, train: Any) -> int:
        return self._width(widest_k(self.config, train), train)

    def _width(self, k: int, train: Any) -> int:
        return min(4 * k, self.config.n_latents) if train.multi_topk_coef else k

    def code(self, encoder: Encoder, train: Any, at: At) -> Code:
        # Columns come best first, so that one selection serves both terms.
        return encoder.topk(self._width(k_at(self.config, train, at), train))

    def serve(self, encoder: Encoder, buffers: dict[str, Tensor]) -> Code:
        return encoder.topk(self.config.k)

    def with_k(self, k: int) -> Any:
        return dataclasses.replace(self.config, k=k)

    def terms(self, train: Any, at: At) -> Terms:
        k = k_at(self.config, train, at)
        if not train.multi_topk_coef:
            return Terms((Term(k),))
        return Terms((Term(k), Term(self._width(k, train), train.multi_topk_coef, "fvu")))


def k_at(config: Any, train: Any, at: At) -> int:
    """Latents that a token has in a step of training."""
    steps = round(train.k_anneal_share * at.total_steps)
    if train.k_start is None or at.step >= steps:
        return int(config.k)
    return round(train.k_start + (config.k - train.k_start) * at.step / steps)


def widest_k(config: Any, train: Any) -> int:
    """The most latents that a token has in any step of training."""
    return int(config.k if train.k_start is None else train.k_start)


def check_annealing(config: Any, train: Any) -> None:
    """Raises InputError where k_start is not between the SAE's k and all of its latents."""
    if train.k_start is not None and not config.k <= train.k_start <= config.n_latents:
        raise InputError(
            f"k_start is {train.k_start}: expected a number from k = {config.k}, which training ends with, to "
            f"n_latents = {config.n_latents}; or None"
        )


def no_annealing(train: Any, who: str, why: str) -> None:
    """Raises InputError where k is to be annealed in what has another."""
    if train.k_start is not None:
        raise InputError(f"k_start is {train.k_start}, which {who} cannot have: {why}; set k_start to None")
