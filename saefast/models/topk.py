"""TopK: the k largest pre-activations of each token (Gao et al. 2024, arXiv 2406.04093)."""

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
    """

    multi_topk_coef: float = 0.0

    def check(self) -> None:
        if not 0 <= self.multi_topk_coef < math.inf:
            raise InputError(f"multi_topk_coef is {self.multi_topk_coef!r}: expected at least 0, and finite")


class TopK(Architecture):
    """Exactly k entries a token, best first; ReLU leaves zeros where fewer are positive."""

    name = "topk"
    TrainFields = TopKTraining

    def width(self, train: Any) -> int:
        k, L = self.config.k, self.config.n_latents
        return min(4 * k, L) if train.multi_topk_coef else k

    def code(self, encoder: Encoder, train: Any, at: At) -> Code:
        # Columns come best first, so that one selection serves both terms.
        return encoder.topk(self.width(train))

    def serve(self, encoder: Encoder, buffers: dict[str, Tensor]) -> Code:
        return encoder.topk(self.config.k)

    def terms(self, train: Any, at: At) -> Terms:
        k = self.config.k
        if not train.multi_topk_coef:
            return Terms((Term(k),))
        return Terms((Term(k), Term(self.width(train), train.multi_topk_coef, "fvu")))
