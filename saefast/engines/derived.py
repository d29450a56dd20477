"""Derivatives that architectures leave to autograd: of elementwise statements, and of what goes past the code.

Autograd runs over the elements given and no further, so that it costs what they cost.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saefast.models.architecture import Architecture
from saefast.models.pointwise import Pointwise
from saefast.ops.code import Number


class Elements(NamedTuple):
    """Pre-activations, and what belongs to their latents: gathered for each, or broadcasting against them."""

    pre: Tensor
    own: Mapping[str, Tensor]
    """The architecture's parameters, and "b_enc"."""
    norms: Tensor | None
    """Of the decoder rows, where the penalty depends on them."""


class Derived(NamedTuple):
    """Derivatives of the loss."""

    pre: Tensor
    """In pre's shape; b_enc and W_enc get theirs through it."""
    own: dict[str, Tensor]
    """In the shapes of `Elements.own`, that of "b_enc" beside what it gets through pre."""
    norms: Tensor | None
    penalty: Tensor
    """0-d, Σ of the penalty over the elements, unweighted."""
    acts: Tensor
    """In pre's shape: the activations."""


@torch.enable_grad()
def derived(
    rule: Pointwise,
    given: Elements,
    grad_acts: Tensor,
    grad_frozen: Tensor | None,
    price: Number,
    train: Any,
    everywhere: Number = 0.0,
) -> Derived:
    """Takes the derivative to the activations back to everything that they depend on, and adds the penalty's.

    Args:
        grad_acts: in pre's shape, of the reconstruction. grad_frozen: of the second one, where there is one.
        price: dloss / dpenalty of one element.
        everywhere: the same of what `Pointwise.everywhere` says, where the elements are all there are.
    """
    pre, own = _leaf(given.pre), {name: _leaf(value) for name, value in given.own.items()}
    norms = None if given.norms is None else _leaf(given.norms)
    acts = rule.activate(pre, own)
    penalty = rule.penalty(pre, acts, own, norms, train)

    def each(number: Number) -> Tensor:
        return torch.as_tensor(number, dtype=pre.dtype, device=pre.device).expand_as(pre)

    pairs = [(acts, grad_acts), (penalty, each(price))]
    if everywhere and (paid := rule.everywhere(pre, own, norms, train)) is not None:
        pairs.append((paid, each(everywhere)))
    if grad_frozen is not None:
        frozen = rule.frozen(pre, own)
        assert frozen is not None
        pairs.append((frozen, grad_frozen))
    pairs = [pair for pair in pairs if pair[0].requires_grad]
    inputs = [pre, *own.values(), *([] if norms is None else [norms])]
    values, upstream = ([pair[i] for pair in pairs] for i in range(2))
    grads = torch.autograd.grad(values, inputs, upstream, materialize_grads=True)
    found = dict(zip(own, grads[1:], strict=False))
    by_norm = None if norms is None else grads[-1]
    return Derived(grads[0], found, by_norm, penalty.detach().sum(), acts.detach())


class Direct(NamedTuple):
    """What an architecture adds to a batch's reconstruction past the code."""

    value: Tensor
    """(B, d_out)."""
    inputs: dict[str, Tensor]

    @classmethod
    def of(cls, architecture: Architecture, x: Tensor, own: Mapping[str, Tensor]) -> "Direct | None":
        """None where that is nothing."""
        inputs = {name: _leaf(value) for name, value in own.items() if value.dim() > 1}
        with torch.enable_grad():
            value = architecture.direct(x, {**own, **inputs})
        return None if value is None else cls(value, inputs)

    def gradient(self, grad: Tensor) -> dict[str, Tensor]:
        """To the parameters, from that to the value (B, d_out)."""
        grads = torch.autograd.grad(self.value, list(self.inputs.values()), grad, materialize_grads=True)
        return dict(zip(self.inputs, grads, strict=True))


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()
