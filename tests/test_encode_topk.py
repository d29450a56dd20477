"""encode_topk on the CPU: bit-equal to a stable sort on integer-valued data, on every instruction set this machine has.

Integer values make every sum exact in any order, so float64, the reference and the tiles must agree to the bit.
Scratch is poisoned with NaN (conftest.py), which ranks first: a result that is never written shows.
"""

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_close_to_reference
from hanging import HANG
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saefast import extension, ops
from saefast.errors import InputError
from saefast.ops import native, reference

pytestmark = pytest.mark.skipif(not extension.available(), reason="the C++ extension was not built")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = [
    pytest.param(dtype, name, id=f"{dtype}-{name}".removeprefix("torch."))
    for dtype in DTYPES
    if extension.available()
    for name in native.tile_kernels(dtype)
]
B, D, L, K = 37, 23, 1501, 19
Case = tuple[Tensor, Tensor, Tensor]


def integers(*shape: int, low: int = -3, high: int = 4) -> Tensor:
    return torch.randint(low, high, shape).float()


def stable_sort(x: Tensor, W: Tensor, b: Tensor | None, k: int, relu: bool = True) -> reference.Code:
    """The definition: values descend, ties go to the lower index, NaN first; float64 is exact on integers."""
    pre = x.double() @ W.double().T + (0 if b is None else b.double())
    values, idx = torch.sort(pre, dim=1, descending=True, stable=True)
    values = values[:, :k].float()
    return (values.relu() if relu else values), idx[:, :k].int()


def assert_same(found: reference.Code, expected: reference.Code) -> None:
    """To the bit, but for the payloads of NaNs."""
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[1], expected[1])


def random_ints() -> Case:
    return integers(B, D), integers(L, D, low=-2, high=3), integers(L)


def no_weights(b: Tensor) -> Case:
    """Pre-activations are b, in every row."""
    return torch.ones(B, D), torch.zeros(L, D), b


def clustered() -> Case:
    """All winners in two blocks of neighbours, the better one last."""
    x, W, b = random_ints()
    b -= 50
    b[40:56], b[L - 30 : L - 14] = 50.0, 60.0
    return x, W, b


