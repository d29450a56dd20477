"""encode_group_max against the dense form: the (B, L) matrix, and the largest of each of its groups.

    python -m bench.encode_group_max [--device cpu|cuda] [--out DIR] [--quick] [--no-check]

"chunked" is the same in plain torch, a few groups at a time, which is what GPUs do.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bench import op
from saefast import ops

CHUNK = 8192


def contest(shape: op.Shape, dtype: torch.dtype, device: str) -> op.Contest:
    torch.manual_seed(0)
    B, D, L, k = shape
    x, W = torch.randn((B, D), device=device), torch.randn((L, D), device=device) / D**0.5
    b = torch.zeros(L, device=device)
    low, width = W.bfloat16(), L // k

    def largest(part: slice) -> tuple[Tensor, Tensor]:
        found = torch.addmm(b[part], x, W[part].T).unflatten(1, (-1, width)).max(2)
        return found.values.relu(), found.indices + torch.arange(part.start, part.stop, width, device=device)

    def chunked() -> tuple[Tensor, Tensor]:
        step = max(CHUNK // width, 1) * width
        found = [largest(slice(start, min(start + step, L))) for start in range(0, L, step)]
        return torch.cat([acts for acts, _ in found], 1), torch.cat([idx for _, idx in found], 1)

    calls = {
        "saefast": lambda: ops.encode_group_max(x, W, b, k),
        "saefast mixed": lambda: ops.encode_group_max(x, W, b, k, W_low=low),
        "encode_topk": lambda: ops.encode_topk(x, W, b, k),
        "chunked": chunked,
        "dense": lambda: largest(slice(0, L)),
    }
    return op.Contest(calls, moved=4.0 * (B * D + L * D), flops=2.0 * B * D * L)


def main(argv: Sequence[str] | None = None) -> int:
    return op.run("encode_group_max", __doc__, contest, argv, shapes=op.GPU_SHAPES[:2], dtypes=("fp32",))


if __name__ == "__main__":
    raise SystemExit(main())
