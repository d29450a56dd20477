"""batch_sums, in float64, against torch's own variance and squares in float32.

    python -m bench.batch_sums [--device cpu|cuda] [--out DIR] [--quick] [--no-check]

GB/s counts the batch read once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bench import op
from saefast.optim import reference
from saefast.optim.dispatch import row_ops


def contest(shape: op.Shape, dtype: torch.dtype, device: str) -> op.Contest:
    torch.manual_seed(0)
    B, D, *_ = shape
    x = torch.empty((B, D), dtype=dtype, device=device).normal_()

    def plain() -> tuple[Tensor, Tensor]:
        return x.var(0, correction=0).sum() * B, x.square().sum()

    calls = {
        "saefast": lambda: row_ops(x).batch_sums(x),
        "saefast reference": lambda: reference.batch_sums(x),
        "var + square": plain,
    }
    return op.Contest(calls, moved=float(x.nbytes))


def main(argv: Sequence[str] | None = None) -> int:
    return op.run("batch_sums", __doc__, contest, argv, dtypes=("fp32",))


if __name__ == "__main__":
    raise SystemExit(main())
