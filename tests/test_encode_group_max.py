"""encode_group_max against a sort of every group of the whole (B, L) matrix, on adversarial rows."""

import sys
from collections.abc import Callable
from typing import Any

import interp
import pytest
import torch
from closeness import assert_close_to_reference
from torch import Tensor

from saefast import extension, ops
from saefast.errors import InputError
from saefast.ops import native, reference, triton_encode_group_max
from saefast.ops.encode_group_max import CANDIDATES, WIDE
from saefast.ops.encoder import Encoder

interp.speed_up()

Problem = tuple[Tensor, Tensor, Tensor]


def integers(B: int, D: int, L: int) -> Problem:
    """Small ones: every sum is exact, in bf16 products too, and many are equal."""
    return tuple(torch.randint(-3, 4, shape).float() for shape in ((B, D), (L, D), (L,)))  # type: ignore[return-value]


def all_equal(B: int, D: int, L: int) -> Problem:
    return torch.zeros(B, D), torch.zeros(L, D), torch.ones(L)


def all_negative(B: int, D: int, L: int) -> Problem:
    x, W, b = integers(B, D, L)
    return x, W, b - 1000


def ascending(B: int, D: int, L: int) -> Problem:
    """Every latent beats all before it."""
    x, W, _ = integers(B, D, L)
    return x * 0, W, torch.arange(L).float() / 4


