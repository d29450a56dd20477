"""Two finished runs whose dictionaries have some latents in common, each with a made-up latents.db."""

from pathlib import Path
from typing import Any

import torch
from latents_db import make_db

import saefast
from saefast.training.residual import stack_of

WIDTH, A, B, SHARED = 16, 90, 70, 50


def make_run(folder: Path, decoder: torch.Tensor, db: bool = True, seed: int = 0, **facts: Any) -> Path:
    """A finished run with a latents.db of its weights. Latent 0 is dead on its rows."""
    folder.mkdir(parents=True)
    sae = saefast.SAE(saefast.SAEConfig(d_in=decoder.shape[1], n_latents=len(decoder), k=4))
    with torch.no_grad():
        sae.W_dec.copy_(decoder)
    sae.save(folder)
    if db:
        about = {"digest": stack_of(folder, saefast.load(folder)).digest(), "architecture": "topk", "k": 4, "hook": "h"}
        make_db(folder, len(decoder), seed=seed, **({"sae": about} | facts))
    return folder


def decoders() -> tuple[torch.Tensor, torch.Tensor]:
    """The first SHARED latents of b are latents of a in the opposite order, all but a little; the rest are others."""
    generator = torch.Generator("cpu").manual_seed(0)
    a = torch.randn(A, WIDTH, generator=generator)
    b = torch.randn(B, WIDTH, generator=generator)
    b[:SHARED] = a[:SHARED].flip(0) + 0.05 * torch.randn(SHARED, WIDTH, generator=generator)
    return a, b
