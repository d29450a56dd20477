"""What hook names mean: module paths, blocks by number, TransformerLens' names."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from saefast.errors import InputError
from saefast.places import Place

# What TransformerLens calls the output of a block.
_TL_BLOCK = re.compile(r"blocks\.(\d+)\.(hook_resid_post|hook_out)")


@dataclass(frozen=True)
class Hook:
    """name: what the user asked for. places: where it is in the model; the values of several are concatenated."""

    name: str
    places: tuple[Place, ...]

    @property
    def path(self) -> str:
        """The places as `find_hook` takes them: an index's hf_name."""
        return "+".join(map(str, self.places))


def find_hook(model: nn.Module, name: str) -> Hook:
    """What a hook name means in this model: NAME[@TURN][:in], or several of these joined by +.

    NAME is tried in this order:

    a full path ("encoder.layer.4"); one relative to the base model, with or without its prefix ("model.layers.4" and
    "layers.4" mean the same in a Llama with or without its language-model head); "layers.4[.rest]" for the blocks of
    any model, under its own name (encoder.layer.4 in BERT, h.4 in GPT-2); TransformerLens'
    "blocks.4.hook_resid_post". Raises InputError with the nearest names that exist.
    """
    return Hook(name, tuple(_find_place(model, part) for part in name.split("+")))


def _find_place(model: nn.Module, written: str) -> Place:
    asked, modules = Place.read(written), dict(model.named_modules())
    for candidate in _candidates(model, modules, asked.path):
        if candidate in modules and candidate:
            return replace(asked, path=candidate)
    name = asked.path
    near = _nearest(name, modules, _blocks_path(model))
    raise InputError(f"hook {name!r} is no module of {type(model).__name__}; nearest: {', '.join(near)}")


def _candidates(model: nn.Module, modules: dict[str, nn.Module], name: str) -> Iterator[str]:
    prefix = str(getattr(model, "base_model_prefix", ""))
    # A model without a head is its own base model, and then the prefix is no part of its paths.
    prefixes = [""] + ([prefix + "."] if prefix and prefix in modules else [])
    plain = name.removeprefix(prefix + ".") if prefix else name
    for relative in dict.fromkeys((name, plain, name.removeprefix("model."), name.removeprefix("transformer."))):
        yield from (p + relative for p in prefixes)
    blocks = _blocks_path(model)
    block = _TL_BLOCK.fullmatch(name)
    if block:
        yield f"{blocks}.{block[1]}"
    match = re.match(r"(?:model\.)?layers?\.(\d+.*)", plain)
    if match:
        yield f"{blocks}.{match[1]}"


def _blocks_path(model: nn.Module) -> str:
    """Path of the list of transformer blocks: the longest ModuleList that is in no other (experts are)."""
    lists = {path: len(module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outer = [path for path in lists if not any(path.startswith(other + ".") for other in lists)]
    return max(outer, key=lambda path: lists[path], default="")


def _nearest(name: str, modules: dict[str, nn.Module], blocks: str) -> list[str]:
    names = [path for path in modules if path]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    ends = [path for path in names if re.fullmatch(re.escape(blocks) + r"\.\d+", path)] if blocks else []
    if ends and (len(near) < 3 or set(near) & set(ends)):
        # Of the blocks it is enough to say how far they go.
        near = [f"{ends[0]} ... {ends[-1]}", *(path for path in near if path not in ends)]
    return near or names[:5]
