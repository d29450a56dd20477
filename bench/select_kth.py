"""select_kth, by which a whole batch finds its threshold, against torch.kthvalue.

    python -m bench.select_kth [--device cpu|cuda] [--out DIR] [--quick] [--no-check]

The keys of normal values, as many as encode_batch_topk has candidates to begin with. GB/s counts them read once.
"""

from collections.abc import Sequence

import torch

from bench import op
from saefast.ops import reference
from saefast.ops.encode_batch_topk import ROOM
from saefast.ops.select_kth import select_kth


def contest(shape: op.Shape, dtype: torch.dtype, device: str) -> op.Contest:
    torch.manual_seed(0)
    B, _, _, k = shape
    keys = reference.positive_keys(torch.empty(ROOM * k * B, dtype=dtype, device=device).normal_())
    calls = {
        "saefast": lambda: select_kth(keys, k * B),
        "torch.kthvalue": lambda: reference.select_kth(keys, k * B),
    }
    return op.Contest(calls, moved=float(keys.nbytes))


def main(argv: Sequence[str] | None = None) -> int:
    return op.run("select_kth", __doc__, contest, argv, dtypes=("fp32",))


if __name__ == "__main__":
    raise SystemExit(main())
