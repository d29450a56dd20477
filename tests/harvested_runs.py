"""A tiny model with a harvest of it, and SAEs that are runs on it."""

import os
from pathlib import Path

import tiny_models

from saefast.harvest.to_disk import HarvestConfig, harvest
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE


def harvested(folder: Path) -> Path:
    """Leaves model, a folder, and acts, a harvest of it, in a folder."""
    tiny_models.model("gpt2", head=True).save_pretrained(folder / "model")
    tiny_models.tokenizer(special=False).save_pretrained(folder / "model")
    config = HarvestConfig(
        model=str(folder / "model"), hooks=("layers.1",), ctx_len=24, dtype="float32", heldout=0.2, device="cpu"
    )
    harvest(folder / "acts", config, text=tiny_models.documents(40), progress=False)
    return folder


def save(folder: Path, data: Path, seed: int = 0, n_latents: int = 40, k: int = 4) -> Path:
    """A finished run on a harvest."""
    kept = {"path": os.path.relpath(data, folder), "hook": None, "key": None, "heldout": 0.2, "shuffle": "mapped"}
    metadata = {"data": kept, "hook_name": "layers.1", "model_name": "tiny"}
    SAE(SAEConfig(d_in=16, n_latents=n_latents, k=k, metadata=metadata), seed=seed).save(folder)
    return folder
