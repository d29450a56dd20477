"""Pointwise: architectures that decide over each latent of a token by itself, and pay for every one that is on.

A subclass states its activation and its penalty in plain differentiable torch, elementwise. The same statement serves
chunks of pre-activations (B, C) and the n entries of a sparse code: what belongs to a latent comes already gathered, so
that it broadcasts against the pre-activations. Engines take the derivatives from it by autograd, over those elements
alone. Where a paper replaces a derivative (straight-through estimators), the statement holds an autograd.Function.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.models.architecture import Architecture, At, smallest_positive
from saefast.models.topk import no_annealing
from saefast.ops.code import Code, Number
from saefast.ops.encoder import Encoder
from saefast.ops.reference import accumulate_dtype

Own = Mapping[str, Tensor]

# Of the first rows, those that thresholds begin at.
_ROWS = 2048


@dataclass
class PointwiseTraining:
    """How architectures are trained whose sparsity is paid for: relu, jumprelu, gated.

    Attributes:
        sparsity_coef: what multiplies the penalty, a mean over tokens of the sum over latents; None steers it so that
            the mean number of active latents comes to SAEConfig.k.
        sparsity_warmup_share: share of the run over which it rises linearly from 0.
    """

    sparsity_coef: float | None = None
    sparsity_warmup_share: float = 0.05

    def check(self) -> None:
        if self.sparsity_coef is not None and not 0 <= self.sparsity_coef < math.inf:
            raise InputError(f"sparsity_coef is {self.sparsity_coef!r}: expected at least 0 and finite, or None")
        if not 0 <= self.sparsity_warmup_share <= 1:
            raise InputError(
                f"sparsity_warmup_share is {self.sparsity_warmup_share!r}: expected a number between 0 and 1"
            )


class Pointwise(Architecture):
    """acts = f(pre, own), latent by latent. SAEConfig.k is the mean number of active latents that is aimed at.

    `own` holds the architecture's (L,) parameters by name and "b_enc", each gathered to the shape of pre or to one that
    broadcasts against it.
    """

    TrainFields: ClassVar[type] = PointwiseTraining
    fixed_width = False

    @property
    def pointwise(self) -> "Pointwise":
        return self

    def check(self) -> None:
        if self.config.rescale_acts_by_decoder_norm:
            raise InputError(
                f"rescale_acts_by_decoder_norm is True, which activation={self.name!r} has not: its latents are not "
                "ranked; set it to False"
            )

    def check_training(self, train: Any) -> None:
        no_annealing(train, f"activation={self.name!r}", "its k is the mean number of active latents that is aimed at")
        for name, needs in (("multi_topk_coef", "ranks latents"), ("auxk_coef", "chooses the top dead latents")):
            if getattr(train, name):
                raise InputError(
                    f"{name} is {getattr(train, name)}, which {needs}: activation={self.name!r} does not rank any; set "
                    f"{name} to 0 (latents that stay silent are resampled, see resample_every)"
                )

    def limit(self, own: Own, train: Any) -> Tensor | float:
        """Pre-activations up to which an entry neither acts nor has a gradient: a number, or (L,).

        Args:
            own: ungathered, (L,) each.
            train: a TrainConfig; None asks for what acts alone, which is what inference needs.
        """
        raise NotImplementedError

    def activate(self, pre: Tensor, own: Own) -> Tensor:
        """The activations, of pre's shape, at least 0."""
        raise NotImplementedError

    def penalty(self, pre: Tensor, acts: Tensor, own: Own, norms: Tensor | None, train: Any) -> Tensor:
        """What every entry costs, of pre's shape.

        Args:
            acts: as `activate` gives them.
            norms: of the decoder rows, gathered as own is; None without `wants_norms`.
        """
        raise NotImplementedError

    def wants_norms(self, train: Any) -> bool:
        """Whether the penalty depends on the norms of decoder rows under this recipe."""
        return False

    def everywhere(self, pre: Tensor, own: Own, norms: Tensor | None, train: Any) -> Tensor | None:
        """What every latent costs besides on every token, active or not, of pre's shape and without a coefficient.

        None is nothing; see `pays_everywhere`. Arguments as for `penalty`.
        """
        return None

    def pays_everywhere(self, train: Any) -> bool:
        """Whether `everywhere` is something under this recipe: every entry has a gradient then, and a step is dense."""
        return False

    def frozen(self, pre: Tensor, own: Own) -> Tensor | None:
        """Activations of a second reconstruction, by the decoder as it is and without a gradient to it; None is none.

        Its squared error is added to the loss, weighted as the first one's.
        """
        return None

    def coefficient(self, at: At, kept: dict[str, Tensor], l0: Number, train: Any) -> Number:
        """What multiplies the mean over tokens of the summed penalty in this step.

        Args:
            kept: as it was before this step.
            l0: mean number of active latents in the batch.
        """
        return float(train.sparsity_coef) * warmed_up(at, train)

    def counted(self, kept: dict[str, Tensor], l0: Number, at: At, train: Any) -> Any:
        """What is kept after a training step in which so many latents were active per token; see `observed`.

        A step with many active latents has no list of them, so that it knows no more than this of its code.
        """
        return kept

    def observed(self, kept: dict[str, Tensor], code: Code, scale: Tensor | None, at: At, train: Any) -> Any:
        return self.counted(kept, (code.acts > 0).sum().double() / code.rows, at, train)

    def charged(self, coefficient: Number, spent: Number, train: Any) -> Number:
        """The penalty as a part of the loss; its derivative to spent, the mean summed penalty, is the coefficient."""
        return coefficient * spent

    def code(self, encoder: Encoder, train: Any, at: At) -> Code:
        return self._above(encoder, self.limit(encoder.own, train))

    def serve(self, encoder: Encoder, buffers: dict[str, Tensor]) -> Code:
        return self._above(encoder, self.limit(encoder.own, None))

    def alone(self, pre: Tensor, own: Own, scale: Tensor | None, buffers: Mapping[str, Tensor]) -> Tensor:
        return self.activate(pre, own)

    @torch.no_grad()
    def _above(self, encoder: Encoder, limit: Tensor | float) -> Code:
        code = encoder.above(limit)
        own = gathered(encoder.own | {"b_enc": encoder.b_enc}, code.idx.long())
        return code._replace(acts=self.activate(code.acts, own), pre=code.acts)


def gathered(own: Own, latents: Tensor | slice) -> dict[str, Tensor]:
    """Those of the parameters that hold a number for each latent, at some latents."""
    return {name: value[latents] for name, value in own.items() if value.dim() == 1}


def warmed_up(at: At, train: Any) -> float:
    """The share of its full size that the penalty has in this step."""
    steps = train.sparsity_warmup_share * at.total_steps
    return min((at.step + 1) / steps, 1.0) if steps > 0 else 1.0


@torch.no_grad()
def threshold_of(sae: Any, rows: Tensor) -> float:
    """Above which pre-activation the first rows (n, d_in) have k latents on average; 1 where none is positive."""
    dtype = accumulate_dtype(sae.dtype)
    x = rows[:_ROWS].to(dtype)
    x = x - sae.b_dec.to(dtype) if sae.config.apply_b_dec_to_input else x
    shadow = sae.W_enc.detach() if sae.dtype != dtype else None
    code = Encoder(x, sae.W_enc.detach(), sae.b_enc.detach().to(dtype), shadow=shadow).batch_topk(sae.config.k)
    smallest = float(smallest_positive(code, None))
    # A little less, so that the smallest of them passes, whichever way it is rounded.
    return smallest * (1 - 1e-5) if smallest < math.inf else 1.0
