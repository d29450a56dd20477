"""Input norm: every token is normalised by figures of its own before it is encoded, and gets them back at the end.

It takes what differs between tokens in size out of the dictionary's task. OpenAI's TopK SAEs (Gao et al. 2024, arXiv
2406.04093, appendix A.1) and BatchTopK's (Bussmann et al. 2024, arXiv 2412.06410) are of tokens with mean 0 and
standard deviation 1; SAELens has these and tokens of norm √d_in as settings of any SAE.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.models.architecture import Layer, RowNorm

# What OpenAI, SAELens and BatchTopK's authors add to the standard deviation on the way in, and not on the way out.
EPS = 1e-5


@dataclass
class InputNormFields:
    """How tokens are normalised.

    Attributes:
        input_norm: what is done to each token before b_dec is subtracted, and undone in its reconstruction: "none"
            nothing; "layer_norm" (x - mean) / (std + 1e-5) over its columns, std with d_in - 1 in the denominator;
            "constant_norm" x · √d_in / ‖x‖. Losses and figures of a training step are of normalised rows.
    """

    input_norm: Literal["none", "layer_norm", "constant_norm"] = "none"

    def check(self) -> None:
        """The schema has checked it."""


class InputNorm(Layer):
    """Over any activation, of rows that come from one place and are themselves what is reconstructed."""

    Fields = InputNormFields

    @classmethod
    def wanted(cls, config: Any) -> bool:
        return config.input_norm != "none"

    def check(self) -> None:
        super().check()
        what = f"input_norm is {self.config.input_norm!r}"
        if self.has_target or len(self.parts()) > 1:
            raise InputError(
                f"{what}, which is undone in the reconstruction of the very row that was normalised: a transcoder or "
                "crosscoder has not that row, or rows of several places; set it to 'none'"
            )
        if self.config.input_norm == "layer_norm" and self.config.d_in < 2:
            raise InputError(f"{what} and d_in 1: a single column has no standard deviation; set it to 'none'")

    def row_norm(self, x: Tensor) -> RowNorm:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.config.input_norm == "layer_norm":
            centre = x.mean(dim=1, keepdim=True)
            std = (x - centre).norm(dim=1, keepdim=True) / (self.config.d_in - 1) ** 0.5
            return RowNorm(centre, std + EPS, std)
        size = x.norm(dim=1, keepdim=True) / self.config.d_in**0.5
        # A row of zeros stays one.
        size = torch.where(size > 0, size, 1)
        return RowNorm(torch.zeros_like(size), size, size)

    def rescaled(self, tensors: dict[str, Tensor], scale: float, target_scale: float) -> dict[str, Tensor]:
        """Rows of any scale are normalised to one; training leaves theirs as it is, for `EPS` would tell them apart."""
        return {}
