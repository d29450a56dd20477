"""encode_tiles over one chunk of columns: both of its methods against the product alone.

    python -m bench.encode_tiles [--device cpu|cuda] [--out DIR] [--quick] [--no-check]

Rows have the k-th best of the whole chunk as their bound, so that few groups are stored, as in most of a pass.
A kernel of GPUs alone; on a CPU `bench.encode_topk` times the C++ that does this work.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from bench import op
from saefast.ops.triton_encode_tiles import make_encoder, product_columns, run_tiles
from saefast.ops.triton_encode_topk import encode_topk
from saefast.ops.triton_launch import readable


def contest(shape: op.Shape, dtype: torch.dtype, device: str) -> op.Contest:
    torch.manual_seed(0)
    B, D, L, k = shape
    x = readable(torch.empty((B, D), dtype=dtype, device=device).normal_())
    W = readable(torch.empty((L, D), dtype=dtype, device=device).normal_(std=D**-0.5))
    fused = make_encoder(x, W, None, None, None, "fused", "ieee")
    chunked = replace(fused, method="chunked")
    tau = encode_topk(x, W, None, k, relu=False)[0][:, -1].contiguous()
    stride = -(-L // fused.group) * fused.group
    scratch = torch.empty(B * stride, dtype=torch.float32, device=device)
    groups = torch.empty(B * stride // fused.group, dtype=torch.float32, device=device)
    product, out = product_columns(chunked, x), torch.empty((B, L), dtype=x.dtype, device=device)
    calls = {
        "saefast": lambda: run_tiles(fused, x, 0, L, tau, groups, scratch),
        "saefast chunked": lambda: run_tiles(chunked, x, 0, L, tau, groups, scratch, product=product),
        "product alone": lambda: torch.mm(x, W.T, out=out),
    }
    return op.Contest(calls, moved=float(x.element_size() * D * (B + L) + groups.nbytes), flops=2.0 * B * D * L)


def main(argv: Sequence[str] | None = None) -> int:
    return op.run("encode_tiles", __doc__, contest, argv, shapes=op.CHUNKS, gpu_only=True)


if __name__ == "__main__":
    raise SystemExit(main())
