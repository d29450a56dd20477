"""Neighbours and largest products against plain float64 sorts: ties, copies, rows of zeros, few latents, and memory."""

import pytest
import torch
from allocations import Allocations
from torch import Tensor

from saefast.errors import InputError
from saefast.latents import products as products_module
from saefast.latents.neighbours import neighbours
from saefast.latents.products import Products, unit_rows
from saefast.ops import mixed


def by_sort(decoder: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Cosines in float64 sorted whole, the lower id first among equals, as the docstring says."""
    rows = decoder.double()
    units = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
    cosines = units @ units.T
    alive = rows.any(1)
    cosines[:, ~alive] = -9
    cosines.fill_diagonal_(-9)
    found, ids = cosines.sort(dim=1, descending=True, stable=True)
    values, others = torch.zeros(len(rows), n), torch.full((len(rows), n), -1)
    kept = min(n, len(rows))
    values[:, :kept], others[:, :kept] = found[:, :kept].float(), ids[:, :kept]
    gone = (values == -9) | ~alive[:, None]
    return values.masked_fill(gone, 0), others.masked_fill(gone, -1).int()


@pytest.mark.parametrize(
    ("L", "d", "n"), [(700, 24, 10), (3000, 40, 10), (1, 8, 10), (2, 8, 10), (7, 5, 10), (65, 3, 1)]
)
def test_neighbours_are_those_of_a_sort(L: int, d: int, n: int) -> None:
    decoder = torch.randn(L, d) * torch.rand(L, 1) * 10
    seen: list[int] = []
    cosines, ids = neighbours(decoder, n, seen.append)
    expected, others = by_sort(decoder, n)
    assert cosines.dtype == torch.float32
    assert ids.dtype == torch.int32
    assert sum(seen) == L
    torch.testing.assert_close(cosines, expected, atol=1e-6, rtol=0)
    # Ids differ only where float64 sees a difference that float32 does not.
    differ = ids != others
    assert differ.float().mean() < 1e-3
    units = torch.nn.functional.normalize(decoder.double(), dim=1)
    for i, j in differ.nonzero().tolist():
        assert abs(units[i] @ units[ids[i, j]] - units[i] @ units[others[i, j]]) < 1e-6


def test_copies_go_by_id_and_nothing_is_its_own_neighbour() -> None:
    base = torch.randn(5, 16)
    decoder = torch.cat([base[:1].repeat(60, 1), base[1:], base[:1].repeat(3, 1) * 2])
    cosines, ids = neighbours(decoder, 10)
    assert not (ids == torch.arange(len(decoder))[:, None]).any()
    assert ids[0].tolist() == list(range(1, 11))
    assert ids[4].tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert ids[59].tolist() == list(range(10))
    assert ids[66].tolist() == list(range(10))
    assert (cosines[:60] > 1 - 1e-6).all()
    assert (cosines <= 1).all()


def test_rows_of_zeros_and_opposites() -> None:
    decoder = torch.tensor([[1.0, 0, 0], [0, 0, 0], [-2, 0, 0], [1e-30, 1e-30, 0], [0, 0, 0]])
    cosines, ids = neighbours(decoder, 4)
    assert ids[0].tolist() == [3, 2, -1, -1]
    torch.testing.assert_close(cosines[0], torch.tensor([0.5**0.5, -1.0, 0, 0]))
    assert ids[2].tolist() == [3, 0, -1, -1]
    for dead in (1, 4):
        assert ids[dead].tolist() == [-1] * 4
        assert cosines[dead].tolist() == [0] * 4
    none, nobody = neighbours(torch.zeros(3, 2))
    assert not none.any()
    assert (nobody == -1).all()


def test_low_precision_weights_are_taken_as_they_are() -> None:
    decoder = torch.randn(300, 32)
    low = neighbours(decoder.bfloat16(), 5)
    assert all(map(torch.equal, low, neighbours(decoder.bfloat16().float(), 5)))
    assert torch.equal(neighbours(decoder.double(), 5)[1], neighbours(decoder, 5)[1])


@pytest.mark.parametrize(
    ("decoder", "n", "says"),
    [
        (torch.ones(3), 10, "expected a matrix"),
        (torch.ones(3, 2, dtype=torch.int64), 10, "expected a matrix"),
        (torch.tensor([[1.0], [torch.nan]]), 10, "row 1"),
        (torch.tensor([[torch.inf], [1.0]]), 10, "row 0"),
        (torch.ones(3, 2), 0, "n is 0"),
    ],
)
def test_odd_decoders_are_refused(decoder: Tensor, n: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        neighbours(decoder, n)


def test_what_bf16_misses_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers, whose products fp32 holds exactly and bf16 does not: bit-equal to a stable sort."""
    monkeypatch.setattr(products_module, "pays_off", lambda W: True)
    # The first 400 differ in their last bits only, which bf16 drops.
    W = torch.cat([1024 + torch.randint(0, 3, (400, 4)), torch.randint(-1024, 1024, (800, 4))]).float()
    x = torch.cat([torch.randint(900, 1024, (50, 4)), torch.randint(-1024, 1024, (50, 4))]).float()
    asked = Products(W)
    assert asked.low is not None
    values, ids = asked.largest(x, 9)
    sorted_, order = (x.double() @ W.double().T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(ids, order[:, :9].int())
    assert torch.equal(values, sorted_[:, :9].float())
    _, plain = mixed.encode_topk_mixed(x, asked.low, W, torch.zeros(len(W)), 9, relu=False)
    assert not torch.equal(plain, order[:, :9].int())


def test_rows_that_bf16_decides_are_not_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products_module, "pays_off", lambda W: True)
    W = unit_rows(torch.randn(20000, 64), "W")
    rows = []
    plain = products_module.encode_topk

    def counted(x: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        rows.append((x.dtype, len(x)))
        return plain(x, *args, **kwargs)

    monkeypatch.setattr(products_module, "encode_topk", counted)
    Products(W).largest(W[:500], 11)
    again = sum(n for dtype, n in rows if dtype == torch.float32)
    assert 0 <= again < 100


def test_memory_is_linear_in_latents() -> None:
    decoder = torch.randn(8192, 32)
    with Allocations(decoder) as watched:
        neighbours(decoder, 10)
    copies = decoder.nbytes * 1.5
    lists = len(decoder) * 10 * 8
    block = 2048 * (32 * 8 * 4 + 64 * 40)
    assert watched.peak < copies + lists + block + len(decoder) * 64
    assert watched.peak < len(decoder) ** 2
