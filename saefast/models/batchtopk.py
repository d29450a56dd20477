"""BatchTopK: the k · B largest activations of a batch of B tokens (Bussmann et al. 2024, arXiv 2412.06410).

A token has k entries on average. At inference it has those above a threshold: a running mean, over training batches, of
the smallest activation that was chosen.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.models.architecture import Architecture, At, smallest_positive
from saefast.models.topk import check_annealing, k_at, widest_k
from saefast.ops.code import Code
from saefast.ops.encode_batch_topk import ROOM
from saefast.ops.encoder import Encoder

UNSET = -1.0


@dataclass
class BatchTopKTraining:
    """How BatchTopK is trained.

    Attributes:
        threshold_decay: decay per step of the running mean that is BatchTopK's threshold at inference.
        threshold_start: steps without a threshold at the beginning. It is never set before k has come down from
            k_start, and always by the last step.
        threshold_from_zero: the running mean begins at 0 (SAELens), and not at the first value seen.
    """

    threshold_decay: float = 0.99
    threshold_start: int = 0
    threshold_from_zero: bool = False

    def check(self) -> None:
        if not 0 <= self.threshold_decay < 1:
            raise InputError(f"threshold_decay is {self.threshold_decay!r}: expected at least 0 and less than 1")
        if self.threshold_start < 0:
            raise InputError(f"threshold_start is {self.threshold_start}: expected at least 0")


class BatchTopK(Architecture):
    """A variable number of entries a token. Buffer: threshold (0-d fp32, -1 until it is known)."""

    name = "batchtopk"
    TrainFields = BatchTopKTraining
    presets = {  # noqa: RUF012
        # "from step > 1000", counted from 0. Nothing that was not chosen counts as firing.
        "dictionary_learning": dict(threshold_decay=0.999, threshold_start=1001, fired_above=0.0),
        "saelens": dict(threshold_from_zero=True),
    }
    fixed_width = False

    def check_training(self, train: Any) -> None:
        check_annealing(self.config, train)
        if train.multi_topk_coef:
            raise InputError(
                f"multi_topk_coef is {train.multi_topk_coef}, which needs activation='topk': its second term is the "
                "4k best of each token"
            )

    def buffers(self) -> dict[str, Tensor]:
        return {"threshold": torch.tensor(UNSET, dtype=torch.float32, device="cpu")}

    def width(self, train: Any) -> int:
        return widest_k(self.config, train)

    def ranked(self, train: Any) -> int:
        return min(ROOM * self.width(train), self.config.n_latents)

    def code(self, encoder: Encoder, train: Any, at: At) -> Code:
        return encoder.batch_topk(k_at(self.config, train, at))

    def serve(self, encoder: Encoder, buffers: dict[str, Tensor]) -> Code:
        threshold = buffers["threshold"]
        # Before training has set it, the batch itself is the measure.
        return encoder.batch_topk(self.config.k) if threshold < 0 else encoder.above(threshold)

    def alone(
        self, pre: Tensor, own: Mapping[str, Tensor], scale: Tensor | None, buffers: Mapping[str, Tensor]
    ) -> Tensor | None:
        threshold = buffers["threshold"]
        if threshold < 0:
            return None
        return torch.where((pre if scale is None else pre * scale) > threshold, pre, 0)

    def observed(self, kept: dict[str, Tensor], code: Code, scale: Tensor | None, at: At, train: Any) -> Any:
        # A wider k has a lower threshold, which is not what the SAE will serve with.
        last = at.step + 1 >= at.total_steps
        if not last and (at.step < train.threshold_start or k_at(self.config, train, at) != self.config.k):
            return kept
        threshold, smallest = kept["threshold"], smallest_positive(code, scale).float()
        mean = threshold.clamp_min(0) * train.threshold_decay + smallest * (1 - train.threshold_decay)
        if not train.threshold_from_zero:
            mean = torch.where(threshold < 0, smallest, mean)
        return kept | {"threshold": torch.where(smallest < math.inf, mean, threshold)}

    def rescaled(self, tensors: dict[str, Tensor], scale: float, target_scale: float) -> dict[str, Tensor]:
        now = tensors["threshold"]
        served = {"threshold": torch.where(now < 0, now, now / target_scale)}
        return super().rescaled(tensors, scale, target_scale) | served
