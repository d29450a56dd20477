"""Every architecture that bench.architectures measures: its settings, and the dense statement of the same maths.

The statements are those of tests/dense_statements.py, which know nothing of saefast.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from bench import common
from saefast.models import registry

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
    calibrated: str = ""
    """What makes it as sparse as after training: a "threshold" or the "bias" of each latent; nothing where k does."""
    own: tuple[str, ...] = ()
    """Parameters (L,) beside the four, by the dense statement's names."""
    renamed: Mapping[str, str] = {}
    """Ours by what the dense statement calls them, where that differs."""

    def own_shapes(self, n_latents: int, d_in: int) -> dict[str, tuple[int, ...]]:
        return {name: (d_in, d_in) if name.startswith("W_") else (n_latents,) for name in self.own}


def widths(n_latents: int) -> tuple[int, ...]:
    """Of nested dictionaries, the whole one last."""
    return tuple(n_latents // part for part in (16, 4, 1))


def topk_family() -> dict[str, Kind]:
    return {
        "topk": Kind("TopK", lambda s: dense.topk(s.k), {}, {}, 2.0),
        "batchtopk": Kind(
            "BatchTopK", lambda s: dense.batch_topk(s.k), {"activation": "batchtopk"}, {}, 2.0, batch=True
        ),
        "matryoshka": Kind(
            "Matryoshka BatchTopK", lambda s: dense.matryoshka(s.k, widths(s.n_latents), batch=True),
            {"activation": "batchtopk", "matryoshka": lambda L, D: widths(L)}, {}, 2.0, batch=True,
        ),
    }  # fmt: skip


def kinds() -> dict[str, Kind]:
    """Those that this version of saefast has."""
    found = topk_family()
    return {name: kind for name, kind in found.items() if kind.sae.get("activation", "topk") in registry.ACTIVATIONS}


def own_names(kind: Kind, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A run's parameters by the names that its dense statement has for them."""
    return {kind.renamed.get(name, name): tensor for name, tensor in parameters.items()}


def sae_fields(kind: Kind, n_latents: int, d_in: int) -> dict[str, Any]:
    """Fields of SAEConfig, those that depend on the sizes worked out."""
    return {name: value(n_latents, d_in) if callable(value) else value for name, value in kind.sae.items()}
