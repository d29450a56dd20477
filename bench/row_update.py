"""row_update: Adam on the rows that fired, against torch's fused Adam on a dense gradient of all rows.

    python -m bench.row_update [--device cpu|cuda] [--out DIR] [--quick] [--no-check]

k uniformly random latents of each token. GB/s counts weights and both moments of the rows that fired, read and
written, and a source row an entry.
"""

from collections.abc import Sequence

import torch

from bench import op
from saefast.optim import reference
from saefast.optim.dispatch import row_ops
from saefast.optim.state import AdamStep, DriftTable, Job, Matrix, Norm, RowGradient


def contest(shape: op.Shape, dtype: torch.dtype, device: str) -> op.Contest:
    torch.manual_seed(0)
    B, D, L, k = shape
    source, coef = torch.randn((B, D), device=device), torch.randn(B * k, device=device)
    idx = torch.randint(L, (B * k,), dtype=torch.int32, device=device)
    token = torch.arange(B, dtype=torch.int32, device=device).repeat_interleave(k)
    matrix = Matrix.of(torch.randn((L, D), device=device) / D**0.5)
    drift = DriftTable(0.9, 0.999, 1e-8, device)
    step = AdamStep(1, 0.9, 0.999, 1e-4, 1e-8, drift.drift, drift.drift_eps, norm=Norm.never)
    backend = row_ops(matrix.w)
    groups = backend.group_entries(idx, torch.ones_like(idx, dtype=torch.bool), L)
    rows = groups.latents[groups.latents >= 0]
    order, offsets = groups.order.long(), groups.offsets[: len(rows) + 1]
    gradient = RowGradient(source, offsets, token[order].contiguous(), coef[order].contiguous())
    job = Job(matrix, step, gradient, rows, torch.empty(len(rows), dtype=torch.float32, device=device))
    dense = torch.nn.Parameter(matrix.w.clone())
    adam = torch.optim.Adam([dense], lr=1e-4, fused=True)

    def all_rows() -> None:
        dense.grad = torch.zeros_like(dense).index_add_(0, idx.long(), coef[:, None] * source[token.long()])
        adam.step()

    calls = {
        "saefast": lambda: backend.update_rows([job]),
        "saefast reference": lambda: reference.update_rows([job]),
        "dense Adam": all_rows,
    }
    return op.Contest(calls, moved=4.0 * D * (6 * len(rows) + B * k))


def main(argv: Sequence[str] | None = None) -> int:
    return op.run("row_update", __doc__, contest, argv, dtypes=("fp32",))


if __name__ == "__main__":
    raise SystemExit(main())
