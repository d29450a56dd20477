"""What a JSON file must hold, declared as types: one check instead of an `if` for every field that may be wrong.

A file's shape is a TypedDict beside the code that reads it. `check` compares what was read with the declaration and
says in one line which file, which field, what was seen and what was expected. The declarations are Python's own, so
mypy holds the reading code to the same shape; nothing else is needed (msgspec and pydantic would be new dependencies;
typeguard, which tyro brings, takes True for an int and looks at the first element of a list alone).
"""

import sys
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import numpy as np

from saefast.errors import InputError

# A number of things, or a place in a file; what torch and numpy can address.
Count = Annotated[int, range(2**63)]
# Of generators: torch's, numpy's and those in C++.
Seed = Annotated[int, range(2**63)]


def check(value: Any, declared: Any, file: object) -> Any:
    """The value, if it is of the declared type.

    Args:
        value: what a JSON parser returned.
        declared: a TypedDict (unknown keys are allowed), list[T], dict[str, T], a union, Literal, int, float (which
            takes an int too), bool, str, None, Any, tuple[T, ...], or Annotated[int, range(...)].
        file: named in the message.

    Raises:
        InputError: naming the file, the field, what was seen and what was expected.
    """
    problem = _problem(value, declared, "")
    if problem is not None:
        raise InputError(f"{file}: {problem}; it was damaged or edited, or is of another program")
    return value


def check_argument(name: str, value: object, declared: Any) -> None:
    """Raises InputError, naming the argument, where a value that a caller gave is not of the declared type."""
    if not fits(value, declared):
        raise InputError(f"{name} is {_shown(value)}: expected {words(declared)}")


def check_fields(config: Any) -> None:
    """Makes the values of a dataclass plain, as `for_json` does, and checks them against its annotations.

    Raises:
        InputError: naming the first field whose value is not of its annotation.
    """
    for name, declared in get_type_hints(type(config), include_extras=True).items():
        value = for_json(getattr(config, name))
        check_argument(name, value, declared)
        # Configs are frozen once they are made, which they are just now.
        object.__setattr__(config, name, value)


def for_json(value: Any) -> Any:
    """numpy's numbers as Python's, and torch's devices and dtypes by their names: what JSON can hold."""
    if isinstance(value, np.generic):
        return value.item()
    # Whoever has a value of torch's has imported it; a page or a help text is shown without waiting for it.
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    return tuple(map(for_json, value)) if type(value) is tuple else value


def fits(value: object, declared: Any) -> bool:
    """Whether a value is of the declared type; see `check`."""
    return _problem(value, declared, "") is None


def words(declared: Any) -> str:
    """A declared type as people say it."""
    if declared is Any:
        return "anything"
    if is_typeddict(declared):
        return "an object"
    origin, inner = get_origin(declared), get_args(declared)
    if origin in (Union, types.UnionType):
        return " or ".join(map(words, inner))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is Annotated:
        return f"{words(inner[0])} from {inner[1].start} to {inner[1].stop - 1}"
    if origin in (list, tuple):
        return f"a {origin.__name__} of {words(inner[0])}"
    if origin is dict:
        return "an object" if inner[1] is Any else f"an object of {words(inner[1])}"
    return "None" if declared is type(None) else str(declared.__name__)


def _problem(value: object, declared: Any, field: str) -> str | None:
    """What is wrong with a value: the first thing that is, or None."""
    inner = get_args(declared)
    parts: list[tuple[object, Any, str]] = []
    if is_typeddict(declared) and isinstance(value, dict):
        if missing := sorted(declared.__required_keys__ - value.keys()):
            return f"{_join(field, missing[0])} is missing"
        hints = get_type_hints(declared, include_extras=True)
        parts = [(value[key], hint, _join(field, key)) for key, hint in hints.items() if key in value]
    elif get_origin(declared) is dict and isinstance(value, dict):
        parts = [(item, inner[1], _join(field, key)) for key, item in value.items()]
    elif (kind := get_origin(declared)) in (list, tuple) and isinstance(value, kind):
        parts = [(item, inner[0], f"{field}[{place}]") for place, item in enumerate(value)]
    elif not _fits_plain(value, declared):
        return f"{field or 'its content'} is {_shown(value)}, expected {words(declared)}"
    return next((found for part in parts if (found := _problem(*part)) is not None), None)


def _fits_plain(value: object, declared: Any) -> bool:
    """As `fits`, for a value that is no object or list: False where one is declared."""
    origin, inner = get_origin(declared), get_args(declared)
    if declared is Any:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in inner)
    if origin is Annotated:
        return fits(value, inner[0]) and value in inner[1]
    if origin is not None or is_typeddict(declared):
        return False
    if isinstance(value, bool):  # an int to Python, but no number to people
        return declared is bool
    return isinstance(value, (float, int) if declared is float else declared)


def _join(field: str, key: object) -> str:
    return f"{field}.{key}" if field else str(key)


def _shown(value: object) -> str:
    """The value in a few characters, on one line, printable everywhere."""
    text = ascii(value) if not isinstance(value, dict | list) else f"{type(value).__name__} of {len(value)}"
    return text if len(text) <= 60 else f"{text[:57]}..."
