"""encode_topk against F.linear + torch.topk, against the product alone, and its two methods against each other.

    python -m bench.encode_topk [--device cpu|cuda] [--out DIR] [--quick] [--no-check]

On a GPU: bf16, the four shapes of the design's table. On a CPU: fp32 and bf16 at (B, D, L, k) = (1024, 768, 32768, 32),
then the memory that L = 262144 at B = 4096 takes. Also pytest-benchmark cases: `pytest bench/encode_topk.py`.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import common
from bench.op import DTYPES, Shape
from saefast import ops
from saefast.ops import reference

# The product alone is never given more than this to write: 1M latents at B = 8192 would be 17 GB of bf16.
PRODUCT_COLUMNS = 1 << 17


GPU_SHAPES = (
    Shape(8192, 768, 32768, 32),
    Shape(8192, 4096, 131072, 64),
    Shape(8192, 4096, 1 << 20, 64),
    Shape(8192, 768, 1 << 24, 32),
)
CPU_SHAPES = (Shape(1024, 768, 32768, 32),)
TINY = (Shape(16, 24, 500, 4),)
CPU_MEMORY = Shape(4096, 768, 262144, 32)
# Designed to be reached, relative to the product alone, at the four shapes above on an H200.
TARGETS = (1.40, 1.15, 1.10, 1.15)


class Problem:
    """Inputs of one shape, and the contenders on them. Values are those of a fresh SAE on normal activations."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        torch.manual_seed(0)
        self.shape = shape
        self.x = torch.empty((shape.B, shape.D), dtype=dtype, device=device).normal_()
        self.W = torch.empty((shape.L, shape.D), dtype=dtype, device=device).normal_(std=shape.D**-0.5)
        self.b = torch.zeros(shape.L, device=device)
        self.bias = self.b.to(dtype)
        self.out = torch.empty((shape.B, min(shape.L, PRODUCT_COLUMNS)), dtype=dtype, device=device)

    def product(self) -> Tensor:
        """x Wᵀ + b, into the same memory chunk by chunk where L is large."""
        for start in range(0, self.shape.L, PRODUCT_COLUMNS):
            part = slice(start, start + PRODUCT_COLUMNS)
            torch.addmm(self.bias[part], self.x, self.W[part].T, out=self.out[:, : len(self.bias[part])])
        return self.out

    def dense(self) -> tuple[Tensor, Tensor]:
        """What SAE libraries do."""
        pre = F.linear(self.x, self.W, self.bias)
        values, idx = pre.topk(self.shape.k, dim=1)
        return values.relu_(), idx

    def ours(self, method: Any = "auto") -> tuple[Tensor, Tensor]:
        return ops.encode_topk(self.x, self.W, self.b, self.shape.k, method=method)

    def plain(self) -> tuple[Tensor, Tensor]:
        """The same without a compiler: chunked torch."""
        return reference.encode_topk(self.x, self.W, self.b, self.shape.k)

    def dense_fits(self) -> bool:
        """Whether the (B, L) matrix fits beside its top-k's workspace, which holds as much again."""
        if self.x.device.type == "cpu":
            return True
        free, _ = torch.cuda.mem_get_info()
        return 3 * self.shape.B * self.shape.L * self.x.element_size() < free


def contenders(problem: Problem) -> dict[str, common.Call]:
    calls: dict[str, common.Call] = {"product alone": problem.product, "saefast": problem.ours}
    if problem.x.is_cuda:
        calls |= {f"saefast {method}": lambda method=method: problem.ours(method) for method in ("fused", "chunked")}
    else:
        calls["saefast reference"] = problem.plain
    if problem.dense_fits():
        calls["F.linear + topk"] = problem.dense
    return calls


def compare(shape: Shape, dtype: str, device: str, budget: float) -> dict[str, Any]:
    problem = Problem(shape, DTYPES[dtype], device)
    calls = contenders(problem)
    taken = common.measure(calls, device, budget)
    size = problem.x.element_size()
    flops = 2.0 * shape.B * shape.D * shape.L
    moved = float(size * shape.D * (shape.B + shape.L) + 8 * shape.B * shape.k)
    rows = []
    for name, spread in taken.items():
        peak = common.peak_bytes(calls[name], device) if device == "cuda" else None
        operands = common.kind(DTYPES[dtype])
        rows.append(common.timed_row(name, spread, device, operands=operands, flops=flops, moved=moved, peak=peak))
    ours = taken["saefast"].median
    others = [name for name in taken if name != "saefast"]
    ratios = {f"saefast / {name}": ours / taken[name].median for name in others}
    return {"shape": shape._asdict(), "dtype": dtype, "rows": rows, "ratios": ratios}


