"""The latents with the most similar decoder rows: for each the largest cosines, exact, by our own encode op."""

import torch
from torch import Tensor

from saefast import ambient
from saefast.errors import InputError
from saefast.latents.products import ROWS, Products, unit_rows
from saefast.latents.steps import Advance, nothing


@ambient.plainly(grad=False)
def neighbours(decoder: Tensor, n: int = 10, advance: Advance = nothing) -> tuple[Tensor, Tensor]:
    """The n latents with the largest cosines to each latent's decoder row, never itself.

    Memory, beside the decoder: its unit rows in fp32, half of that again in bf16, and 8 · L · n bytes.

    Args:
        decoder: (L, d) of any float dtype.
        advance: called with how many latents more are done.

    Returns:
        cosines (L, n) fp32, descending, negative ones as they are, and ids (L, n) int32, both on the decoder's device.
        Ties, as between exact copies, go to the lower id. A row of zeros has no direction: it is nobody's neighbour.
        Places that are left over (all n of a row of zeros, the last ones where fewer than n others are) hold id -1 and
        cosine 0.

    Raises:
        InputError: decoder is no matrix of finite numbers; n < 1.
    """
    if n < 1:
        raise InputError(f"n is {n}: expected how many neighbours a latent has, 1 or more")
    units = unit_rows(decoder, "decoder")
    cosines = torch.zeros(len(units), n, dtype=torch.float32, device=units.device)
    ids = torch.full((len(units), n), -1, dtype=torch.int32, device=units.device)
    alive = units.any(1).nonzero()[:, 0]
    advance(len(units) - len(alive))
    if len(alive) < len(units):
        units = units[alive]
    kept = min(n, len(alive) - 1)
    products = Products(units) if kept > 0 else None
    for start in range(0, len(alive), ROWS):
        rows = units[start : start + ROWS]
        if products is not None:
            values, found = _others(*products.largest(rows, kept + 1), start)
            here = alive[start : start + len(rows)]
            cosines[here, :kept] = values.clamp(-1, 1)
            ids[here, :kept] = alive[found.long()].int()
        advance(len(rows))
    return cosines, ids


def _others(values: Tensor, ids: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """(B, k + 1) of rows start, start + 1, … -> (B, k): without the row itself.

    Where it is not there, k + 1 others were as alike as the row is to itself: the last of them goes.
    """
    B, k = ids.shape[0], ids.shape[1] - 1
    itself = ids == torch.arange(start, start + B, dtype=ids.dtype, device=ids.device)[:, None]
    itself[:, -1] |= ~itself.any(1)
    return values[~itself].view(B, k), ids[~itself].view(B, k)
