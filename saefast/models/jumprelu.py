"""JumpReLU: a pre-activation above its latent's threshold passes as it is, any other is 0 (arXiv 2407.14435).

Thresholds are trained. A step has no derivative that could do it, so theirs is a straight-through estimate: that of a
step smeared out over a window around the threshold, which is what the derivative of the expected loss comes to
(Rajamanoharan et al. 2024; Gemma Scope, Lieberum et al. 2024, arXiv 2408.05147). The tanh penalty and the loss of
pre-activations below their thresholds are those of Conerly et al. (2025, "Dictionary Learning Optimization
Techniques", Circuits Updates of January).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.models.architecture import At
from saefast.models.pointwise import Own, Pointwise, threshold_of, warmed_up
from saefast.ops.code import Number

STEERED = "sparsity_steered"
# Width of the window, in units of the threshold, where none is given.
_WIDTH = 0.5
# Where no coefficient is given: what it answers to L0 / k - 1 at once, and what a whole run of such an error adds to
# it, in units of 1 / k and of a reconstruction loss that is a share of the variance. Larger errors are not added up:
# they are of thresholds that are on their way.
_AT_ONCE, _IN_A_RUN, _LARGEST = 2.0, 10.0, 0.2


@dataclass
class JumpReLUFields:
    """What a JumpReLU is, differentiated.

    Attributes:
        jumprelu_bandwidth: width of the window around a threshold through which this gets its gradient; None is half
            of the threshold itself, whatever the scale of the inputs (Gemma Scope: 0.001, of
            inputs with a mean square of 1; Anthropic: 2).
        jumprelu_ste_to_input: pre-activations in the window get the estimate too, not the thresholds alone (Anthropic).
    """

    jumprelu_bandwidth: float | None = None
    jumprelu_ste_to_input: bool = False

    def check(self) -> None:
        width = self.jumprelu_bandwidth
        if width is not None and not 0 < width < math.inf:
            raise InputError(f"jumprelu_bandwidth is {width!r}: expected more than 0 and finite, or None")


@dataclass
class JumpReLUTraining:
    """How JumpReLU is trained.

    Attributes:
        jumprelu_penalty: what sparsity_coef multiplies: "l0" the mean L0 (Gemma Scope); "target" (L0 / k - 1)², which
            holds L0 a little above k (dictionary_learning); "tanh" the sum of tanh(jumprelu_tanh_scale · act · ‖decoder
            row‖) (Anthropic).
        jumprelu_threshold_lr: peak learning rate of the logarithms of the thresholds; None is lr. It follows lr's
            schedule.
        jumprelu_threshold: where thresholds begin, in the units that inputs are scaled to; None is where k latents a
            token are active in the first rows.
        jumprelu_tanh_scale: see jumprelu_penalty.
        jumprelu_pre_act_coef: weight of the mean over tokens of Σ ReLU(threshold - pre) · ‖decoder row‖, over all
            latents, which brings back dead ones; Anthropic's is 3e-6. More than 0 makes every step a dense one.
    """

    jumprelu_penalty: Literal["l0", "target", "tanh"] = "l0"
    jumprelu_threshold_lr: float | None = 0.03
    jumprelu_threshold: float | None = None
    jumprelu_tanh_scale: float = 4.0
    jumprelu_pre_act_coef: float = 0.0

    def check(self) -> None:
        for name in ("jumprelu_threshold_lr", "jumprelu_threshold", "jumprelu_tanh_scale"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} is {value!r}: expected more than 0, and finite")
        if not 0 <= self.jumprelu_pre_act_coef < math.inf:
            raise InputError(
                f"jumprelu_pre_act_coef is {self.jumprelu_pre_act_coef!r}: expected at least 0, and finite"
            )


class Gate(torch.autograd.Function):
    """1 where pre > threshold, else 0. Derivatives are those of a ramp as wide as the window, 0 outside of it."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, width: Tensor, to_pre: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold, width)
        ctx.to_pre = to_pre
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        pre, threshold, width = ctx.saved_tensors
        slope = torch.where((pre - threshold).abs() < width / 2, grads[0] / width, 0)
        return slope if ctx.to_pre else None, (-slope).sum_to_size(threshold.shape), None, None


