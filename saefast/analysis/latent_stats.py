"""How often and how strongly each latent fires, on disk in a run's folder: what evaluation and features leave there.

    latents.safetensors         of all held-out rows, by `saefast eval`
    feature_stats.safetensors   of the rows that latents were chosen on, by `saefast features`

Both hold counts (L,) int64, total_act and max_act (L,) float64 and n_rows, as `saefast.metrics.streaming.Sparsity` has
them.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from saefast.data.shardfile import map_tensor, read_header
from saefast.errors import InputError
from saefast.files import replacing, usable
from saefast.formats.own import EVALUATED
from saefast.metrics.streaming import Sparsity

LATENTS, FEATURE_STATS = EVALUATED, "feature_stats.safetensors"


def write_latent_stats(file: Path, sparsity: Sparsity, more: Mapping[str, Tensor] | None = None) -> None:
    """Writes the file, whole or not at all. more: other tensors of the latents, by name."""
    tensors = {
        "counts": sparsity.counts,
        "total_act": sparsity.total_act,
        "max_act": sparsity.max_act,
        "n_rows": torch.tensor(sparsity.n_rows, dtype=torch.int64, device="cpu"),
        **(more or {}),
    }
    with replacing(file) as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)


def max_acts(folder: str | Path, n_latents: int) -> Tensor:
    """(n_latents,) float64: the largest activation of each latent that was seen, by evaluation or by features.

    Raises:
        InputError: neither has run on the SAE in that folder; a file of another SAE.
    """
    folder = usable(folder)
    files = [folder / name for name in (LATENTS, FEATURE_STATS) if (folder / name).is_file()]
    if not files:
        raise InputError(
            f"{folder} holds neither {LATENTS} nor {FEATURE_STATS}, so the largest activation of a latent is not "
            f"known: run saefast eval {folder} or saefast features {folder} first"
        )
    return torch.stack([_max_act(file, n_latents) for file in files]).amax(0)


def _max_act(file: Path, n_latents: int) -> Tensor:
    entry = read_header(file).get("max_act")
    if entry is None or entry.shape != (n_latents,) or entry.dtype != torch.float64:
        seen = "no max_act" if entry is None else f"a max_act of shape {entry.shape}, {entry.dtype}"
        raise InputError(f"{file} holds {seen}: expected ({n_latents},) float64; run saefast eval again")
    found = map_tensor(file, entry).clone()
    if not (found.isfinite() & (found >= 0)).all():
        raise InputError(f"{file} is damaged: max_act holds NaN, inf or numbers below 0; run saefast eval again")
    return found
