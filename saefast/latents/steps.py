"""How far a pass is: steps of known size, and what share of all work each is expected to be."""

from collections.abc import Callable, Mapping

# Is told how much more is done: rows, or latents.
Advance = Callable[[int], None]
# Is told the step under way, and the share of all work that is done, from 0 to 1.
Shares = Callable[[str, float], None]


def nothing(_n: int) -> None:
    """An `advance` for those who wait without looking."""


class Steps:
    """Shares of the whole.

    Args:
        costs: seconds that each step is expected to take, in any unit, in the order of the steps.
        shown: where the share goes; None is nowhere.
    """

    def __init__(self, costs: Mapping[str, float], shown: Shares | None) -> None:
        whole = sum(costs.values()) or 1.0
        self._costs = {name: cost / whole for name, cost in costs.items()}
        self._shown, self._before = shown, 0.0
        self._step, self._done, self._total = "", 0, 1

    def begin(self, name: str, total: int) -> Advance:
        """A step of so many rows or latents; what was before it is done."""
        self._before += self._costs.get(self._step, 0.0)
        self._step, self._done, self._total = name, 0, max(total, 1)
        self._show()
        return self._advance

    def end(self) -> None:
        self._before, self._done, self._total = 1.0, 0, 1
        self._show()

    def _advance(self, n: int) -> None:
        self._done += n
        self._show()

    def _show(self) -> None:
        if self._shown is not None:
            share = min(self._done / self._total, 1.0)
            self._shown(self._step, min(self._before + self._costs.get(self._step, 0.0) * share, 1.0))
