"""What an accelerated object keeps beside what it had: its options, the layout of its matrices, values made late."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from saefast.errors import InputError

# Where the state stands in an object's __dict__.
NAME = "_saefast"


@dataclass
class State:
    """Of one object; pickled and copied with it.

    Attributes:
        package, kind: the peer's package, and the class of its that the object is taken for.
        mixed: whether bf16 products choose candidates where that is faster.
        reproduce_bugs: whether gradients that the peer gets wrong are given as it gives them.
        methods: names of the methods that are replaced.
        laid_out: names of matrices whose storage was turned so that a latent is a contiguous row, and whether that is a
            column of the parameter.
    """

    package: str
    kind: str
    mixed: bool
    reproduce_bugs: bool
    methods: tuple[str, ...] = ()
    laid_out: dict[str, bool] = field(default_factory=dict)


def state_of(thing: Any) -> State:
    found: State = vars(thing)[NAME]
    return found


def turned(parameter: nn.Parameter) -> None:
    """Turns the storage of a matrix: rows that were contiguous are columns now, or the other way round.

    The Parameter object, its shape and its values stay. What is elementwise, as Adam and clipping are, does not see the
    difference. An optimiser that already has state keeps that as it lies.
    """
    lies_in_rows = parameter.data.is_contiguous()
    parameter.data = parameter.data.T.contiguous().T if lies_in_rows else parameter.data.contiguous()


def put_back(module: nn.Module, laid_out: Mapping[str, bool]) -> None:
    """Turns matrices again, but for those that something has given another storage since."""
    for name, is_turned in laid_out.items():
        parameter = module.get_parameter(name)
        if (parameter.T if is_turned else parameter).is_contiguous():
            turned(parameter)


def latents(module: nn.Module, name: str, *, is_turned: bool) -> Tensor:
    """A matrix as (n_latents, width), contiguous: the parameter, or a view that gradients flow through.

    Its storage is turned for that where it has to be; also later, where something gave it another storage, as
    `load_state_dict(assign=True)` does.

    Args:
        is_turned: whether the parameter is (width, n_latents).
    """
    parameter = module.get_parameter(name)
    found = parameter.T if is_turned else parameter
    if found.is_contiguous():
        return found
    turned(parameter)
    state_of(module).laid_out[name] = is_turned
    return parameter.T if is_turned else parameter


def contiguous_state(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A state dict as it was before: safetensors writes contiguous tensors alone."""
    for name in state_of(module).laid_out:
        value = state.get(prefix + name)
        # With keep_vars the caller wants the Parameter itself.
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            state[prefix + name] = value.contiguous()


def hooked(*modules: nn.Module) -> bool:
    """Whether any of these has hooks that someone waits for."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind, None) for module in modules for kind in kinds)


class Later:
    """A dense (B, L) tensor that an interface has a place for and few read: made when it is asked for.

    Args:
        make: makes it, with gradients if they are recorded now.
        of: what it is made of. It cannot be made any more once one of these has changed.
    """

    def __init__(self, name: str, make: Callable[[], Tensor], *of: Tensor) -> None:
        self._name, self._make, self._of = name, make, of
        self._versions, self._grad = [_version(t) for t in of], torch.is_grad_enabled()
        self._value: Tensor | None = None

    def value(self) -> Tensor:
        """
        Raises:
            InputError: the weights have changed since.
        """
        if self._value is None:
            if self._versions != [_version(t) for t in self._of]:
                raise InputError(
                    f"{self._name} is made when it is first read, and the weights have changed since the call that "
                    f"returned it: read {self._name} before the optimiser's step, or saefast.restore() the SAE"
                )
            with torch.set_grad_enabled(self._grad):
                self._value = self._make()
        return self._value


def _version(tensor: Tensor) -> tuple[int, int]:
    """Changes when a tensor is written to. Those of inference mode do not count that."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


@cache
def with_late_item(base: type, name: str) -> type:
    """A subclass of a NamedTuple whose item `name` is a `Later` until it is read, by name, place or unpacking."""
    place = base._fields.index(name)  # type: ignore[attr-defined]

    def read(self: Any, index: Any) -> Any:
        found = tuple.__getitem__(self, index)
        if isinstance(found, tuple):
            return tuple(item.value() if isinstance(item, Later) else item for item in found)
        return found.value() if isinstance(found, Later) else found

    members = {
        "__slots__": (),
        "__doc__": base.__doc__,
        "__getitem__": read,
        "__iter__": lambda self: (read(self, i) for i in range(len(self))),
        # Pickled and copied as what it stands for.
        "__reduce__": lambda self: (base, tuple(self)),
        "__repr__": lambda self: repr(base(*self)),
        name: property(lambda self: read(self, place)),
    }
    return type(base.__name__, (base,), members)


@cache
def with_late_field(base: type, name: str) -> type:
    """A subclass of a dataclass whose field `name` is a `Later` until it is read."""
    place = f"_{name}"

    def read(self: Any) -> Any:
        found = vars(self)[place]
        return found.value() if isinstance(found, Later) else found

    members = {"__doc__": base.__doc__, name: property(read, lambda self, value: vars(self).__setitem__(place, value))}
    return type(base.__name__, (base,), members)
