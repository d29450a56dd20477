"""The whole encoder and the decoder of large codes on compiled kernels in bf16: drivers, chunks, merges, odd memory.

Integer values make every sum exact, so the answer is the stable sort's to the bit.
"""

import pytest
import torch
from torch import Tensor

from ptx.emulate import emulated
from saefast.kernels import tuning
from saefast.ops import triton_encode_tiles, triton_encode_topk
from saefast.ops.code import Code, Prefixes
from saefast.optim import reference as rows
from saefast.optim import triton as rows_triton

L, K = 700, 12


def integers(*shape: int) -> Tensor:
    return torch.randint(-3, 4, shape).bfloat16()


def stable_sort(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    pre = x.double() @ W.double().T + b.double()
    values, idx = torch.sort(pre, dim=1, descending=True, stable=True)
    return values[:, :k].float(), idx[:, :k].int()


def misaligned(t: Tensor) -> Tensor:
    """The same rows, one element off every 16-byte boundary."""
    moved: Tensor = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
    return moved.copy_(t)


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("D", [96, 1040])
@pytest.mark.parametrize("method", ["auto", "chunked"])
def test_the_encoder_is_the_stable_sort(method: str, D: int, sm: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = integers(37, D), integers(L, D), integers(L).float()
    W[3] = W[690] = W[40]  # ties across chunks
    monkeypatch.setattr(triton_encode_tiles, "_library_columns", lambda _: 96)
    with emulated(sm) as found:
        acts, idx = triton_encode_topk.encode_topk(x, W, b, K, chunk=224, method=method, relu=False)
    assert not found.faults, found.faults
    kernel = "tiles_library" if method == "chunked" else "tiles_descriptor" if sm == 90 else "tiles_pointer"
    kernels = [call.kernel for call in found.calls]
    # Chunks of 224 and 448 columns and the rest; products of 96.
    assert kernels.count("merge_topk") == 3
    assert kernels.count(kernel) == (len(kernels) - 3) == (3 + 5 + 1 if method == "chunked" else 3)
    expected = stable_sort(x, W, b, K)
    assert torch.equal(acts, expected[0])
    assert torch.equal(idx, expected[1])


@pytest.mark.parametrize("odd", ["one row of a wider matrix", "x off its boundary", "W off its boundary"])
def test_odd_memory_on_descriptors(odd: str) -> None:
    x, W, b = integers(5, 96), integers(L, 96), torch.zeros(L)
    if odd.startswith("one"):
        x = torch.cat([x[:1], integers(1, 3)], 1)[:, :96]
        assert x.is_contiguous()
        assert x.stride(0) == 99
    x = misaligned(x) if odd.startswith("x") else x
    W = misaligned(W) if odd.startswith("W") else W
    with emulated(90) as found:
        acts, idx = triton_encode_topk.encode_topk(x, W, b, K, method="fused", relu=False)
    assert not found.faults, found.faults
    expected_kernel = "tiles_pointer" if odd.startswith("W") else "tiles_descriptor"
    assert {call.kernel for call in found.calls} == {expected_kernel, "merge_topk"}
    expected = stable_sort(x, W, b, K)
    assert torch.equal(acts, expected[0])
    assert torch.equal(idx, expected[1])


@pytest.mark.parametrize("relu", [True, False])
def test_the_decoder_of_a_code_as_large_as_auxks(relu: bool) -> None:
    """2048 latents a token, which leaves a tile 8 columns."""
    B, k, D = 2, 1100, 45
    assert tuning.decode_loss(D, k) == tuning.DecodeLoss(2048, 8, 16)
    x, W = torch.randint(-4, 5, (B, D)).float(), torch.randint(-2, 3, (1300, D)).float()
    acts = torch.randint(-2 * (not relu), 3, (B, k)).float()
    idx = torch.rand(B, 1300).topk(k, dim=1).indices.int()
    planes = torch.full((2, 1, B, D), torch.nan)
    with emulated(90) as found:
        ours = rows_triton.decode_loss(x, Code(acts, idx), W, None, Prefixes([k], [0.5]), planes[0], relu=relu)
    assert not found.faults, found.faults
    plain = rows.decode_loss(x, Code(acts, idx), W, None, Prefixes([k], [0.5]), planes[1], relu=relu)
    assert torch.equal(planes[0], planes[1])
    assert torch.equal(ours.grad_acts, plain.grad_acts)
    assert torch.equal(ours.squares, plain.squares)


@pytest.mark.parametrize("by_latent", [False, True])
@pytest.mark.parametrize("sm", [80, 90])
def test_a_code_of_rows_of_any_length(sm: int, by_latent: bool) -> None:
    """CSR with several prefixes: rows without entries, of one, of many, and padding that no row has."""
    D, lengths = 45, [0, 1, 40, 17]
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    x, W = torch.randint(-4, 5, (4, D)).float(), torch.randint(-2, 3, (90, D)).float()
    n = sum(lengths)
    idx = torch.cat([torch.randperm(90)[:length] for length in lengths] + [torch.zeros(3, dtype=torch.int64)]).int()
    acts = torch.cat([torch.randint(0, 3, (n,)).float(), torch.zeros(3)])
    prefixes = Prefixes([30, 60, 90] if by_latent else [4, 16, 90], [1.0, 2.0, 0.5], by_latent, main=1)
    code, planes, errors = Code(acts, idx, ends), torch.full((2, 3, 4, D), torch.nan), torch.full((2, 4, D), torch.nan)
    with emulated(sm) as found:
        ours = rows_triton.decode_loss(x, code, W, x[0], prefixes, planes[0], error=errors[0])
    assert not found.faults, found.faults
    plain = rows.decode_loss(x, code, W, x[0], prefixes, planes[1], error=errors[1])
    assert torch.equal(planes[0], planes[1])
    assert torch.equal(errors[0], errors[1])
    assert torch.equal(ours.grad_acts, plain.grad_acts)
    assert torch.equal(ours.squares, plain.squares)
