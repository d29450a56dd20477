"""What training and encoding launch: recipes that together ask for every form of every kernel."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from saefast.engines import hot
from saefast.engines.config import preset
from saefast.engines.fused import FusedEngine
from saefast.kernels import tuning
from saefast.models.sae import SAE
from saefast.ops import triton_encode_topk, triton_sddmm, triton_select_kth, triton_spmm, triton_threshold_encode
from saefast.ops.code import Code, Prefixes
from saefast.optim import triton as rows_triton
from saefast.optim import triton_batch
from saefast.optim.state import AdamStep, AnyMatrix, DriftTable, Job, LeanMatrix, Matrix, Norm, RowGradient


@dataclass(frozen=True)
class Sizes:
    D: int = 48
    L: int = 96
    K: int = 6
    B: int = 16
    steps: int = 3


SMALL = Sizes()
SOON = dict(lr=1e-3, dead_after=2 * SMALL.B)

LEAN_OPENAI = dict(lr=1e-3, dead_after=2, auxk_k=20, ema_decay=None, optimizer="adam-lean")
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "saefast": ("saefast", SOON),
    "lean": ("saefast", SOON | dict(optimizer="adam-lean")),
    "hot": ("saefast", SOON | dict(max_grad_norm=0.01)),
    "lean and hot": ("saefast", SOON | dict(optimizer="adam-lean", max_grad_norm=0.01)),
    "several prefixes": ("sparsify", SOON | dict(auxk_coef=1 / 32, multi_topk_coef=1 / 8)),
    "norm before the step": ("openai", dict(lr=1e-3, dead_after=2, auxk_k=20, ema_decay=0.9)),
    "norm after the step": ("dictionary_learning", SOON),
    "acts rescaled": ("saelens", dict(lr=1e-3, dead_after=2)),
    "raw rows": ("saefast", dict(decoder_norm="never", project_decoder_grad=False, auxk_coef=0.0, lr=1e-3)),
    "raw rows, clipped": ("saefast", dict(decoder_norm="never", project_decoder_grad=False, max_grad_norm=1.0)),
    "AuxK of any sign": ("saefast", SOON | dict(auxk_relu=False, auxk_b_dec_grad=True, apply_b_dec_to_input=False)),
    "every row": ("saefast", SOON),
    "every row, several prefixes": ("saefast", SOON | dict(multi_topk_coef=0.5, max_grad_norm=0.01)),
    "lean, every row": ("saefast", SOON | dict(optimizer="adam-lean")),
    "lean, norm before the step": ("openai", LEAN_OPENAI),
    "lean, norm after the step": ("dictionary_learning", SOON | dict(optimizer="adam-lean")),
    "lean, acts rescaled": ("saelens", dict(lr=1e-3, dead_after=2, optimizer="adam-lean")),
    "lean, raw rows": ("saefast", dict(decoder_norm="never", project_decoder_grad=False, optimizer="adam-lean")),
    "lean, several prefixes": ("sparsify", SOON | dict(multi_topk_coef=1 / 8, optimizer="adam-lean")),
}


@contextmanager
def soon(cut: int = 12) -> Iterator[None]:
    """What comes late in a run comes at once: hot latents, and groups long enough to be cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hot, "REFRESH_EVERY", 1)
        patch.setattr(hot, "COLUMNS", 4)
        patch.setattr(tuning, "CUT", cut)
        yield


def batches(sizes: Sizes = SMALL) -> list[Tensor]:
    """Some latents fire on nearly every token, others hardly ever."""
    sources, share = torch.randn(60, sizes.D), torch.logspace(-2.5, -0.1, 60)
    code = torch.rand(sizes.steps, sizes.B, 60) * (torch.rand(sizes.steps, sizes.B, 60) < share)
    return list(code @ sources + 0.05 * torch.randn(sizes.steps, sizes.B, sizes.D))


def trained(recipe: str, data: list[Tensor], sizes: Sizes = SMALL) -> tuple[FusedEngine, list[float]]:
    """The engine after its steps, and the losses."""
    name, settings = RECIPES[recipe]
    sae_config, config = preset(name, sizes.D, sizes.L, sizes.K, engine="fused", **settings)
    share, every = 0.05 if "hot" in recipe else None, 1 if "every row" in recipe else 2
    engine = FusedEngine(SAE(sae_config, seed=1), config, sizes.steps, settle_every=every, hot_share=share)
    engine.initialise(data[0])
    losses = [float(engine.step(x).loss) for x in data]
    engine.finish()
    return engine, losses


