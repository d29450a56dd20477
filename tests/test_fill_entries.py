"""A code's entries grouped by latent and weighed, on their Triton kernels, against plain torch."""

import interp
import pytest
import torch
from torch import Tensor

from saefast.ops import groups
from saefast.ops.code import Code, Prefixes
from saefast.optim import reference as rows
from saefast.optim import triton_batch as batch_triton

interp.speed_up()
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")


def code(n: int, L: int, share: float, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randint(L, (n,), dtype=torch.int32, device=device), torch.rand(n, device=device) < share


@pytest.mark.parametrize(("n", "L"), [(0, 7), (1, 1), (200, 5), (200, 900), (300, 300)])
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_runs_have_room_for_as_many_as_there_may_be(n: int, L: int, share: float, device: torch.device) -> None:
    idx, keep = code(n, L, share, device)
    found, exact = batch_triton.group_entries(idx, keep, L), groups.group_entries(idx, keep, L)
    U, kept = len(exact.latents), len(exact.order)
    assert torch.equal(found.latents[:U], exact.latents)
    assert torch.equal(found.offsets[: U + 1], exact.offsets)
    assert torch.equal(found.order[:kept], exact.order)
    # The sizes are those of the shapes; what is left over is empty.
    assert len(found.order) == n
    assert len(found.latents) == len(found.offsets) - 1 == min(n, L)
    assert (found.latents[U:] == -1).all()
    assert (found.offsets[U:] == kept).all()
    assert found.latents.dtype == found.offsets.dtype == found.order.dtype == torch.int32
    assert torch.equal(found.counts(L), exact.counts(L))
    assert torch.equal(found.over_all(L), exact.over_all(L))


def codes(columns: list[int], csr: bool, idx: Tensor, B: int) -> list[Code]:
    """Cuts idx (n,) into parts of so many columns, the first one as CSR with rows of other lengths and padding."""
    parts = [t.view(B, -1) for t in idx.split([B * c for c in columns])]
    found = [Code(torch.randn(part.shape, device=idx.device), part) for part in parts]
    if csr:
        n = found[0].idx.numel()
        ends = torch.randint(0, n - 5, (B - 1,), device=idx.device).sort().values
        row_ptr = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), n - 5)]).int()
        found[0] = Code(found[0].acts.flatten(), found[0].idx.flatten(), row_ptr)
    return found


@pytest.mark.parametrize("columns", [[4], [8], [4, 3], [8, 1], [8, 2, 3]])
@pytest.mark.parametrize("bounds", [[4], [2, 8], [9, 30]])
@pytest.mark.parametrize("csr", [False, True])
@pytest.mark.parametrize("by_latent", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_entries(
    columns: list[int], bounds: list[int], csr: bool, by_latent: bool, share: float, device: torch.device
) -> None:
    B, L = 70, 30
    n = B * sum(columns)
    idx, keep = code(n, L, share, device)
    idx[::3] = 5  # a group longer than one load
    given = codes(columns, csr, idx, B)
    if csr:
        keep[B * columns[0] - 5 : B * columns[0]] = False
    parts, prefixes = [(c, torch.randn(c.acts.shape, device=device)) for c in given], Prefixes(bounds, [], by_latent)
    padded, exact = batch_triton.group_entries(idx, keep, L), groups.group_entries(idx, keep, L)
    found = batch_triton.fill_entries(padded, parts, prefixes, L)
    expected = rows.fill_entries(exact, parts, prefixes, L)
    for a, b in zip(found[:4], expected[:4], strict=True):
        assert torch.equal(a[: len(b)], b)
    torch.testing.assert_close(found.grad_by_latent, expected.grad_by_latent, rtol=1e-5, atol=1e-4)
    again = batch_triton.fill_entries(padded, parts, prefixes, L)
    assert torch.equal(found.grad_by_latent, again.grad_by_latent)
