"""The product x · W_encᵀ of an encoder on a GPU, of which only what a bound lets through is stored.

By kernels/encode_tiles.py, or by library products that it filters. `encode_topk` and `threshold_encode` stand on it.
"""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from saefast.kernels import encode_tiles, tuning
from saefast.ops.triton_launch import (
    architecture,
    check_device,
    descriptor,
    descriptor_fits,
    interpreted,
    processors,
    readable,
    tf32,
)


@dataclass(frozen=True)
class Encoder:
    """What one call ranks: column c is latent c, or latents[c]; bias, scale and theta go by column."""

    W: Tensor
    latents: Tensor | None
    bias: Tensor | None
    scale: Tensor | None
    columns: int
    group: int
    arch: int
    kind: str
    method: str
    precision: str
    theta: Tensor | None = None  # thresholds of latents: count and collect instead of ranking

    @property
    def plain(self) -> bool:
        """Neither scales nor counts, which take registers."""
        return self.theta is None and self.scale is None

    @property
    def described(self) -> bool:
        """Whether the operands are read through TMA descriptors: whole rows whose bytes are aligned, no list."""
        persistent = tuning.tiles(self.arch, self.kind, self.W.shape[1], self.plain).per_sm > 0
        return persistent and self.latents is None and descriptor_fits(self.W)

    @property
    def threshold_step(self) -> int:
        """How far apart two latents' thresholds lie: 0 where one serves all."""
        return int(self.theta is not None and len(self.theta) > 1)

    def tiles(self) -> tuning.Tiles:
        arch, kind, D = self.arch, self.kind, self.W.shape[1]
        return tuning.tiles(arch, kind, D, self.plain) if self.described else tuning.pointer_tiles(arch, kind, D)


def make_encoder(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    latents: Tensor | None,
    scale: Tensor | None,
    method: str,
    precision: str,
) -> Encoder:
    check_device(x)
    W_enc = readable(W_enc)
    bias = None if b_enc is None else b_enc.float().contiguous()
    scale = None if scale is None else scale.float().contiguous()
    if latents is not None:
        latents = latents.contiguous()
        bias = None if bias is None else bias[latents.long()]
        scale = None if scale is None else scale[latents.long()]
    columns = W_enc.shape[0] if latents is None else latents.shape[0]
    arch = architecture(x.device)
    kind = tuning.product_kind(W_enc.element_size(), precision)
    enc = Encoder(W_enc, latents, bias, scale, columns, tuning.group(columns), arch, kind, method, precision)
    if method != "auto":
        return enc
    # Pointers are followed 16 bytes at a time only where the compiler can tell that all rows are aligned.
    wide = enc.described or (descriptor_fits(W_enc) and W_enc.shape[1] % 16 == 0)
    return replace(enc, method=tuning.method(arch, kind, W_enc.shape[1], wide))


def product_columns(enc: Encoder, x: Tensor) -> int:
    """Columns of a library product at a time; 0 where the kernel multiplies."""
    return _library_columns(x) if enc.method == "chunked" else 0


