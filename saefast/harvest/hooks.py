"""What hook names mean: module paths, blocks by number, TransformerLens' names, patterns over blocks."""

import difflib
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from saefast.errors import InputError
from saefast.harvest.lens_names import embedding_place, place_in_block
from saefast.places import Place

# A block by its number, whatever the model calls its list of blocks.
_SHORT = re.compile(r"(?:model\.)?(?:layers?|blocks?)\.(-?\d+)(\..+)?")
# TransformerLens' name of a place in a block.
_LENS = re.compile(r"blocks\.(-?\d+)\.((?:\w+\.)?hook_\w+)")


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
    "layers.4" mean the same in a Llama with or without its language-model head); TransformerLens' names
    ("blocks.4.hook_resid_mid", "hook_embed"; `lens_names` has the tables); "layers.4[.rest]" for the blocks of any
    model, under its own name (encoder.layer.4 in BERT, h.4 in GPT-2), those that read text before all others.
    -1 is the last of a list. Warns, naming it, where such a short name could mean a block of another stack.

    Raises InputError with the nearest names that exist, and where encoder and decoder both have such blocks.
    """
    hook = _find(model, name)
    _warn_of_others(model, hook)
    return hook


def expand_hooks(model: nn.Module, names: Sequence[str]) -> tuple[Hook, ...]:
    """`find_hook` of each name; of "layers.*.mlp" one hook for each block that has it: layers.0.mlp, layers.1.mlp ...

    Raises InputError as find_hook does, for a pattern that nothing matches, and for two names of one place.
    """
    modules = dict(model.named_modules())
    longest = max((len(module) for module in modules.values() if isinstance(module, nn.ModuleList)), default=0)
    hooks: list[Hook] = []
    for name in names:
        found = _matching(model, name, longest) if "*" in name else [_find(model, name)]
        _warn_of_others(model, found[0])
        hooks += found
    by_path: dict[str, str] = {}
    for hook in hooks:
        if (other := by_path.setdefault(hook.path, hook.name)) != hook.name:
            raise InputError(f"hooks {other} and {hook.name}: two of them are the same module, {hook.path}")
    return tuple({hook.path: hook for hook in hooks}.values())


def expand_names(known: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """The names, a pattern ("blocks.*.hook_resid_post") replaced by those of `known` that it matches, in order.

    Of a pattern that joins several by +, it is enough that the joined names are known. Raises InputError for a pattern
    that none matches; names without a * are left as they are.
    """
    out: list[str] = []
    for name in names:
        if "*" not in name:
            out.append(name)
            continue
        _one_star(name)
        joined = [_numbers(known, Place.read(part).path) for part in name.split("+") if "*" in part]
        numbers = _numbers(known, name) or set.intersection(*joined)
        if not numbers:
            raise InputError(f"hook {name!r} matches nothing; there are {', '.join(known[:6])}")
        out += [name.replace("*", str(number)) for number in sorted(numbers)]
    return tuple(dict.fromkeys(out))


def known_place(known: Sequence[str], written: str) -> Place:
    """A place whose path is one of the known names; -1 in it is the last number that there is of such names."""
    place = Place.read(written)
    match = re.search(r"(?<=\.)-\d+(?=\.|$)", place.path)
    if match is None or place.path in known:
        return place
    pattern = f"{place.path[: match.start()]}*{place.path[match.end() :]}"
    numbers, back = sorted(_numbers(known, pattern)), -int(match[0])
    return replace(place, path=pattern.replace("*", str(numbers[-back]))) if 0 < back <= len(numbers) else place


def _numbers(known: Sequence[str], pattern: str) -> set[int]:
    """The numbers that, put in the place of each * of a pattern, give a known name."""
    first, *others = map(re.escape, pattern.split("*"))
    written = re.compile(first + r"(\d+)" + r"\1".join(others))
    return {int(match[1]) for match in map(written.fullmatch, known) if match}


def _matching(model: nn.Module, pattern: str, longest: int) -> list[Hook]:
    refused: InputError | None = None
    found: list[Hook] = []
    _one_star(pattern)
    for number in range(longest):
        try:
            found.append(_find(model, pattern.replace("*", str(number))))
        except InputError as error:
            refused = refused or error
    if not found:
        raise InputError(f"hook {pattern!r} matches nothing: {refused or 'the model has no list of blocks'}")
    return found


def _one_star(pattern: str) -> None:
    """Raises InputError where a * stands for anything but a block's number."""
    for part in pattern.split("+"):
        if not re.fullmatch(r"[^*]*(?<=\.)\*(?=[.:@]|$)[^*]*|[^*]+", part):
            raise InputError(f"hook {pattern!r}: expected one * in the place of a block's number, as in layers.*.mlp")


def _find(model: nn.Module, name: str) -> Hook:
    places = tuple(_find_place(model, part) for part in name.split("+"))
    if len(set(places)) < len(places):
        raise InputError(f"hook {name!r} names {places[0]} twice")
    return Hook(name, places)


def _find_place(model: nn.Module, written: str) -> Place:
    asked, modules = Place.read(written), dict(model.named_modules())
    for candidate in _candidates(model, modules, asked.path):
        path = _counted_from_the_end(modules, candidate)
        if path in modules and path:
            return replace(asked, path=path)
    block = _short_path(model, modules, asked.path)
    if block is not None:
        return replace(asked, path=block)
    place = _lens_place(model, modules, asked.path)
    if place is None:
        near = _nearest(asked.path, modules, _stacks(model).text)
        raise InputError(f"hook {asked.path!r} is no module of {type(model).__name__}; nearest: {', '.join(near)}")
    if asked.side == "in":
        raise InputError(f"hook {written!r}: {asked.path} means {place} here, which has no input of its own")
    return replace(place, turn=asked.turn)


