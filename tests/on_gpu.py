"""A module's row operations on another device: what goes in is copied there, what they wrote or returned comes back.

So a test that is written for tensors on a CPU holds a GPU's kernels to the same figures.
"""

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class Moved:
    """`module`, whose functions run on `device`. Tensors in tuples, lists and dataclasses are found."""

    def __init__(self, module: ModuleType, device: str) -> None:
        self.module, self.device = module, device

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self.module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            there: dict[int, tuple[Tensor, Tensor]] = {}

            def move(tensor: Tensor) -> Tensor:
                return there.setdefault(id(tensor), (tensor, tensor.to(self.device, copy=True)))[1]

            found = function(*each(args, move), **each(kwargs, move))
            for here, moved in there.values():
                back = moved.to(here.device)
                if not same_bits(here, back):
                    here.copy_(back)
            return each(found, lambda tensor: tensor.cpu())

        return call


def each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor in it changed."""
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: each(getattr(value, field.name), change) for field in dataclasses.fields(value)}
        return type(value)(**fields)
    if isinstance(value, dict):
        return {key: each(inner, change) for key, inner in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(each(inner, change) for inner in value))
    return type(value)(each(inner, change) for inner in value) if isinstance(value, (tuple, list)) else value


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also where both are NaN."""
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))
