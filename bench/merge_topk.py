"""merge_topk of a second chunk into the k best of a first, against torch.topk over both.

    python -m bench.merge_topk [--device cpu|cuda] [--out DIR] [--quick] [--no-check]

Each merge starts from a copy of what stood before, which is timed with it: B·k values and indices.
A kernel of GPUs alone; on a CPU `bench.encode_topk` times the C++ that does this work.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bench import op
from saefast.kernels import tuning
from saefast.ops.chunks import sorted_width
from saefast.ops.reference import pre_activations
from saefast.ops.triton_encode_tiles import make_encoder, run_tiles
from saefast.ops.triton_encode_topk import Best, encode_topk, merge
from saefast.ops.triton_launch import readable


def contest(shape: op.Shape, dtype: torch.dtype, device: str) -> op.Contest:
    torch.manual_seed(0)
    B, D, L, k = shape
    n, width = L // 2, sorted_width(k)
    x = readable(torch.empty((B, D), dtype=dtype, device=device).normal_())
    W = readable(torch.empty((L, D), dtype=dtype, device=device).normal_(std=D**-0.5))
    enc = make_encoder(x, W, None, None, None, "fused", "ieee")
    acts, idx = encode_topk(x, W[:n], None, k, relu=False)
    before = Best(acts, idx, acts[:, -1].contiguous())
    stride = -(-n // enc.group) * enc.group
    scratch = torch.empty(B * stride, dtype=torch.float32, device=device)
    groups = torch.empty(B * stride // enc.group, dtype=torch.float32, device=device)
    run_tiles(enc, x, n, n, before.tau, groups, scratch)
    room = width + tuning.merge(width, enc.group).visit * enc.group
    keys = torch.empty(B * room, dtype=torch.int64, device=device)
    buffers = (groups, scratch, None, torch.empty_like(groups, dtype=torch.int32), keys)
    pre = pre_activations(x, W[n : 2 * n], None)

    def torch_topk() -> tuple[Tensor, Tensor]:
        values, order = torch.cat([acts, pre], 1).topk(k)
        return values, order

    calls = {
        "saefast": lambda: merge(enc, buffers, Best(*(t.clone() for t in before)), n, n, timed=False),
        "cat + topk": torch_topk,
    }
    # Group maxima are read, the values of few groups, and the running top-k read and written.
    return op.Contest(calls, moved=float(groups.nbytes + 16 * B * k))


def main(argv: Sequence[str] | None = None) -> int:
    return op.run("merge_topk", __doc__, contest, argv, shapes=op.CHUNKS, gpu_only=True)


if __name__ == "__main__":
    raise SystemExit(main())
