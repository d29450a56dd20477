"""Crosscoder: one code for the rows of several layers or models, a decoder for each (Lindsey et al. 2024).

transformer-circuits.pub/2024/crosscoders. As an SAE it takes the rows side by side: W_enc reads all of them, and a
decoder row is the layers' own decoder rows side by side, so nothing more is held for a latent. What is paid for an
activation, and what latents are ranked by where they compete, is the sum over the layers of their decoder norms (for
BatchTopK Minder et al. 2025, arXiv 2504.02922): one L2 norm over all of them would favour latents that are spread.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.models.architecture import Layer

# The buffer: what each layer's rows were multiplied by in training.
PART_SCALE = "part_scale"


@dataclass
class CrosscoderFields:
    """What a crosscoder is.

    Attributes:
        crosscode_widths: widths of the layers or models whose rows lie side by side in x: a crosscoder, with one code
            for all of them and a decoder for each. None is an SAE of one place.
    """

    crosscode_widths: tuple[int, ...] | None = None

    def check(self) -> None:
        widths = self.crosscode_widths
        if widths is not None and (len(widths) < 2 or min(widths) < 1):
            raise InputError(
                f"crosscode_widths is {widths}: expected widths of at least two layers or models, such as (768, 768)"
            )


class Crosscoder(Layer):
    """Over any activation. Buffer: part_scale (M,), what the rows of each part were multiplied by before training.

    Activations are measured in the summed norms of a latent's scaled decoder rows, unless the activation pays for
    sparsity, in which case the penalty takes these norms.
    """

    Fields = CrosscoderFields

    @classmethod
    def wanted(cls, config: Any) -> bool:
        return config.crosscode_widths is not None

    @property
    def _widths(self) -> tuple[int, ...]:
        widths: tuple[int, ...] = self.config.crosscode_widths
        return widths

    def check(self) -> None:
        super().check()
        if sum(self._widths) != self.config.d_in:
            raise InputError(
                f"crosscode_widths is {self._widths}, {sum(self._widths)} in all, but d_in is {self.config.d_in}: "
                "expected widths that add up to that"
            )

    def check_training(self, train: Any) -> None:
        super().check_training(train)
        rule = self.pointwise
        several = len(set(self._widths)) > 1
        if train.engine == "fused" and several and rule is not None and rule.wants_norms(train):
            raise InputError(
                f"crosscode_widths is {self._widths}, and activation={self.name!r} pays by decoder norms: engine "
                "'fused' does that for parts of one width; use engine='autograd'"
            )

    def buffers(self) -> dict[str, Tensor]:
        return super().buffers() | {PART_SCALE: torch.ones(len(self._widths), dtype=torch.float32, device="cpu")}

    @property
    def ranks_by_norm(self) -> bool:
        return self.pointwise is None

    def norms(self, W_dec: Tensor, buffers: Mapping[str, Tensor] | None = None) -> Tensor:
        # In training the rows, and so the decoder, are scaled already.
        if len(set(self._widths)) == 1:  # three times as fast
            norms = W_dec.unflatten(1, (len(self._widths), -1)).norm(dim=2)
        else:
            norms = torch.stack([part.norm(dim=1) for part in W_dec.split(self._widths, dim=1)], dim=1)
        return norms if buffers is None else norms * buffers[PART_SCALE].to(norms.dtype)

    def parts(self) -> tuple[int, ...]:
        return self._widths

    def target_parts(self) -> tuple[int, ...]:
        return self._widths

    def levels(self, buffers: Mapping[str, Tensor]) -> Tensor:
        widths = torch.tensor(self._widths, dtype=torch.int64, device=buffers[PART_SCALE].device)
        return buffers[PART_SCALE].repeat_interleave(widths)

    def unlevelled(self, tensors: dict[str, Tensor], levels: Tensor, target_levels: Tensor) -> dict[str, Tensor]:
        """Codes stay as they are: W_enc takes the levels in, decoder and b_dec give them back."""
        kind = tensors["W_enc"].dtype
        starts = torch.tensor(self._widths, dtype=torch.int64, device=levels.device).cumsum(0) - 1
        return {
            "W_enc": (tensors["W_enc"] * levels).to(kind),
            "W_dec": (tensors["W_dec"] / target_levels).to(kind),
            "b_dec": (tensors["b_dec"] / target_levels).to(tensors["b_dec"].dtype),
            PART_SCALE: (tensors[PART_SCALE] * target_levels[starts]).to(tensors[PART_SCALE].dtype),
        }
