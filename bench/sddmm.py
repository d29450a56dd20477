"""sddmm against what torch offers: gather the rows of W, then a batched product.

    python -m bench.sddmm [--device cpu|cuda] [--out DIR] [--quick] [--no-check]

Rows of W are gathered by uniformly random latents, the least cached there can be. GB/s counts what must be read and
written once. Also pytest-benchmark cases: `pytest bench/sddmm.py`.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from bench import op
from saefast import ops
from saefast.ops import reference


def contest(shape: op.Shape, dtype: torch.dtype, device: str) -> op.Contest:
    torch.manual_seed(0)
    B, D, L, k = shape
    x = torch.empty((B, D), dtype=dtype, device=device).normal_()
    idx = torch.randint(L, (B, k), dtype=torch.int32, device=device)
    W = torch.empty((L, D), dtype=dtype, device=device).normal_()
    calls = {
        "saefast": lambda: ops.sddmm(x, idx, W),
        "saefast reference": lambda: reference.sddmm(x, idx, W),
        # Writes the gathered rows, (B, k, D), and reads them back.
        "gather + bmm": lambda: torch.bmm(W[idx.long()], x[:, :, None])[:, :, 0],
    }
    # Read once: x, the indices, and a row of W an entry. Written once: the result.
    return op.Contest(calls, moved=float(8 * B * k + W.element_size() * (B * k * D + B * D)))


def main(argv: Sequence[str] | None = None) -> int:
    return op.run("sddmm", __doc__, contest, argv)


@pytest.mark.parametrize("dtype", op.DTYPES)
@pytest.mark.parametrize("what", ["saefast", "saefast reference", "gather + bmm"])
def test_bench_sddmm(benchmark: Any, what: str, dtype: str) -> None:
    op.once(benchmark, contest, what, dtype)


if __name__ == "__main__":
    raise SystemExit(main())
