"""What a kernel is launched with, as the compiler sees it: types, alignment, constants. Can be written as JSON.

Made where kernels are interpreted or compiled alike; `specialised` is what Triton's launcher derives from it.
"""

import inspect
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

ELEMENTS = {
    "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64", "int8": "i8", "int16": "i16",
    "int32": "i32", "int64": "i64", "uint8": "u8", "bool": "i1",
}  # fmt: skip
# What Triton's launcher takes where a launch does not say.
DEFAULTS = {"num_warps": 4, "num_stages": 3}


@dataclass(frozen=True)
class Argument:
    kind: str
    """pointer, descriptor, integer, number or constant (None too)."""
    type: str = ""
    """Of a pointer's elements, or a descriptor's with its box."""
    value: Any = None
    aligned: bool = False
    """Whether a pointer is a multiple of 16 bytes."""


@dataclass(frozen=True)
class Call:
    module: str
    kernel: str
    arguments: dict[str, Argument]
    options: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(found: dict[str, Any]) -> "Call":
        arguments = {name: Argument(**a) for name, a in found["arguments"].items()}
        return Call(found["module"], found["kernel"], arguments, found["options"])


def described(value: Any, constant: bool) -> Argument:
    if constant or value is None:
        return Argument("constant", value=getattr(value, "value", value))
    if hasattr(value, "data_ptr"):
        return Argument("pointer", element_of(value), aligned=value.data_ptr() % 16 == 0)
    if hasattr(value, "block_shape"):
        return Argument("descriptor", f"{element_of(value.base)}{list(value.block_shape)}")
    if isinstance(value, int):
        return Argument("integer", value=value)
    return Argument("number", value=float(value))


def element_of(tensor: Any) -> str:
    return ELEMENTS[str(tensor.dtype).removeprefix("torch.")]


def bound(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A launch's arguments by name, launch options left out."""
    names = inspect.signature(function).parameters
    return inspect.getcallargs(function, *args, **{k: v for k, v in kwargs.items() if k in names})


def options_of(names: Collection[str], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a launch says beside its kernel's arguments."""
    return DEFAULTS | {k: v for k, v in kwargs.items() if k not in names and v is not None}


def call_of(function: Any, constexprs: set[str], given: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Call:
    arguments = {name: described(value, name in constexprs) for name, value in given.items()}
    return Call(function.__module__, function.__name__, arguments, options_of(given, kwargs))


def specialised(
    kernel: Any, arguments: Mapping[str, Argument]
) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Signature, constants and attributes, as the launcher derives them for a compiled kernel's arguments."""
    signature, constants, attributes = {}, {}, {}
    for n, p in enumerate(kernel.params):
        a = arguments[p.name]
        free = a.kind == "integer" and not p.do_not_specialize
        if p.is_constexpr or a.kind == "constant" or (free and a.value == 1):
            signature[p.name], constants[p.name] = "constexpr", a.value
            continue
        signature[p.name] = type_of(a)
        if a.aligned or (free and a.value % 16 == 0):
            attributes[(n,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def type_of(a: Argument) -> str:
    if a.kind == "pointer":
        return f"*{a.type}"
    if a.kind == "descriptor":
        return f"tensordesc<{a.type}>"
    if a.kind == "number":
        return "fp32"
    return "i32" if -(1 << 31) <= a.value < 1 << 31 else "i64"
