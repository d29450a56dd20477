"""ReLU with an L1 penalty: every positive pre-activation is active, and what is active is paid for.

Two published forms. Bricken et al. (2023, "Towards Monosemanticity"): decoder rows at unit norm, their gradient
projected, penalty Σ acts. Templeton et al. (2024, "Scaling Monosemanticity"; the recipe is that of the Circuits Updates
of April 2024): free rows, penalty Σ acts · ‖W_dec row‖, the same however a latent's scale is shared out between its
activation and its row. Which of them it is follows from `SAEConfig.unit_norm_decoder`: with neither, activations would
shrink while decoder rows grow.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.models.architecture import smallest_positive
from saefast.models.pointwise import Own
from saefast.models.steering import Steered
from saefast.ops.code import padded
from saefast.ops.encoder import Encoder
from saefast.ops.reference import accumulate_dtype
from saefast.ops.spmm import spmm

# Of the first rows, those that biases begin at.
_ROWS = 2048


@dataclass
class ReLUTraining:
    """How a ReLU with an L1 penalty is trained.

    Attributes:
        sparse_start: ReLU's biases begin where k latents a token are active in the first rows, and W_enc at the scale
            at which these reconstruct best; False begins with biases of 0, where about half of all latents are active.
    """

    sparse_start: bool = True

    def check(self) -> None:
        """A flag has no bounds."""


class ReLU(Steered):
    """acts = ReLU(pre). No parameters beside the four."""

    name = "relu"
    first_share = 0.7
    TrainFields = ReLUTraining

    def wants_norms(self, train: Any) -> bool:
        return not self.config.unit_norm_decoder

    def check_training(self, train: Any) -> None:
        super().check_training(train)
        if self.config.unit_norm_decoder and train.decoder_norm == "never":
            raise InputError(
                "decoder_norm is 'never' and unit_norm_decoder True: the L1 penalty of activation='relu' would be paid "
                "off by small activations and long decoder rows; set unit_norm_decoder to False, which makes it count "
                "the rows' norms, or decoder_norm to 'post_step'"
            )
        if not self.config.unit_norm_decoder and (train.decoder_norm != "never" or train.project_decoder_grad):
            raise InputError(
                f"unit_norm_decoder is False, decoder_norm {train.decoder_norm!r} and project_decoder_grad "
                f"{train.project_decoder_grad}: activation='relu' with free decoder rows needs decoder_norm 'never' "
                "and project_decoder_grad False"
            )

    def recipe(self, name: str) -> dict[str, Any]:
        # The paper's reconstruction loss is a mean over the columns; ours a sum, so that its penalty counts d_in times.
        found = {"sparsity_coef": 0.004 * self.config.d_in} if name == "towards_monosemanticity" else {}
        return super().recipe(name) | found

    @torch.no_grad()
    def start(self, sae: Any, rows: Tensor, targets: Tensor, train: Any) -> None:
        if not train.sparse_start:
            return
        dtype = accumulate_dtype(sae.dtype)
        x, t = rows[:_ROWS].to(dtype), targets[:_ROWS].to(dtype) - sae.b_dec.to(dtype)
        x = x - sae.b_dec.to(dtype) if self.config.apply_b_dec_to_input else x
        shadow = sae.W_enc.detach() if sae.dtype != dtype else None
        code = Encoder(x, sae.W_enc.detach(), sae.b_enc.detach().to(dtype), shadow=shadow).batch_topk(self.config.k)
        # A little below the last of them, for whether that is active must not hang on rounding.
        limit = smallest_positive(code, None) * (1 - 2**-10)
        if not limit.isfinite():
            return
        sae.b_enc.sub_(limit.to(sae.dtype))
        code = padded(code, self.config.n_latents)
        t_hat = spmm((code.acts - limit).relu(), code.idx, sae.W_dec.detach()).to(dtype)
        squares, along = t_hat.double().square().sum(), (t.double() * t_hat.double()).sum()
        if train.fit_encoder and squares > 0 and along > 0:
            for parameter in (sae.W_enc, sae.b_enc):
                parameter.mul_((along / squares).to(sae.dtype))

    def restarted(self, own: dict[str, Tensor], alive: Tensor) -> dict[str, Tensor]:
        # With a bias of 0 they would be active on half of all tokens.
        return super().restarted(own, alive) | {"b_enc": own["b_enc"][alive].mean()}

    def limit(self, own: Own, train: Any) -> float:
        return 0.0

    def activate(self, pre: Tensor, own: Own) -> Tensor:
        return pre.relu()

    def penalty(self, pre: Tensor, acts: Tensor, own: Own, norms: Tensor | None, train: Any) -> Tensor:
        return acts if norms is None else acts * norms