def _candidates(model: nn.Module, modules: dict[str, nn.Module], name: str) -> Iterator[str]:
    """Paths that a name may stand for as it is."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    # A model without a head is its own base model, and then the prefix is no part of its paths.
    prefixes = [""] + ([prefix + "."] if prefix and prefix in modules else [])
    plain = name.removeprefix(prefix + ".") if prefix else name
    for relative in dict.fromkeys((name, plain, name.removeprefix("model."), name.removeprefix("transformer."))):
        yield from (p + relative for p in prefixes)


def _lens_place(model: nn.Module, modules: dict[str, nn.Module], name: str) -> Place | None:
    """What TransformerLens calls so; None where it is none of its names, or of a block that is not there."""
    if name == "hook_embed":
        return embedding_place(model, _stack_of(model, name))
    match = _LENS.fullmatch(name)
    if match is None:
        return None
    block = _counted_from_the_end(modules, f"{_stack_of(model, name)}.{match[1]}")
    return place_in_block(model, block, match[1], match[2]) if block in modules else None


def _short_path(model: nn.Module, modules: dict[str, nn.Module], name: str) -> str | None:
    """Path of a block, or of what is in it, that is named by its number."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    match = _SHORT.fullmatch(name.removeprefix(prefix + ".") if prefix else name)
    if match is None:
        return None
    path = _counted_from_the_end(modules, f"{_stack_of(model, name)}.{match[1]}{match[2] or ''}")
    return path if path in modules else None


def _counted_from_the_end(modules: dict[str, nn.Module], path: str) -> str:
    """The path with -1 as the number of the last module of its list."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if re.fullmatch(r"-\d+", part):
            above = modules.get(".".join(parts[:i]))
            if isinstance(above, nn.ModuleList | nn.Sequential) and -int(part) <= len(above):
                parts[i] = str(len(above) + int(part))
    return ".".join(parts)


class _Stacks(NamedTuple):
    """Lists of blocks, by their paths: the one that short names mean, and all. both: encoder's and decoder's, where a
    model has both and neither is meant more than the other."""

    text: str
    every: list[str]
    both: tuple[str, str] | None


def _stacks(model: nn.Module) -> _Stacks:
    lists = {path: len(module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    # Lists in lists are experts and the like.
    outer = {path: n for path, n in lists.items() if not any(path.startswith(other + ".") for other in lists)}

    # Convolutions in front of the blocks can be more than these.
    attends = {path for path in outer if any("att" in name for name, _ in model.get_submodule(path).named_modules())}

    def longest(part: str | None) -> str:
        return max(_below(part, outer), key=lambda path: (path in attends, outer[path]), default="")

    encoder, decoder = (_part(model, name) for name in ("get_encoder", "get_decoder"))
    first, second = longest(encoder), longest(decoder)
    # A model that is its own encoder, or decoder, has the other inside it.
    nested = first in _below(decoder, outer) or second in _below(encoder, outer)
    if first and second and not nested:
        return _Stacks("", list(outer), (first, second))
    named = [path for path, _ in model.named_modules() if path.split(".")[-1] in ("language_model", "text_model")]
    text = next((found for part in (decoder, *named, "") if (found := longest(part))), "")
    return _Stacks(text, [path for path in outer if path in attends or text not in attends], None)


def _below(part: str | None, paths: Iterable[str]) -> list[str]:
    """Those of the paths that are in a part of the model, "" being all of it."""
    return [path for path in paths if part is not None and (not part or path.startswith(part + "."))]


def _part(model: nn.Module, getter: str) -> str | None:
    """Path of what a model says is its encoder or decoder; None where it has none."""
    try:
        part = getattr(model, getter)()
    # Models without such a part answer in various ways.
    except Exception:
        return None
    return next((path for path, module in model.named_modules() if module is part), None)


def _stack_of(model: nn.Module, name: str) -> str:
    stacks = _stacks(model)
    if stacks.both is not None:
        raise InputError(
            f"hook {name!r} could be of {stacks.both[0]} or of {stacks.both[1]} of this {type(model).__name__}:"
            f" name one, as in {stacks.both[0]}.0"
        )
    return stacks.text


def _warn_of_others(model: nn.Module, hook: Hook) -> None:
    """Says which block a short name was taken for, where another stack has the same."""
    if not any(_LENS.fullmatch(part) or _SHORT.match(part) for part in hook.name.split("+")):
        return
    modules, stacks = dict(model.named_modules()), _stacks(model)
    place = hook.places[0]
    if not place.path.startswith(stacks.text + ".") or hook.name == hook.path:
        return
    rest = place.path.removeprefix(stacks.text)
    number = rest.split(".")[1]
    others = [f"{path}.{number}" for path in stacks.every if path != stacks.text]
    others = [path for path in others if path in modules and next(modules[path].children(), None) is not None]
    if others:
        warnings.warn(
            f"hook {hook.name} is {hook.path}, not {', '.join(others)}: name the whole path to choose yourself",
            RuntimeWarning,
            stacklevel=3,
        )


def _nearest(name: str, modules: dict[str, nn.Module], blocks: str) -> list[str]:
    names = [path for path in modules if path]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    ends = [path for path in names if re.fullmatch(re.escape(blocks) + r"\.\d+", path)] if blocks else []
    if ends and (len(near) < 3 or set(near) & set(ends)):
        # Of the blocks it is enough to say how far they go.
        near = [" ... ".join(dict.fromkeys((ends[0], ends[-1]))), *(path for path in near if path not in ends)]
    return near or names[:5]
