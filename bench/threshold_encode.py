"""threshold_encode against the dense product, compared, gathered and written.

    python -m bench.threshold_encode [--device cpu|cuda] [--out DIR] [--quick] [--no-check]

About k of L latents are above the threshold. Values are those of a fresh SAE on normal activations.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import op
from saefast import ops
from saefast.ops import reference


def contest(shape: op.Shape, dtype: torch.dtype, device: str) -> op.Contest:
    torch.manual_seed(0)
    B, D, L, k = shape
    x = torch.empty((B, D), dtype=dtype, device=device).normal_()
    W = torch.empty((L, D), dtype=dtype, device=device).normal_(std=D**-0.5)
    # The quantile of a normal value that k of L exceed.
    theta = float(torch.special.ndtri(torch.tensor(1 - k / L, dtype=torch.float64, device="cpu")))

    def dense() -> tuple[Tensor, Tensor]:
        pre = F.linear(x, W)
        above = pre > theta
        return above.nonzero(), pre[above]

    calls = {
        "saefast": lambda: ops.threshold_encode(x, W, None, theta),
        "saefast reference": lambda: reference.threshold_encode(x, W, None, theta),
        "F.linear + nonzero": dense,
    }
    return op.Contest(calls, moved=float(x.element_size() * D * (B + L) + 8 * B * k), flops=2.0 * B * D * L)


def main(argv: Sequence[str] | None = None) -> int:
    return op.run("threshold_encode", __doc__, contest, argv)


if __name__ == "__main__":
    raise SystemExit(main())
