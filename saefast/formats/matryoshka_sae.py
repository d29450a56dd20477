"""Checkpoints of the Matryoshka SAE repository, `sae.pt` and `config.json` (bartbussmann/matryoshka_sae, 2503.17547).

As BatchTopK's (`saefast.formats.batchtopk`), with a threshold that batchtopk keeps a running mean of and serves by, and
GlobalBatchTopKMatryoshkaSAE, the sizes of whose groups stand in the config as text. A threshold of 0 is one that was
never set. Its topk, vanilla and jumprelu SAEs have no threshold: their files are BatchTopK's to the letter.
"""

import json
import warnings
from typing import Any

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.formats.batchtopk import CONFIG, KEPT, THRESHOLD, BatchTopKRepo, state_file
from saefast.formats.source import Source
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.schema import fits

MATRYOSHKA = "globalmatryoshkatopk"


class MatryoshkaRepo(BatchTopKRepo):
    """BatchTopKSAE with a threshold, and GlobalBatchTopKMatryoshkaSAE."""

    name = "matryoshka_sae"
    about = "the Matryoshka paper's repository: BatchTopK with a threshold, nested dictionaries or one"
    layout = (
        f"sae.pt with W_enc (d_in, n_latents), W_dec, b_enc, b_dec and a single {THRESHOLD}, and {CONFIG} with "
        "act_size and dict_size"
    )
    signs = ("sae.pt", CONFIG, "W_enc", "W_dec", "b_enc", "b_dec", THRESHOLD)
    types = {"batchtopk": "batchtopk", MATRYOSHKA: "batchtopk"}  # noqa: RUF012

    def recognises(self, source: Source) -> bool:
        file = state_file(source)
        return file is not None and set(source.entries(file)) == {"W_enc", "W_dec", "b_enc", "b_dec", THRESHOLD}

    def more(self, source: Source, file: str, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
        if kind != MATRYOSHKA:
            return {}
        sizes, n_latents = settings.get("group_sizes"), source.entries(file)["W_enc"].shape[1]
        try:
            sizes = json.loads(sizes) if isinstance(sizes, str) else sizes
        except ValueError:
            sizes = None
        if not fits(sizes, list[int]) or not sizes or min(sizes) < 1 or sum(sizes) != n_latents:
            raise InputError(
                f"{source.folder / CONFIG}: group_sizes is {settings.get('group_sizes')!r}, expected sizes of at least "
                f"1 that add up to {n_latents}"
            )
        return {"matryoshka": tuple(sum(sizes[: i + 1]) for i in range(len(sizes)))}

    def threshold(self, source: Source, file: str) -> float:
        found = source.number(file, THRESHOLD)
        if found == 0:
            warnings.warn(
                f"{source.folder / file} has a threshold of 0, which was never set: every positive latent is on",
                RuntimeWarning,
                stacklevel=2,
            )
        return found

    def own_tensors(self, sae: SAE, own: dict[str, Tensor]) -> dict[str, Tensor]:
        # Theirs begins at 0, ours at -1.
        return {THRESHOLD: sae.get_buffer("threshold").clamp_min(0)}

    def kept(self, config: SAEConfig) -> set[str]:
        return KEPT | {"matryoshka"}

    def lost(self, sae: SAE) -> list[str]:
        if float(sae.get_buffer("threshold")) < 0:
            return ["the threshold is not set, and is written as 0: in evaluation every positive latent would be on"]
        return []

    def settings(self, sae: SAE) -> dict[str, Any]:
        # Their loader reads both lists from text, of any SAE.
        found = super().settings(sae) | {"top_k_matryoshka": "[]"}
        ends = torch.tensor(
            sorted({0, *(sae.config.matryoshka or ()), sae.config.n_latents}), dtype=torch.int64, device="cpu"
        )
        nested = {} if sae.config.matryoshka is None else {"sae_type": MATRYOSHKA}
        return found | nested | {"group_sizes": str(ends.diff().tolist())}