def show(result: dict[str, Any] | None) -> None:
    if result is None:
        return
    print(f"\n{result['shape']} {result['dtype']}")
    common.print_timed(result["rows"])
    for name, ratio in result["ratios"].items():
        print(f"    {name} = {ratio:.3f}")
    if "target" in result:
        print(f"    target on an H200: saefast / product alone <= {result['target']}")


def memory(shape: Shape, dtype: str) -> dict[str, Any]:
    """Peak memory beyond the inputs on a CPU, each contender in a process of its own."""
    child, sizes = ("bench.encode_topk", "--peak"), [str(size) for size in shape]
    peaks = {what: common.peak_in_child(*child, what, dtype, *sizes) for what in ("dense", "ours")}
    return {"shape": shape._asdict(), "dtype": dtype, "peak_bytes": peaks}


def peak(what: str, dtype: str, *sizes: str) -> None:
    """The child's part of `memory`: prints the bytes one call took."""
    # A small call first, so that thread pools and libraries do not count.
    for shape in (Shape(8, 64, 512, 4), Shape(*map(int, sizes))):
        problem = Problem(shape, DTYPES[dtype], "cpu")
        taken = common.peak_bytes({"dense": problem.dense, "ours": problem.ours}[what], "cpu")
    print(taken)


def on_cpu(options: argparse.Namespace) -> list[dict[str, Any] | None]:
    budget = 0.1 if options.rehearse else 4.0 if options.quick else 30.0
    results = []
    for shape in TINY if options.rehearse else CPU_SHAPES:
        for dtype in DTYPES:
            results.append(common.attempt(f"{shape} {dtype}", lambda s=shape, t=dtype: compare(s, t, "cpu", budget)))
            show(results[-1])
    if not options.quick and not options.rehearse:
        results.append(memory(CPU_MEMORY, "fp32"))
        print(f"\npeak memory beyond the inputs at {results[-1]['shape']} fp32")
        for what, taken in results[-1]["peak_bytes"].items():
            print(f"    {what}: {taken / 1e6:,.0f} MB")
    return results


def on_gpu(options: argparse.Namespace) -> list[dict[str, Any] | None]:
    shapes = GPU_SHAPES[:2] if options.quick else GPU_SHAPES
    budget, results = 3.0 if options.quick else 8.0, []
    for shape, target in zip(shapes, TARGETS, strict=False):
        found = common.attempt(f"{shape} bf16", lambda s=shape: compare(s, "bf16", "cuda", budget))
        results.append(found and {**found, "target": target})
        show(results[-1])
        torch.cuda.empty_cache()
    return results


def main(argv: Sequence[str] | None = None) -> int:
    child = {"peak": {"nargs": "+", "help": argparse.SUPPRESS}}
    options = common.arguments("bench.encode_topk", __doc__, argv, **child)
    if options.peak:
        peak(*options.peak)
        return 0
    if not options.no_check:
        files = (
            ("test_encode_topk_triton.py", "test_merge_topk.py")
            if options.device == "cuda"
            else ("test_encode_topk.py",)
        )
        common.check(options.device, *files)
    results = on_cpu(options) if options.device == "cpu" else on_gpu(options)
    common.write_results(options.out, options.device, "encode_topk", [result for result in results if result])
    return int(None in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("what", ["product", "dense", "ours", "plain"])
def test_bench_encode_topk(benchmark: Any, what: str, dtype: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problem = Problem((GPU_SHAPES if device == "cuda" else CPU_SHAPES)[0], DTYPES[dtype], device)
    call = getattr(problem, what)

    def run() -> None:
        call()
        common.synchronize(device)

    run()
    benchmark.pedantic(run, rounds=3)


if __name__ == "__main__":
    raise SystemExit(main())
