"""The k · B largest of a batch against a sort of all of it, where rows want very different numbers of latents."""

import pytest
import torch
from torch import Tensor

from saefast.ops.code import padded
from saefast.ops.encoder import Encoder


def scores(name: str, B: int, L: int) -> Tensor:
    """(B, L) pre-activations, whole numbers, so that every way to compute them gives the same bits."""
    if name == "equal":
        return torch.ones(B, L)
    if name == "one row has it all":
        return torch.cat([torch.arange(L).flip(0)[None] + 500.0, torch.randint(-9, 9, (B - 1, L))])
    if name == "none is positive":
        return -torch.arange(float(B * L)).view(B, L)
    if name == "few are positive":
        return torch.where(torch.rand(B, L) < 0.02, 5.0, -1.0)
    return torch.randint(-9, 9, (B, L)).float() if name == "ties" else torch.randperm(B * L).view(B, L) - B * L / 2


@pytest.mark.parametrize(
    "name", ["distinct", "ties", "equal", "one row has it all", "none is positive", "few are positive"]
)
@pytest.mark.parametrize(("B", "L", "k"), [(1, 40, 3), (7, 64, 1), (13, 50, 5), (9, 24, 20), (5, 16, 16)])
def test_the_code_is_a_sort_of_the_whole_batch(name: str, B: int, L: int, k: int) -> None:
    """The k · B largest; of equal ones those in the lower row, then the lower latent; nothing that is not positive."""
    values = scores(name, B, L)
    code = padded(Encoder(torch.eye(B), values.T.contiguous(), torch.zeros(L)).batch_topk(k), L)
    order = values.flatten().sort(descending=True, stable=True).indices[: k * B]
    expected = torch.zeros(B * L).index_fill(0, order, 1.0).view(B, L) * values.relu()
    assert torch.equal(torch.zeros(B, L).scatter(1, code.idx.long(), code.acts), expected)
