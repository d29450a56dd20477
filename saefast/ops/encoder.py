"""Encoder: one batch and the weights that it meets, for an architecture's rule to make a code of."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saefast.ops import mixed
from saefast.ops.code import Code
from saefast.ops.encode_batch_topk import encode_batch_topk
from saefast.ops.encode_group_max import encode_group_max
from saefast.ops.encode_topk import encode_topk
from saefast.ops.threshold_encode import threshold_encode


@dataclass
class Encoder:
    """pre = x W_encᵀ + b_enc, of which no more is ever made than the rule at hand needs.

    Attributes:
        x: (B, D). W_enc: (L, D). b_enc: (L,).
        scale: (L,) what pre-activations are multiplied by where they are ranked, or None. Activations stay unscaled.
        own: the architecture's own parameters, by name.
        shadow: (L, D) a bf16 copy of W_enc: it chooses candidates, W_enc decides among them (see `saefast.ops.mixed`).
    """

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    scale: Tensor | None = None
    shadow: Tensor | None = None
    own: dict[str, Tensor] = field(default_factory=dict)

    def of(self, latents: slice, reads: slice) -> "Encoder":
        """Some latents, which read some columns of x alone; its codes count from the first of them."""
        scale, shadow = (None if t is None else t[latents] for t in (self.scale, self.shadow))
        own = {name: value[latents] for name, value in self.own.items() if value.dim() == 1}
        return Encoder(self.x[:, reads].contiguous(), self.W_enc[latents], self.b_enc[latents], scale, shadow, own)

    def topk(self, k: int, latents: Tensor | None = None, relu: bool = True) -> Code:
        """The k best of each row, (B, k). Arguments as `saefast.ops.encode_topk`."""
        options: dict[str, Any] = dict(latents=latents, scale=self.scale, relu=relu)
        if self.shadow is None:
            return Code(*encode_topk(self.x, self.W_enc, self.b_enc, k, **options))
        return Code(*mixed.encode_topk_mixed(self.x, self.shadow, self.W_enc, self.b_enc, k, **options))

    def batch_topk(self, k: int) -> Code:
        """The k · B best of the batch that are positive, CSR; see `saefast.ops.encode_batch_topk`."""
        return encode_batch_topk(self.x, self.W_enc, self.b_enc, k, scale=self.scale, W_low=self.shadow)

    def group_max(self, k: int) -> Code:
        """The largest of each of k equal groups of latents, (B, k); see `saefast.ops.encode_group_max`."""
        return Code(*encode_group_max(self.x, self.W_enc, self.b_enc, k, scale=self.scale, W_low=self.shadow))

    def above(self, threshold: Tensor | float) -> Code:
        """Every entry whose ranked value is above a threshold, CSR, latents ascending in a row.

        Args:
            threshold: one number, or (L,) with one for each latent; at least 0 where there is a scale.
        """
        limits = threshold if isinstance(threshold, Tensor) and threshold.dim() else float(threshold)
        if self.scale is not None:
            # pre · scale > threshold. A scale of 0 lets nothing pass.
            limits = torch.where(self.scale > 0, limits / self.scale, torch.inf)
        # Weights of fewer bits have x rounded to theirs; sums are in fp32.
        row_ptr, idx, acts = threshold_encode(self.x.to(self.W_enc.dtype), self.W_enc, self.b_enc, limits)
        return Code(acts, idx, row_ptr.int())
