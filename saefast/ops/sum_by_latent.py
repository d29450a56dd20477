"""sum_by_latent: a sparse code summed over the batch, the gradient of b_enc."""

from typing import Any

from torch import Tensor

from saefast.ops import backends, checks, reference
from saefast.ops.registered import Registered
from saefast.typed import typed


@typed
def sum_by_latent(acts: Tensor, idx: Tensor, n_latents: int) -> Tensor:
    """out[l] = Σ over entries with idx = l of their acts. Repeats bit for bit.

    Differentiable in acts. Autocast changes nothing.

    Args:
        acts: (B, K) float, or (n,) of a CSR code. idx: int32 or int64 of the same shape, 0 <= idx < n_latents.

    Returns:
        (n_latents,) in acts' dtype.

    Raises:
        InputError: shapes, dtypes or devices that do not fit, or (on a CPU) an index out of range.
    """
    if acts.dim() == 1 and idx.dim() == 1:
        acts, idx = acts[None], idx[None]
    checks.entries(acts, idx, n_latents)
    out: Tensor = _sum_by_latent(acts, idx, n_latents)
    return out


def _run(acts: Tensor, idx: Tensor, n_latents: int) -> Tensor:
    checks.one_each(acts.device, n_latents)
    checks.inside(idx, n_latents)
    acts, idx = acts.contiguous(), idx.contiguous()
    if backends.backend(acts) == "triton":
        from saefast.ops import triton_spmm

        return triton_spmm.sum_by_latent(acts, idx, n_latents)
    return reference.sum_by_latent(acts, idx, n_latents)


def _fake(acts: Tensor, idx: Tensor, n_latents: int) -> Tensor:
    return acts.new_empty(n_latents, dtype=acts.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (idx,) = ctx.saved_tensors
    return grad[idx.long()], None, None


_sum_by_latent = Registered("sum_by_latent", _run, _fake, save=_save, backward=_backward)
