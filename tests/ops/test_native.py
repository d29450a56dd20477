"""spmm, sddmm and threshold_encode of the C++ extension against the reference, and what they refuse."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from closeness import assert_close_to_reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saefast import extension, ops
from saefast.errors import InputError
from saefast.ops import backends, native, reference

pytestmark = pytest.mark.skipif(not extension.available(), reason="the C++ extension was not built")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = [
    pytest.param(dtype, name, id=f"{dtype}-{name}".removeprefix("torch."))
    for dtype in DTYPES
    if extension.available()
    for name in native.tile_kernels(dtype)
]


def integers(*shape: int, low: int = -3, high: int = 4) -> Tensor:
    return torch.randint(low, high, shape).float()


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("idx_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (7, 50, 33, 1), (40, 300, 96, 3), (9, 20, 777, 32), (300, 1000, 64, 17)]
)
def test_spmm_and_sddmm_are_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, idx_dtype: torch.dtype, threads: int
) -> None:
    B, L, D, K = shape
    acts, idx = torch.randn(B, K), torch.randint(0, L, (B, K), dtype=idx_dtype)
    x, W = torch.randn(B, D), torch.randn(L, D).to(dtype)
    out = native.spmm(acts, idx, W)
    assert out.dtype == dtype
    assert_close_to_reference(out, reference.spmm, acts, idx, W)
    assert_close_to_reference(native.sddmm(x, idx, W), reference.sddmm, x, idx, W)


@settings(deadline=None, max_examples=100)
@given(
    shape=st.tuples(st.integers(0, 30), st.integers(1, 50), st.integers(0, 150), st.integers(0, 40)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_integers_are_exact_at_any_shape(shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    B, L, D, K = shape
    acts, idx = integers(B, K, low=0, high=3), torch.randint(0, L, (B, K))
    x, W = integers(B, D), integers(L, D, low=-2, high=2).to(dtype)
    out = native.spmm(acts.to(dtype), idx, W)
    assert torch.equal(out, reference.spmm(acts, idx, W))
    assert torch.equal(native.sddmm(x.to(dtype), idx, W), reference.sddmm(x, idx, W))


def test_every_16_bit_float_is_read_exactly() -> None:
    """Subnormals, infinities and NaN included."""
    for dtype in (torch.bfloat16, torch.float16):
        W = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[:, None]
        idx = torch.arange(2**16)[:, None]
        torch.testing.assert_close(
            native.sddmm(torch.ones(2**16, 1), idx, W), W.float(), rtol=0, atol=0, equal_nan=True
        )
        spread = native.spmm(torch.ones(2**16, 1), idx, W)
        torch.testing.assert_close(spread, W, rtol=0, atol=0, equal_nan=True)


def test_threads_do_not_change_a_bit() -> None:
    acts, idx, W, x = (
        torch.randn(500, 33),
        torch.randint(0, 900, (500, 33)),
        torch.randn(900, 130),
        torch.randn(500, 130),
    )
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 7, 2):
            torch.set_num_threads(n)
            results.append((native.spmm(acts, idx, W), native.sddmm(x, idx, W)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for pair in results for a, b in zip(pair, results[0], strict=True))


@pytest.mark.parametrize(
    ("bad", "dtype"),
    [(-1, torch.int32), (50, torch.int32), (-1, torch.int64), (50, torch.int64), (2**31 + 3, torch.int64)],
)
def test_an_index_out_of_range_is_named(bad: int, dtype: torch.dtype, threads: int) -> None:
    idx = torch.randint(0, 50, (20, 6), dtype=dtype)
    idx[13, 4] = bad
    for op, first in ((native.spmm, torch.randn(20, 6)), (native.sddmm, torch.randn(20, 8))):
        with pytest.raises(InputError, match=rf"idx\[13, 4\] is {bad}, outside \[0, 50\)"):
            op(first, idx, torch.randn(50, 8))


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("spmm", {"idx": torch.zeros(4, 3)}, "float32"),
        ("spmm", {"idx": torch.zeros(4, 2, dtype=torch.int64)}, "acts"),
        ("sddmm", {"x": torch.zeros(4, 9)}, "x has shape"),
        ("sddmm", {"x": torch.zeros(3, 8)}, "x has shape"),
    ],
)
def test_what_would_read_past_memory_is_refused(op: str, change: dict[str, Any], message: str) -> None:
    first = {"acts": torch.zeros(4, 3)} if op == "spmm" else {"x": torch.zeros(4, 8)}
    arguments: dict[str, Any] = first | {"idx": torch.zeros(4, 3, dtype=torch.int64), "W": torch.zeros(50, 8)}
    with pytest.raises(InputError, match=message):
        getattr(native, op)(**(arguments | change))


def test_float64_goes_to_the_reference() -> None:
    assert backends.backend(torch.empty(0, dtype=torch.float64)) == "reference"
    acts, idx = torch.randn(3, 4).double(), torch.randint(0, 9, (3, 4))
    x, W = torch.randn(3, 5), torch.randn(9, 5).double()
    assert torch.equal(ops.spmm(acts, idx, W), reference.spmm(acts, idx, W))
    assert torch.equal(native.spmm(acts, idx, W), reference.spmm(acts, idx, W))
    assert torch.equal(native.sddmm(x, idx, W.float()), ops.sddmm(x, idx, W.float()))


def test_ops_reaches_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    acts, idx, x, W = integers(3, 4), torch.randint(0, 9, (3, 4)), integers(3, 5), integers(9, 5)
    expected = reference.spmm(acts, idx, W), reference.sddmm(x, idx, W), reference.threshold_encode(x, W, None, 1.0)
    for name in ("spmm", "sddmm", "threshold_encode"):
        monkeypatch.setattr(reference, name, None)
    assert torch.equal(ops.spmm(acts, idx, W), expected[0])
    assert torch.equal(ops.sddmm(x, idx, W), expected[1])
    assert all(map(torch.equal, ops.threshold_encode(x, W, None, 1.0), expected[2]))


def assert_same_csr(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("each", [False, True], ids=["one threshold", "one a latent"])
@pytest.mark.parametrize(("dtype", "kernel"), FORMS)
def test_threshold_encode_is_the_reference(dtype: torch.dtype, kernel: str, each: bool, threads: int) -> None:
    for rows, latents in ((1, 5), (70, 3001), (600, 333)):
        x, W, b = integers(rows, 23).to(dtype), integers(latents, 23).to(dtype), integers(latents)
        threshold = integers(latents, low=-9, high=30) if each else 20.0
        expected = reference.threshold_encode(x, W, b, threshold)
        for scratch in (1 << 30, 1):
            found = native.threshold_encode(x, W, b, threshold, max_scratch_bytes=scratch, kernel=kernel)
            assert_same_csr(found, expected)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.tuples(st.integers(0, 70), st.integers(0, 20), st.integers(1, 400)),
    threshold=st.sampled_from([-math.inf, -5.0, 0.0, 3.0, math.inf, math.nan]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_threshold_encode_at_any_shape(
    shape: tuple[int, int, int], threshold: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    rows, width, latents = shape
    x, W, b = integers(rows, width).to(dtype), integers(latents, width).to(dtype), integers(latents)
    b[::13] = math.nan
    b[1::17] = -math.inf
    assert_same_csr(native.threshold_encode(x, W, b, threshold), reference.threshold_encode(x, W, b, threshold))
