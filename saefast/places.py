"""A place in a model: what a module takes or gives at one of its turns, written PATH[@TURN][:in]."""

import re
from dataclasses import dataclass
from typing import Literal

_WRITTEN = re.compile(r"(?P<path>.+?)(@(?P<turn>-?\d+))?(?P<side>:in|:out)?")


@dataclass(frozen=True)
class Place:
    """path: the module's, from the model. side: its output or its first input. turn: which of its calls in a forward
    pass, counted from 0, from the last where negative; None where it is called once."""

    path: str
    side: Literal["out", "in"] = "out"
    turn: int | None = None

    def __str__(self) -> str:
        return f"{self.path}{'' if self.turn is None else f'@{self.turn}'}{':in' * (self.side == 'in')}"

    @classmethod
    def read(cls, written: str) -> "Place":
        """The place that `str` writes so; ":out" may be said."""
        found = _WRITTEN.fullmatch(written)
        if found is None:
            return cls(written)
        turn = None if found["turn"] is None else int(found["turn"])
        return cls(found["path"], "in" if found["side"] == ":in" else "out", turn)
