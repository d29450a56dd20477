"""What a hooked module gives for images and sound, as rows: (items, positions, width), and which positions are kept."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saefast.errors import InputError
from saefast.places import Place

FeatureMaps = Literal["channels_first", "channels_last"]
# Masks over positions, as models' forwards call them.
MASKS = ("attention_mask", "pixel_attention_mask", "padding_mask")
# What models call the parameters that stand before the patches, and how many: the last dimension but one.
_IN_FRONT: tuple[str, ...] = (
    "cls_token",
    "class_token",
    "class_embedding",
    "dist_token",
    "distillation_token",
    "reg_token",
)
_IN_FRONT += ("register_tokens", "storage_tokens")
# A position is stored in 16 bits.
MOST_POSITIONS = 1 << 15


def shaper(model: nn.Module, maps: FeatureMaps | None) -> Callable[[Any, str], Tensor]:
    """What makes activations (items, positions, width) of what a module at a place gives or takes.

    A pooled output (items, width) is one position. Of (items, height, width, channels) and (items, channels, height,
    width), `maps` says which it is, and so of a convolution over time, (items, channels, length).
    """

    def shaped(output: Any, hook: str) -> Tensor:
        place = Place.read(hook)
        over_time = place.side == "out" and _gives_channels_first(model.get_submodule(place.path))
        hidden = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(hidden, Tensor) or hidden.dim() < 2 or not hidden.is_floating_point():
            seen = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise InputError(f"hook {hook!r} gives {seen}, expected activations of shape (items, positions, width)")
        if hidden.dim() == 2:
            return hidden[:, None]
        if maps is None and (hidden.dim() > 3 or over_time):
            raise InputError(
                f"hook {hook!r} gives {tuple(hidden.shape)}, which may be (items, channels, ...) or (items, ...,"
                " channels): say with feature_maps whether it is channels_first or channels_last"
            )
        if maps == "channels_first":
            return hidden.flatten(2).transpose(1, 2)
        return hidden.flatten(1, -2)

    return shaped


def _gives_channels_first(module: nn.Module) -> bool:
    """Whether a module does nothing but convolve over time: (items, channels, length) comes of it."""
    inside = list(module.modules())
    return any(isinstance(m, nn.Conv1d) for m in inside) and not any(isinstance(m, nn.Linear) for m in inside)


def in_front(model: nn.Module, inputs: Mapping[str, Tensor], n_positions: int) -> int:
    """How many of an image's positions come before its patches: the CLS token and registers; 0 where there are none, or
    not yet, as in the embedding of patches."""
    if "input_ids" in inputs:
        return 0
    found = {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in _IN_FRONT}
    n = sum(1 if p.dim() < 2 else p.shape[-2] for p in found.values())
    return 0 if n_positions <= n or n_positions == _patches(model, inputs) else n


def _patches(model: nn.Module, inputs: Mapping[str, Tensor]) -> int | None:
    """How many patches the images are cut into, where that is known."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", None) or config
    size, pixels = getattr(config, "patch_size", None), inputs.get("pixel_values")
    if pixels is None or pixels.dim() != 4 or not isinstance(size, int | tuple | list):
        return None
    high, wide = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return (pixels.shape[2] // high) * (pixels.shape[3] // wide)


def unmasked(model: nn.Module, inputs: Mapping[str, Tensor], hook: str, shape: tuple[int, int]) -> Tensor:
    """Which positions (items, positions) no mask among the inputs leaves out, bool on the CPU.

    A mask of sound is longer than the positions made of it: the model's own rule is used where it has one (wav2vec2 and
    the like), and a mask that is a whole number of times as long counts at the first place of each position. Raises
    InputError for any other.
    """
    keep = torch.ones(shape, dtype=torch.bool, device="cpu")
    for name in MASKS:
        if name in inputs and shape[1] > 1:
            keep &= _stretched(model, name, inputs[name].cpu().bool(), hook, shape)
    return keep


def _stretched(model: nn.Module, name: str, mask: Tensor, hook: str, shape: tuple[int, int]) -> Tensor:
    if mask.all():
        return mask.new_ones(shape)
    own = getattr(model, "_get_feature_vector_attention_mask", None)
    # An adapter makes the last layers' positions fewer than the others', and the rule counts one of them.
    if own is not None and mask.dim() == 2 and mask.shape != shape and not getattr(model.config, "add_adapter", False):
        return own(shape[1], mask.long()).cpu().bool()
    if mask.dim() != 2 or len(mask) != shape[0] or mask.shape[1] % shape[1]:
        raise InputError(
            f"{name} has shape {tuple(mask.shape)}, hook {hook!r} gives {shape[1]} positions: give a mask of the"
            " positions to keep beside the inputs, (inputs, mask)"
        )
    return mask[:, :: mask.shape[1] // shape[1]]
