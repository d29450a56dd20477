"""Flags out of configs: tyro reads SAEConfig, TrainConfig and HarvestConfig themselves, so a new field is a new flag.

A field's type, default and help (the "Attributes:" of the class docstring) are read when the command line is parsed,
whoever put them together.
"""

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, get_args, get_origin, get_type_hints

from tyro.constructors import (
    MISSING_NONPROP,
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from saefast.cli.counts import count

COUNTS = tuple[int, ...]


def rules(command: type, written: dict[str, None]) -> ConstructorRegistry:
    """tyro's rules with ours before them, for the dataclass `command`; `written` gets the counts as they were typed."""
    registry = ConstructorRegistry()
    registry.primitive_rule(_count_rule(written))
    registry.primitive_rule(_counts_rule(written))
    registry.struct_rule(_config_rule(command))
    return registry


def described(config: type) -> dict[str, str]:
    """What the "Attributes:" of a docstring, as it is now, says of each of them, on one line."""
    section = inspect.cleandoc(config.__doc__ or "").partition("Attributes:\n")[2]
    section = re.split(r"^(?=\S)", section, maxsplit=1, flags=re.MULTILINE)[0]
    entries = re.findall(r"^ {4}(\w+):(.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()).removesuffix(".") for name, text in entries}


def _count_rule(written: dict[str, None]) -> Callable[[PrimitiveTypeInfo], PrimitiveConstructorSpec[int] | None]:
    """Every int may be written as 128Ki or 2.5M."""
    spec: PrimitiveConstructorSpec[int] = PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: _read(words, written)[0],
        is_instance=_is_count,
        str_from_instance=lambda value: [str(value)],
    )
    return lambda asked: spec if asked.type is int else None


def _counts_rule(written: dict[str, None]) -> Callable[[PrimitiveTypeInfo], PrimitiveConstructorSpec[COUNTS] | None]:
    """Several ints are one word: 512,2Ki,8Ki."""
    spec: PrimitiveConstructorSpec[COUNTS] = PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT,INT,...",
        instance_from_str=lambda words: _read(words[0].split(","), written),
        is_instance=lambda value: isinstance(value, tuple) and all(map(_is_count, value)),
        str_from_instance=lambda value: [",".join(map(str, value))],
    )
    # tyro may ask for typing.Tuple[int, ...], which is not equal to tuple[int, ...].
    return lambda asked: spec if asked.type_origin is tuple and get_args(asked.type) == get_args(COUNTS) else None


def _read(words: list[str], written: dict[str, None]) -> COUNTS:
    values = tuple(map(count, words))
    written.update(dict.fromkeys(words))
    return values


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _config_rule(command: type) -> Callable[[StructTypeInfo], StructConstructorSpec | None]:
    """The configs inside a command's arguments: a flag for every field that a command line can write.

    A field of the command's own stands in for a config's field of that name: the command fills it in. Where it can
    do so only later, as with widths that the data decides, it declares a functools.partial of the config, and gets one.
    """
    own = {field.name for field in dataclasses.fields(command)}

    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        unfinished = isinstance(info.default, functools.partial)
        config = info.default.func if unfinished else info.type
        if config is command or not dataclasses.is_dataclass(config):
            return None
        known = info.default.keywords if unfinished else getattr(info.default, "__dict__", {})
        flags = [flag for flag in _flags(config, known) if flag.name not in own]
        left = {name: known[name] for name in known.keys() - {flag.name for flag in flags}}
        make = functools.partial(functools.partial, config) if unfinished else config
        return StructConstructorSpec(functools.partial(make, **left), tuple(flags))

    return rule


def _flags(config: type, known: dict[str, Any]) -> list[StructFieldSpec]:
    """A flag for each field but objects (metadata), with the value that is known of it, or its default."""
    hints, help_texts = get_type_hints(config), described(config)
    return [
        StructFieldSpec(
            name=field.name,
            type=hints[field.name],
            default=known.get(field.name, _default(field)),
            helptext=help_texts.get(field.name),
        )
        for field in dataclasses.fields(config)
        if get_origin(hints[field.name]) is not dict
    ]


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING_NONPROP if field.default is dataclasses.MISSING else field.default
