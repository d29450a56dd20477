"""decode_loss in one pass over the decoder's rows, against torch's three: embedding_bag, residual, gather and bmm.

    python -m bench.decode_loss [--device cpu|cuda] [--out DIR] [--quick] [--no-check]

GB/s counts x, the code and a row of W_dec an entry read once, the residual and the gradient written once.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import op
from saefast.ops.code import Code, Prefixes
from saefast.optim import reference
from saefast.optim.dispatch import row_ops


def contest(shape: op.Shape, dtype: torch.dtype, device: str) -> op.Contest:
    torch.manual_seed(0)
    B, D, L, k = shape
    x, b = torch.randn((B, D), device=device), torch.randn(D, device=device)
    acts, idx = torch.rand((B, k), device=device), torch.randint(L, (B, k), dtype=torch.int32, device=device)
    W = torch.randn((L, D), device=device) / D**0.5
    residual = torch.empty((1, B, D), dtype=torch.float32, device=device)
    given = (x, Code(acts, idx), W, b, Prefixes([k], [1 / B]), residual)

    def plain() -> tuple[Tensor, Tensor]:
        error = x - b - F.embedding_bag(idx, W, per_sample_weights=acts, mode="sum")
        return error.square().sum(1), torch.bmm(W[idx.long()], error[:, :, None])[:, :, 0] * (-2 / B)

    calls = {
        "saefast": lambda: row_ops(W).decode_loss(*given),
        "saefast reference": lambda: reference.decode_loss(*given),
        "embedding_bag + bmm": plain,
    }
    return op.Contest(calls, moved=4.0 * (B * k * D + 2 * B * D + 3 * B * k))


def main(argv: Sequence[str] | None = None) -> int:
    return op.run("decode_loss", __doc__, contest, argv, dtypes=("fp32",))


if __name__ == "__main__":
    raise SystemExit(main())
