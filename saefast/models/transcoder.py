"""Transcoder: reconstructs something else than what it encodes, such as what an MLP gives from what it takes.

Dunefsky, Chlenski and Nanda 2024, "Transcoders Find Interpretable LLM Feature Circuits" (arXiv 2406.11944). With `skip`
a linear map of the input is added to what the code decodes to: Paulo, Shabalin and Belrose 2025, "Transcoders Beat
Sparse Autoencoders for Interpretability" (arXiv 2501.18823); the form is that of sparsify and circuit-tracer.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.models.architecture import Layer


@dataclass
class TranscoderFields:
    """What a transcoder is.

    Attributes:
        d_out: width of what is reconstructed where that is not the input itself; None is the input.
        skip: add x W_skipᵀ to the reconstruction; W_skip (d_out, d_in) is trained with the rest.
    """

    d_out: int | None = None
    skip: bool = False

    def check(self) -> None:
        if self.d_out is not None and not 1 <= self.d_out < 2**31:
            raise InputError(f"d_out is {self.d_out}: expected at least 1 and less than 2^31")


class Transcoder(Layer):
    """A decoder into another space, over any activation. b_dec is the centre of targets, so x is encoded as it is."""

    Fields = TranscoderFields
    has_target = True

    @classmethod
    def wanted(cls, config: Any) -> bool:
        return config.d_out is not None or config.skip

    @property
    def d_out(self) -> int:
        return int(self.config.d_in if self.config.d_out is None else self.config.d_out)

    def check(self) -> None:
        super().check()
        if self.config.crosscode_widths is not None:
            raise InputError(
                f"crosscode_widths is {self.config.crosscode_widths}, with d_out = {self.config.d_out}, "
                f"skip = {self.config.skip}: a crosscoder reconstructs the rows that it takes; leave d_out and skip out"
            )

    def check_training(self, train: Any) -> None:
        super().check_training(train)
        if train.init_encoder_scale:
            raise InputError(
                "init_encoder_scale is True: it makes inputs come back at their own length, and a transcoder gives "
                "something else; set it to False"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return super().shapes() | {"W_dec": (self.config.n_latents, self.d_out), "b_dec": (self.d_out,)}

    def target_parts(self) -> tuple[int, ...]:
        return (self.d_out,)

    def parameters(self) -> dict[str, Tensor]:
        own = super().parameters()
        if self.config.skip:
            own["W_skip"] = torch.zeros(self.d_out, self.config.d_in, dtype=torch.float32, device="cpu")
        return own

    def direct(self, x: Tensor, own: dict[str, Tensor]) -> Tensor | None:
        return x @ own["W_skip"].T if self.config.skip else None

    def rescaled(self, tensors: dict[str, Tensor], scale: float, target_scale: float) -> dict[str, Tensor]:
        found = super().rescaled(tensors, scale, target_scale)
        if self.config.skip and target_scale != scale:
            found["W_skip"] = tensors["W_skip"] * (scale / target_scale)
        return found
