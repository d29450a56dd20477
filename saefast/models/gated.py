"""Gated: one affine map decides which latents are on, another how much (Rajamanoharan et al. 2024, arXiv 2404.16014).

An L1 penalty makes activations smaller than they should be. Here it is paid by the gate alone: π = W_enc x + b_enc is
on where it is above 0, and acts are ReLU(exp(r_mag) · W_enc x + b_mag) there. A step has no derivative, so the gate
learns from a second reconstruction, ReLU(π) by the decoder as it is, which gets no gradient from it.
"""

from typing import Any

import torch
from torch import Tensor

from saefast.models.pointwise import Own, threshold_of
from saefast.models.steering import Steered


class Gated(Steered):
    """Own parameters: r_mag, b_mag (n_latents,), the magnitude's log-scale over W_enc and its bias."""

    name = "gated"
    first_share = 0.5

    def parameters(self) -> dict[str, Tensor]:
        new = torch.zeros(2, self.config.n_latents, dtype=torch.float32, device="cpu")
        return {"r_mag": new[0].clone(), "b_mag": new[1].clone()}

    @torch.no_grad()
    def start(self, sae: Any, rows: Tensor, targets: Tensor, train: Any) -> None:
        # Gates open where k latents are on; magnitudes stay what the weights began with.
        threshold = threshold_of(sae, rows)
        sae.b_mag.copy_(sae.b_enc)
        sae.b_enc.sub_(threshold)

    def restarted(self, own: dict[str, Tensor], alive: Tensor) -> dict[str, Tensor]:
        # With a bias of 0 a gate would be open on half of all tokens.
        return {name: own[name][alive].mean() for name in ("r_mag", "b_mag", "b_enc")}

    def limit(self, own: Own, train: Any) -> float:
        return 0.0

    def activate(self, pre: Tensor, own: Own) -> Tensor:
        magnitude = own["r_mag"].exp() * (pre - own["b_enc"]) + own["b_mag"]
        return torch.where(pre > 0, magnitude.relu(), 0)

    def frozen(self, pre: Tensor, own: Own) -> Tensor | None:
        return pre.relu()

    def penalty(self, pre: Tensor, acts: Tensor, own: Own, norms: Tensor | None, train: Any) -> Tensor:
        return pre.relu()

    def rescaled(self, tensors: dict[str, Tensor], scale: float, target_scale: float) -> dict[str, Tensor]:
        # A scale of W_enc is the same in any unit.
        return super().rescaled(tensors, scale, target_scale) | {"r_mag": tensors["r_mag"]}
