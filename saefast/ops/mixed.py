"""Encoding with two precisions: bf16 products choose candidates, fp32 products decide among them.

On hardware with bf16 matrix units this halves the one dense product of a step or better, and keeps fp32's values.
"""

import torch
from torch import Tensor

from saefast import extension
from saefast.ops import backends, native
from saefast.ops.encode_topk import encode_topk
from saefast.ops.reference import stable_topk
from saefast.ops.sddmm import sddmm


def pays_off(W: Tensor) -> bool:
    """Whether bf16 products are faster than fp32 ones where W lies."""
    if W.dtype != torch.float32:
        return False
    if W.is_cuda:
        return True
    ext = extension.load() if W.device.type == "cpu" else None
    return ext is not None and any("bf16" in name for name in ext.tile_kernel_names(True))


def candidates(k: int) -> int:
    """How many candidates the k best are chosen from: k and a margin of an eighth, at least 4.

    Rounding x and W to bf16 moves a pre-activation by about 2^-9 · √(2/3) of the product of norms over √D, some 0.2 %
    of the spread of the pre-activations of a row. Neighbours around rank k of L normal values are 1 / (k √(2 ln(L/k)))
    of that spread apart, 0.8 % at k = 32 and L = 32768. A member of the true top k that bf16 puts behind k + margin
    has to err by the whole margin: 3 % or more, so a dozen standard deviations.
    """
    return k + max(4, k // 8)


def encode_topk_mixed(
    x: Tensor,
    W_low: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    latents: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = True,
) -> tuple[Tensor, Tensor]:
    """`ops.encode_topk(x, W_enc, ...)` by way of a low-precision copy of the weights.

    Values, order and ties are those of fp32 products among `candidates(k)` latents, which the products of x and W_low,
    rounded to W_low's dtype and summed in fp32, select.

    Args:
        x: (B, D) fp32.
        W_low: (L, D) bf16, the rounded copy of W_enc.
        The rest as `ops.encode_topk`.
    """
    n = len(W_enc) if latents is None else len(latents)
    if W_enc.dtype == torch.float32 and backends.backend(W_low) == "native":
        return native.encode_topk_mixed(
            *(x, W_low, W_enc, b_enc, k), candidates=candidates(k), latents=latents, scale=scale, relu=relu
        )
    _, idx = encode_topk(x.to(W_low.dtype), W_low, b_enc, min(candidates(k), n), latents=latents, scale=scale)
    pre = sddmm(x, idx, W_enc) + b_enc[idx.long()]
    rank = pre if scale is None else pre * scale[idx.long()]
    best = stable_topk(rank, k, idx)
    acts, idx = pre.gather(1, best), idx.gather(1, best)
    return (acts.relu_() if relu else acts), idx
