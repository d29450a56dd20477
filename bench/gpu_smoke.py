"""Whether each kernel is right at all, and whole steps with it: the first minute of `make gpu`.

Every op against its plain torch form, at a size that divides nothing and at real ones; integers make the encoders'
sums exact, so those must agree to the bit. Then three steps of the fused engine against the autograd engine in
float64, with rows that wait to be settled, lean, with hot latents and with AuxK.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.cases import Case, Settings
from bench.gpu_smoke_rows import OPERATIONS, row_operation
from bench.gpu_smoke_steps import STEPS, three_steps
from saefast import ops
from saefast.kernels import tuning
from saefast.ops import (
    reference,
    triton_encode_topk,
    triton_sddmm,
    triton_select_kth,
    triton_spmm,
    triton_threshold_encode,
)
from saefast.ops.code import Code, Prefixes
from saefast.ops.reference import stable_topk
from saefast.optim import reference as rows
from saefast.optim import triton as rows_triton


class Size(NamedTuple):
    B: int
    D: int
    L: int
    k: int


ODD = Size(37, 100, 1003, 7)
REAL = (ODD, Size(1024, 768, 32768, 32), Size(512, 4096, 16384, 64))
# Every kernel at the small size; at real ones in bfloat16, at the wide one those whose settings differ there.
AT: dict[Size, str | tuple[str, ...]] = {REAL[1]: "", REAL[2]: ("encode_topk", "decode_loss", "update_rows")}
STEPS_AT = (Size(256, 128, 4096, 16), Size(2048, 768, 32768, 32))
TINY, TINY_STEPS = (Size(5, 20, 130, 3),), (Size(8, 16, 64, 3),)


def cases(settings: Settings) -> list[Case]:
    sizes = TINY if settings.rehearse else REAL[:1] if settings.small else REAL
    steps_at = TINY_STEPS if settings.rehearse else STEPS_AT[:1] if settings.small else STEPS_AT
    found = [
        Case(f"{name} {label(size)}", run)
        for size in sizes
        for name, run in ops_at(size, settings)
        if size not in AT or (name.startswith(AT[size]) and not name.endswith("float32"))
    ]
    return found + [
        Case(f"{name} {label(size)}", run) for size in steps_at for name, run in steps_of(size, settings.device)
    ]


def label(size: Size) -> str:
    return "x".join(map(str, size))


Named = tuple[str, Callable[[], dict[str, Any]]]


def steps_of(size: Size, device: str) -> Iterator[Named]:
    for name in STEPS:
        yield f"three steps {name}", lambda n=name: three_steps(n, size, device)


def ops_at(size: Size, settings: Settings) -> Iterator[Named]:
    device = settings.device
    # Triton's interpreter computes on the bit patterns of bfloat16.
    half = torch.float16 if settings.rehearse else torch.bfloat16
    for dtype in (half, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        for method in ("fused", "chunked"):
            yield f"encode_topk {method} {kind}", lambda m=method, t=dtype: encode(size, t, device, method=m)
        yield f"threshold_encode {kind}", lambda t=dtype: threshold_encode(size, t, device)
        for name, case in (("spmm", spmm), ("sddmm", sddmm), ("spmm_t", spmm_t)):
            yield f"{name} {kind}", lambda c=case, t=dtype: c(size, t, device)
    yield "encode_topk scaled", lambda: encode(size, half, device, scaled=True)
    yield "encode_topk of a list", lambda: encode(size, half, device, listed=True)
    yield "decode_loss", lambda: decode_loss(size, device)
    yield "decode_loss csr", lambda: decode_loss(size, device, csr=True)
    yield "select_kth", lambda: select_kth(size, device)
    yield "encode_batch_topk", lambda: encode_batch_topk(size, device)
    yield "encode_group_max", lambda: encode_group_max(size, device)
    n = min(size.L // 4, 2000)
    for kind in ("adam", "lean"):
        for name in OPERATIONS:
            yield f"{name} {kind}", lambda k=kind, o=name: row_operation(size.D, device, k, o, n)
        # Wider than a program holds.
        yield f"update_rows {kind} wide", lambda k=kind: row_operation(tuning.MAX_ROW + 8, device, k, "update_rows", 8)


def integers(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randint(-3, 4, shape, device=device).to(dtype)


def exact(found: Tensor, expected: Tensor) -> dict[str, Any]:
    """Equal to the bit, or how many elements are not."""
    wrong = int((found != expected).sum()) if found.shape == expected.shape else -1
    return {"outcome": "failed" if wrong else "ok", "wrong": wrong, "of": expected.numel()}


def close(found: Tensor, plain: Tensor, truth: Tensor) -> dict[str, Any]:
    """At most twice as far from the float64 result as torch is in the same dtype, but for one rounding of it."""
    error, allowed = (float((t.double() - truth).abs().max()) for t in (found, plain))
    allowed = 2 * allowed + float(torch.finfo(found.dtype).eps * truth.abs().max())
    # Written so that NaN fails.
    return {"outcome": "ok" if error <= allowed else "failed", "error": error, "allowed": allowed}


def worst(*found: dict[str, Any]) -> dict[str, Any]:
    """The first that failed, or else the last."""
    return next((one for one in found if one["outcome"] != "ok"), found[-1])


def encode(
    size: Size, dtype: torch.dtype, device: str, method: str = "auto", scaled: bool = False, listed: bool = False
) -> dict[str, Any]:
    x, W = integers(size.B, size.D, dtype=dtype, device=device), integers(size.L, size.D, dtype=dtype, device=device)
    b = torch.randint(-3, 4, (size.L,), device=device).float()
    # Powers of two scale without rounding.
    scale = 2.0 ** torch.randint(-2, 3, (size.L,), device=device) if scaled else None
    latents = torch.arange(1, size.L, 3, dtype=torch.int32, device=device) if listed else None
    acts, idx = triton_encode_topk.encode_topk(x, W, b, size.k, method=method, scale=scale, latents=latents, relu=False)
    columns = torch.arange(size.L, device=device) if latents is None else latents.long()
    pre = (x.double() @ W[columns].double().T + b[columns]).float()
    order = stable_topk(pre if scale is None else pre * scale[columns], size.k)
    return worst(exact(idx, columns[order].int()), exact(acts, pre.gather(1, order)))


def threshold_encode(size: Size, dtype: torch.dtype, device: str) -> dict[str, Any]:
    x, W = integers(size.B, size.D, dtype=dtype, device=device), integers(size.L, size.D, dtype=dtype, device=device)
    theta = 8.0 * size.D**0.5  # two standard deviations of a sum of D products
    row_ptr, idx, acts = triton_threshold_encode.threshold_encode(x, W, None, theta)
    pre = (x.double() @ W.double().T).float()
    row, column = (pre > theta).nonzero(as_tuple=True)
    counts = torch.zeros(size.B + 1, dtype=torch.int64, device=device)
    counts[1:] = torch.bincount(row, minlength=size.B).cumsum(0)
    return worst(exact(row_ptr, counts), exact(idx, column.int()), exact(acts, pre[row, column]))


def code(size: Size, device: str) -> tuple[Tensor, Tensor]:
    return torch.rand(size.B, size.k, device=device), torch.randint(
        size.L, (size.B, size.k), dtype=torch.int32, device=device
    )


def spmm(size: Size, dtype: torch.dtype, device: str) -> dict[str, Any]:
    (acts, idx), W = code(size, device), torch.randn(size.L, size.D, device=device).to(dtype)
    found = triton_spmm.spmm(acts, idx, W)
    return close(found, reference.spmm(acts, idx, W), reference.spmm(acts.double(), idx, W.double()))


def sddmm(size: Size, dtype: torch.dtype, device: str) -> dict[str, Any]:
    (_, idx), W = code(size, device), torch.randn(size.L, size.D, device=device).to(dtype)
    x = torch.randn(size.B, size.D, device=device).to(dtype)
    return close(
        triton_sddmm.sddmm(x, idx, W), reference.sddmm(x, idx, W), reference.sddmm(x.double(), idx, W.double())
    )


def spmm_t(size: Size, dtype: torch.dtype, device: str) -> dict[str, Any]:
    (acts, idx), x = code(size, device), torch.randn(size.B, size.D, device=device).to(dtype)
    args = (size.L,)
    plain, truth = reference.spmm_t(acts, idx, x, *args), reference.spmm_t(acts.double(), idx, x.double(), *args)
    return close(triton_spmm.spmm_t(acts, idx, x, *args), plain, truth)


def decode_loss(size: Size, device: str, csr: bool = False) -> dict[str, Any]:
    """csr: as many entries a row as fall to it, and prefixes by latent."""
    (acts, idx), x = code(size, device), torch.randn(size.B, size.D, device=device)
    W, b = torch.randn(size.L, size.D, device=device), torch.randn(size.D, device=device)
    given, prefixes = Code(acts, idx), Prefixes([size.k], [0.5])
    if csr:
        ends = torch.randint(acts.numel(), (size.B - 1,), device=device).sort().values
        row_ptr = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), acts.numel() - 1)]).int()
        acts[-1, -1] = 0  # padding
        given = Code(acts.flatten(), idx.flatten(), row_ptr)
        prefixes = Prefixes([size.L // 3, size.L], [0.5, 0.25], by_latent=True, main=1)

    def run(module: Any, dtype: torch.dtype) -> list[Tensor]:
        residual = torch.zeros(len(prefixes.bounds), size.B, size.D, dtype=dtype, device=device)
        at = given._replace(acts=given.acts.to(dtype))
        found = module.decode_loss(x.to(dtype), at, W.to(dtype), b.to(dtype), prefixes, residual)
        return [residual, found.squares, found.grad_acts]

    ours, plain, truth = run(rows_triton, torch.float32), run(rows, torch.float32), run(rows, torch.float64)
    return worst(*(close(*three) for three in zip(ours, plain, truth, strict=True)))


def select_kth(size: Size, device: str) -> dict[str, Any]:
    keys = reference.positive_keys(torch.randn(4 * size.B * size.k, device=device))
    return exact(triton_select_kth.select_kth(keys, size.B * size.k), keys.sort().values[-size.B * size.k])


def encode_batch_topk(size: Size, device: str) -> dict[str, Any]:
    """One row holds more than all the others, so that some are encoded again."""
    x, W = (integers(n, size.D, dtype=torch.float32, device=device) for n in (size.B, size.L))
    x[1] *= 16
    b = torch.randint(-3, 4, (size.L,), device=device).float()
    row_ptr, idx, acts = reference.encode_batch_topk(x, W, b, size.k)
    found = ops.encode_batch_topk(x, W, b, size.k)
    assert found.row_ptr is not None
    return worst(exact(found.row_ptr, row_ptr), exact(found.idx, idx), exact(found.acts, acts))


def encode_group_max(size: Size, device: str) -> dict[str, Any]:
    L = size.L // size.k * size.k
    x, W = (integers(n, size.D, dtype=torch.float32, device=device) for n in (size.B, L))
    b = torch.randint(-3, 4, (L,), device=device).float()
    acts, idx = reference.encode_group_max(x, W, b, size.k)
    found = ops.encode_group_max(x, W, b, size.k)
    return worst(exact(found[0], acts), exact(found[1], idx))
