"""The price of a sparse code: where an architecture pays for what is on, what becomes of its gradient.

`fused_pass` finds dloss / dacts of the reconstruction. Here the architecture's activation and penalty take it back to
the pre-activations, to parameters of the architecture's own, and to the norms of decoder rows.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from saefast.engines.derived import Elements, derived
from saefast.engines.gradient import Gradient, Model, serial_sum
from saefast.models.pointwise import Pointwise, gathered
from saefast.ops.code import Code, Number, Prefixes
from saefast.ops.groups import Groups
from saefast.ops.sum_by_latent import sum_by_latent
from saefast.optim.dispatch import row_ops


class Paid(NamedTuple):
    """What a pointwise architecture makes of the gradient to its activations."""

    grad_pre: Tensor
    """In the code's shape."""
    own: dict[str, Tensor]
    """(L,) each: gradients of its parameters, and what b_enc gets besides Σ grad_pre."""
    along: Tensor | None
    """(L, M), as `RowGradient.along`, of all latents."""
    penalty: Number
    coefficient: Number
    frozen_loss: Number
    """Of the second reconstruction, where there is one."""


def pay(
    model: Model, target: Tensor, code: Code, groups: Groups, grad_acts: Tensor, l0: Number, weight: Number
) -> Paid:
    """Takes the gradient to the activations of a code further, with that of the penalty.

    Args:
        target: (B, d_out). groups: of the code's entries; their decoder rows are settled.
        grad_acts: dloss / dacts of the reconstruction.
        l0: mean number of active latents in the batch.
        weight: what multiplies the reconstruction's squared error.
    """
    rule, weights, L = model.architecture.pointwise, model.weights, len(model.weights.enc.w)
    assert code.pre is not None
    ids = code.idx.long()
    own = gathered(weights.own_values() | {"b_enc": weights.b_enc}, ids)
    norms = block_norms(model, groups, target.dtype) if rule.wants_norms(model.config) else None
    grad_frozen, frozen_loss = frozen(model, rule, target, code, own, weight)
    coefficient = rule.coefficient(model.at, model.kept, l0, model.config)
    elements = Elements(code.pre, own, None if norms is None else norms.sum(1)[ids])
    found = derived(rule, elements, grad_acts, grad_frozen, coefficient / len(target), model.config)
    by_latent = {name: sum_by_latent(grad[None], code.idx[None], L) for name, grad in found.own.items()}
    along = None
    if found.norms is not None and norms is not None:
        along = sum_by_latent(found.norms[None], code.idx[None], L)[:, None] / norms
    charged = rule.charged(coefficient, found.penalty / len(target), model.config)
    return Paid(found.pre, by_latent, along, charged, coefficient, frozen_loss)


def block_norms(model: Model, groups: Groups, dtype: torch.dtype) -> Tensor:
    """(L, M) norms of the parts of the decoder rows that have a group; 1 for all others."""
    latents, W_dec = groups.latents.long(), model.weights.dec.w
    norms = model.architecture.norms(W_dec[latents].to(dtype))
    # A latent of -1 writes to the last place, which is cut off.
    found = norms.new_ones(len(W_dec) + 1, norms.shape[1])
    found[latents] = torch.where(norms > 0, norms, 1)
    return found[:-1]


def frozen(
    model: Model, rule: Pointwise, target: Tensor, code: Code, own: dict[str, Tensor], weight: Number
) -> tuple[Tensor | None, Number]:
    """The second reconstruction, by the decoder as it is: the gradient to its activations, and its loss."""
    assert code.pre is not None
    acts = rule.frozen(code.pre, own)
    if acts is None:
        return None, 0.0
    W_dec, b_dec = model.weights.dec.w, model.weights.b_dec
    plane, whole = model.scratch("frozen", 1, *target.shape), Prefixes([len(W_dec)], [weight], True)
    again = code._replace(acts=acts)
    decoded = row_ops(target).decode_loss(target, again, W_dec, b_dec, whole, plane, relu=False)
    return decoded.grad_acts, weight * serial_sum(decoded.squares[0])


def with_price(found: Gradient, paid: Paid, dense: bool) -> Gradient:
    """A pass's gradient with that of what was paid.

    Args:
        dense: every latent has a row in the gradient of W_dec, and not those alone that have a group.
    """
    along = paid.along
    if along is not None and not dense:
        along = along[found.groups.latents.long()]
    own = dict(paid.own)
    b_enc = found.b_enc + own.pop("b_enc")
    return dataclasses.replace(
        found,
        for_dec=found.for_dec._replace(along=along),
        b_enc=b_enc,
        own=found.own | own,
        loss=found.loss + paid.penalty + paid.frozen_loss,
        penalty=paid.penalty,
        coefficient=paid.coefficient,
    )
