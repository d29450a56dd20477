"""Small SAEs of every kind, rows for them, and their spool held to the dense code."""

import numpy as np
import torch
from torch import Tensor

from saefast.data.mapped_source import Located
from saefast.latents.spool import Spool
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

L, D, N = 40, 8, 230
KINDS = ("topk", "batchtopk", "jumprelu", "relu", "gated", "groupmax")
# Those whose rows have codes of different lengths.
UNEVEN = ("batchtopk", "jumprelu", "relu", "gated")


def made(kind: str, n_latents: int = L) -> SAE:
    """An SAE whose latents fire on some rows: thresholds are set where the architecture has them."""
    sae = SAE(SAEConfig(d_in=D, n_latents=n_latents, k=4, activation=kind), seed=0).requires_grad_(False)
    sae.b_enc -= 0.3
    for name, buffer in sae.named_buffers():
        if name == "threshold":
            buffer.fill_(0.4)
    return sae


def rows(n: int = N, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def batches(x: Tensor, size: int = 37) -> list[Located]:
    """Sequences of 23 rows, numbered from 500 downwards."""
    numbers = torch.arange(len(x))
    seq, pos = (500 - numbers // 23).int(), (numbers % 23).to(torch.int16)
    return [Located(x[part], seq[part], pos[part]) for part in numbers.split(size)]


def dense(spool: Spool) -> np.ndarray:
    found = np.zeros((spool.n_rows, spool.n_latents), np.float32)
    for row in range(spool.n_rows):
        part = slice(spool.row_ptr[row], spool.row_ptr[row + 1])
        found[row, spool.idx[part]] = spool.acts[part]
    return found


def spool_of(acts: Tensor, idx: Tensor, n_latents: int) -> Spool:
    """A spool in memory of a code acts, idx (n, K), of rows of no known sequence."""
    on, none = acts > 0, np.zeros(0, np.int32)
    row_ptr = np.concatenate([[0], on.sum(1).cumsum(0).numpy()])
    ids = idx[on].int().numpy()
    n_fired = np.bincount(ids, minlength=n_latents)
    code = row_ptr, ids, acts[on].float().numpy()
    return Spool(n_latents, len(acts), *code, none, none.astype(np.uint16), none.astype(np.int64), n_fired)
