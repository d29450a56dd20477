"""A place in a model: what a module takes or gives at one of its turns, written PATH[@TURN][:in].

Two things are done at places: their values are taken while the model runs (`visited` and `Taken`), or others are put
there (`replaced`). Both mean the same value by a place, so what a harvest took is what a splice replaces.
"""

import contextlib
import inspect
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from saefast.errors import InputError

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


Visit = Callable[[Place, Any], Any]
Shape = Callable[[Any, str], Tensor]


@contextlib.contextmanager
def visited(model: nn.Module, places: Iterable[Place], visit: Visit) -> Iterator[None]:
    """While open, visit(place, given) sees what each place's module gives, or takes first, at every one of its turns.

    What visit returns takes its place, unless that is None. Raises InputError where a module takes nothing.
    """
    with contextlib.ExitStack() as stack:
        for place in places:
            module = model.get_submodule(place.path)
            attach = _on_output if place.side == "out" else _on_input
            stack.callback(attach(module, place, visit).remove)
        yield


def _on_output(module: nn.Module, place: Place, visit: Visit) -> RemovableHandle:
    return module.register_forward_hook(lambda _module, _args, output: visit(place, output))


def _on_input(module: nn.Module, place: Place, visit: Visit) -> RemovableHandle:
    # Blocks are called with their first argument by name as well as by place.
    names = ("hidden_states", *inspect.signature(module.forward).parameters)

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        name = next((name for name in names if name in kwargs), None)
        if not args and name is None:
            raise InputError(f"hook {str(place)!r}: that module is called without an input")
        new = visit(place, args[0] if args else kwargs[str(name)])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, str(name): new})

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def activations(given: Any, where: str) -> Tensor:
    """Activations (batch, length, d) in what a module takes or gives: a tensor, or the first of a tuple or list.

    (batch, length, heads, d_head) is flattened. Raises InputError for anything else, naming `where`.
    """
    hidden = given[0] if isinstance(given, tuple | list) and given else given
    if not isinstance(hidden, Tensor) or hidden.dim() < 3 or not hidden.is_floating_point():
        seen = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
        raise InputError(f"hook {where!r} gives {seen}, expected activations of shape (batch, length, width)")
    return hidden.flatten(2)


def by_token(batch: int, lengths: Sequence[int], turned: set[str] | None = None) -> Shape:
    """`activations` of a pass over sequences of tokens, also of modules that see all tokens in one row (OPT's MLP).

    lengths: how many positions each of the `batch` sequences may have. turned: places that have (length, batch, d)
    instead, as XLNet's do, and are put right; one sequence of several tokens tells, and a pass over one adds them.

    Raises InputError for activations that are not by sequence and token.
    """

    def shaped(given: Any, where: str) -> Tensor:
        if isinstance(given, Tensor) and given.dim() == 2 and len(given) == batch * lengths[0]:
            given = given.unflatten(0, (batch, lengths[0]))
        found = activations(given, where)
        if turned is not None:
            if batch == found.shape[1] == 1 < found.shape[0] and found.shape[0] in lengths:
                turned.add(where)
            found = found.transpose(0, 1) if where in turned else found
        if len(found) != batch or found.shape[1] not in lengths:
            raise InputError(
                f"hook {where!r} gives shape {tuple(found.shape)} for ({batch}, {lengths[0]}) tokens: "
                "expected (sequences, tokens, width)"
            )
        return found

    return shaped


def with_activations(given: Any, hidden: Tensor) -> Any:
    """What a module took or gave, with other activations (batch, length, d) in it."""
    if isinstance(given, Tensor):
        return hidden.reshape(given.shape)
    items = [hidden.reshape(given[0].shape), *given[1:]]
    # A named tuple takes its items one by one.
    return type(given)(*items) if hasattr(given, "_fields") else type(given)(items)


class _Turns:
    """Counts the turns of places in one forward pass."""

    def __init__(self, places: Iterable[Place]) -> None:
        self.calls = dict.fromkeys(places, 0)

    def next(self, place: Place) -> int:
        """The number of the turn that has come, counted from 0."""
        self.calls[place] += 1
        return self.calls[place] - 1

    def check(self, place: Place) -> None:
        """Raises InputError where the place's turn did not come, or none is named and there were several."""
        calls, turn = self.calls[place], place.turn
        if calls == 0:
            raise InputError(f"hook {str(place)!r} never fired: the model's forward pass does not run that module")
        if turn is None and calls > 1:
            every = [str(Place(place.path, place.side, number)) for number in (0, calls - 1, -1)]
            raise InputError(
                f"hook {str(place)!r} runs {calls} times in one forward pass: "
                f"name the turn, {every[0]} ... {every[1]}, or {every[2]} for the last"
            )
        if turn is not None and not -calls <= turn < calls:
            raise InputError(
                f"hook {str(place)!r}: that module ran {calls} times in this forward pass, "
                f"so its turns are 0 ... {calls - 1}, or -1 ... {-calls} from the last"
            )


class Taken(_Turns):
    """The values of places in one forward pass, as far as it has come. `take` is the visit that takes them.

    shaped: makes activations (batch, length, d) of what a module gives; see `activations`.
    """

    def __init__(self, places: Iterable[Place], shaped: Shape = activations) -> None:
        super().__init__(places)
        self._shaped = shaped
        # Of a turn counted from the last, as many values are kept as may still turn out to be it.
        self._values: dict[Place, deque[Tensor]] = {p: deque(maxlen=max(-(p.turn or 0), 1)) for p in self.calls}

    def take(self, place: Place, given: Any) -> None:
        turn = self.next(place)
        if turn == (place.turn or 0) or (place.turn or 0) < 0:
            # The model may go on to change its tensor in place.
            self._values[place].append(self._shaped(given, str(place)).clone())

    def complete(self) -> bool:
        """Whether nothing that the rest of the pass computes can be of use."""
        return all(self._values[p] and (p.turn or 0) >= 0 for p in self.calls)

    def value(self, place: Place) -> Tensor:
        """(batch, length, d). Raises InputError where the place's turn did not come, or more than one may be meant."""
        self.check(place)
        return self._values[place][0]


@contextlib.contextmanager
def replaced(
    model: nn.Module,
    replace: Mapping[Place, Callable[[Tensor], Tensor]],
    calls: Mapping[Place, int] | None = None,
    shaped: Shape = activations,
) -> Iterator[None]:
    """While open, for one forward pass: the activations x (batch, length, d) of each place are replace[place](x).

    A tuple or list has its first element replaced and stays one. calls: of each place in such a pass (`Taken.calls`);
    turns that are counted from the last need it. shaped: as in Taken. Raises InputError at the end where a place's turn
    did not come, or no turn is named and there were several.
    """
    turns = _Turns(replace)
    wanted = {p: (p.turn or 0) + ((calls or {}).get(p, 0) if (p.turn or 0) < 0 else 0) for p in replace}

    def visit(place: Place, given: Any) -> Any:
        if turns.next(place) != wanted[place]:
            return None
        return with_activations(given, replace[place](shaped(given, str(place))))

    with visited(model, replace, visit):
        yield
    for place in replace:
        turns.check(place)
