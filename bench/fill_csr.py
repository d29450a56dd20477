"""fill_csr of one chunk's hits, against torch's nonzero and a mask.

    python -m bench.fill_csr [--device cpu|cuda] [--out DIR] [--quick] [--no-check]

About k of L latents are above the threshold. The size of the result is read back in both, so the host waits.
A kernel of GPUs alone; on a CPU `bench.threshold_encode` times the C++ that does this work.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bench import op
from saefast.ops.reference import pre_activations
from saefast.ops.triton_encode_tiles import make_encoder, run_tiles
from saefast.ops.triton_launch import readable
from saefast.ops.triton_threshold_encode import fill


def contest(shape: op.Shape, dtype: torch.dtype, device: str) -> op.Contest:
    torch.manual_seed(0)
    B, D, L, k = shape
    x = readable(torch.empty((B, D), dtype=dtype, device=device).normal_())
    W = readable(torch.empty((L, D), dtype=dtype, device=device).normal_(std=D**-0.5))
    pre = pre_activations(x, W, None)
    # A normal value that k of L exceed.
    theta = torch.special.ndtri(torch.tensor([1 - k / L], dtype=torch.float64, device="cpu")).float().to(device)
    enc = replace(make_encoder(x, W, None, None, None, "fused", "ieee"), theta=theta)
    stride = -(-L // enc.group) * enc.group
    scratch = torch.empty(B * stride, dtype=torch.float32, device=device)
    hits = torch.empty((B, stride // enc.group), dtype=torch.int32, device=device)
    run_tiles(enc, x, 0, L, None, hits.view(-1), scratch)

    def masked() -> tuple[Tensor, Tensor]:
        above = pre > theta
        return above.nonzero(), pre[above]

    calls = {"saefast": lambda: fill(enc, hits, scratch, 0, L), "nonzero + mask": masked}
    # Counts are read, the values of groups with hits, and the entries written.
    return op.Contest(calls, moved=float(hits.nbytes + 4 * enc.group * int((hits > 0).sum()) + 8 * int(hits.sum())))


def main(argv: Sequence[str] | None = None) -> int:
    return op.run("fill_csr", __doc__, contest, argv, shapes=op.CHUNKS, gpu_only=True)


if __name__ == "__main__":
    raise SystemExit(main())
