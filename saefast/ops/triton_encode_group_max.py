"""encode_group_max on a GPU: library products of a chunk of latents, and the largest of each of its groups.

Chunks are whole groups, or parts of one group where it is wider than a chunk. A chunk is read back once, while most of
it is still in L2. Arguments are validated by `saefast.ops`; tensors are contiguous.
"""

import torch
from torch import Tensor

from saefast.ops import reference
from saefast.ops.triton_encode_tiles import Encoder, make_encoder, ranked_products
from saefast.ops.triton_launch import on_device, readable

# Of a chunk's products. Half of it stays in the L2 of the GPUs that this is for.
CHUNK_BYTES = 64 << 20
LEAST_COLUMNS = 256


def encode_group_max(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    *,
    best: int = 1,
    scale: Tensor | None = None,
    columns: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.encode_group_max` without ReLU.

    Args:
        columns: of a chunk, for tests and measurements.
    """
    enc = make_encoder(x, W_enc, b_enc, None, scale, "chunked", "ieee")
    x = readable(x)
    B, width = x.shape[0], W_enc.shape[0] // k
    columns = columns or max(LEAST_COLUMNS, CHUNK_BYTES // (4 * max(B, 1)))
    step = columns // width
    with on_device(x):
        if step:
            firsts = range(0, k, step)
            found = [_best_of_groups(enc, x, first * width, width, min(step, k - first), best) for first in firsts]
        else:
            found = [_best_of_parts(enc, x, group * width, width, columns, best) for group in range(k)]
    return torch.cat([pre for pre, _ in found], 1), torch.cat([idx for _, idx in found], 1)


def _best_of_groups(enc: Encoder, x: Tensor, start: int, width: int, n: int, best: int) -> tuple[Tensor, Tensor]:
    """(B, n · best) of the n groups of `width` latents from latent `start` on."""
    pre, rank = (t.view(-1, width) for t in ranked_products(enc, x, start, n * width))
    order = rank.max(1, keepdim=True).indices if best == 1 else reference.stable_topk(rank, best)
    first = torch.arange(start, start + n * width, width, dtype=torch.int64, device=x.device)
    idx = order.view(len(x), n, best) + first[:, None]
    return pre.gather(1, order).view(len(x), -1), idx.flatten(1).int()


def _best_of_parts(enc: Encoder, x: Tensor, start: int, width: int, columns: int, best: int) -> tuple[Tensor, Tensor]:
    """(B, best) of the one group of `width` latents from latent `start` on, by parts of it."""
    none = x.new_empty((len(x), 0), dtype=torch.float32)
    held: reference.Ranked = none, none, none.long()
    for at in range(start, start + width, columns):
        n = min(columns, start + width - at)
        ids = torch.arange(at, at + n, dtype=torch.int64, device=x.device).expand(len(x), -1)
        held = reference.merge_topk(held, (*ranked_products(enc, x, at, n), ids), best)
    return held[0], held[2].int()
