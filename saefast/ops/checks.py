"""Checks of arguments that several ops share. Each raises InputError naming the argument and what was expected."""

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.placement import require_memory

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTS = (torch.int32, torch.int64)


def dense(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise InputError(f"{name} is {tensor.layout}: expected a dense tensor; use {name}.to_dense()")


def encoder(x: Tensor, W_enc: Tensor, b_enc: Tensor | None, low: torch.dtype | None = None) -> int:
    """x (B, D), W_enc (L, D) of one device and dtype, unless both become `low`, b_enc (L,) or None. -> L."""
    dense(x=x, W_enc=W_enc)
    if W_enc.dim() != 2 or W_enc.shape[0] == 0:
        raise InputError(f"W_enc has shape {tuple(W_enc.shape)}: expected (n_latents, d_in) with n_latents >= 1")
    width("x", x, W_enc)
    if W_enc.shape[0] >= 2**31:
        raise InputError(f"W_enc has {W_enc.shape[0]} latents: at most 2**31 - 1 fit the int32 indices")
    if x.dtype not in FLOATS or W_enc.dtype not in FLOATS or (low is None and W_enc.dtype != x.dtype):
        raise InputError(f"x is {x.dtype} and W_enc {W_enc.dtype}: expected one floating dtype for both; cast one")
    if b_enc is not None:
        vector("b_enc", b_enc, W_enc)
    return W_enc.shape[0]


def vector(name: str, values: Tensor, W: Tensor) -> None:
    """One float for each row of W."""
    dense(**{name: values})
    if values.shape != W.shape[:1]:
        raise InputError(f"{name} has shape {tuple(values.shape)}: expected ({W.shape[0]},), one value per latent")
    if values.dtype not in FLOATS or values.device != W.device:
        raise InputError(f"{name} is {values.dtype} on {values.device}: expected a float tensor on {W.device}")


def width(name: str, x: Tensor, W: Tensor) -> None:
    """x (B, D) and W (L, D) on one device."""
    dense(**{name: x})
    if x.dim() != 2 or W.dim() != 2 or x.shape[1] != W.shape[1]:
        raise InputError(f"{name} has shape {tuple(x.shape)} and W {tuple(W.shape)}: expected (batch, D) and (L, D)")
    if x.device != W.device:
        raise InputError(f"{name} is on {x.device} and W on {W.device}: expected one device; move one with .to()")


def listed(latents: Tensor, W: Tensor) -> None:
    """Ascending ids of rows of W."""
    dense(latents=latents)
    if latents.dim() != 1 or latents.dtype not in INTS or latents.device != W.device:
        raise InputError(
            f"latents is {latents.dtype} of shape {tuple(latents.shape)} on {latents.device}: "
            f"expected a 1-D int32 or int64 tensor on {W.device}"
        )


def ascending(latents: Tensor, n_latents: int) -> None:
    """The values of what is `listed`. On a GPU the check would stall the stream."""
    if latents.device.type == "cpu" and len(latents):
        in_order = bool((latents[1:] > latents[:-1]).all())
        if not in_order or latents[0] < 0 or latents[-1] >= n_latents:
            raise InputError(f"latents must be strictly ascending ids in [0, {n_latents}): sort and deduplicate them")


def code(acts: Tensor | None, idx: Tensor, W: Tensor, rows: int | None = None, row_ptr: Tensor | None = None) -> None:
    """acts and idx (B, K), or (n,) where there is a row_ptr (B + 1,), idx being rows of W; its values are `inside`."""
    dense(idx=idx, W=W)
    if W.dim() != 2 or W.dtype not in FLOATS:
        raise InputError(f"W is {W.dtype} of shape {tuple(W.shape)}: expected a floating (n_latents, D) tensor")
    held = _rows(idx, row_ptr)
    if acts is not None:
        dense(acts=acts)
    if acts is not None and (acts.shape != idx.shape or acts.dtype not in FLOATS):
        raise InputError(
            f"acts is {acts.dtype} of shape {tuple(acts.shape)}: expected floats of idx's {tuple(idx.shape)}"
        )
    if rows is not None and held != rows:
        raise InputError(f"idx has {held} rows and x {rows}: expected as many")
    if idx.device != W.device or (acts is not None and acts.device != W.device):
        raise InputError(f"acts and idx must be on W's device {W.device}, idx is on {idx.device}")


def entries(acts: Tensor, idx: Tensor, n_latents: int, row_ptr: Tensor | None = None) -> int:
    """acts and idx (B, K), or (n,) with a row_ptr, of which only the number of latents is known. -> B."""
    dense(acts=acts, idx=idx)
    if acts.shape != idx.shape or acts.dtype not in FLOATS or acts.device != idx.device:
        raise InputError(f"acts is {of(acts)} and idx {of(idx)}: expected floats and ints, both (batch, k)")
    held = _rows(idx, row_ptr)
    if not 1 <= n_latents < 2**31:
        raise InputError(f"n_latents is {n_latents}: expected an int from 1 to 2**31 - 1")
    return held


def _rows(idx: Tensor, row_ptr: Tensor | None) -> int:
    """The rows of idx (B, K), or (n,) with row_ptr (B + 1,)."""
    if idx.dim() != (2 if row_ptr is None else 1) or idx.dtype not in INTS:
        shape = "(batch, k)" if row_ptr is None else "(n,) as there is a row_ptr"
        raise InputError(f"idx is {idx.dtype} of shape {tuple(idx.shape)}: expected int32 or int64, {shape}")
    if row_ptr is None:
        return idx.shape[0]
    dense(row_ptr=row_ptr)
    if row_ptr.dim() != 1 or row_ptr.dtype not in INTS or row_ptr.device != idx.device or not row_ptr.shape[0]:
        raise InputError(f"row_ptr is {of(row_ptr)}: expected (batch + 1,) int32 or int64 on {idx.device}")
    return row_ptr.shape[0] - 1


def pointers(row_ptr: Tensor, n: int) -> None:
    """The values of a row_ptr over n entries. On a GPU the check would stall the stream."""
    if row_ptr.device.type == "cpu" and (row_ptr[0] != 0 or row_ptr[-1] > n or bool((row_ptr.diff() < 0).any())):
        seen = f"{int(row_ptr[0])} to {int(row_ptr[-1])}"
        raise InputError(f"row_ptr goes from {seen}: expected to ascend from 0, to no more than the {n} entries")


def one_each(device: torch.device, n_latents: int) -> None:
    """Raises InputError where the device could not hold a number for each latent."""
    # To ask costs more than a small sum, and this much fits anywhere.
    if n_latents > 1 << 26:
        require_memory(device, n_latents * 4, f"one number for each of n_latents = {n_latents}")


def of(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"


def rounded(W_low: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor | None) -> None:
    """W_low, the copy of W_enc in fewer bits, beside an x in fp32."""
    dense(W_low=W_low)
    fits = W_low.shape == W_enc.shape and W_low.device == W_enc.device and x.dtype == torch.float32
    if not fits or W_low.dtype not in (torch.bfloat16, torch.float16) or b_enc is None:
        raise InputError(
            f"W_low is {of(W_low)}, x {of(x)} and W_enc {of(W_enc)}: expected the rounded copy of "
            "W_enc in bfloat16, x in float32, and a b_enc beside them"
        )


def inside(idx: Tensor, n_latents: int) -> None:
    """The values of idx, where work is done on them. On a GPU the check would stall the stream."""
    if idx.device.type == "cpu" and idx.numel():
        low, high = torch.aminmax(idx)
        if int(low) < 0 or int(high) >= n_latents:
            raise InputError(f"idx holds {int(low)}..{int(high)}: expected values in [0, {n_latents})")
