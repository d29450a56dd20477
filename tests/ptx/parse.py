"""PTX as Triton writes it -> a Program of instructions.

One statement a line or between semicolons; directives, braces and comments fall away, except the comment in which
`.loc` names a source line and the calls it was inlined through.
"""

import re
from dataclasses import dataclass, field, replace
from typing import NamedTuple

WIDTHS = {"64": 8, "32": 4, "16": 2, "8": 1}
ROUNDS = ("add", "sub", "mul", "fma", "div", "sqrt", "rcp", "rsqrt", "ex2", "lg2", "mma", "wgmma")
NAME = re.compile(r"%?[\w$.]+")


class Unsupported(Exception):
    """PTX that is not modelled here; the message holds its text."""


class Address(NamedTuple):
    """[base + offset]; a tensor map's operand has coordinates too."""

    base: str
    offset: int = 0
    coordinates: tuple[str, ...] = ()


# A register or constant, the elements of a vector, or an address.
Operand = str | tuple[str, ...] | Address


@dataclass(eq=False)
class Instruction:
    op: tuple[str, ...]
    """The opcode and its modifiers: ("ld", "global", "v4", "b32")."""
    operands: tuple[Operand, ...]
    guard: str | None
    negated: bool
    place: str
    """Source line, innermost first: "standard.py:43 in fill_csr.py:29"."""
    spot: tuple[str, int, int]
    """File, line and column of the innermost."""
    text: str
    number: int = 0
    """Its place in the program."""
    names: frozenset[str] = field(default=frozenset())
    """Every register it mentions."""
    rounds: bool = False
    """Whether it rounds."""

    @property
    def kind(self) -> str:
        """The last modifier, which is the type it works on."""
        return self.op[-1]


@dataclass
class Program:
    name: str
    parameters: list[tuple[str, int]]
    """Name and bytes."""
    body: list[Instruction]
    labels: dict[str, list[int]]
    shared: list[str] = field(default_factory=list)
    """Arrays of shared memory; Triton has one, and it starts at 0."""

    def without(self, *numbers: int) -> "Program":
        """A copy in which some instructions do nothing."""
        body = list(self.body)
        for number in numbers:
            old = body[number]
            body[number] = Instruction(("nop",), (), None, False, old.place, old.spot, f"// {old.text}", number)
        return replace(self, body=body)


def parse(ptx: str) -> Program:
    """The first kernel of a PTX module."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+)"', ptx))
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)[^{]*\{", ptx, re.S)
    if head is None:
        raise Unsupported("PTX without an entry")
    program = Program(head[1], _parameters(head[2]), [], {}, re.findall(r"\.shared[^;]*\.b8\s+(\w+)\[", ptx))
    spot, place = ("", 0, 0), ""
    for line in ptx[head.end() :].split("\n"):
        if line.strip().startswith(".section"):
            break
        if found := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)\s+(\d+)", line):
            # Line 0: code of no line, which keeps the one before.
            if found[2] != "0":
                spot = (files.get(found[1], found[1]), int(found[2]), int(found[3]))
                place = _place(line, spot)
            continue
        for statement in line.partition("//")[0].split(";"):
            _add(program, statement.strip(), place, spot)
    return program


def _parameters(text: str) -> list[tuple[str, int]]:
    found = []
    for p in filter(None, (p.strip() for p in text.split(","))):
        array = re.search(r"\.b8\s+(\w+)\[(\d+)\]", p)
        scalar = re.search(r"\.[usbf](\d+)", p)
        if array:
            found.append((array[1], int(array[2])))
        elif scalar:
            found.append((p.split()[-1], WIDTHS[scalar[1]]))
        else:
            raise Unsupported(f"parameter {p}")
    return found


def _place(line: str, spot: tuple[str, int, int]) -> str:
    chain = re.findall(r"([\w.-]+:\d+):\d+", line.partition("//")[2])
    return " in ".join(chain or [f"{spot[0]}:{spot[1]}"])


def _add(program: Program, text: str, place: str, spot: tuple[str, int, int]) -> None:
    """One statement, behind its labels."""
    # The braces of a vector stay; those of a scope stand alone.
    text = re.sub(r"^\{\s*(?=\.reg|[a-z@]|$)|^\}$", "", text).strip()
    while label := re.match(r"(\$?[\w$.]+):(?!:)\s*", text):
        # A label of inline assembly may occur once a block; a branch means the last one before it.
        program.labels.setdefault(label[1], []).append(len(program.body))
        text = text[label.end() :]
    if not text or text[0] in ".}{":
        return
    guard = re.match(r"@(!?)(%?\w+)\s+", text)
    op, _, rest = (text[guard.end() :] if guard else text).replace("\t", " ").partition(" ")
    operands = [part for o in split(rest) for part in (o.split("|") if "|" in o else [o])]
    names = frozenset(name for name in NAME.findall(rest) if name.startswith("%"))
    names |= {guard[2]} if guard else set()
    parsed, inverted = tuple(_operand(o.strip()) for o in operands), bool(guard and guard[1])
    i = Instruction(tuple(op.split(".")), parsed, guard and guard[2], inverted, place, spot, " ".join(text.split()))
    i.number, i.names = len(program.body), names
    i.rounds = i.kind in ("f32", "f64") and i.op[0] in ROUNDS
    program.body.append(i)


def split(text: str) -> list[str]:
    """At commas outside brackets and braces."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(split(text.strip("{} ")))
    if not text.startswith("["):
        return text
    first, *rest = split(text.strip("[] "))
    base, _, offset = first.partition("+")
    coordinates = tuple(split(rest[0].strip("{} "))) if rest else ()
    return Address(base.strip(), int(offset, 0) if offset.strip() else 0, coordinates)
