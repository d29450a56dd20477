"""The CPU backend of the ops: torch tensors in, the C++ extension saefast._native underneath."""

from types import ModuleType

import torch
from torch import Tensor

from saefast import extension
from saefast.errors import InputError
from saefast.ops import reference
from saefast.ops.backends import NATIVE


def tile_kernels(dtype: torch.dtype) -> list[str]:
    """The instruction sets that encode_topk can use here for a dtype, its default first."""
    names: list[str] = _built().tile_kernel_names(dtype == torch.bfloat16)
    return names


def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    latents: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = True,
    max_scratch_bytes: int = 1 << 30,
    kernel: str | None = None,
) -> reference.Code:
    """`reference.encode_topk` in one pass: product tiles are filtered in registers, and only what may be among the k
    best of its row is ever stored. bf16 products are exact and summed in fp32 (subnormal bf16 count as zero).

    The values do not depend on the batch a row comes in, on threads or on scratch.

    Args:
        kernel: an instruction set of csrc/tiles.cpp, for tests and benchmarks; None takes the best this machine has.
    """
    _check_matrices(x, W_enc)
    bias, weight = _vector("b_enc", b_enc, W_enc), _vector("scale", scale, W_enc)
    ids = None if latents is None else latents.long().contiguous()
    acts, idx = _new_code(x.shape[0], k)
    try:
        _built().encode_topk(
            *(x, W_enc, bias, weight, ids, k, relu, acts, idx, max_scratch_bytes, kernel, torch.get_num_threads())
        )
    except (IndexError, ValueError) as error:
        raise InputError(f"encode_topk: {error}") from None
    return acts, idx


def encode_topk_mixed(
    x: Tensor,
    W_low: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    candidates: int | None = None,
    latents: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = True,
    max_scratch_bytes: int = 1 << 30,
) -> reference.Code:
    """Top-k by way of a low-precision copy of the weights: its products choose candidates, fp32 products the k best.

    The candidates are exactly the best over x and W_enc rounded to W_low's dtype, summed in fp32. Values, order and
    ties of the result are those of x and W_enc; a latent is missed only where rounding put it behind all candidates.

    Args:
        x: (B, D) fp32.
        W_low: (L, D) bf16 or fp16, the rounded copy of W_enc.
        W_enc: (L, D) fp32.
        candidates: how many to decide among, at least k; None: k, so that the set is the low-precision product's.
        The rest as `encode_topk`.
    """
    low = x.to(W_low.dtype)
    _check_matrices(low, W_low)
    _check_matrices(x, W_enc)
    if x.dtype != torch.float32 or W_enc.shape != W_low.shape:
        raise InputError(
            f"x is {x.dtype}, W_enc {tuple(W_enc.shape)} and W_low {tuple(W_low.shape)}: expected fp32 x and W_enc, "
            "and W_low a rounded copy of W_enc"
        )
    bias, weight = _vector("b_enc", b_enc, W_enc), _vector("scale", scale, W_enc)
    ids = None if latents is None else latents.long().contiguous()
    n = W_enc.shape[0] if ids is None else ids.shape[0]
    acts, idx = _new_code(x.shape[0], k)
    try:
        _built().encode_topk_mixed(
            *(low, W_low, x, W_enc, bias, weight, ids, k if candidates is None else min(candidates, n), k, relu),
            *(acts, idx, max_scratch_bytes, torch.get_num_threads()),
        )
    except (IndexError, ValueError) as error:
        raise InputError(f"encode_topk_mixed: {error}") from None
    return acts, idx


