"""fill_entries, which weighs a step's grouped entries, against the same in plain torch.

    python -m bench.fill_entries [--device cpu|cuda] [--out DIR] [--quick] [--no-check]

k uniformly random latents of each token. GB/s counts an entry's act, gradient and place read, and four numbers written.
"""

from collections.abc import Sequence

import torch

from bench import op
from saefast.ops.code import Code, Prefixes
from saefast.ops.groups import group_entries
from saefast.optim import reference
from saefast.optim.dispatch import row_ops


def contest(shape: op.Shape, dtype: torch.dtype, device: str) -> op.Contest:
    torch.manual_seed(0)
    B, _, L, k = shape
    idx = torch.randint(L, (B * k,), dtype=torch.int32, device=device)
    keep = torch.ones_like(idx, dtype=torch.bool)
    code = Code(torch.rand((B, k), device=device), idx.view(B, k))
    entries = [(code, torch.randn((B, k), device=device))], Prefixes([k], [1 / B]), L
    backend = row_ops(code.acts)
    ours, plain = backend.group_entries(idx, keep, L), group_entries(idx, keep, L)
    calls = {
        "saefast": lambda: backend.fill_entries(ours, *entries),
        "saefast reference": lambda: reference.fill_entries(plain, *entries),
    }
    return op.Contest(calls, moved=4.0 * (7 * B * k + L))


def main(argv: Sequence[str] | None = None) -> int:
    return op.run("fill_entries", __doc__, contest, argv, dtypes=("fp32",))


if __name__ == "__main__":
    raise SystemExit(main())
