"""select_kth: the k-th largest of very many numbers, exactly and without sorting them."""

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.ops import backends, checks, native, reference
from saefast.typed import typed


@typed
def select_kth(keys: Tensor, k: int) -> Tensor:
    """The k-th largest key, by a radix select: every key is read a few times, none is moved.

    Args:
        keys: (n,) int32 or int64, none negative (`reference.positive_keys` makes such of floats).
        k: counts from 1.

    Returns:
        0-d in the keys' dtype and on their device: the largest t with at least k keys >= t; 0 where there are fewer.

    Raises:
        InputError: keys that are not such, or k below 1.
    """
    if keys.dim() != 1 or keys.dtype not in checks.INTS:
        raise InputError(f"keys is {keys.dtype} of shape {tuple(keys.shape)}: expected (n,) int32 or int64")
    if k < 1:
        raise InputError(f"k is {k}: expected 1 or more")
    match backends.backend(keys, served=(torch.int32,)):
        case "triton":
            from saefast.ops import triton_select_kth

            return triton_select_kth.select_kth(keys.contiguous(), k)
        case "native":
            return native.select_kth(keys.contiguous(), k)
    return reference.select_kth(keys, k)
