"""encode_topk on Triton kernels: bit-equal to a stable sort on integer-valued data, in every form of the kernel.

Integer values make every sum exact in any order, so a library GEMM, the kernels and float64 must agree to the bit.
Scratch is poisoned with NaN (conftest.py), which ranks first: a value read before it is written shows.
On a CPU the kernels run in Triton's interpreter; with a GPU the same tests run compiled.
"""

import itertools
import math
from functools import partial

import interp
import numpy as np
import pytest
import torch
from allocations import Allocations
from closeness import assert_close_to_reference
from draws import given, settings, st
from tile_forms import FORMS, force, integers, misaligned, sliced

from saefast import ops
from saefast.errors import InputError
from saefast.kernels import encode_tiles, tuning
from saefast.ops import reference, triton_sddmm, triton_spmm, triton_threshold_encode
from saefast.ops import triton_encode_tiles as tiles
from saefast.ops import triton_encode_topk as driver
from saefast.ops.chunks import SORT_BYTES, chunks, cut_csr, cut_sort, cut_topk, sorted_width, steady, topk_bytes

interp.speed_up()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning", "ignore:invalid value")
D, L, K = 24, 600, 12


def stable_sort(x, W, b, k, relu=True):
    """The definition: values descend, ties go to the lower index, NaN first; float64 is exact on integers."""
    pre = x.double() @ W.double().T + (0 if b is None else b.double())
    values, idx = torch.sort(pre, dim=1, descending=True, stable=True)
    values = values[:, :k].float()
    return (values.relu() if relu else values), idx[:, :k].int()


