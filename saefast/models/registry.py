"""The architectures: one line each; nothing outside of this folder knows them by name."""

import dataclasses
from typing import Any, get_type_hints

from saefast.models.architecture import Architecture, Layer
from saefast.models.batchtopk import BatchTopK
from saefast.models.cross_layer_transcoder import CrossLayerTranscoder
from saefast.models.crosscoder import Crosscoder
from saefast.models.gated import Gated
from saefast.models.groupmax import GroupMax
from saefast.models.hierarchical import Hierarchical
from saefast.models.input_norm import InputNorm
from saefast.models.jumprelu import JumpReLU
from saefast.models.matryoshka import Matryoshka
from saefast.models.pointwise import Pointwise
from saefast.models.relu_l1 import ReLU
from saefast.models.topk import TopK
from saefast.models.transcoder import Transcoder

# What SAEConfig.activation may be.
ACTIVATIONS: dict[str, type[Architecture]] = {
    kind.name: kind
    for kind in (
        TopK,
        BatchTopK,
        GroupMax,
        JumpReLU,
        Gated,
        ReLU,
    )
}  # fmt: skip
# Each is laid over an activation, or over a layer before it in this list, where its own fields ask for it.
LAYERS: tuple[type[Layer], ...] = (
    Matryoshka,
    Hierarchical,
    Crosscoder,
    CrossLayerTranscoder,
    Transcoder,
    InputNorm,
)


def architecture(config: Any) -> Architecture:
    """What an SAEConfig describes."""
    found = ACTIVATIONS[config.activation](config)
    for layer in LAYERS:
        if layer.wanted(config):
            found = layer(config, found)
    return found


def _declared(which: str) -> list[Any]:
    """The dataclasses that all architectures, and what several are built on, declare under that name, each once."""
    kinds = (Pointwise, *ACTIVATIONS.values(), *LAYERS)
    return list(dict.fromkeys(getattr(kind, which) for kind in kinds))


def fields(which: str) -> type:
    """A dataclass of what all architectures add to a config, keyword-only.

    Args:
        which: "Fields", for SAEConfig, or "TrainFields", for TrainConfig.
    """
    found: dict[str, tuple[str, Any, Any]] = {}
    for declared in _declared(which):
        hints = get_type_hints(declared)
        for one in dataclasses.fields(declared):
            assert one.name not in found, f"two architectures have a field {one.name}"
            found[one.name] = (one.name, hints[one.name], dataclasses.field(default=one.default))
    return dataclasses.make_dataclass(which, found.values(), kw_only=True)


def check(which: str, config: Any) -> None:
    """Raises InputError where a value that an architecture added to a config is out of its bounds."""
    for declared in _declared(which):
        declared.check(config)


def described(which: str) -> str:
    """The lines of the dataclasses' docstrings below "Attributes:", to go on another one's."""
    texts = [str(declared.__doc__).partition("Attributes:\n")[2] for declared in _declared(which)]
    return "".join(text.rstrip(" ") for text in texts)
