"""Loading: something that takes long to load, loaded once and in the background, while pages are served."""

import threading
from collections.abc import Callable
from typing import Generic, Literal, TypeVar

from saefast.errors import InputError

Loaded = TypeVar("Loaded")
State = Literal["not begun", "loading", "ready", "failed"]


class NotReady(Exception):
    """It is not loaded, or not yet. Loading.state and Loading.why say more."""


class Loading(Generic[Loaded]):
    """What `load` returns, once it has.

    Attributes:
        state: how far it is; a failed one is tried again by `start`.
        why: why it failed, in one line; "" where it did not.
    """

    def __init__(self, load: Callable[[], Loaded]) -> None:
        self._load, self._lock = load, threading.Lock()
        self._found: Loaded | None = None
        self.state: State = "not begun"
        self.why = ""

    def start(self) -> None:
        """Begins to load unless that is under way or done; returns at once."""
        with self._lock:
            if self.state in ("loading", "ready"):
                return
            self.state, self.why = "loading", ""
        # A daemon, so that Ctrl-C does not wait for it.
        threading.Thread(target=self._run, name="loading", daemon=True).start()

    def get(self) -> Loaded:
        """Raises NotReady."""
        with self._lock:
            if self._found is None:
                raise NotReady
            return self._found

    def _run(self) -> None:
        try:
            found = self._load()
        # A model may fail in any way of its own; it is said where a person looks for it, on the page.
        except Exception as error:
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            with self._lock:
                self.state, self.why = "failed", kind + " ".join(str(error).split())[:500]
            return
        with self._lock:
            self._found, self.state = found, "ready"