def rising_blocks() -> Case:
    """Each block of latents beats the one before, so that the bound is always too low."""
    return no_weights((torch.arange(L) // 200 * 7 + torch.arange(L) % 5).float())


def infinities() -> Case:
    x, W, b = random_ints()
    b[[5, 250, L - 1]], b[300:600] = math.inf, -math.inf
    return x, W, b


def mostly_minus_infinity() -> Case:
    """Fewer than k finite values: -inf is an ordinary value and wins places, lowest index first."""
    b = torch.full((L,), -math.inf)
    b[[3, 400]] = 1.0
    return no_weights(b)


def nan_in_x() -> Case:
    x, W, b = random_ints()
    x[[1, B - 1], 5] = math.nan
    return x, W, b


def nan_in_W() -> Case:
    x, W, b = random_ints()
    W[[7, 30, 31, L - 2], 3] = math.nan
    return x, W, b


def nan_in_b() -> Case:
    x, W, b = random_ints()
    b[::40] = math.nan
    return x, W, b


def infinite_weights() -> Case:
    """inf · 0 is NaN and inf · 1 is not: the zeros that rows are padded with must not take part."""
    x, W, b = random_ints()
    W[[9, L - 1], 2] = math.inf
    return x, W, b


CASES: dict[str, Callable[[], Case]] = {
    "ties": random_ints,
    "all equal": lambda: no_weights(torch.zeros(L)),
    "all negative": lambda: no_weights(-torch.randint(1, 9, (L,)).float()),
    "ascending": lambda: no_weights(torch.arange(L).float()),
    "descending": lambda: no_weights(-torch.arange(L).float()),
    "few positives": lambda: no_weights(torch.where(torch.arange(L) % 97 == 7, 1.0, -1.0)),
    "clustered": clustered,
    "rising blocks": rising_blocks,
    "infinities": infinities,
    "mostly -inf": mostly_minus_infinity,
    "NaN in x": nan_in_x,
    "NaN in W": nan_in_W,
    "NaN in b": nan_in_b,
    "infinite weights": infinite_weights,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dtype", "kernel"), FORMS)
def test_is_the_stable_sort(dtype: torch.dtype, kernel: str, case: str) -> None:
    x, W, b = CASES[case]()
    x, W = x.to(dtype), W.to(dtype)
    assert_same(native.encode_topk(x, W, b, K, kernel=kernel), stable_sort(x, W, b, K))
    assert_same(
        native.encode_topk(x, W, b, K, relu=False, kernel=kernel), reference.encode_topk(x, W, b, K, relu=False)
    )


@pytest.mark.parametrize("case", ["ties", "ascending", "rising blocks", "NaN in b"])
@pytest.mark.parametrize("k", [1, 2, 127, 700, L - 1, L])
def test_any_k(k: int, case: str) -> None:
    x, W, b = CASES[case]()
    found = native.encode_topk(x, W, b, k)
    assert_same(found, stable_sort(x, W, b, k))
    assert (found[1].sort(1).values.diff(dim=1) > 0).all()


@settings(deadline=None, max_examples=150)
@given(
    shape=st.tuples(st.integers(0, 70), st.integers(0, 40), st.integers(1, 900)),
    share=st.floats(0, 1),
    form=st.sampled_from([f.values for f in FORMS] or [(torch.float32, None)]),
    spread=st.integers(0, 6),
    scratch=st.sampled_from([1, 100_000, 1 << 30]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(shape: tuple[int, int, int], share: float, form: Any, spread: int, scratch: int, seed: int) -> None:
    torch.manual_seed(seed)
    (rows, width, latents), (dtype, kernel) = shape, form
    k = max(1, min(latents, round(share * latents)))
    x = integers(rows, width, low=-spread, high=spread + 1).to(dtype)
    W = integers(latents, width, low=-2, high=3).to(dtype)
    found = native.encode_topk(x, W, None, k, relu=False, max_scratch_bytes=scratch, kernel=kernel)
    assert_same(found, stable_sort(x, W, None, k, relu=False))


@pytest.mark.parametrize("n", [1, K, 700])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_the_latents_asked_for_compete(dtype: torch.dtype, n: int) -> None:
    x, W, b = random_ints()
    x, W, latents = x.to(dtype), W.to(dtype), torch.randperm(L)[:n].sort().values
    k = min(n, K)
    acts, local = stable_sort(x, W[latents], b[latents], k)
    assert_same(native.encode_topk(x, W, b, k, latents=latents.int()), (acts, latents[local.long()].int()))


@pytest.mark.parametrize(("dtype", "kernel"), FORMS)
def test_scale_ranks_and_is_not_in_the_values(dtype: torch.dtype, kernel: str) -> None:
    x, W, b = random_ints()
    x, W, scale = x.to(dtype), W.to(dtype), 2.0 ** torch.randint(-3, 4, (L,))
    found = native.encode_topk(x, W, b, K, scale=scale, kernel=kernel)
    assert_same(found, reference.encode_topk(x, W, b, K, scale=scale))
    assert not torch.equal(found[1], native.encode_topk(x, W, b, K)[1])
    some = torch.arange(3, L, 5)
    some_found = native.encode_topk(x, W, b, K, scale=scale, latents=some, kernel=kernel)
    assert_same(some_found, reference.encode_topk(x, W, b, K, scale=scale, latents=some))


@pytest.mark.parametrize("odd_address", [False, True])
@pytest.mark.parametrize(("dtype", "kernel"), FORMS)
def test_odd_widths_and_addresses(dtype: torch.dtype, kernel: str, odd_address: bool) -> None:
    """An odd number of bf16 ends in half a pair: what follows it in memory, here NaN and inf, must not count."""
    for width in (1, 2, 7, 30):
        pool = torch.full((2 * L * width + 9,), math.nan).to(dtype)
        x, W = (pool[at : at + n * width].view(n, width) for at, n in ((odd_address, B), (B * width + 5, L)))
        x.copy_(integers(B, width))
        W.copy_(integers(L, width))
        W[1:5] = math.inf
        assert_same(native.encode_topk(x, W, None, K, kernel=kernel), stable_sort(x, W, None, K))


def test_minus_zero_ties_with_zero() -> None:
    W = torch.tensor([[-0.0], [0.0], [-0.0], [-1.0]])
    acts, idx = native.encode_topk(torch.ones(1, 1), W, torch.full((4,), -0.0), 3)
    assert idx.tolist() == [[0, 1, 2]]
    assert acts.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("rows", [0, 1, 5, 16, 17, 200])
@pytest.mark.parametrize(("dtype", "kernel"), FORMS)
def test_a_row_gives_the_same_bits_in_any_company(dtype: torch.dtype, kernel: str, rows: int) -> None:
    x, W, b = torch.randn(200, 300).to(dtype), torch.randn(900, 300).to(dtype), torch.randn(900)
    whole = native.encode_topk(x, W, b, 7, kernel=kernel)
    part = native.encode_topk(x[:rows], W, b, 7, kernel=kernel)
    assert torch.equal(part[0], whole[0][:rows])
    assert torch.equal(part[1], whole[1][:rows])


@pytest.mark.parametrize("rows", [3, 700])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_scratch_and_runs_do_not_change_a_bit(dtype: torch.dtype, rows: int) -> None:
    x, W, b = torch.randn(rows, 96).to(dtype), torch.randn(5000, 96).to(dtype), torch.randn(5000)
    first = native.encode_topk(x, W, b, K)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            for scratch in (1 << 30, 1 << 21, 1):
                again = native.encode_topk(x, W, b, K, max_scratch_bytes=scratch)
                assert torch.equal(again[0], first[0])
                assert torch.equal(again[1], first[1])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("dtype", "kernel"), FORMS)
def test_real_values_are_as_close_as_torch(dtype: torch.dtype, kernel: str) -> None:
    for width in (64, 777, 3000):
        x, W, b = torch.randn(40, width), torch.randn(2000, width) / width**0.5, torch.randn(2000) / 10
        x, W = x.to(dtype), W.to(dtype)
        acts, idx = native.encode_topk(x, W, b, 64, kernel=kernel)
        assert_close_to_reference(acts, lambda x, W, b: reference.encode_topk(x, W, b, 64)[0], x, W, b)
        # What was chosen has the values that were returned.
        pre = reference.pre_activations(x.double(), W.double(), b).gather(1, idx.long())
        torch.testing.assert_close(acts.double(), pre, rtol=1e-4, atol=1e-4)


def exact_values(x: Tensor, W: Tensor, b: Tensor, idx: Tensor) -> Tensor:
    return reference.pre_activations(x, W, b).gather(1, idx.long()).relu()


def test_mixed_takes_the_choice_from_one_matrix_and_the_values_from_the_other() -> None:
    x, W, b = torch.randn(50, 96), torch.randn(3000, 96), torch.randn(3000)
    low = W.bfloat16()
    assert not torch.equal(W, low.float())
    acts, idx = native.encode_topk_mixed(x, low, W, b, K)
    chosen = native.encode_topk(x.bfloat16(), low, b, K)[1]
    assert torch.equal(idx.sort(1).values, chosen.sort(1).values)
    assert_close_to_reference(acts, exact_values, x, W, b, idx)
    assert (acts.diff(dim=1) <= 0).all()


def test_mixed_with_candidates_to_spare_is_the_fp32_choice() -> None:
    x, W, b = torch.randn(200, 96), torch.randn(3000, 96), torch.randn(3000)
    exact = stable_sort(x, W, b, K)[1]
    assert torch.equal(native.encode_topk_mixed(x, W.bfloat16(), W, b, K, candidates=3 * K)[1], exact)
    assert not torch.equal(native.encode_topk_mixed(x, W.bfloat16(), W, b, K)[1], exact)


@pytest.mark.parametrize("candidates", [None, K + 4, 10 * L])
def test_mixed_on_integers_is_exact_with_every_option(candidates: int | None) -> None:
    x, W, b = random_ints()
    b[7], b[200] = math.nan, -math.inf
    some, scale = torch.arange(1, L, 3), 2.0 ** torch.randint(-3, 4, (L,))
    for options in ({}, {"relu": False}, {"latents": some}, {"scale": scale}):
        found = native.encode_topk_mixed(x, W.bfloat16(), W, b, K, candidates=candidates, **options)  # type: ignore[arg-type]
        assert_same(found, reference.encode_topk(x, W, b, K, **options))  # type: ignore[arg-type]


def test_mixed_refuses_what_would_read_past_memory() -> None:
    x, W, b = random_ints()
    for change in (
        {"candidates": K - 1},
        {"W_enc": W[:-1]},
        {"W_low": W[:-1].bfloat16()},
        {"x": x.bfloat16()},
        {"latents": torch.tensor([0, L])},
        {"b_enc": b[1:]},
    ):
        arguments: dict[str, Any] = {"x": x, "W_low": W.bfloat16(), "W_enc": W, "b_enc": b, "k": K}
        with pytest.raises(InputError):
            native.encode_topk_mixed(**(arguments | change))


def test_ops_reaches_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = random_ints()
    monkeypatch.setattr(reference, "encode_topk", None)
    for dtype in DTYPES:
        found = ops.encode_topk(x.to(dtype), W.to(dtype).T.contiguous().T, b, K, max_scratch_bytes=1 << 20)
        assert_same(found, stable_sort(x, W, b, K))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": L + 1}, f"outside .1, {L}"),
        ({"latents": torch.tensor([0, L])}, rf"latents.1. is {L}"),
        ({"latents": torch.tensor([-1, 3]), "k": 1}, "latents.0. is -1"),
        ({"kernel": "abacus"}, "abacus"),
        ({"b_enc": torch.zeros(3)}, "b_enc"),
        ({"scale": torch.zeros(3)}, "scale"),
        ({"W_enc": torch.zeros(L, D + 1)}, "expected .B, D."),
        ({"W_enc": torch.zeros(L, D).half()}, "float16"),
        ({"W_enc": torch.zeros(D, L).T}, "contiguous"),
        ({"x": torch.zeros(2, D).double()}, "float64"),
    ],
)
def test_what_would_read_past_memory_is_refused(change: dict[str, Any], message: str) -> None:
    x, W, b = random_ints()
    arguments: dict[str, Any] = {"x": x, "W_enc": W, "b_enc": b, "k": 2}
    with pytest.raises(InputError, match=message):
        native.encode_topk(**(arguments | change))


MEMORY = """
import sys, torch
from saefast.ops import native

def now(field):
    line = next(l for l in open("/proc/self/status") if l.startswith(field))
    return int(line.split()[1]) / 1024

dtype, L = getattr(torch, sys.argv[1]), int(sys.argv[4])
x, W = torch.randn(4096, 48).to(dtype), torch.randn(L, 48).to(dtype)
if sys.argv[2] == "ascending":
    x[:, 0], W[:, 0] = 1, torch.arange(L) / 4
native.encode_topk(x[:64], W[:4096], None, 32)
before = now("VmRSS")
native.encode_topk(x, W, None, 32, max_scratch_bytes=int(sys.argv[3]))
print(now("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "kind", "scratch", "L", "most"),
    [
        ("float32", "random", 1 << 30, 262144, 60),
        ("bfloat16", "ascending", 1 << 30, 16384, 60),
        ("float32", "ascending", 4 << 20, 16384, 12),
    ],
)
def test_extra_memory_is_small(dtype: str, kind: str, scratch: int, L: int, most: float) -> None:
    """In MB. The (4096, 262144) matrix would be 4300; the promise is 600."""
    arguments = [sys.executable, "-c", MEMORY, dtype, kind, str(scratch), str(L)]
    out = subprocess.run(arguments, capture_output=True, text=True, timeout=HANG, check=True).stdout
    assert float(out) < most
