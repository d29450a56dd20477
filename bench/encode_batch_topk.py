"""encode_batch_topk against the dense form: the (B, L) matrix, and torch's top-k of all of it.

    python -m bench.encode_batch_topk [--device cpu|cuda] [--out DIR] [--quick] [--no-check]

x is normal with rows of other sizes, so that rows hold other numbers of entries, as those of a trained SAE do.
`encode_topk` is what as many entries cost where each row has its own k.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bench import op
from saefast import ops
from saefast.ops import mixed

DENSE_FITS = op.GPU_SHAPES[:2]


def contest(shape: op.Shape, dtype: torch.dtype, device: str) -> op.Contest:
    torch.manual_seed(0)
    B, D, L, k = shape
    x = torch.randn((B, D), device=device) * torch.rand((B, 1), device=device).add(0.5)
    W, b = torch.randn((L, D), device=device) / D**0.5, torch.zeros(L, device=device)
    low = W.bfloat16()

    def dense() -> Tensor:
        return torch.addmm(b, x, W.T).relu_().flatten().topk(k * B, sorted=False).values

    calls = {
        "saefast": lambda: ops.encode_batch_topk(x, W, b, k),
        "saefast mixed": lambda: ops.encode_batch_topk(x, W, b, k, W_low=low),
        "encode_topk": lambda: ops.encode_topk(x, W, b, k),
        "encode_topk mixed": lambda: mixed.encode_topk_mixed(x, low, W, b, k),
        "dense": dense,
    }
    return op.Contest(calls, moved=4.0 * (B * D + L * D), flops=2.0 * B * D * L)


def main(argv: Sequence[str] | None = None) -> int:
    return op.run("encode_batch_topk", __doc__, contest, argv, shapes=DENSE_FITS, dtypes=("fp32",))


if __name__ == "__main__":
    raise SystemExit(main())