def assert_same(found, expected):
    """To the bit, but for the payloads of NaNs."""
    torch.testing.assert_close(found[0].cpu(), expected[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[1].cpu(), expected[1])


@pytest.fixture
def use_form(monkeypatch, device):
    return partial(force, monkeypatch, device)


def random_ints():
    return integers(3, D), integers(L, D, low=-2, high=3), integers(L, dtype=torch.float32)


def all_equal():
    return torch.ones(3, D).half(), torch.ones(L, D).half(), torch.zeros(L)


def all_negative():
    return torch.ones(2, D).half(), -integers(L, D, low=1, high=4), -torch.ones(L)


def ascending():
    return torch.ones(2, D).half(), torch.zeros(L, D).half(), torch.arange(L).float()


def descending():
    return torch.ones(2, D).half(), torch.zeros(L, D).half(), -torch.arange(L).float()


def clustered():
    """All winners in two blocks of neighbours, in the last chunk and in the first."""
    b = torch.full((L,), -50.0)
    b[40:56], b[L - 30 : L - 14] = 50.0, 60.0
    x, W, _ = random_ints()
    return x, W, b


def few_positives():
    return torch.ones(2, D).half(), torch.zeros(L, D).half(), torch.where(torch.arange(L) % 97 == 7, 1.0, -1.0)


def infinities():
    x, W, b = random_ints()
    b[[5, 250, L - 1]], b[300:] = math.inf, -math.inf
    b[580] = 4.0
    return x, W, b


def mostly_minus_infinity():
    """Fewer than k finite values: -inf are ordinary values and win places, lowest index first."""
    b = torch.full((L,), -math.inf)
    b[[3, 400]] = 1.0
    return torch.ones(2, D).half(), torch.zeros(L, D).half(), b


def nan_in_b():
    x, W, b = random_ints()
    b[[3, 400, L - 1]] = torch.tensor([math.nan, -math.nan, math.nan])
    return x, W, b


def nan_in_W():
    x, W, b = random_ints()
    W[[7, 300, 301], 5] = math.nan
    return x, W, b


def nan_in_x():
    x, W, b = random_ints()
    x[1, 3] = math.nan
    return x, W, b


def infinity_in_x():
    x, W, b = random_ints()
    x[0, 2], x[1, 4] = math.inf, -math.inf
    return x, W, b


CASES = (
    random_ints, all_equal, all_negative, ascending, descending, clustered, few_positives, infinities,
    mostly_minus_infinity, nan_in_b, nan_in_W, nan_in_x, infinity_in_x,
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_is_the_stable_sort(case, form, use_form, device):
    x, W, b = case()
    found = driver.encode_topk(
        x.to(device), W.to(device), b.to(device), K, chunk=128, method=use_form(form), relu=False
    )
    assert_same(found, stable_sort(x, W, b, K, relu=False))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("B", "D", "L", "k"),
    [(0, 8, 64, 4), (1, 8, 300, 1), (2, 7, 131, 131), (5, 37, 331, 40), (17, 1, 33, 5), (3, 64, 1, 1), (2, 65, 40, 33)],
)
def test_shapes_that_divide_nothing(B, D, L, k, form, use_form, device):
    x, W, b = integers(B, D), integers(L, D), integers(L)
    method = use_form(form)
    acts, idx = driver.encode_topk(x.to(device), W.to(device), b.to(device), k, chunk=64, method=method)
    assert acts.dtype == torch.float32
    assert idx.dtype == torch.int32
    assert_same((acts, idx), stable_sort(x, W, b, k))


@pytest.mark.parametrize("method", ["fused", "chunked"])
def test_without_a_bias_and_in_fp32(method, device):
    x, W = integers(3, 20, dtype=torch.float32), integers(200, 20, dtype=torch.float32)
    found = driver.encode_topk(x.to(device), W.to(device), None, 9, chunk=96, method=method)
    assert_same(found, stable_sort(x, W, None, 9))


@pytest.mark.parametrize("form", FORMS)
def test_a_list_of_latents_competes_alone_and_keeps_its_ids(form, use_form, device):
    x, W, b = random_ints()
    latents = torch.randperm(L)[:211].sort().values.to(torch.int32)
    scale = torch.pow(2.0, integers(L, low=-2, high=3, dtype=torch.float32))
    method = use_form(form)
    for scaled in (None, scale):
        expected = reference.encode_topk(x, W, b, K, latents=latents, scale=scaled)
        moved = None if scaled is None else scaled.to(device)
        options = {"latents": latents.to(device), "scale": moved, "chunk": 64, "method": method}
        found = driver.encode_topk(x.to(device), W.to(device), b.to(device), K, **options)
        assert_same(found, expected)


@pytest.mark.parametrize("form", FORMS)
def test_scale_ranks_and_returns_what_it_did_not_scale(form, use_form, device):
    # Odd scales, so that dividing them out again would not give the value back.
    x, W, b = random_ints()
    scale = torch.rand(L) + 0.1
    pre = x.double() @ W.double().T + b
    order = torch.sort(pre.float() * scale, dim=1, descending=True, stable=True).indices[:, :K]
    options = {"scale": scale.to(device), "chunk": 128, "method": use_form(form), "relu": False}
    found = driver.encode_topk(x.to(device), W.to(device), b.to(device), K, **options)
    assert_same(found, (pre.gather(1, order).float(), order.int()))


def test_the_methods_agree_to_the_bit_and_so_do_two_runs(device):
    x, W, b = (t.to(device) for t in random_ints())
    fused, again, chunked = (
        driver.encode_topk(x, W, b, K, chunk=128, method=method) for method in ("fused", "fused", "chunked")
    )
    for other in (again, chunked):
        assert torch.equal(fused[0], other[0])
        assert torch.equal(fused[1], other[1])


@pytest.mark.parametrize("method", ["fused", "chunked"])
@pytest.mark.parametrize("latents", [None, 230])
def test_a_scratch_cap_splits_rows_and_changes_nothing(method, latents, device, monkeypatch):
    x, W, b = integers(21, D), integers(300, D), integers(300)
    chosen = None if latents is None else torch.arange(latents) + 50
    expected = reference.encode_topk(x, W, b, K, latents=chosen)
    seen = []
    watched = spy(driver._topk_rows, lambda args: seen.append(len(args[1])))
    monkeypatch.setattr(driver, "_topk_rows", watched)
    chosen = None if chosen is None else chosen.to(device)
    found = driver.encode_topk(
        x.to(device), W.to(device), b.to(device), K, latents=chosen, method=method, max_scratch_bytes=40_000, chunk=256
    )
    assert_same(found, expected)
    assert len(seen) > 1
    assert sum(seen) == 21


def spy(function, look):
    def watched(*args, **kwargs):
        look(args)
        return function(*args, **kwargs)

    return watched


def test_scratch_stays_under_its_cap_or_the_cap_is_refused(device, monkeypatch):
    x, W, b = (t.to(device) for t in (integers(9, D), integers(L, D), integers(L)))
    taken = []
    empty = torch.Tensor.new_empty

    def counted(self, *args, **kwargs):
        tensor = empty(self, *args, **kwargs)
        taken.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", counted)
    driver.encode_topk(x[:4], W, b, K, max_scratch_bytes=40_000)
    assert 0 < sum(taken) <= 40_000 + 2 * 4 * K * 4  # one part of rows, and the result
    with pytest.raises(InputError, match="max_scratch_bytes is 700: expected at least"):
        driver.encode_topk(x, W, b, K, max_scratch_bytes=700)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("D", [24, 25])
@pytest.mark.parametrize("odd", ["x sliced", "W sliced", "x moved", "W moved", "both moved"])
def test_odd_strides_and_offsets(odd, D, form, use_form, device):
    x, W, b = integers(3, D).to(device), integers(L, D).to(device), integers(L).to(device)
    x = sliced(x) if odd == "x sliced" else misaligned(x) if odd in ("x moved", "both moved") else x
    W = misaligned(W) if odd in ("W moved", "both moved") else W
    if odd == "W sliced":
        W, b = sliced(W), b[:1]
    assert x.is_contiguous()
    assert W.is_contiguous()
    k = min(K, len(W))
    found = driver.encode_topk(x, W, b, k, chunk=128, method=use_form(form))
    assert_same(found, stable_sort(x.cpu(), W.cpu(), b.cpu(), k))


TARGETS = [(8192, 768, 32768, 32), (8192, 4096, 131_072, 64), (8192, 4096, 1 << 20, 64), (8192, 768, 1 << 24, 32)]


@pytest.mark.parametrize(("B", "D", "columns", "k"), TARGETS)
def test_scratch_is_what_the_chunks_take(B, D, columns, k, monkeypatch):
    """Real allocations at the design's sizes, on tensors without memory and with launches left out."""
    x = torch.empty(B, D, dtype=torch.float16, device="meta")
    W = torch.empty(columns, D, dtype=torch.float16, device="meta")
    monkeypatch.setattr(driver, "run_tiles", lambda *_, **__: None)
    monkeypatch.setattr(driver.merge_topk, "merge_topk", {(B,): lambda *_, **__: None})
    with Allocations(x, W) as watch:
        acts, idx = driver.encode_topk(x, W, None, k, relu=False)
    first, group = max(4096, 64 * k), 32 if columns <= 1 << 18 else 64
    width = max(32, 1 << (k - 1).bit_length())
    per_row = 8 * (width + tuning.merge(width, group).visit * group) + 4
    # Chunks are first · 1, 2, 4, … wide while first · (1 + 2 + 4 + …) columns are there and the widest fits the cap.
    doubled = first * 2 ** int(math.log2(columns / first + 1) - 1)
    affordable = int(((1 << 30) / B - per_row) / (4 + 8 / group)) // 256 * 256
    widest = min(doubled, affordable)
    scratch = B * (4 * widest + 8 * widest // group + per_row)
    assert watch.peak == scratch + acts.nbytes + idx.nbytes
    assert scratch == topk_bytes(cut_topk(B, columns, k, 1 << 30), columns, k) <= 1 << 30
    if columns == 32768:
        assert (widest, scratch) == (16384, 580_943_872)


@given(
    B=st.integers(1, 100_000), columns=st.integers(1, 1 << 21), k=st.integers(1, 2048), D=st.integers(1, 8192),
    budget=st.integers(1 << 16, 1 << 33), product=st.sampled_from([0, 1024, 4096]), listed=st.booleans(),
    block=st.sampled_from([16, 64, 128]), counted=st.booleans(),
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_cuts_fit_their_budget(B, columns, k, D, budget, product, listed, block, counted):
    group, copied = tuning.group(columns), 2 * D * listed
    try:
        if counted:
            cut, copied = cut_csr(B, columns, budget, block=block, first=None, product=product), 0
        else:
            cut = cut_topk(B, columns, k, budget, block=block, product=product, copied=copied)
    except InputError:
        return
    width = sorted_width(k)
    if counted:
        bytes_taken = cut.rows * (4 * cut.widest + 12 * cut.widest // group + 8)
    else:
        per_row = 4 * cut.widest + 8 * cut.widest // group + 4 + 8 * (width + tuning.merge(width, group).visit * group)
        bytes_taken = cut.rows * per_row
        assert bytes_taken == topk_bytes(cut, columns, k)
    assert bytes_taken + cut.product * copied <= budget
    assert 1 <= cut.rows <= B
    assert group <= cut.first <= cut.widest
    assert cut.first % group == cut.widest % group == cut.product % group == 0
    assert (cut.product > 0) == (product > 0)
    found = list(chunks(columns, cut))
    assert found[0][0] == 0
    assert all(start + n == following for (start, n), (following, _) in itertools.pairwise(found))
    assert sum(n for _, n in found) == columns
    assert max(n for _, n in found) <= cut.widest < max(n for _, n in found) + group, "memory for what never comes"
    assert steady(columns, cut)[1] == max(n for _, n in found)
    if budget >= 8 * B * (max(4096, 64 * k) + width) and not counted:
        assert cut.rows == B
        assert cut.first == min(max(4096, 64 * k), -(-columns // group) * group)
    widths = [n for _, n in found[:-1]]
    assert all(
        wide == (narrow if counted else min(2 * narrow, cut.widest)) for narrow, wide in itertools.pairwise(widths)
    )


@pytest.mark.parametrize("case", [random_ints, nan_in_b, clustered], ids=lambda case: case.__name__)
@pytest.mark.parametrize("product", [32, 64, 96])
def test_a_chunk_of_several_products(case, product, device, monkeypatch):
    """Each product is filtered by itself, and the chunk is merged once."""
    x, W, b = case()
    monkeypatch.setattr(tiles, "_library_columns", lambda _: product)
    merges, merge = [], driver.merge
    monkeypatch.setattr(driver, "merge", spy(merge, lambda args: merges.append(args[3:5])))
    arguments = [t.to(device) for t in (x, W, b)]
    found = driver.encode_topk(*arguments, K, chunk=128, method="chunked", relu=False)
    assert_same(found, stable_sort(x, W, b, K, relu=False))
    assert merges == [(0, 128), (128, 256), (384, L - 384)]
    latents = torch.arange(0, L, 2).to(torch.int32)
    listed = driver.encode_topk(*arguments, K, chunk=128, method="chunked", latents=latents.to(device))
    assert_same(listed, reference.encode_topk(x, W, b, K, latents=latents))
    row_ptr, idx, acts = triton_threshold_encode.threshold_encode(*arguments, 3.0, method="chunked")
    for got, want in zip((row_ptr, idx, acts), reference.threshold_encode(x, W, b, 3.0), strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("columns", [L, 130, 90])
def test_autotuning_times_chunks_as_most_are(columns, device, monkeypatch):
    """Where there are several chunks, with the thresholds known; and what it tries changes no result."""
    x, W, b = (t[:columns] if len(t) == L else t for t in random_ints())
    timed, known, launches = [], [], tuning.merge_candidates(tuning.merge(32, 32), 32)[:3]

    def autotune(key, candidates, run):
        timed.append(key[0])
        for config in [next(iter(candidates))] if key[0] == "encode_tiles" else launches:
            run(config)
        return config

    def watched(function):
        def run_tiles(*args, timed=False, **options):
            if timed:
                known.append((args[2], args[3], not args[4].isnan().any()))
            return function(*args, timed=timed, **options)

        return run_tiles

    monkeypatch.setattr(driver, "autotunes", lambda _: True)
    monkeypatch.setattr(tuning, "autotune", autotune)
    monkeypatch.setattr(driver, "run_tiles", watched(driver.run_tiles))
    arguments = [t.to(device) for t in (x, W, b)]
    found = driver.encode_topk(*arguments, K, chunk=64, method="fused", relu=False)
    assert_same(found, stable_sort(x, W, b, K, relu=False))
    assert timed == ["encode_tiles", "merge_topk"]
    assert known == {L: [(192, 256, True)], 130: [(64, 66, True)], 90: [(0, 64, False)]}[columns]


def test_what_autotuning_found_is_used_from_then_on(device, monkeypatch):
    x, W, b = (t.to(device) for t in random_ints())
    enc = tiles.make_encoder(x, W, b, None, None, "fused", "ieee")
    key = ("encode_tiles", enc.arch, enc.kind, False, enc.described, True)
    picked = tuning.tiles(enc.arch, enc.kind, D)._replace(block_l=64)
    monkeypatch.setitem(tuning._chosen, key, picked)
    seen, launch = [], tiles._launch_tiles
    monkeypatch.setattr(tiles, "_launch_tiles", spy(launch, lambda args: seen.append(args[-1])))
    assert_same(driver.encode_topk(x, W, b, K), stable_sort(x.cpu(), W.cpu(), b.cpu(), K))
    assert set(seen) == {picked}


@pytest.mark.parametrize("k", [9, 100, L])
def test_a_k_too_large_for_the_merge_takes_the_library(k, device, monkeypatch):
    monkeypatch.setattr(tuning, "MERGE_MAX_K", 8)
    x, W, b = nan_in_b()
    scale = torch.pow(2.0, integers(L, low=-2, high=3, dtype=torch.float32))
    expected = reference.encode_topk(x, W, b, k, scale=scale)
    budget = SORT_BYTES * (k + L) * 2  # two rows at a time
    arguments = [t.to(device) for t in (x, W, b)]
    assert_same(driver.encode_topk(*arguments, k, scale=scale.to(device), max_scratch_bytes=budget), expected)
    with pytest.raises(InputError, match=f"to sort k = {k} for one row"):
        driver.encode_topk(*arguments, k, max_scratch_bytes=1000)


@pytest.mark.parametrize("case", [random_ints, all_equal, clustered, nan_in_W, infinities], ids=lambda c: c.__name__)
@pytest.mark.parametrize("k", [1, 40, 599])
def test_chunks_of_a_k_too_large_for_the_merge(case, k, device, monkeypatch):
    monkeypatch.setattr(tuning, "MERGE_MAX_K", 0)
    monkeypatch.setattr(driver, "cut_sort", lambda *_: (2, 130))
    x, W, b = case()
    found = driver.encode_topk(x.to(device), W.to(device), b.to(device), k, relu=False)
    assert_same(found, stable_sort(x, W, b, k, relu=False))
    latents = torch.arange(0, L, 3).to(torch.int32)
    listed = driver.encode_topk(x.to(device), W.to(device), b.to(device), min(k, 200), latents=latents.to(device))
    assert_same(listed, reference.encode_topk(x, W, b, min(k, 200), latents=latents))


@pytest.mark.parametrize(("B", "columns", "k"), [(8192, 100_000, 2304), (8192, 5000, 4608), (3, 1 << 24, 4096)])
@pytest.mark.parametrize("scaled", [True, False])
def test_scratch_of_a_large_k_is_bounded(B, columns, k, scaled, monkeypatch):
    """One selection where all columns fit beside 256 rows, and never more memory than allowed."""
    x, W = (torch.empty(n, 64, dtype=torch.float16, device="meta") for n in (B, columns))
    scale = torch.empty(columns, device="meta") if scaled else None
    monkeypatch.setattr(tiles, "library_product", lambda *_: None)
    with Allocations(x, W, *([scale] if scaled else [])) as watch:
        acts, idx = driver.encode_topk(x, W, None, k, scale=scale, relu=False)
    assert watch.peak - acts.nbytes - idx.nbytes <= 1 << 30
    rows, width = cut_sort(B, columns, k, 1 << 30)
    assert rows * (k + width) * SORT_BYTES <= 1 << 30
    assert rows >= min(B, 256)
    assert -(-columns // width) == {100_000: 2, 5000: 1, 1 << 24: 4}[columns]


@pytest.mark.parametrize("k", [32, 3000])
@pytest.mark.parametrize("method", ["fused", "chunked"])
def test_nothing_is_read_back(method, k, monkeypatch):
    """On tensors without memory, of which no number can be read: a step's encoder does not wait for its device."""
    x, W, scale = (torch.empty(s, dtype=d, device="meta") for s, d in (
        ((512, 64), torch.float16), ((20_000, 64), torch.float16), ((20_000,), torch.float32),
    ))  # fmt: skip
    latents = torch.empty(9000, dtype=torch.int64, device="meta")
    kernels = {"merge_topk": (driver.merge_topk, "merge_topk")}
    kernels |= {name: (encode_tiles, name) for name in ("tiles_pointer", "tiles_descriptor", "tiles_library")}
    launched = set()
    for name, (module, attribute) in kernels.items():
        monkeypatch.setattr(module, attribute, AnyGrid(lambda *_, name=name, **__: launched.add(name)))
    for listed in (None, latents):
        acts, idx = driver.encode_topk(x, W, scale, k, scale=scale, latents=listed, method=method)
        assert acts.is_meta
        assert acts.shape == idx.shape == (512, k)
    expected = {"fused": {"tiles_pointer", "merge_topk"}, "chunked": {"tiles_library", "merge_topk"}}[method]
    assert launched == (expected if k == 32 else set())


class AnyGrid:
    def __init__(self, launch):
        self.launch = launch

    def __getitem__(self, grid):
        return self.launch


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["fused", "chunked"])
def test_real_values_are_as_close_as_torch_gets(dtype, method, device):
    x, W, b = (t.to(device) for t in (torch.randn(4, 100).to(dtype), torch.randn(300, 100).to(dtype), torch.randn(300)))
    acts, idx = driver.encode_topk(x, W, b, 10, method=method, chunk=128, relu=False)

    def at_found(x, W, b):
        """Values at the indices found, summed in fp32 term after term as the kernel does without tensor cores."""
        if x.dtype not in (torch.float32, torch.float64):
            return reference.pre_activations(x, W, b).gather(1, idx.long())
        pre = x.new_zeros(len(x), len(W))
        for d in range(x.shape[1]):
            pre += x[:, d, None] * W[:, d]
        return (pre + b).gather(1, idx.long())

    assert_close_to_reference(acts, at_found, x, W, b, per_row=True)
    pre = reference.pre_activations(x, W, b)
    assert torch.equal(idx.sort(1).values, pre.topk(10).indices.sort(1).values.int())
    assert (acts[:, 1:] <= acts[:, :-1]).all()


KINDS = ("ties", "wide", "ascending", "constant", "sparse")


@given(
    B=st.integers(0, 3), D=st.integers(1, 40), L=st.integers(1, 200), share=st.floats(0, 1), chunk=st.integers(1, 200),
    kind=st.sampled_from(KINDS), method=st.sampled_from(["fused", "chunked"]), seed=st.integers(0, 2**31),
    bad=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=20, deadline=None)
def test_any_shape_and_data(B, D, L, share, chunk, kind, method, seed, bad):
    torch.manual_seed(seed)
    k = max(1, round(share * L))
    high = {"ties": 2, "wide": 30}.get(kind, 1)
    x, W = integers(B, D, low=-high, high=high + 1), integers(L, D, low=-high, high=high + 1)
    b = torch.arange(L).float() * 100 if kind == "ascending" else torch.zeros(L)
    if kind == "sparse":
        b = torch.where(torch.rand(L) < 0.05, 50.0, -50.0)
    for value in (math.inf, -math.inf, math.nan)[:bad]:
        b[torch.randint(L, (1,))] = value
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = driver.encode_topk(x.to(device), W.to(device), b.to(device), k, chunk=chunk, method=method)
    assert_same(found, stable_sort(x, W, b, k))


def test_the_first_chunk_is_bounded_by_its_group_maxima(device, monkeypatch):
    """Of a first chunk with more groups than k, only groups that can hold a winner are visited."""
    x, W, b = integers(4, D, low=-9, high=10), integers(2048, D, low=-9, high=10), torch.zeros(2048)
    seen = {}
    merge = driver.merge_topk.merge_topk

    class Spy:
        def __getitem__(self, grid):
            def launch(groups, scratch, scale, passed, *rest, **options):
                merge[grid](groups, scratch, scale, passed, *rest, **options)
                seen["passed"], seen["bound"] = passed.cpu().view(4, -1), options["BOUND"]

            return launch

    monkeypatch.setattr(driver.merge_topk, "merge_topk", Spy())
    driver.encode_topk(x.to(device), W.to(device), b.to(device), 8, chunk=2048, method="fused")
    assert seen["bound"] == 64
    best = (x.float() @ W.float().T).view(4, 64, 32).amax(2)
    expected = (best >= best.topk(8).values[:, -1:]).sum(1)
    # Slots past the count keep the poison.
    assert torch.equal((seen["passed"] >= 0).sum(1), expected)


def test_rows_beyond_int32_offsets(device):
    """Rows whose elements lie past 2**31: the matrix is never touched but for them."""
    rows, width = 2**17 + 64, 2**14
    W = torch.from_numpy(np.zeros((rows, width), np.float16)).to(device)  # 4.3 GB of untouched pages
    W[-40:, ::1000] = integers(40, 17)
    x, latents = integers(2, width), torch.arange(rows - 60, rows)
    acts, idx = driver.encode_topk(x.to(device), W, None, 5, latents=latents.to(device), method="fused")
    expected = reference.encode_topk(x, W[-60:].cpu(), None, 5)
    assert_same((acts, idx), (expected[0], expected[1] + rows - 60))
    codes = (idx.long() - (rows - 60)).int()
    small = W[-60:].contiguous()
    assert torch.equal(triton_spmm.spmm(acts, idx, W), triton_spmm.spmm(acts, codes, small))
    assert torch.equal(triton_sddmm.sddmm(x.to(device), idx, W), triton_sddmm.sddmm(x.to(device), codes, small))


def test_tensors_that_no_kernel_serves_are_refused():
    x, W = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(4, 3, dtype=torch.float64)
    with pytest.raises(InputError, match=r"float64: expected float32, float16 or bfloat16"):
        driver.encode_topk(x, W, None, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_gpu_every_case_in_bf16(form, use_form):
    method = use_form(form)
    for case in CASES:
        x, W, b = case()
        found = driver.encode_topk(
            x.bfloat16().cuda(), W.bfloat16().cuda(), b.cuda(), K, chunk=128, method=method, relu=False
        )
        assert_same(found, stable_sort(x, W, b, K, relu=False))


LARGE = [
    *((torch.bfloat16, *size) for size in ((768, 32768, 32), (1000, 20011, 65), (4096, 8192, 64), (768, 300_000, 256))),
    (torch.float16, 768, 20011, 32),
    (torch.float32, 768, 20011, 32),
]


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "D", "L", "k"), LARGE)
def test_gpu_large_integers_repeat_bit_for_bit(dtype, form, D, L, k, use_form):
    # Values and sums below 2**8 and 2**24: exact in bf16 operands and fp32 sums.
    x = torch.randint(-3, 4, (777, D), device="cuda").to(dtype)
    W = torch.randint(-3, 4, (L, D), device="cuda").to(dtype)
    b = torch.randint(-3, 4, (L,), device="cuda").float()
    method = use_form(form)
    first = driver.encode_topk(x, W, b, k, method=method)
    # A race shows as a difference between runs sooner or later.
    for _ in range(10):
        again = driver.encode_topk(x, W, b, k, method=method)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
    pre = (x.float() @ W.float().T + b) if dtype != torch.float32 else (x.double() @ W.double().T + b)
    values, idx = torch.sort(pre, dim=1, descending=True, stable=True)
    assert torch.equal(first[0], values[:, :k].float().relu())
    assert torch.equal(first[1], idx[:, :k].int())


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["auto", "fused"])
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_gpu_precision_of_fp32_products(precision, method, monkeypatch):
    x, W = torch.randn(512, 1024, device="cuda"), torch.randn(4096, 1024, device="cuda")
    acts, idx = driver.encode_topk(x, W, None, 32, method=method, precision=precision, relu=False)
    exact = (x.double() @ W.double().T).gather(1, idx.long())
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
    library = (x @ W.T).gather(1, idx.long())
    error, allowed = (acts - exact).abs().max(), 2 * (library - exact).abs().max()
    if (precision, method) == ("tf32", "fused"):
        # The kernel cuts off what the library rounds: up to 2**-10 of each factor.
        allowed = 2 * 2**-10 * (x.double().abs() @ W.double().abs().T).gather(1, idx.long()).max()
    assert error <= allowed
    assert (error < 1e-3) == (precision == "ieee")


@pytest.mark.gpu
def test_gpu_products_in_tf32_leave_the_setting_as_it_was():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    driver.encode_topk(
        torch.randn(8, 64, device="cuda"), torch.randn(300, 64, device="cuda"), None, 4, precision="tf32"
    )
    assert matmul.fp32_precision == before


@pytest.mark.gpu
def test_gpu_a_graph_of_the_encoder_replays():
    x, W, b = (t.cuda() for t in (integers(256, 64), integers(5000, 64), integers(5000)))
    expected = driver.encode_topk(x, W, b, 16, method="fused")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        acts, idx = driver.encode_topk(x, W, b, 16, method="fused")
    graph.replay()
    assert torch.equal(acts, expected[0])
    assert torch.equal(idx, expected[1])


def test_ops_gives_what_the_kernels_give(device):
    x, W, b = (t.to(device) for t in random_ints())
    expected = driver.encode_topk(x, W, b, K)
    found = ops.encode_topk(x, W, b, K)
    assert_same(found, (expected[0].cpu(), expected[1].cpu()))
