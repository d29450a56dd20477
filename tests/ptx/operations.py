"""The table of opcodes. A handler gets the block, the instruction and the mask of threads that its guard lets through.

To add an opcode: a function in the module it belongs to (arithmetic, lanes, access, tensorcore, tma), under
`@computes("name")` if it returns the value of its first operand, under `@acts("name")` if it does more than that.
"""

from collections.abc import Callable

import numpy as np

from ptx.machine import Block, Mask
from ptx.parse import Instruction

Handler = Callable[[Block, Instruction, Mask], None]
HANDLERS: dict[str, Handler] = {}


def acts(*names: str) -> Callable[[Handler], Handler]:
    def add(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return add


def computes(*names: str) -> Callable[[Callable[[Block, Instruction], np.ndarray]], Handler]:
    def add(function: Callable[[Block, Instruction], np.ndarray]) -> Handler:
        def handler(block: Block, i: Instruction, mask: Mask) -> None:
            block.put(i.operands[0], function(block, i), mask)

        handler.__name__ = function.__name__
        return acts(*names)(handler)

    return add
