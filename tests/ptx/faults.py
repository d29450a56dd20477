"""What a run found: kinds of faults, where, how often, and an example of each.

race        two warps of a block touch a byte, one of them writes, and no bar.sync lies between
programs    two blocks of a grid touch a byte of global memory and one of them writes
bounds      a global access outside every buffer, or a shared one outside the block's
aligned     an address that is no multiple of the access's width: a fault on a GPU, silent in Triton's interpreter
unwritten   shared memory read before anything was written there
async       bytes of a cp.async or TMA copy touched before it was waited for; operands of a wgmma overwritten, or
            its sums touched, before it was waited for
proxy       shared memory that st or cp.async wrote, read by wgmma or overwritten by TMA without fence.proxy.async
masked      something that depends on a lane that a load without `other` left out
hang        threads that wait for what nothing will bring
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from ptx.parse import Instruction

KINDS = ("race", "programs", "bounds", "aligned", "unwritten", "async", "proxy", "masked", "hang")


class Fault(NamedTuple):
    kind: str
    place: str
    """Source line."""
    text: str
    """The instruction."""


@dataclass
class Faults:
    found: Counter[Fault] = field(default_factory=Counter)
    examples: dict[Fault, str] = field(default_factory=dict)

    def report(self, kind: str, instruction: Instruction, detail: str) -> None:
        fault = Fault(kind, instruction.place, instruction.text)
        self.found[fault] += 1
        self.examples.setdefault(fault, detail)

    @property
    def kinds(self) -> set[str]:
        return {fault.kind for fault in self.found}

    def lines(self) -> list[str]:
        """One a kind and source line."""
        seen: dict[tuple[str, str], list[Fault]] = {}
        for fault in self.found:
            seen.setdefault((fault.kind, fault.place), []).append(fault)
        return [
            f"{kind:9} {place}: {self.examples[faults[0]]} ({len(faults)} instructions, {faults[0].text})"
            for (kind, place), faults in seen.items()
        ]

    def __bool__(self) -> bool:
        return bool(self.found)