class JumpReLU(Pointwise):
    """Own parameter: log_threshold (n_latents,), the natural logarithms of the thresholds."""

    name = "jumprelu"
    Fields = JumpReLUFields
    TrainFields = JumpReLUTraining

    def check_training(self, train: Any) -> None:
        super().check_training(train)
        if train.jumprelu_penalty == "target" and train.sparsity_coef is None:
            raise InputError(
                "sparsity_coef is None, which lets a run find the coefficient that brings L0 to k, and "
                "jumprelu_penalty='target' is another way to the same: set sparsity_coef (dictionary_learning's is 1), "
                "or leave jumprelu_penalty at 'l0'"
            )

    def parameters(self) -> dict[str, Tensor]:
        return {"log_threshold": torch.zeros(self.config.n_latents, dtype=torch.float32, device="cpu")}

    def rates(self, train: Any) -> dict[str, float]:
        rate = train.jumprelu_threshold_lr
        return {} if rate is None or not train.lr else {"log_threshold": rate / train.lr}

    @torch.no_grad()
    def start(self, sae: Any, rows: Tensor, targets: Tensor, train: Any) -> None:
        threshold = train.jumprelu_threshold
        if threshold is None:
            threshold = threshold_of(sae, rows)
        sae.log_threshold.fill_(math.log(threshold))

    def width(self, train: Any) -> int:
        # Those in the window are about two thirds as many as those above the threshold.
        return min(math.ceil(1.75 * self.config.k), self.config.n_latents)

    def limit(self, own: Own, train: Any) -> Tensor | float:
        threshold = own["log_threshold"].exp()
        return threshold if train is None else threshold - self._window(threshold) / 2

    def activate(self, pre: Tensor, own: Own) -> Tensor:
        gate, threshold = self._gate(pre, own)
        # Where the gate moves, the activation goes from 0 to the threshold.
        return torch.where(gate > 0, pre, 0) + threshold.detach() * (gate - gate.detach())

    def wants_norms(self, train: Any) -> bool:
        return bool(train.jumprelu_penalty == "tanh" or self.pays_everywhere(train))

    def penalty(self, pre: Tensor, acts: Tensor, own: Own, norms: Tensor | None, train: Any) -> Tensor:
        if train.jumprelu_penalty != "tanh":
            return self._gate(pre, own)[0]
        assert norms is not None
        return torch.tanh(train.jumprelu_tanh_scale * acts * norms)

    def pays_everywhere(self, train: Any) -> bool:
        return bool(train.jumprelu_pre_act_coef)

    def everywhere(self, pre: Tensor, own: Own, norms: Tensor | None, train: Any) -> Tensor | None:
        if not self.pays_everywhere(train):
            return None
        assert norms is not None
        return train.jumprelu_pre_act_coef * (own["log_threshold"].exp() - pre).relu() * norms

    def state(self, train: Any) -> dict[str, Tensor]:
        return {} if train.sparsity_coef is not None else {STEERED: torch.zeros((), dtype=torch.float64, device="cpu")}

    def coefficient(self, at: At, kept: dict[str, Tensor], l0: Number, train: Any) -> Number:
        k = self.config.k
        if train.sparsity_coef is None:
            # A sum over past steps, for a penalty that is in balance with the reconstruction where L0 is k.
            coef = (kept[STEERED] + _AT_ONCE * (l0 / k - 1)) / k * self._unit(train)
        elif train.jumprelu_penalty == "target":
            coef = train.sparsity_coef * 2 * (l0 / k - 1) / k
        else:
            coef = train.sparsity_coef
        return coef * warmed_up(at, train)

    def counted(self, kept: dict[str, Tensor], l0: Number, at: At, train: Any) -> Any:
        if STEERED not in kept:
            return kept
        excess = torch.as_tensor(l0 / self.config.k - 1, dtype=torch.float64, device=kept[STEERED].device)
        share = _IN_A_RUN / max(at.total_steps, 1)
        return kept | {STEERED: kept[STEERED] + share * excess.clamp(-_LARGEST, _LARGEST)}

    def _unit(self, train: Any) -> float:
        """Inputs are scaled so that a token's variance is about d_in, which is what loss "sum" is measured in."""
        return float(self.config.d_in if train.loss == "sum" else 1)

    def charged(self, coefficient: Number, spent: Number, train: Any) -> Number:
        if train.jumprelu_penalty != "target":
            return coefficient * spent
        # sparsity_coef · (spent / k - 1)², from its derivative.
        return coefficient * (spent - self.config.k) / 2

    def rescaled(self, tensors: dict[str, Tensor], scale: float, target_scale: float) -> dict[str, Tensor]:
        log_threshold = tensors["log_threshold"]
        found = super().rescaled(tensors, scale, target_scale)
        return found | {"log_threshold": log_threshold - math.log(target_scale)}

    def _window(self, threshold: Tensor) -> Tensor:
        """Width of the window around each threshold."""
        width = self.config.jumprelu_bandwidth
        return _WIDTH * threshold.detach() if width is None else torch.full_like(threshold, width)

    def _gate(self, pre: Tensor, own: Own) -> tuple[Tensor, Tensor]:
        """Which are on, with its derivatives, and the thresholds."""
        threshold = own["log_threshold"].exp()
        return Gate.apply(pre, threshold, self._window(threshold), self.config.jumprelu_ste_to_input), threshold