def training(recipe: str, sizes: Sizes = SMALL) -> Callable[[], Any]:
    return lambda: trained(recipe, batches(sizes), sizes)


def updating_along(D: int = 48, M: int = 2, lean: bool = False, n: int = 3) -> None:
    """Updates and the norm pass of n rows whose gradients have a part along the weights, in M blocks."""
    w, ids = torch.randn(n + 2, D), torch.arange(1, n + 1, dtype=torch.int32)
    matrix: AnyMatrix = LeanMatrix.of(w.bfloat16(), 1) if lean else Matrix.of(w)
    lengths = torch.arange(n) * tuning.CUT
    offsets = torch.cat([lengths[:1], lengths.cumsum(0)]).int()
    entries = torch.randint(4, (int(lengths.sum()),), dtype=torch.int32)
    gradient = RowGradient(torch.randn(4, D), offsets, entries, torch.randn(len(entries)), torch.randn(n, M))
    drift = DriftTable(0.9, 0.999, 1e-8)
    for norm in (Norm.never, Norm.after_update):
        step = AdamStep(1, 0.9, 0.999, 1e-3, 1e-8, drift.drift, drift.drift_eps, norm=norm)
        job = Job(matrix, step, gradient, ids, torch.zeros(n))
        rows_triton.gradient_squares(job)
        rows_triton.update_rows([job])


def decoding_csr(D: int = 300, L: int = 64) -> None:
    """Rows of any number of entries with prefixes by latent and by place, and their entries for the updates."""
    ends = torch.tensor([0, 0, 1, 41, 58], dtype=torch.int32)
    x, W, idx = torch.randn(len(ends) - 1, D), torch.randn(L, D), torch.randint(L, (61,), dtype=torch.int32)
    code, more = Code(torch.randn(61).relu(), idx, ends), Code(torch.randn(len(x), 2), idx[:8].view(-1, 2))
    for prefixes in (Prefixes([20, 40, L], [1.0, 0.5, 2.0], True, main=2), Prefixes([20], [1.0])):
        found = rows_triton.decode_loss(x, code, W, x[0], prefixes, torch.empty(len(prefixes.bounds), *x.shape))
        grouped = triton_batch.group_entries(torch.cat([idx, idx[:8]]), torch.arange(69) != 58, L)
        rows_triton.fill_entries(grouped, [(code, found.grad_acts), (more, more.acts)], prefixes, L)


def decoding(D: int = 300, L: int = 96, K: int = 40) -> None:
    """So many entries a token that several warps share them."""
    x, W, idx = torch.randn(5, D), torch.randn(L, D), torch.rand(5, L).topk(K, dim=1).indices.int()
    acts = torch.randn(5, K).relu()
    rows_triton.decode_loss(x, Code(acts, idx), W, x[0], Prefixes([K], [1.0]), torch.empty(1, *x.shape))


def selecting() -> None:
    """The k-th largest of keys that several programs look at."""
    keys = torch.randint(0, 2**31 - 1, (tuning.SELECT_KEYS + 900,), dtype=torch.int32)
    assert int(triton_select_kth.select_kth(keys, 600)) == int(keys.sort(descending=True).values[599])


def encoding(dtype: torch.dtype, method: str, D: int = 48, k: int = 8, L: int = 300, precision: str = "ieee") -> None:
    """Top-k in several chunks, of a list and with scales, thresholds, and the sparse products behind an encode."""
    x, W, b = torch.randn(6, D).to(dtype), torch.randn(L, D).to(dtype), torch.randn(L)
    scale, latents = torch.rand(L), torch.randperm(L)[: L // 3].sort().values.int()
    how = dict(method=method, precision=precision)
    triton_encode_topk.encode_topk(x, W, b, k, scale=scale, chunk=L // 3, **how)
    triton_encode_topk.encode_topk(x, W, None, k, latents=latents, **how)
    triton_threshold_encode.threshold_encode(x, W, b, torch.full((L,), 9.0), **how)
    triton_threshold_encode.threshold_encode(x, W, b, 9.0, **how)
    acts, idx = triton_encode_topk.encode_topk(x, W, b, k, **how)
    triton_spmm.spmm(acts, idx, W)
    triton_sddmm.sddmm(x, idx, W)
    triton_spmm.spmm_t(acts, idx, x, L)
    triton_spmm.sum_by_latent(acts, idx, L)
