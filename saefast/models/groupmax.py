"""GroupMax: the largest pre-activation of each of k equal groups of latents (EleutherAI's sparsify, "groupmax").

Group g is the n_latents / k consecutive latents from g · n_latents / k on. Choosing needs no sort, and a token has one
latent in each group, so that groups can live on devices of their own.
"""

from typing import Any

from torch import Tensor

from saefast.errors import InputError
from saefast.models.architecture import Architecture, At, Term, Terms
from saefast.models.topk import no_annealing
from saefast.ops.code import Code
from saefast.ops.encode_group_max import check_groups
from saefast.ops.encoder import Encoder


class GroupMax(Architecture):
    """Exactly k entries a token, latents ascending; ReLU leaves zeros where a group has none that is positive."""

    name = "groupmax"
    presets = {  # noqa: RUF012
        # A group without a positive latent counts there as a firing of its first; here it is nobody's.
        "sparsify": dict(fired_above=0.0),
    }

    def check(self) -> None:
        check_groups(self.config.n_latents, self.config.k)

    def check_training(self, train: Any) -> None:
        no_annealing(train, "activation='groupmax'", "k is the number of its groups")
        if train.multi_topk_coef:
            raise InputError(
                f"multi_topk_coef is {train.multi_topk_coef}, which needs activation='topk': its second term is the "
                "4k best of each token; set it to 0"
            )

    def code(self, encoder: Encoder, train: Any, at: At) -> Code:
        return encoder.group_max(self.config.k)

    def serve(self, encoder: Encoder, buffers: dict[str, Tensor]) -> Code:
        return encoder.group_max(self.config.k)

    def terms(self, train: Any, at: At) -> Terms:
        return Terms((Term(self.config.k),))
