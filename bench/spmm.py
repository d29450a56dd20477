"""spmm against torch's embedding_bag, which is the same sum with weights.

    python -m bench.spmm [--device cpu|cuda] [--out DIR] [--quick] [--no-check]

Rows of W are gathered by uniformly random latents, the least cached there can be. GB/s counts what must be read and
written once. Also pytest-benchmark cases: `pytest bench/spmm.py`.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import op
from saefast import ops
from saefast.ops import reference


def contest(shape: op.Shape, dtype: torch.dtype, device: str) -> op.Contest:
    torch.manual_seed(0)
    B, D, L, k = shape
    acts, idx = torch.rand((B, k), device=device), torch.randint(L, (B, k), dtype=torch.int32, device=device)
    W = torch.empty((L, D), dtype=dtype, device=device).normal_()
    calls = {
        "saefast": lambda: ops.spmm(acts, idx, W),
        "saefast reference": lambda: reference.spmm(acts, idx, W),
        "embedding_bag": lambda: F.embedding_bag(idx, W, per_sample_weights=acts.to(dtype), mode="sum"),
    }
    # Read once: the code, and a row of W an entry. Written once: the result.
    return op.Contest(calls, moved=float(8 * B * k + W.element_size() * (B * k * D + B * D)))


def main(argv: Sequence[str] | None = None) -> int:
    return op.run("spmm", __doc__, contest, argv)


@pytest.mark.parametrize("dtype", op.DTYPES)
@pytest.mark.parametrize("what", ["saefast", "saefast reference", "embedding_bag"])
def test_bench_spmm(benchmark: Any, what: str, dtype: str) -> None:
    op.once(benchmark, contest, what, dtype)


if __name__ == "__main__":
    raise SystemExit(main())
