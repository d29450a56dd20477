"""The optimiser of an accelerated object: torch's Adam in its fused form, and storage that lies alike.

Adam without `fused` makes two temporary matrices for each parameter, and goes over memory seven times; fused it goes
once. Of a step that is otherwise sparse it would be most. Fused optimisers of torch go through the storage of a
parameter, its gradient and its state in one line: if these lie differently, they are wrong without a word.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from saefast.errors import InputError

# What the groups of an optimiser had as (fused, foreach) before `fuse`.
_before: WeakKeyDictionary[Optimizer, list[tuple[Any, Any]]] = WeakKeyDictionary()
_guards: list[Any] = []


def guard() -> None:
    """From now on every fused optimiser has its tensors laid alike before it steps. Once for the process."""
    if not _guards:
        _guards.append(register_optimizer_step_pre_hook(lay_alike))


def fuse(optimizer: Optimizer) -> None:
    """Adam's and AdamW's fused form, for all groups that have one.

    Raises:
        InputError: another kind of optimiser.
    """
    if type(optimizer) not in (Adam, AdamW):
        raise InputError(
            f"optimizer is a {type(optimizer).__module__}.{type(optimizer).__qualname__}: expected torch.optim.Adam or "
            "AdamW, whose fused form can be turned on; leave it out, and it steps as it does now"
        )
    if optimizer not in _before:
        _before[optimizer] = [(group.get("fused"), group.get("foreach")) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        if _can_be_fused(group):
            group["fused"], group["foreach"] = True, False
            for parameter in group["params"]:
                step = optimizer.state[parameter].get("step") if parameter in optimizer.state else None
                if isinstance(step, Tensor):
                    optimizer.state[parameter]["step"] = step.to(parameter.device, torch.float32)


def unfuse(optimizer: Optimizer) -> None:
    """Undoes `fuse`."""
    for group, (fused, foreach) in zip(optimizer.param_groups, _before.pop(optimizer, ()), strict=False):
        group["fused"], group["foreach"] = fused, foreach


def _can_be_fused(group: dict[str, Any]) -> bool:
    plain = not (group.get("differentiable") or isinstance(group["lr"], Tensor))
    served = all(
        p.dtype in (torch.float32, torch.float64) and p.device.type in ("cpu", "cuda") for p in group["params"]
    )
    return plain and served


@torch.no_grad()
def lay_alike(optimizer: Optimizer, *_: Any) -> None:
    """Gradients and state of a fused optimiser as their parameters lie."""
    for group in optimizer.param_groups:
        if not group.get("fused"):
            continue
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is not None and _differs(grad, parameter):
                parameter.grad = _like(grad, parameter)
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and _differs(value, parameter):
                    state[name] = _like(value, parameter)


def _differs(value: Tensor, parameter: Tensor) -> bool:
    is_matrix = value.layout == torch.strided and value.shape == parameter.shape
    return is_matrix and value.stride() != parameter.stride()


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)