def encode_group_max(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    best: int = 1,
    scale: Tensor | None = None,
    relu: bool = True,
    max_scratch_bytes: int = 1 << 30,
    kernel: str | None = None,
) -> reference.Code:
    """`reference.encode_group_max` over the tiles of `encode_topk`: of each group only the best so far are stored."""
    _check_matrices(x, W_enc)
    bias, weight = _vector("b_enc", b_enc, W_enc), _vector("scale", scale, W_enc)
    acts, idx = _new_code(x.shape[0], k * best)
    found = acts.view(-1, k, best), idx.view(-1, k, best)
    try:
        _built().encode_group_max(
            *(x, W_enc, bias, weight, k, best, *found, max_scratch_bytes, kernel, torch.get_num_threads())
        )
    except (IndexError, ValueError) as error:
        raise InputError(f"encode_group_max: {error}") from None
    return (acts.relu_() if relu else acts), idx


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    threshold: Tensor | float,
    *,
    max_scratch_bytes: int = 1 << 30,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.threshold_encode` over the tiles of `encode_topk`; memory grows with the entries found only."""
    L = W_enc.shape[0]
    if isinstance(threshold, Tensor):
        theta = threshold.to("cpu", torch.float32).expand(L)
    else:
        theta = torch.full((L,), threshold, dtype=torch.float32, device="cpu")
    _check_matrices(x, W_enc)
    bias, bound = _vector("b_enc", b_enc, W_enc), _vector("threshold", theta, W_enc)
    scratch = (max_scratch_bytes, kernel, torch.get_num_threads())
    code = _built().ThresholdCode(x, W_enc, bias, bound, *scratch)
    row_ptr = torch.empty(x.shape[0] + 1, dtype=torch.int64, device="cpu")
    idx = torch.empty(code.size(), dtype=torch.int32, device="cpu")
    acts = torch.empty(code.size(), dtype=torch.float32, device="cpu")
    code.write(row_ptr, idx, acts)
    return row_ptr, idx, acts


def select_kth(keys: Tensor, k: int) -> Tensor:
    return torch.tensor(_built().select_kth(keys, k), dtype=torch.int32, device="cpu")


def spmm(acts: Tensor, idx: Tensor, W: Tensor) -> Tensor:
    """`reference.spmm`, W's rows gathered once and summed in fp32 in the order of j."""
    if W.dtype not in NATIVE:
        return reference.spmm(acts, idx, W)
    if acts.shape != idx.shape:
        raise InputError(f"acts has shape {tuple(acts.shape)} and idx {tuple(idx.shape)}: expected one shape")
    values = acts.float().contiguous()
    out = torch.empty((idx.shape[0], W.shape[1]), dtype=torch.float32, device="cpu")
    _gathered("spmm", idx, W, values, out)
    return out.to(W.dtype)


def sddmm(x: Tensor, idx: Tensor, W: Tensor) -> Tensor:
    """`reference.sddmm`, W's rows gathered once."""
    if W.dtype not in NATIVE:
        return reference.sddmm(x, idx, W)
    if x.shape != (idx.shape[0], W.shape[1]):
        raise InputError(f"x has shape {tuple(x.shape)}: expected {(idx.shape[0], W.shape[1])} to go with idx and W")
    out = torch.empty(idx.shape, dtype=torch.float32, device="cpu")
    _gathered("sddmm", idx, W, x.float().contiguous(), out)
    return out


def _gathered(op: str, idx: Tensor, W: Tensor, source: Tensor, out: Tensor) -> None:
    """Runs one of the two gathers."""
    W, idx = W.contiguous(), idx.contiguous()
    if W.dim() != 2 or idx.dim() != 2 or idx.dtype not in (torch.int32, torch.int64):
        raise InputError(f"idx is {idx.dtype} of shape {tuple(idx.shape)}: expected (batch, k) int32 or int64")
    try:
        getattr(_built(), op)(W, idx, source, out, torch.get_num_threads())
    except IndexError as error:
        raise InputError(f"{op}: {error}") from None


def _built() -> ModuleType:
    ext = extension.load()
    if ext is None:
        raise InputError("saefast's C++ extension is not built: call saefast.ops, which falls back to torch")
    return ext


def _new_code(B: int, k: int) -> reference.Code:
    """Room for acts and idx (B, k)."""
    acts = torch.empty((B, k), dtype=torch.float32, device="cpu")
    return acts, torch.empty((B, k), dtype=torch.int32, device="cpu")


def _check_matrices(x: Tensor, W: Tensor) -> None:
    """Raises InputError where x and W are not what the extension's encoders take."""
    if x.dim() != 2 or W.dim() != 2 or x.shape[1] != W.shape[1] or x.dtype != W.dtype or x.dtype not in NATIVE:
        raise InputError(
            f"x is {x.dtype} of shape {tuple(x.shape)}, W {W.dtype} {tuple(W.shape)}: expected (B, D) and (L, D), "
            "both fp32, bf16 or fp16"
        )
    if not (x.is_contiguous() and W.is_contiguous() and x.device.type == W.device.type == "cpu"):
        raise InputError("x and W must be contiguous CPU tensors: call .cpu() and .contiguous(), as saefast.ops does")


def _vector(name: str, vector: Tensor | None, W: Tensor) -> Tensor | None:
    if vector is None:
        return None
    if vector.shape != W.shape[:1]:
        raise InputError(f"{name} has shape {tuple(vector.shape)}: expected ({W.shape[0]},), one value per latent")
    return vector.float().contiguous()
