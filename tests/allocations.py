"""The memory that a piece of code takes, by watching every tensor that it makes. Works on tensors without memory."""

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """The most bytes that tensors made while it is on held at a time.

    Args:
        given: tensors that were there before, whose views do not count.
    """

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.held = self.peak = 0
        self.known = {t.untyped_storage()._cdata for t in given}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return made

    def note(self, storage: torch.UntypedStorage) -> None:
        # By the storage's own address: views share it, and a tensor without memory has no other.
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())

    def freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.held -= size
