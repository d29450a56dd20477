"""Arguments checked against the annotations of the function that takes them, where people call it.

A wrong type is then named at once, in one line, and not by an error ten calls further in. The annotation stays the only
declaration: mypy checks the function's own code against it.
"""

import functools
import inspect
import numbers
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from saefast.errors import InputError

P = ParamSpec("P")
T = TypeVar("T")
Fits = Callable[[Any], bool]


def typed(function: Callable[P, T]) -> Callable[P, T]:
    """The function, raising InputError for an argument that is not of its annotated type.

    numpy's numbers are numbers, and anything that os.fspath turns into text is a path. Of a container only the type is
    checked, not its elements: an iterable may be readable only once.
    """
    names = tuple(inspect.signature(function).parameters)
    checks: dict[str, Fits] = {}
    in_order: list[Fits] = []

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        # torch.compile traces what is called, and could not trace how annotations are read.
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if not checks:  # at the first call, when every name that the annotations use exists
            checks.update(_checks(function))
            in_order.extend(checks.get(name, _anything) for name in names)
        for place, (fits, value) in enumerate(zip(in_order, args, strict=False)):
            if not fits(value):
                raise _refusal(function, names[place], value)
        for name, value in kwargs.items():
            if not checks.get(name, _anything)(value):
                raise _refusal(function, name, value)
        return function(*args, **kwargs)

    return checked


def _refusal(function: Callable[..., Any], name: str, value: Any) -> InputError:
    return InputError(f"{name} is {_kind(value)}: expected {_words(get_type_hints(function)[name])}")


def _anything(value: Any) -> bool:
    return True


def _checks(function: Callable[..., Any]) -> dict[str, Fits]:
    hints = get_type_hints(function)
    keywords = {p.name for p in inspect.signature(function).parameters.values() if p.kind == p.VAR_KEYWORD}
    return {name: _check(hint) for name, hint in hints.items() if name not in keywords}


def _check(hint: Any) -> Fits:
    """Whether a value is of a type, as a function that is cheap to call."""
    if hint is Any:
        return _anything
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        kinds = tuple(option for option in inner if isinstance(option, type) and option not in _PLAIN)
        others = [_check(option) for option in inner if option not in kinds]
        return lambda value: isinstance(value, kinds) or any(fits(value) for fits in others)
    if origin is Literal:
        return lambda value: isinstance(value, str) and value in inner
    if origin is Annotated:
        return _check(inner[0])
    if hint in _PLAIN:
        return _PLAIN[hint]
    kind = origin or hint
    return lambda value: isinstance(value, kind)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, os.PathLike) and isinstance(os.fspath(value), str))


# torch's stand for sizes that are not known yet.
_INTEGERS = (numbers.Integral, torch.SymInt)
_PLAIN: dict[Any, Fits] = {
    # Python's own numbers first: to ask for a kind of number costs ten times as much.
    int: lambda value: type(value) is int or (isinstance(value, _INTEGERS) and not isinstance(value, bool)),
    float: lambda value: type(value) is float or (isinstance(value, numbers.Real) and not isinstance(value, bool)),
    Path: _is_path,
}


def _words(hint: Any) -> str:
    """A type as people say it."""
    inner = get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_words, inner)))
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, inner))
    if hint is type(None):
        return "None"
    kind = get_origin(hint) or hint
    return {"Path": "a path", "str": "text"}.get(kind.__name__, kind.__name__)


def _kind(value: Any) -> str:
    """A value's type, with the value where that is short."""
    shown = ascii(value) if isinstance(value, str | bytes | numbers.Number | None) else ""
    article = "an" if type(value).__name__[:1].lower() in "aeiou" else "a"
    return f"{shown} ({type(value).__name__})" if 0 < len(shown) <= 40 else f"{article} {type(value).__name__}"
