"""encode_batch_topk against a sort of the whole (B, L) matrix, bit by bit where sums are exact, on adversarial rows."""

import itertools
from collections.abc import Callable

import fake_cuda
import interp
import pytest
import torch
from torch import Tensor

from saefast import ops
from saefast.errors import InputError
from saefast.ops import reference, triton_encode_topk
from saefast.ops.code import Code
from saefast.ops.encode_batch_topk import ROOM, batch_topk
from saefast.ops.encode_topk import encode_topk

interp.speed_up()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

Problem = tuple[Tensor, Tensor, Tensor, int]


def integers(B: int, D: int, L: int) -> tuple[Tensor, Tensor, Tensor]:
    """Small ones: every sum is exact, in bf16 products too, and many are equal."""
    return tuple(torch.randint(-3, 4, shape).float() for shape in ((B, D), (L, D), (L,)))  # type: ignore[return-value]


def one_row_has_nearly_all(B: int, D: int, L: int) -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = integers(B, D, L)
    x[B // 2] *= 64
    return x, W, b


def all_equal(B: int, D: int, L: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(B, D), torch.zeros(L, D), torch.ones(L)


def all_negative(B: int, D: int, L: int) -> tuple[Tensor, Tensor, Tensor]:
    x, W, _ = integers(B, D, L)
    return x, W, torch.full((L,), -1e4)


def few_positive(B: int, D: int, L: int) -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = all_negative(B, D, L)
    b[L // 2] = 1e4
    return x, W, b


def rows_of_nan(B: int, D: int, L: int) -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = integers(B, D, L)
    x[B // 3, 0], x[-1, 1] = torch.nan, torch.inf
    return x, W, b


def equal_rows(B: int, D: int, L: int) -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = integers(B, D, L)
    return x[:1].expand(B, -1), W, b


KINDS: dict[str, Callable[[int, int, int], tuple[Tensor, Tensor, Tensor]]] = {
    f.__name__.replace("_", " "): f
    for f in (integers, one_row_has_nearly_all, all_equal, all_negative, few_positive, rows_of_nan, equal_rows)
}
SIZES = [(13, 5, 300, 4), (7, 9, 41, 1), (4, 3, 10, 10), (1, 4, 50, 6), (30, 6, 64, 20)]


def by_sorting(x: Tensor, W: Tensor, b: Tensor, k: int, scale: Tensor | None = None) -> Code:
    """The whole matrix, sorted."""
    pre = x.double() @ W.double().T + b
    rank = (pre if scale is None else pre * scale).flatten()
    B, L, n = len(x), len(W), k * len(x)
    best = rank.sort(descending=True, stable=True).indices[:n]
    best = best[~(rank[best] <= 0)]
    row_ptr, idx, acts = [0], [], []
    for row in range(B):
        # From the best on, which is how a row is ordered.
        mine = [place for place in best.tolist() if place // L == row]
        row_ptr.append(row_ptr[-1] + len(mine))
        idx += [place % L for place in mine]
        acts += [float(pre.flatten()[place]) for place in mine]
    padding = [0] * (n - len(idx))
    return Code(torch.tensor(acts + padding), torch.tensor(idx + padding).int(), torch.tensor(row_ptr).int())


def assert_same(ours: Code, expected: Code) -> None:
    assert ours.row_ptr is not None
    assert expected.row_ptr is not None
    assert ours.idx.dtype == ours.row_ptr.dtype == torch.int32
    assert ours.row_ptr.tolist() == expected.row_ptr.tolist()
    assert ours.idx.tolist() == expected.idx.tolist()
    assert torch.equal(ours.acts.double().cpu().nan_to_num(-1.0), expected.acts.double().nan_to_num(-1.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("B", "D", "L", "k"), SIZES)
@pytest.mark.parametrize("how", ["fp32", "fp64", "bf16", "mixed", "scaled", "no bias", "plain"])
def test_it_is_a_sort_of_the_whole_batch(kind: str, B: int, D: int, L: int, k: int, how: str) -> None:
    x, W, b = KINDS[kind](B, D, L)
    scale = 2.0 ** torch.randint(-2, 3, (L,)) if how == "scaled" else None
    b = torch.zeros(L) if how == "no bias" else b
    expected = by_sorting(x, W, b, k, scale)
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(how, torch.float32)
    given = (x.to(dtype), W.to(dtype), None if how == "no bias" else b, k)
    if how == "plain":
        row_ptr, idx, acts = reference.encode_batch_topk(*given, chunk=16)
        return assert_same(Code(acts, idx, row_ptr), expected)
    low = W.bfloat16() if how == "mixed" else None
    found = ops.encode_batch_topk(*given, scale=scale, W_low=low)
    assert found.acts.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.acts.shape == (k * B,)
    return assert_same(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_kernels_of_the_row_wise_encoder(kind: str, device: torch.device) -> None:
    x, W, b = KINDS[kind](9, 16, 200)
    there = [t.contiguous().to(device) for t in (x, W, b)]
    found = batch_topk(
        lambda rows, k: triton_encode_topk.encode_topk(rows, *there[1:], k, relu=False), there[0], 3, 200
    )
    assert_same(Code(*(t.cpu() for t in found[:3])), by_sorting(x, W, b, 3))


def test_floats_and_ties_of_real_data() -> None:
    """As exact as the row-wise encoder: the answer is the sort of its own accumulators."""
    B, D, L, k = 40, 32, 500, 9
    x, W, b = torch.randn(B, D), torch.randn(L, D), torch.randn(L)
    x[3] *= 20
    found = ops.encode_batch_topk(x, W, b, k)
    acts, idx = ops.encode_topk(x, W, b, L, relu=False)
    place = torch.arange(B)[:, None] * L + idx
    dense = torch.empty(B * L).scatter_(0, place.flatten(), acts.flatten())
    best = dense.sort(descending=True, stable=True).indices[: k * B]
    expected = best[(best // L).argsort(stable=True)]
    assert torch.equal(found.tokens() * L + found.idx, expected)
    assert torch.equal(found.acts, dense[expected])


def test_the_same_arguments_give_the_same_bits() -> None:
    x, W, b = torch.randn(20, 16), torch.randn(90, 16), torch.randn(90)
    first = ops.encode_batch_topk(x, W, b, 5)
    ops.encode_batch_topk(-x, W, b, 7)
    again = ops.encode_batch_topk(x, W, b, 5)
    assert all(torch.equal(a, c) for a, c in zip(first[:3], again[:3], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_candidates_never_grow_to_the_size_of_the_matrix(kind: str) -> None:
    B, L, k = 64, 2048, 2
    x, W, b = KINDS[kind](B, 8, L)
    goes: list[tuple[int, int]] = []

    def encode(rows: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
        goes.append((len(rows), wanted))
        return encode_topk(rows, W, b, wanted, relu=False)

    assert_same(batch_topk(encode, x.contiguous(), k, L), by_sorting(x, W, b, k))
    assert goes[0] == (B, ROOM * k)
    assert all(rows * wanted <= 2 * k * B for rows, wanted in goes[1:]), goes
    assert all(b == 2 * a for (_, a), (_, b) in itertools.pairwise(goes))


def test_a_batch_without_rows() -> None:
    found = ops.encode_batch_topk(torch.zeros(0, 4), torch.zeros(9, 4), None, 3)
    assert found.row_ptr.tolist() == [0]
    assert found.acts.shape == found.idx.shape == (0,)


@pytest.mark.skipif(not interp.INTERPRETED, reason="needs Triton's interpreter")
def test_how_often_the_host_waits_for_a_gpu() -> None:
    """Once where rows have room for what falls to them, and once more each time some get more."""
    x, W, b = torch.randn(12, 16), torch.randn(64, 16), torch.zeros(64)
    heavy = x.clone()
    heavy[5] *= 100
    expected = [by_sorting(rows.float(), W, b, 3) for rows in (x, heavy)]
    with fake_cuda.device() as gpu:
        there = [t.to("cuda:0") for t in (x, heavy, W, b)]
        for rows, wanted, most in ((there[0], expected[0], 1), (there[1], expected[1], 4)):
            with gpu.counting() as waits:
                found = ops.encode_batch_topk(rows, *there[2:], 3)
            assert 1 <= sum(waits.values()) <= most, dict(waits)
            assert found.row_ptr.cpu().tolist() == wanted.row_ptr.tolist()
            assert found.idx.cpu().tolist() == wanted.idx.tolist()


@pytest.mark.parametrize("scaled", [False, True])
def test_gradcheck(scaled: bool) -> None:
    x, W, b = (t.double().requires_grad_(True) for t in (torch.randn(5, 4), torch.randn(12, 4), torch.randn(12)))
    scale = torch.rand(12, dtype=torch.float64) + 0.5 if scaled else None
    assert torch.autograd.gradcheck(lambda *given: ops.encode_batch_topk(*given, 2, scale=scale).acts, (x, W, b))


def test_the_derivative_is_that_of_the_dense_form() -> None:
    x, W, b = (t.requires_grad_(True) for t in (torch.randn(15, 8), torch.randn(70, 8), torch.randn(70)))
    code = ops.encode_batch_topk(x, W, b, 3)
    weight = torch.randn(45)
    ours = torch.autograd.grad((code.acts * weight).sum(), (x, W, b))
    dense = (x @ W.T + b)[code.tokens(), code.idx.long()]
    for a, c in zip(ours, torch.autograd.grad((dense * weight).sum(), (x, W, b)), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)


W4 = torch.zeros(9, 4)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((torch.zeros(2, 4), W4, None, 0), {}, "k is 0: expected an int between 1 and n_latents = 9"),
        ((torch.zeros(2, 4), W4, None, 10), {}, "k is 10"),
        ((torch.zeros(2, 5), W4, None, 1), {}, "x has shape"),
        ((torch.zeros(2, 4), W4, torch.zeros(3), 1), {}, "b_enc has shape"),
        ((torch.zeros(2, 4), W4, None, 1), dict(scale=torch.zeros(3)), "scale has shape"),
        (
            (torch.zeros(2, 4), W4, torch.zeros(9), 1),
            dict(W_low=torch.zeros(3, 4)),
            r"W_low is torch.float32 of shape \(3, 4\)",
        ),
        ((torch.zeros(2, 4), W4, None, 1), dict(W_low=W4.bfloat16()), "a b_enc beside them"),
    ],
)
def test_what_cannot_be_served_is_refused(args: Problem, options: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.encode_batch_topk(*args, **options)