def _library_columns(x: Tensor) -> int:
    """Columns of a library product that fills half of L2."""
    if not x.is_cuda:
        return 4096
    half = torch.cuda.get_device_properties(x.device).L2_cache_size // 2
    return max(1024, half // (4 * max(1, x.shape[0])) // 256 * 256)


def run_tiles(
    enc: Encoder, x: Tensor, start: int, n: int, tau: Tensor | None, groups: Tensor, scratch: Tensor, *,
    product: int = 0, timed: bool = False,
) -> None:  # fmt: skip
    """Groups and scratch of columns start .. start + n, against enc.theta or else against tau.

    Args:
        product: columns of a library product at a time, where the method is "chunked".
        timed: let autotuning find the settings.
    """
    if enc.method == "chunked":
        return _filter_products(enc, x, start, n, tau, groups, scratch, product)
    key = ("encode_tiles", enc.arch, enc.kind, x.shape[1] > tuning.NARROW, enc.described, enc.plain)
    config = enc.tiles()

    def run(config: tuning.Tiles) -> None:
        _launch_tiles(enc, x, start, n, tau, groups, scratch, config)

    if timed:
        tuning.autotune(key, tuning.tiles_candidates(enc.arch, enc.kind, config), run)
    return run(tuning.chosen(key, config))


def _launch_tiles(
    enc: Encoder, x: Tensor, start: int, n: int, tau: Tensor | None, groups: Tensor, scratch: Tensor,
    config: tuning.Tiles,
) -> None:  # fmt: skip
    B, D, stride = x.shape[0], x.shape[1], triton.cdiv(n, enc.group) * enc.group
    span = min(triton.cdiv(B, config.block_b), max(1, tuning.SPAN_BYTES // (config.block_b * D * x.element_size() + 1)))
    tiles = triton.cdiv(B, config.block_b) * triton.cdiv(n, config.block_l)
    tail = (*_vectors(enc, tau), groups, scratch, B, n, start, D, stride, enc.threshold_step, span)
    options = {
        "BLOCK_B": config.block_b, "BLOCK_L": config.block_l, "BLOCK_D": config.block_d, "GROUP": enc.group,
        "COUNT": enc.theta is not None, "PRECISION": enc.precision, "num_warps": config.warps,
        "num_stages": config.stages,
    }  # fmt: skip
    if enc.described:
        operands = descriptor(x, [config.block_b, config.block_d]), descriptor(enc.W, [config.block_l, config.block_d])
        grid = (min(tiles, config.per_sm * processors(x.device)),)
        encode_tiles.tiles_descriptor[grid](*operands, *tail, **options, FENCE=not interpreted())
    else:
        encode_tiles.tiles_pointer[(tiles,)](x, enc.W, enc.latents, *tail, **options)


def _filter_products(
    enc: Encoder, x: Tensor, start: int, n: int, tau: Tensor | None, groups: Tensor, scratch: Tensor, product: int
) -> None:
    """The same by library products of `product` columns, each filtered while it is still in L2."""
    B, stride = x.shape[0], triton.cdiv(n, enc.group) * enc.group
    matrix = scratch[: B * stride].view(B, stride)
    span = min(triton.cdiv(B, 64), max(1, tuning.SPAN_BYTES // (64 * x.shape[1] * x.element_size() + 1)))
    for at in range(0, n, product):
        width = min(product, n - at)
        library_product(enc, x, start + at, width, matrix[:, at : at + width])
        encode_tiles.tiles_library[(triton.cdiv(B, 64) * triton.cdiv(width, 128),)](
            *_vectors(enc, tau), groups[at // enc.group :], scratch[at:], B, width, start + at, stride,
            enc.threshold_step, span, BLOCK_B=64, BLOCK_L=128, GROUP=enc.group, COUNT=enc.theta is not None,
        )  # fmt: skip


def _vectors(enc: Encoder, tau: Tensor | None) -> tuple[Tensor | None, ...]:
    return enc.bias, enc.scale, tau if enc.theta is None else enc.theta


def library_product(enc: Encoder, x: Tensor, start: int, n: int, out: Tensor) -> None:
    """out (B, n) fp32 = x · W[columns]ᵀ by torch's GEMM, with fp32 accumulators left unrounded."""
    columns = slice(start, start + n)
    W = enc.W[columns] if enc.latents is None else enc.W[enc.latents[columns].long()]
    if x.dtype == torch.float32:
        with tf32(enc.precision == "tf32"):
            torch.mm(x, W.T, out=out)
    elif x.is_cuda:
        torch.mm(x, W.T, out_dtype=torch.float32, out=out)
    else:
        torch.mm(x.float(), W.float().T, out=out)


def ranked_products(enc: Encoder, x: Tensor, start: int, n: int) -> tuple[Tensor, Tensor]:
    """Pre-activations (rows, n) of columns start .. start + n, and what they rank by."""
    pre = x.new_empty((x.shape[0], n), dtype=torch.float32)
    library_product(enc, x, start, n, pre)
    if enc.bias is not None:
        pre += enc.bias[start : start + n]
    return pre, pre if enc.scale is None else pre * enc.scale[start : start + n]
