"""The modes of torch that surround a call: plain ones while saefast computes, the caller's while their code runs.

Autocast, gradients switched off, inference mode and a lower matmul precision change what a line of torch means. Inside
`plain` none of them is in force, so that training, loading and evaluating give the same bits under each of them. But a
source of data may be the caller's own generator, running a model that they put under autocast and no_grad on purpose:
without those it would give other rows, or keep a graph of every batch. So `theirs` and `drawn` switch back: the
caller's code runs in the modes in which they called saefast.

The default dtype and device belong to the whole process and are never touched: every tensor names its own
(tests/test_memory.py). Deterministic algorithms may stay on: nothing here depends on them.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

# Devices whose autocast can reach saefast's tensors.
DEVICES = ("cpu", "cuda")


class Modes(NamedTuple):
    """What is in force in one thread."""

    grad: bool
    inference: bool
    autocast: tuple[torch.dtype | None, ...]
    """Per entry of DEVICES: the dtype autocast uses there, None where it is off."""


def _in_force() -> Modes:
    autocast = (torch.get_autocast_dtype(d) if torch.is_autocast_enabled(d) else None for d in DEVICES)
    return Modes(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), tuple(autocast))


@contextlib.contextmanager
def _under(modes: Modes) -> Iterator[None]:
    """Runs the block in these modes, then restores those from before, even if the block has changed some."""
    before = _in_force()
    try:
        # The one mode that has no setter. It sets grad as well.
        with torch.inference_mode(modes.inference):
            _set(modes)
            yield
    finally:
        _set(before)


def _set(modes: Modes) -> None:
    """Sets all but inference mode."""
    torch.set_grad_enabled(modes.grad)
    for device, dtype, now in zip(DEVICES, modes.autocast, _in_force().autocast, strict=True):
        if dtype != now:
            torch.set_autocast_enabled(device, dtype is not None)
        if dtype is not None:
            torch.set_autocast_dtype(device, dtype)


class _Precision:
    """The precision of float32 matrix products, one setting for the whole process: full while any thread asks for that.

    The first thread to ask remembers the setting and the last one to leave restores it, so that two trainings side by
    side leave it as it was.
    """

    def __init__(self) -> None:
        self._lock, self._asking = threading.Lock(), 0
        self._before: tuple[str | None, list[str]] | None = None

    def _ask(self) -> None:
        with self._lock:
            self._asking += 1
            if self._before is None and self._overall() != "highest":
                self._before = self._overall(), [backend.fp32_precision for backend in _backends()]
                torch.set_float32_matmul_precision("highest")

    def _leave(self) -> None:
        with self._lock:
            self._asking -= 1
            if self._asking or self._before is None:
                return
            (overall, each), self._before = self._before, None
            if overall is not None:
                torch.set_float32_matmul_precision(overall)
            for backend, precision in zip(_backends(), each, strict=True):
                if backend.fp32_precision != precision:
                    backend.fp32_precision = precision

    @staticmethod
    def _overall() -> str | None:
        """The setting; None where the backends' settings differ: torch then has no one word for them and raises."""
        try:
            return torch.get_float32_matmul_precision()
        except RuntimeError:
            return None

    def untouched(self) -> bool:
        """Whether precision is full and no thread of ours made it so: then none of them is about to change it."""
        return self._before is None and self._overall() == "highest"

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        self._ask()
        try:
            yield
        finally:
            self._leave()

    @contextlib.contextmanager
    def as_it_was(self) -> Iterator[None]:
        self._leave()
        try:
            yield
        finally:
            self._ask()


def _backends() -> tuple[Any, ...]:
    backends: Any = torch.backends  # mkldnn's is made on the fly, which its types do not say
    return backends.mkldnn.matmul, backends.cuda.matmul


class _Thread(threading.local):
    """The modes in which this thread called saefast; None outside of saefast and while the caller's code runs."""

    theirs: Modes | None = None


_precision = _Precision()
_thread = _Thread()


@contextlib.contextmanager
def plain(grad: bool | None = None) -> Iterator[None]:
    """Runs the block in torch's plain modes.

    Args:
        grad: whether gradients are recorded; inference mode is off then. None leaves both as the caller has them, for
            methods that the caller may differentiate.
    """
    before, now = _thread.theirs, _in_force()
    ours = Modes(now.grad, now.inference, _OFF) if grad is None else Modes(grad, False, _OFF)
    if before is not None and ours.inference == now.inference:
        # Inside another block: everything else is plain already.
        with torch.set_grad_enabled(ours.grad):
            yield
        return
    _thread.theirs = before if before is not None else now
    try:
        with _precision.full(), _under(ours):
            yield
    finally:
        _thread.theirs = before


_OFF = (None,) * len(DEVICES)


def _is_plain() -> bool:
    """Whether `plain(None)` would change nothing."""
    return not torch._C._is_any_autocast_enabled() and _precision.untouched()


def plainly(grad: bool | None = None) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: the function runs inside `plain(grad)`."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if grad is None and torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
                return function(*args, **kwargs)  # our ops see to the rest where the program runs
            if grad is None and _is_plain():  # at a tenth of the cost: an SAE's methods may be called for every token
                return function(*args, **kwargs)
            with plain(grad):
                return function(*args, **kwargs)

        return call

    return decorate


def caller() -> Modes:
    """The modes in which this thread called saefast, or that are in force outside of it; for `anywhere`."""
    return _in_force() if _thread.theirs is None else _thread.theirs


@contextlib.contextmanager
def anywhere(modes: Modes) -> Iterator[None]:
    """Runs the caller's code in its own modes on any thread, also one that saefast has started.

    All but the precision of float32 products: that is one for the process, and while one thread draws another trains.
    It stays full, so that what is drawn does not depend on when it is.
    """
    with _handed_over(modes, precision=False), _precision.full():
        yield


@contextlib.contextmanager
def _handed_over(modes: Modes, precision: bool = True) -> Iterator[None]:
    """Runs the caller's code in its own modes, in the middle of ours."""
    kept = _thread.theirs
    _thread.theirs = None
    gives_back = precision and kept is not None
    try:
        with _under(modes), _precision.as_it_was() if gives_back else contextlib.nullcontext():
            yield
    finally:
        _thread.theirs = kept


@contextlib.contextmanager
def theirs() -> Iterator[None]:
    """Runs the block, which calls the caller's code, in the modes in which they called saefast."""
    modes = _thread.theirs
    if modes is None:
        yield
        return
    with _handed_over(modes):
        yield


_END = object()


def drawn(given: Iterable[T], modes: Modes | None = None) -> Iterator[T]:
    """Iterates over what the caller gave, running their code in their modes; with those of `caller`, on any thread.

    A generator that yields inside `with torch.no_grad():` leaves that mode on for the loop that draws from it. Here the
    mode is taken away after each draw and put back for the next one, so that it never reaches saefast's code.
    """
    hand_over = _handed_over if modes is None else anywhere
    modes, iterator = _thread.theirs if modes is None else modes, None
    if modes is None:
        yield from given
        return
    while True:
        with hand_over(modes):
            iterator = iter(given) if iterator is None else iterator
            item = next(iterator, _END)
            modes = _in_force()
        if item is _END:
            return
        yield item  # type: ignore[misc]
