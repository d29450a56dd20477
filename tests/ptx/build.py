"""Compiles a call for a GPU that is not here, as the launcher would. In processes without TRITON_INTERPRET alone."""

import importlib
import json
import re
from functools import cache
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ptx.call import Call, specialised
from ptx.parse import Program, parse


class Binary(NamedTuple):
    program: Program
    parameters: tuple[str, ...]
    """Names of the arguments that were not constants, in order."""
    types: dict[str, str]
    warps: int
    shared: int
    unfilled: frozenset[tuple[str, int, int]]
    """File, line and column of the loads that leave lanes out without `other`."""


class DoesNotCompile(Exception):
    """The compiler's reason, and the arguments that were None."""


def kernel_of(call: Call) -> Any:
    return getattr(importlib.import_module(call.module), call.kernel)


def compiled(call: Call, sm: int) -> Binary:
    """
    Raises:
        DoesNotCompile.
    """
    signature, constants, attributes = specialised(kernel_of(call), call.arguments)
    key = json.dumps([call.module, call.kernel, signature, constants, sorted(attributes), call.options, sm])
    return _compiled(key)


@cache
def _compiled(key: str) -> Binary:
    module, name, signature, constants, attributes, options, sm = json.loads(key)
    kernel = getattr(importlib.import_module(module), name)
    source = ASTSource(kernel, signature, constants, {tuple(n): [["tt.divisibility", 16]] for n in attributes})
    try:
        found = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    except Exception as error:  # whatever the compiler dislikes is a finding
        nothing = [n for n, value in constants.items() if value is None]
        raise DoesNotCompile(f"{name} for sm_{sm} without {nothing}: {_reason(error)}") from error
    parameters = tuple(n for n in signature if signature[n] != "constexpr")
    types = {n: signature[n] for n in parameters}
    return Binary(
        parse(found.asm["ptx"]), parameters, types, options["num_warps"], found.metadata.shared,
        unfilled_loads(found.asm["ttir"]),
    )  # fmt: skip


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[-160:]


def unfilled_loads(ttir: str) -> frozenset[tuple[str, int, int]]:
    """Where the source has a load with a mask and without `other`."""
    places = dict(re.findall(r"^#(loc\d*) = loc\((.*)\)$", ttir, re.M))
    found = set()
    # tt.load %pointer, %mask : type loc(#loc12); a third operand is `other`.
    for operands, at in re.findall(r"tt\.load ((?:%[\w:#]+(?:, )?)+).* loc\(#(loc\d*)\)", ttir):
        if operands.count("%") == 2:
            spot = _spot(at, places)
            found |= {spot} if spot else set()
    return frozenset(found)


def _spot(name: str, places: dict[str, str]) -> tuple[str, int, int] | None:
    """The innermost file, line and column of a location."""
    for _ in range(20):
        text = places.get(name, "")
        if file := re.search(r'"(?:[^"]*/)?([^"/]+)":(\d+):(\d+)', text):
            return file[1], int(file[2]), int(file[3])
        inner = re.search(r"#(loc\d*)", text)
        if inner is None:
            return None
        name = inner[1]
    return None
