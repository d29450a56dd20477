"""Every architecture that bench.architectures measures: its settings, and the dense statement of the same maths.

The statements are those of tests/dense_statements.py, which know nothing of saefast.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from bench import common
from saefast.models import registry
from saefast.models.config import SAEConfig

sys.path.append(str(common.ROOT / "tests"))
import dense_statements as dense
from dense_statements import Coefficient, Statement


class Setting(NamedTuple):
    """What a dense statement has to be told of a run of ours."""

    k: int
    n_latents: int
    coef: Coefficient
    """Of the sparsity penalty, step by step: where ours is steered, as it was."""
    config: Any
    """The TrainConfig, every number chosen."""


class Kind(NamedTuple):
    """One line of the tables."""

    label: str
    dense: Callable[[Setting], Statement]
    sae: Mapping[str, Any]
    """Fields of SAEConfig beside the sizes."""
    train: Mapping[str, Any]
    """Fields of TrainConfig that differ from the defaults."""
    least: float
    """How many times as fast as its dense statement a step has to be."""
    data: str = "one layer"
    """Or "layer to layer", "two layers" side by side."""
    batch: bool = False
    """Chooses over a batch, so that what serves is a threshold."""
    reads: int = 1
    """A latent reads D over this many columns of x."""
    calibrated: str = ""
    """What makes it as sparse as after training: a "threshold" or the "bias" of each latent; nothing where k does."""
    begins_dense: bool = False
    """Published as beginning with half of all latents on, which is timed as well."""
    one_for_all: bool = False
    """One SAE serves every k."""
    timed: Mapping[str, Any] = {}
    """Fields of TrainConfig for a step that is timed, so that the sparsity stays as it is."""
    own: tuple[str, ...] = ()
    """Parameters (L,) beside the four, by the dense statement's names."""
    renamed: Mapping[str, str] = {}
    """Ours by what the dense statement calls them, where that differs."""

    def there(self) -> bool:
        """Whether this version of saefast has it."""
        known = {field.name for field in dataclasses.fields(SAEConfig)}
        return set(self.sae) <= known and self.sae.get("activation", "topk") in registry.ACTIVATIONS

    def own_shapes(self, n_latents: int, d_in: int) -> dict[str, tuple[int, ...]]:
        return {name: (d_in, d_in) if name.startswith("W_") else (n_latents,) for name in self.own}


def widths(n_latents: int, d_in: int) -> tuple[int, ...]:
    """Of nested dictionaries, the whole one last."""
    return tuple(n_latents // part for part in (16, 4, 1))


def halves(n_latents: int, d_in: int) -> tuple[int, ...]:
    """Of the two layers that lie side by side."""
    return (d_in // 2, d_in - d_in // 2)


FREE = dict(decoder_norm="never", project_decoder_grad=False)
# JumpReLU's window by default, as a share of the threshold.
WINDOW = dense.Window(0.5, relative=True)
BUDGETS = (8, 16, 32, 64)

COMPETING: dict[str, Kind] = {
    "topk": Kind("TopK", lambda s: dense.topk(s.k), {}, {}, 2.0),
    "batchtopk": Kind(
        "BatchTopK", lambda s: dense.batch_topk(s.k), dict(activation="batchtopk"), {}, 2.0, batch=True
    ),
    "groupmax": Kind("GroupMax", lambda s: dense.group_max(s.k), dict(activation="groupmax"), {}, 2.0),
    "matryoshka": Kind(
        "Matryoshka BatchTopK", lambda s: dense.matryoshka(s.k, widths(s.n_latents, 0), batch=True),
        dict(activation="batchtopk", matryoshka=widths), {}, 2.0, batch=True,
    ),
    "hierarchical": Kind(
        "HierarchicalTopK", lambda s: dense.hierarchical_topk(sorted({*BUDGETS, s.k}), served=s.k),
        dict(hierarchical=BUDGETS), {}, 2.0, one_for_all=True,
    ),
}  # fmt: skip
PAYING: dict[str, Kind] = {
    "relu": Kind(
        "ReLU + L1, unit rows", lambda s: dense.relu_l1(s.coef, by_norm=False), dict(activation="relu"), {}, 1.0,
        calibrated="bias", begins_dense=True,
    ),
    "relu_norms": Kind(
        "ReLU + L1 · norms", lambda s: dense.relu_l1(s.coef, by_norm=True),
        dict(activation="relu", unit_norm_decoder=False), FREE, 1.0, calibrated="bias", begins_dense=True,
    ),
    "jumprelu": Kind(
        "JumpReLU + L0", lambda s: dense.jump_relu_l0(s.coef, WINDOW), dict(activation="jumprelu"), {}, 2.0,
        calibrated="threshold", own=("log_threshold",), timed=dict(jumprelu_threshold_lr=None),
    ),
    "jumprelu_tanh": Kind(
        "JumpReLU + tanh", lambda s: dense.jump_relu_tanh(s.coef, WINDOW, slope=4.0, pre_act_coef=0.0),
        dict(activation="jumprelu"), dict(jumprelu_penalty="tanh"), 2.0, calibrated="threshold",
        own=("log_threshold",), timed=dict(jumprelu_threshold_lr=None),
    ),
    "gated": Kind(
        "Gated", lambda s: dense.gated(s.coef), dict(activation="gated"), {}, 1.0, calibrated="bias",
        own=("r_mag", "b_mag"),
    ),
}  # fmt: skip
ELSEWHERE: dict[str, Kind] = {
    "transcoder": Kind(
        "Transcoder TopK", lambda s: dense.topk(s.k, centred=False),
        dict(d_out=lambda L, D: D, apply_b_dec_to_input=False), {}, 2.0, data="layer to layer",
    ),
    "transcoder_skip": Kind(
        "Transcoder TopK, skip", lambda s: dense.with_skip(dense.topk(s.k, centred=False)),
        dict(d_out=lambda L, D: D, skip=True, apply_b_dec_to_input=False), {}, 2.0, data="layer to layer",
        own=("W_skip",),
    ),
    "crosscoder": Kind(
        "Crosscoder TopK", lambda s: dense.crosscoder_topk(s.k, 2, centred=True), dict(crosscode_widths=halves), {},
        2.0, data="two layers",
    ),
    "cross_layer": Kind(
        "Cross-layer transcoder", lambda s: dense.cross_layer_topk(s.k, 2),
        dict(n_layers=2, apply_b_dec_to_input=False), {}, 2.0, data="two layers", reads=2,
    ),
}  # fmt: skip


def kinds() -> dict[str, Kind]:
    """Those that this version of saefast has, by the name of the command line."""
    return {name: kind for name, kind in (COMPETING | PAYING | ELSEWHERE).items() if kind.there()}


def own_names(kind: Kind, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A run's parameters by the names that its dense statement has for them."""
    return {kind.renamed.get(name, name): tensor for name, tensor in parameters.items()}


def sae_fields(kind: Kind, n_latents: int, d_in: int) -> dict[str, Any]:
    """Fields of SAEConfig, those that depend on the sizes worked out."""
    return {name: value(n_latents, d_in) if callable(value) else value for name, value in kind.sae.items()}
