"""The ops as torch's own: torch.compile, torch.export, fake tensors and function transforms see each as one node.

Whatever looks at a program instead of running it finds here the shapes, the derivative and the rule for vmap of an op.
A call that nobody looks at goes past torch's dispatcher, which is 10 µs of Python, straight to the backend.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from saefast import ambient
from saefast.errors import InputError

# Arguments of these types hide nothing: a fake tensor, a DTensor or a symbolic number is of another.
_PLAIN = {Tensor, torch.nn.Parameter, type(None), bool, int, float, str, torch.dtype}


class Registered:
    """An op, `torch.ops.saefast.<name>`, called by the shortest way that serves whoever is looking.

    Args:
        run: does the work; its annotations are the op's schema.
        fake: takes the same arguments and makes empty results of the right shapes and dtypes.
        save: (ctx, inputs, output) keeps what the derivative needs.
        backward: (ctx, *grads) -> for each input its gradient, or None. Not given: the op has no derivative.
        rows: the arguments whose first dimension is the batch, as that of every result is: torch.vmap may map over
            these. Of none: it may not.
    """

    def __init__(
        self,
        name: str,
        run: Callable[..., Any],
        fake: Callable[..., Any],
        *,
        save: Callable[..., None] | None = None,
        backward: Callable[..., tuple[Any, ...]] | None = None,
        rows: tuple[str, ...] = (),
    ) -> None:
        self.name, self.rows, self.arguments = name, rows, tuple(inspect.signature(run).parameters)
        # Inside, every mode of torch is a plain one: autocast would round the sums that a plain product makes.
        self.run = ambient.plainly()(run)
        definition = torch.library.custom_op(f"saefast::{name}", torch.no_grad()(self.run), mutates_args=())
        definition.register_fake(fake)
        definition.register_vmap(self._mapped)
        self.differentiable = backward is not None
        if save is not None and backward is not None:
            definition.register_autograd(backward, setup_context=lambda ctx, inputs, output: save(ctx, inputs, output))
            self._recorded, self._transformed = _functions(self, save, backward)
        self.op = getattr(torch.ops.saefast, name).default

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.op(*args)
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return self._transformed.apply(*args) if self.differentiable else self.op(*args)
        if looked_at(args):
            return self.op(*args)
        if self.differentiable and torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return self._recorded.apply(*args)
        return self.run(*args)

    def _mapped(self, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """vmap's rule: rows of all that is mapped over lie one after another in a larger batch."""
        n, flat = info.batch_size, []
        for name, dim, value in zip(self.arguments, in_dims, args, strict=True):
            if not isinstance(value, Tensor) or (dim is None and name not in self.rows):
                flat.append(value)
                continue
            if name not in self.rows or "row_ptr" in self._given(args):
                raise InputError(self._unmapped(name))
            each = value.expand(n, *value.shape) if dim is None else value.movedim(dim, 0)
            flat.append(each.flatten(0, 1))
        out = self(*flat)
        if isinstance(out, Tensor):
            return out.unflatten(0, (n, -1) if len(out) else (n, 0)), 0
        return tuple(one.unflatten(0, (n, len(one) // n)) for one in out), (0,) * len(out)

    def _given(self, args: tuple[Any, ...]) -> set[str]:
        return {name for name, value in zip(self.arguments, args, strict=True) if value is not None}

    def _unmapped(self, name: str) -> str:
        may_be = f"only {' and '.join(self.rows)} of equally many entries a row can be" if self.rows else "none can be"
        return (
            f"{name} of saefast.ops.{self.name} is mapped over by a function transform (torch.vmap): {may_be}; "
            "call the op once for each, in a loop"
        )


def looked_at(args: tuple[Any, ...]) -> bool:
    """Whether a mode of torch's dispatcher wants to see a call, or tensors have no memory that a kernel could read."""
    return bool(torch._C._len_torch_dispatch_stack() or args[0].is_meta or not _PLAIN.issuperset(map(type, args)))


def low_precision(x: Tensor, W: Tensor) -> torch.dtype | None:
    """The dtype that autocast wants a product of x and W in; None where there is none, or one of them is float64."""
    device = x.device.type
    if not torch._C._is_any_autocast_enabled() or not torch.amp.is_autocast_available(device):
        return None
    if not torch.is_autocast_enabled(device) or torch.float64 in (x.dtype, W.dtype):
        return None
    return torch.get_autocast_dtype(device)


def _functions(
    op: Registered, save: Callable[..., None], backward: Callable[..., tuple[Any, ...]]
) -> tuple[type[Any], type[Any]]:
    """The derivative for a plain call, and for one under functorch's transforms, which ask for another form of it."""

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            out = op.run(*args)
            save(ctx, args, out)
            return out

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return op.op(*args)

        setup_context = staticmethod(save)
        vmap = staticmethod(op._mapped)

    for function in (Recorded, Transformed):
        function.backward = staticmethod(backward)  # type: ignore[method-assign]
        function.__name__ = function.__qualname__ = op.name
    return Recorded, Transformed
