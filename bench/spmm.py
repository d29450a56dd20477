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
from torch import Tensor

from bench import common
from saefast.ops import dispatch as ops
from saefast.ops import reference

# (B, D, L, k)
GPU_SHAPES = ((8192, 768, 32768, 32), (8192, 4096, 131072, 64), (8192, 4096, 1 << 20, 64))
CPU_SHAPES = ((1024, 768, 32768, 32), (1024, 2304, 16384, 64))
TINY = ((16, 24, 100, 4),)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Problem:
    def __init__(self, B: int, D: int, L: int, k: int, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        self.acts = torch.rand((B, k), device=device)
        self.idx = torch.randint(L, (B, k), dtype=torch.int32, device=device)
        self.W = torch.empty((L, D), dtype=dtype, device=device).normal_()
        # Read once: the code, and a row of W an entry. Written once: the result.
        self.moved = float(8 * B * k + self.W.element_size() * (B * k * D + B * D))

    def ours(self) -> Tensor:
        return ops.spmm(self.acts, self.idx, self.W)

    def plain(self) -> Tensor:
        return reference.spmm(self.acts, self.idx, self.W)

    def embedding_bag(self) -> Tensor:
        return F.embedding_bag(self.idx, self.W, per_sample_weights=self.acts.to(self.W.dtype), mode="sum")


def compare(shape: tuple[int, int, int, int], dtype: str, device: str, budget: float) -> dict[str, Any]:
    problem = Problem(*shape, DTYPES[dtype], device)
    calls: dict[str, common.Call] = {
        "saefast": problem.ours,
        "saefast reference": problem.plain,
        "embedding_bag": problem.embedding_bag,
    }
    taken = common.measure(calls, device, budget)
    rows = []
    for name, spread in taken.items():
        peak = common.peak_bytes(calls[name], device) if device == "cuda" else None
        operands = common.kind(DTYPES[dtype])
        rows.append(common.timed_row(name, spread, device, operands=operands, moved=problem.moved, peak=peak))
    ratio = taken["saefast"].median / taken["embedding_bag"].median
    return {"shape": dict(zip("BDLk", shape, strict=True)), "dtype": dtype, "rows": rows, "ratio": ratio}


def main(argv: Sequence[str] | None = None) -> int:
    options = common.arguments("bench.spmm", __doc__, argv)
    if not options.no_check:
        common.check(options.device, "test_spmm.py")
    shapes = TINY if options.rehearse else GPU_SHAPES if options.device == "cuda" else CPU_SHAPES
    budget = 0.1 if options.rehearse else 2.0 if options.quick else 10.0
    results = []
    for shape in shapes[: 1 if options.quick else None]:
        for dtype in DTYPES:
            result = common.attempt(f"{shape} {dtype}", lambda s=shape, t=dtype: compare(s, t, options.device, budget))
            results.append(result)
            if result:
                print(f"\n{result['shape']} {dtype}: saefast / embedding_bag = {result['ratio']:.3f}")
                common.print_timed(result["rows"])
    common.write_results(options.out, options.device, "spmm", [r for r in results if r])
    return int(None in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", ["ours", "plain", "embedding_bag"])
def test_bench_spmm(benchmark: Any, what: str, dtype: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = Problem(*(GPU_SHAPES if device == "cuda" else CPU_SHAPES)[0], DTYPES[dtype], device)
    call = getattr(problem, what)

    def run() -> None:
        call()
        common.synchronize(device)

    run()
    benchmark.pedantic(run, rounds=3)


if __name__ == "__main__":
    raise SystemExit(main())
