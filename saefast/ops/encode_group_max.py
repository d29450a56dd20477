"""encode_group_max: the largest pre-activation of each of k equal groups of latents."""

from typing import Any

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.ops import backends, checks, native, reference
from saefast.ops.code import Code
from saefast.ops.registered import Registered, low_precision
from saefast.ops.sddmm import sddmm
from saefast.ops.selected import gradients, remember
from saefast.typed import typed

# Latents of each group that bf16 products choose, for fp32 products to decide among. In groups of 256 and 1024 normal
# values, d_in 384, bf16 puts another before the best in 0.4 % of groups, two in 0.003 %, and three in none of 650,000.
CANDIDATES = 3
# Latents of a group from which on products in bf16 save more than deciding costs, on a CPU (bench/encode_group_max.py).
WIDE = 256


@typed
def encode_group_max(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    scale: Tensor | None = None,
    relu: bool = True,
    W_low: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The largest of x W_encᵀ + b_enc in each of k groups of L / k consecutive latents (sparsify's "groupmax").

    Exact over fp32 accumulators (fp64 for fp64 inputs), ties to the lower latent, NaN above +inf. The (B, L) matrix is
    never held. Differentiable in x, W_enc and b_enc, through the entries selected and not where ReLU clipped. Autocast
    and torch.vmap as for `encode_topk`; a W_low stands in the way of autocast.

    Args:
        x: (B, D) float. W_enc: (L, D), x's dtype and device. b_enc: (L,) float, or None.
        k: groups, and so entries a row; a divisor of L.
        scale: (L,) positive floats: ranks by scale · pre, returns pre. Gets no gradient.
        relu: clip the returned values at zero; the indices do not change.
        W_low: (L, D) bf16, the rounded copy of W_enc: its products choose CANDIDATES latents of each group, among
            which those of x and W_enc decide, where groups have at least WIDE latents. x is fp32 then.

    Returns:
        acts (B, k) fp32 (fp64 for fp64 inputs), idx (B, k) int32, ascending in a row.

    Raises:
        InputError: a shape, dtype or device that cannot be served, or a k that does not divide L.
    """
    low = low_precision(x, W_enc) if W_low is None else None
    L = checks.encoder(x, W_enc, b_enc, low if W_low is None else W_enc.dtype)
    check_groups(L, k)
    if scale is not None:
        checks.vector("scale", scale, W_enc)
    if W_low is not None:
        checks.rounded(W_low, x, W_enc, b_enc)
    found: tuple[Tensor, Tensor] = _encode_group_max(x, W_enc, b_enc, k, scale, relu, W_low, low)
    return found


def _run(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, scale: Tensor | None, relu: bool, W_low: Tensor | None,
    low: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if low is not None:
        x, W_enc = x.to(low), W_enc.to(low)
    if W_low is None or (W_enc.dtype == x.dtype and len(W_enc) // k < WIDE):
        pre, idx = _best(x, W_enc, b_enc, k, 1, scale)
    else:
        pre, idx = _best_mixed(x, W_low, W_enc, b_enc, k, scale)
    return pre.relu() if relu else pre, idx


def _fake(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, *options: Any) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)
    acts = x.new_empty(shape, dtype=reference.accumulate_dtype(x.dtype))
    return acts, x.new_empty(shape, dtype=torch.int32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, W_enc, b_enc, _, _, relu = inputs[:6]
    remember(ctx, x, W_enc, b_enc, Code(*output), clip=relu)


def _backward(ctx: Any, grad_acts: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return gradients(ctx, grad_acts) + (None,) * 5


_encode_group_max = Registered("encode_group_max", _run, _fake, save=_save, backward=_backward, rows=("x",))


def check_groups(n_latents: int, k: int) -> None:
    """Raises InputError where n_latents are not k equal groups."""
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= n_latents:
        raise InputError(f"k is {k!r}: expected an int between 1 and n_latents = {n_latents}")
    if n_latents % k:
        below, above = n_latents // k * k, (n_latents // k + 1) * k
        raise InputError(
            f"n_latents is {n_latents} and k {k}: latents are not k equal groups; take n_latents = {below} or {above}, "
            "or another k"
        )


def _best(
    x: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, best: int, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The `best` best of each group, (B, k · best), without ReLU."""
    x, W_enc = x.contiguous(), W_enc.contiguous()
    match backends.backend(x):
        case "triton":
            from saefast.ops import triton_encode_group_max

            return triton_encode_group_max.encode_group_max(x, W_enc, b_enc, k, best=best, scale=scale)
        case "native":
            return native.encode_group_max(x, W_enc, b_enc, k, best=best, scale=scale, relu=False)
    return reference.encode_group_max(x, W_enc, b_enc, k, best=best, scale=scale, relu=False)


def _best_mixed(
    x: Tensor, W_low: Tensor, W_enc: Tensor, b_enc: Tensor | None, k: int, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The best of each group, (B, k), by fp32 products among the candidates of low-precision ones."""
    n = min(CANDIDATES, len(W_enc) // k)
    _, idx = _best(x.to(W_low.dtype), W_low, b_enc, k, n, scale)
    # Ascending, so that the first of equal values is that of the lower latent.
    groups = idx.view(-1, k, n).sort(dim=2).values
    idx = groups.flatten(1)
    pre = sddmm(x, idx, W_enc)
    pre = pre if b_enc is None else pre + b_enc[idx.long()]
    rank = pre if scale is None else pre * scale[idx.long()]
    chosen = rank.view_as(groups).max(dim=2, keepdim=True).indices
    return pre.view_as(groups).gather(2, chosen).squeeze(2), groups.gather(2, chosen).squeeze(2)
