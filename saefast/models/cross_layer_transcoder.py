"""Cross-layer transcoder: each layer's code, of what its MLP takes, decodes into what its own and all later MLPs give.

Ameisen et al. 2025, "Circuit Tracing" (transformer-circuits.pub/2025/attribution-graphs/methods.html): the output of
layer m is reconstructed as Σ over l <= m of acts_l · W_dec[l → m]. x holds the inputs of the M layers side by side, and
the target their outputs. Latents are the layers' own, layer by layer: W_enc (L, d_in / M) reads its layer's columns,
and a decoder row (d_out,) is 0 in the columns of earlier layers and stays so. Those zeros are kept and computed with,
which wastes (M - 1) / 2M of W_dec, just under half.

One that is trained here has the best latents of each layer. Those that others publish have a threshold for each latent
or a ReLU alone: they are served.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.models.architecture import Block, Layer
from saefast.models.topk import no_annealing
from saefast.ops.code import Code, padded
from saefast.ops.encoder import Encoder

# The buffer: what each layer's targets were multiplied by in training.
TARGET_SCALE = "target_scale"
_ACTIVATIONS = ("topk", "relu", "jumprelu")


@dataclass
class CrossLayerFields:
    """What a cross-layer transcoder is.

    Attributes:
        n_layers: a cross-layer transcoder of so many layers, whose inputs lie side by side in x and their outputs in
            the target: the code of each decodes into its own output and all later ones; k and n_latents count those of
            all layers. None is any other SAE.
    """

    n_layers: int | None = None

    def check(self) -> None:
        if self.n_layers is not None and self.n_layers < 2:
            raise InputError(f"n_layers is {self.n_layers}: expected at least 2 layers; one layer is a transcoder")


class CrossLayerTranscoder(Layer):
    """k / M latents of each layer, or all that pass ReLU or JumpReLU. Buffer: target_scale (M,)."""

    Fields = CrossLayerFields
    has_target = True

    @classmethod
    def wanted(cls, config: Any) -> bool:
        return config.n_layers is not None

    @property
    def _layers(self) -> int:
        return int(self.config.n_layers)

    @property
    def _d_out(self) -> int:
        return int(self.config.d_in if self.config.d_out is None else self.config.d_out)

    def check(self) -> None:
        super().check()
        c, M = self.config, self._layers
        for name, value in {"d_in": c.d_in, "d_out": self._d_out, "n_latents": c.n_latents, "k": c.k}.items():
            if value % M:
                raise InputError(
                    f"{name} is {value}, which {M} layers (n_layers) cannot share: expected a multiple of {M}"
                )
        what = f"a cross-layer transcoder (n_layers = {M})"
        if c.activation not in _ACTIVATIONS:
            raise InputError(
                f"activation is {c.activation!r}, but {what} takes the k / n_layers best latents of each layer, or all "
                "above a threshold: use activation='topk', or 'relu' or 'jumprelu' for one that is not trained here"
            )
        for name in ("matryoshka", "hierarchical", "crosscode_widths", "skip"):
            if getattr(c, name):
                raise InputError(f"{name} is {getattr(c, name)}, which {what} has not: leave it out")

    def check_training(self, train: Any) -> None:
        super().check_training(train)
        if self.pointwise is not None:
            raise InputError(
                f"activation is {self.config.activation!r}: a cross-layer transcoder is trained with activation='topk' "
                "alone (n_layers is set)"
            )
        no_annealing(train, f"a cross-layer transcoder (n_layers = {self._layers})", "its layers share k")
        for name in ("multi_topk_coef", "auxk_coef", "init_encoder_scale"):
            if getattr(train, name):
                raise InputError(
                    f"{name} is {getattr(train, name)}, which a cross-layer transcoder has not: set it to 0 (latents "
                    "that stay silent are resampled, see resample_every)"
                )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        L, D = self.config.n_latents, self._d_out
        return super().shapes() | {"W_enc": (L, self.config.d_in // self._layers), "W_dec": (L, D), "b_dec": (D,)}

    def blocks(self) -> tuple[Block, ...]:
        M = self._layers
        each, reads, writes = (size // M for size in (self.config.n_latents, self.config.d_in, self._d_out))
        return tuple(
            Block(slice(m * each, (m + 1) * each), slice(m * reads, (m + 1) * reads), slice(m * writes, self._d_out))
            for m in range(M)
        )

    def buffers(self) -> dict[str, Tensor]:
        return super().buffers() | {TARGET_SCALE: torch.ones(self._layers, dtype=torch.float32, device="cpu")}

    def code(self, encoder: Encoder, train: Any, at: Any) -> Code:
        return self._best_of_layers(encoder)

    def serve(self, encoder: Encoder, buffers: dict[str, Tensor]) -> Code:
        if self.pointwise is None:
            return self._best_of_layers(encoder)
        # As many entries for each layer, so that entry and layer can be told from each other's place.
        found = [self.pointwise.serve(encoder.of(*block[:2]), buffers) for block in self.blocks()]
        width = max(code.fullest for code in found)
        return self._beside([padded(code, self.config.n_latents // self._layers, width) for code in found])

    def _best_of_layers(self, encoder: Encoder) -> Code:
        """(B, k): those of the first layer, then of the next."""
        return self._beside([encoder.of(*block[:2]).topk(self.config.k // self._layers) for block in self.blocks()])

    def _beside(self, codes: list[Code]) -> Code:
        """Codes (B, K) of the layers, whose latents count from 0, as one (B, M · K)."""
        idx = [code.idx + block.latents.start for code, block in zip(codes, self.blocks(), strict=True)]
        pre = [code.pre for code in codes if code.pre is not None]
        acts = torch.cat([code.acts for code in codes], dim=1)
        return Code(acts, torch.cat(idx, dim=1), pre=torch.cat(pre, dim=1) if pre else None)

    def parts(self) -> tuple[int, ...]:
        return (self.config.d_in // self._layers,) * self._layers

    def target_parts(self) -> tuple[int, ...]:
        return (self._d_out // self._layers,) * self._layers

    def levels(self, buffers: Mapping[str, Tensor]) -> Tensor:
        return buffers[TARGET_SCALE].repeat_interleave(self._d_out // self._layers)

    def unlevelled(self, tensors: dict[str, Tensor], levels: Tensor, target_levels: Tensor) -> dict[str, Tensor]:
        """Codes stay as they are: W_enc takes the levels in, decoder and b_dec give the targets' back."""
        W_enc, W_dec = tensors["W_enc"].clone(), tensors["W_dec"]
        for block in self.blocks():
            W_enc[block.latents] *= levels[block.reads.start]
        starts = torch.arange(self._layers, dtype=torch.int64, device=W_dec.device) * (self._d_out // self._layers)
        return {
            "W_enc": W_enc,
            "W_dec": (W_dec / target_levels).to(W_dec.dtype),
            "b_dec": (tensors["b_dec"] / target_levels).to(tensors["b_dec"].dtype),
            TARGET_SCALE: (tensors[TARGET_SCALE] * target_levels[starts]).to(tensors[TARGET_SCALE].dtype),
        }
