"""encode_batch_topk against the dense form: the (B, L) matrix, and torch's top-k of all of it.

    python -m bench.encode_batch_topk [--device cpu|cuda] [--out DIR] [--quick] [--no-check]

x is normal, with rows of other sizes, so that rows hold other numbers of entries, as those of a trained SAE do.
`encode_topk` of the same k is what a row-wise selection costs. Also select_kth, by which the threshold is found,
against torch's own.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench import common
from saefast import ops
from saefast.ops import mixed, reference
from saefast.ops.encode_batch_topk import ROOM
from saefast.ops.select_kth import select_kth

# (B, D, L, k)
GPU_SHAPES = ((8192, 768, 32768, 32), (8192, 4096, 131072, 64))
CPU_SHAPES = ((1024, 768, 32768, 32),)
TINY = ((16, 24, 100, 4),)


class Problem:
    def __init__(self, B: int, D: int, L: int, k: int, device: str) -> None:
        torch.manual_seed(0)
        self.B, self.L, self.k = B, L, k
        self.x = torch.randn((B, D), device=device) * torch.rand((B, 1), device=device).add(0.5)
        self.W = torch.randn((L, D), device=device) / D**0.5
        self.b = torch.zeros(L, device=device)
        self.low = self.W.bfloat16()
        self.keys = reference.positive_keys(torch.randn(ROOM * k * B, device=device))

    def ours(self) -> Tensor:
        return ops.encode_batch_topk(self.x, self.W, self.b, self.k).acts

    def mixed(self) -> Tensor:
        return ops.encode_batch_topk(self.x, self.W, self.b, self.k, W_low=self.low).acts

    def row_wise(self) -> Tensor:
        return ops.encode_topk(self.x, self.W, self.b, self.k)[0]

    def row_wise_mixed(self) -> Tensor:
        return mixed.encode_topk_mixed(self.x, self.low, self.W, self.b, self.k)[0]

    def dense(self) -> Tensor:
        return torch.addmm(self.b, self.x, self.W.T).relu_().flatten().topk(self.k * self.B, sorted=False).values

    def select(self) -> Tensor:
        return select_kth(self.keys, self.k * self.B)

    def kthvalue(self) -> Tensor:
        return reference.select_kth(self.keys, self.k * self.B)


def compare(shape: tuple[int, int, int, int], device: str, budget: float) -> dict[str, Any]:
    problem = Problem(*shape, device)
    calls: dict[str, common.Call] = {
        "saefast": problem.ours,
        "saefast mixed": problem.mixed,
        "encode_topk": problem.row_wise,
        "encode_topk mixed": problem.row_wise_mixed,
        "dense": problem.dense,
        "select_kth": problem.select,
        "torch.kthvalue": problem.kthvalue,
    }
    taken = common.measure(calls, device, budget)
    B, D, L, _ = shape
    rows = []
    for name, spread in taken.items():
        operands = common.kind(torch.bfloat16 if "mixed" in name else torch.float32)
        encodes = name not in ("select_kth", "torch.kthvalue")
        work = dict(flops=2.0 * B * D * L) if encodes else dict(moved=4.0 * len(problem.keys))
        rows.append(common.timed_row(name, spread, device, operands=operands, **work))
    ratio = taken["saefast"].median / taken["encode_topk"].median
    return {"shape": dict(zip("BDLk", shape, strict=True)), "rows": rows, "ratio": ratio}


def main(argv: Sequence[str] | None = None) -> int:
    options = common.arguments("bench.encode_batch_topk", __doc__, argv)
    if not options.no_check:
        common.check(options.device, "test_encode_batch_topk.py", "test_select_kth.py")
    shapes = TINY if options.rehearse else GPU_SHAPES if options.device == "cuda" else CPU_SHAPES
    budget = 0.1 if options.rehearse else 4.0 if options.quick else 20.0
    results = []
    for shape in shapes[: 1 if options.quick else None]:
        result = common.attempt(str(shape), lambda s=shape: compare(s, options.device, budget))
        results.append(result)
        if result:
            print(f"\n{result['shape']}: saefast / encode_topk of the same k = {result['ratio']:.3f}")
            common.print_timed(result["rows"])
    common.write_results(options.out, options.device, "encode_batch_topk", [r for r in results if r])
    return int(None in results)


if __name__ == "__main__":
    raise SystemExit(main())