def nan_and_inf(B: int, D: int, L: int) -> Problem:
    x, W, b = integers(B, D, L)
    x[B // 3, 0], x[-1, -1] = torch.nan, torch.inf
    b[L // 2], b[L // 3], b[-1] = torch.nan, torch.nan, torch.inf
    return x, W, b


def signed_zeros(B: int, D: int, L: int) -> Problem:
    x, W, _ = integers(B, D, L)
    return x * 0, W, torch.where(torch.rand(L) < 0.5, -0.0, 0.0)


KINDS: dict[str, Callable[[int, int, int], Problem]] = {
    f.__name__.replace("_", " "): f for f in (integers, all_equal, all_negative, ascending, nan_and_inf, signed_zeros)
}
# Groups of one latent, one group of all, more than a tile, fewer than a tile's latents, and rows beyond a tile's.
SIZES = [(13, 5, 300, 4), (7, 9, 41, 1), (4, 3, 10, 10), (1, 4, 54, 6), (70, 6, 60, 20)]


def by_sorting(x: Tensor, W: Tensor, b: Tensor, k: int, scale: Tensor | None, best: int = 1) -> tuple[Tensor, Tensor]:
    """pre in float64 and idx, (B, k · best), of a stable sort of each group."""
    pre = x.double() @ W.double().T + b
    groups = (pre if scale is None else pre * scale).view(len(x), k, -1)
    first = torch.arange(k)[:, None] * groups.shape[2]
    idx = (groups.sort(dim=2, descending=True, stable=True).indices[:, :, :best] + first).flatten(1)
    return pre.gather(1, idx), idx


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], relu: bool = False) -> None:
    acts, idx = (t.cpu() for t in found)
    assert idx.dtype == torch.int32
    assert idx.tolist() == expected[1].tolist()
    wanted = expected[0].relu() if relu else expected[0]
    assert torch.equal(acts.double().nan_to_num(-7.0), wanted.nan_to_num(-7.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("B", "D", "L", "k"), SIZES)
@pytest.mark.parametrize("how", ["fp32", "fp64", "bf16", "fp16", "mixed", "mixed, scaled", "scaled", "no bias", "relu"])
def test_it_is_a_sort_of_every_group(
    kind: str, B: int, D: int, L: int, k: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, W, b = KINDS[kind](B, D, L)
    scale = 2.0 ** torch.randint(-2, 3, (L,)) if "scaled" in how else None
    b = torch.zeros(L) if how == "no bias" else b
    dtypes = {"fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes.get(how, torch.float32)
    low = W.bfloat16() if "mixed" in how else None
    monkeypatch.setattr(sys.modules["saefast.ops.encode_group_max"], "WIDE", 1)
    given = (x.to(dtype), W.to(dtype), None if how == "no bias" else b, k)
    found = ops.encode_group_max(*given, scale=scale, relu=how == "relu", W_low=low)
    assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found[0].shape == (B, k)
    assert_same(found, by_sorting(x, W, b, k, scale), how == "relu")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("B", "D", "L", "k"), SIZES)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_best_few_of_every_group_on_every_backend(
    kind: str, B: int, D: int, L: int, k: int, scaled: bool, device: torch.device
) -> None:
    x, W, b = KINDS[kind](B, D, L)
    scale = 2.0 ** torch.randint(-2, 3, (L,)) if scaled else None
    for best in {1, min(3, L // k), L // k}:
        expected = by_sorting(x, W, b, k, scale, best)
        for chunk in (7, 4096):
            assert_same(
                reference.encode_group_max(x, W, b, k, best=best, scale=scale, relu=False, chunk=chunk), expected
            )
        if extension.available():
            for kernel in native.tile_kernels(torch.float32):
                options: dict[str, Any] = dict(best=best, scale=scale, relu=False, kernel=kernel)
                assert_same(native.encode_group_max(x, W, b, k, **options), expected)
                assert_same(native.encode_group_max(x, W, b, k, **options, max_scratch_bytes=1), expected)
        there = [None if t is None else t.to(device) for t in (x, W, b, scale)]
        for columns in (7, 64, None):
            on_gpu = triton_encode_group_max.encode_group_max(*there[:3], k, best=best, scale=there[3], columns=columns)
            assert_same(on_gpu, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_as_close_as_torchs(dtype: torch.dtype) -> None:
    x, W, b = torch.randn(40, 96), torch.randn(480, 96), torch.randn(480)
    x, W = x.to(dtype), W.to(dtype)
    acts, idx = ops.encode_group_max(x, W, b, 8, relu=False)

    def there(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return (x @ W.T + b.to(x.dtype)).gather(1, idx.long())

    assert_close_to_reference(acts, there, x, W, b)
    exact = (x.double() @ W.double().T + b).view(40, 8, 60)
    largest = exact.amax(2)
    # Chosen is the largest but for the rounding of sums of 97 products.
    assert (largest - exact.view(40, -1).gather(1, idx.long())).abs().max() <= 97 * 2**-24 * 2 * exact.abs().max()


def test_two_precisions_decide_in_fp32() -> None:
    """Of latents that bf16 cannot tell apart, fp32 takes the best."""
    B, D, L, k = 30, 64, 1024, 2
    x, W, b = torch.randn(B, D), torch.randn(L, D), torch.zeros(L)
    assert L // k >= WIDE
    # Pairs that differ by less than bf16 holds.
    W[::2] = W[::2].bfloat16()
    W[1::2] = W[::2] * (1 + 2.0**-12)
    low = W.bfloat16()
    assert torch.equal(low[1::2], low[::2])
    acts, idx = ops.encode_group_max(x, W, b, k, W_low=low)
    expected = ops.encode_group_max(x, W, b, k)
    assert (expected[1] % 2 == 1).all(), "the first of a pair is what ties alone would choose"
    assert torch.equal(idx, expected[1])
    torch.testing.assert_close(acts, expected[0])


@pytest.mark.parametrize(("k", "used"), [(8, True), (16, False)])
def test_two_precisions_are_for_wide_groups(k: int, used: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of narrow ones the candidates would cost more than products in bf16 save."""
    calls: list[int] = []
    module = sys.modules["saefast.ops.encode_group_max"]
    real = module.sddmm
    monkeypatch.setattr(module, "sddmm", lambda x, idx, W: calls.append(idx.shape[1]) or real(x, idx, W))
    x, W, b = integers(6, 5, 2048)
    found = ops.encode_group_max(x, W, b, k, W_low=W.bfloat16(), relu=False)
    assert calls == ([k * CANDIDATES] if used else [])
    assert_same(found, by_sorting(x, W, b, k, None))


def test_the_same_arguments_give_the_same_bits_whatever_lies_beside() -> None:
    x, W, b = torch.randn(70, 48), torch.randn(96, 48), torch.randn(96)
    together = ops.encode_group_max(x, W, b, 6)
    again = ops.encode_group_max(x, W, b, 6)
    assert all(torch.equal(a, c) for a, c in zip(together, again, strict=True))
    if extension.available():
        alone = torch.cat([ops.encode_group_max(x[i : i + 1], W, b, 6)[0] for i in range(70)])
        assert torch.equal(alone, together[0])


def test_a_batch_without_rows() -> None:
    for low in (None, torch.zeros(9, 4).bfloat16()):
        acts, idx = ops.encode_group_max(torch.zeros(0, 4), torch.zeros(9, 4), torch.zeros(9), 3, W_low=low)
        assert acts.shape == idx.shape == (0, 3)


def test_no_backend_holds_the_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver of GPUs multiplies by chunks, of whole groups and of parts of one."""
    widths: list[int] = []
    real = triton_encode_group_max.ranked_products

    def watched(enc: Any, x: Tensor, start: int, n: int) -> tuple[Tensor, Tensor]:
        widths.append(n)
        return real(enc, x, start, n)

    monkeypatch.setattr(triton_encode_group_max, "ranked_products", watched)
    x, W, b = integers(5, 4, 96)
    for k, columns, expected in ((8, 30, [24, 24, 24, 24]), (2, 20, [20, 20, 8] * 2), (96, 96, [96])):
        widths.clear()
        triton_encode_group_max.encode_group_max(x, W, b, k, columns=columns)
        assert widths == expected


def test_an_encoder_hands_on_what_it_has() -> None:
    x, W, b = integers(9, 5, 40)
    scale = torch.rand(40) + 0.5
    for shadow in (None, W.bfloat16()):
        code = Encoder(x, W, b, scale, shadow).group_max(4)
        assert_same((code.acts, code.idx), by_sorting(x, W, b, 4, scale), relu=True)
        assert code.row_ptr is None


@pytest.mark.parametrize("how", ["plain", "scaled", "no relu"])
def test_gradcheck(how: str) -> None:
    x, W, b = (t.double().requires_grad_(True) for t in (torch.randn(5, 4), torch.randn(12, 4), torch.randn(12) - 1.5))
    scale = torch.rand(12, dtype=torch.float64) + 0.5 if how == "scaled" else None

    def acts(*given: Tensor) -> Tensor:
        return ops.encode_group_max(*given, 3, scale=scale, relu=how != "no relu")[0]

    pre = ops.encode_group_max(x, W, b, 3, scale=scale, relu=False)[0]
    assert (pre < 0).any()
    assert (pre > 0).any()
    assert torch.autograd.gradcheck(acts, (x, W, b))


def test_the_derivative_is_that_of_the_dense_form() -> None:
    x, W, b = (t.requires_grad_(True) for t in (torch.randn(15, 8), torch.randn(70, 8), torch.randn(70) - 2))
    weight = torch.randn(15, 7)
    ours = torch.autograd.grad((ops.encode_group_max(x, W, b, 7)[0] * weight).sum(), (x, W, b))
    dense = (x @ W.T + b).view(15, 7, 10).amax(2).relu()
    assert (dense == 0).any()
    for a, c in zip(ours, torch.autograd.grad((dense * weight).sum(), (x, W, b)), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-5)


W4 = torch.zeros(9, 4)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((torch.zeros(2, 4), W4, None, 0), {}, "k is 0: expected an int between 1 and n_latents = 9"),
        ((torch.zeros(2, 4), W4, None, 10), {}, "k is 10"),
        (
            (torch.zeros(2, 4), W4, None, 4),
            {},
            "n_latents is 9 and k 4: latents are not k equal groups; take n_latents = 8 or 12, or another k",
        ),
        ((torch.zeros(2, 5), W4, None, 3), {}, "x has shape"),
        ((torch.zeros(2, 4), W4, torch.zeros(3), 3), {}, "b_enc has shape"),
        ((torch.zeros(2, 4), W4, None, 3), dict(scale=torch.zeros(3)), "scale has shape"),
        (
            (torch.zeros(2, 4), W4, torch.zeros(9), 3),
            dict(W_low=torch.zeros(3, 4)),
            r"W_low is torch.float32 of shape \(3, 4\)",
        ),
        ((torch.zeros(2, 4), W4, None, 3), dict(W_low=W4.bfloat16()), "a b_enc beside them"),
    ],
)
def test_what_cannot_be_served_is_refused(args: Any, options: dict[str, Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ops.encode_group_max(*args, **options)


@pytest.mark.skipif(not extension.available(), reason="needs the C++ extension")
def test_the_extension_refuses_groups_that_do_not_fit() -> None:
    x, W = torch.zeros(2, 4), torch.zeros(9, 4)
    with pytest.raises(InputError, match="9 latents are not 2 equal groups"):
        native.encode_group_max(x, W, None, 2)
    with pytest.raises(InputError, match=r"best is 4, outside \[1, 3\]"):
        native.encode_group_max(x, W, None, 3, best=4)
