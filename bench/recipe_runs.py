"""One training run of `bench.recipe`, by us or by a peer, and what it is worth on held-out rows."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import common
from bench.recipe_cells import Cell
from bench.recipe_rows import heldout_file, train_file, truth_file
from bench.recipe_world import best_cosines, found_by_frequency
from bench.step import PEERS_PYTHON
from saefast.engines.config import TrainConfig, preset
from saefast.engines.recipe import choose
from saefast.errors import InputError
from saefast.metrics.streaming import Reconstruction
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.training.api import opened, train
from saefast.training.loop import Line

HELDOUT_ROWS, CHUNK = 20_000, 1024
# Two decades apart from feature 1 to feature 32,768 and a half more.
EDGES = torch.linspace(-5, 0, 21, device="cpu")
SAE_FIELDS = {field.name for field in fields(SAEConfig)}
# The batch that a peer's package takes where the user names none; its preset leaves that to the user.
PRESET_BATCH = {"SAELens": 4096, "dictionary_learning": 8192, "sparsify": 4096}
CHILD = common.ROOT / "bench" / "recipe_child.py"


def configs(rows: Path, cell: Cell, override: Mapping[str, Any]) -> tuple[SAEConfig, TrainConfig]:
    """Of our run at a cell: the shape, the tokens and the seed, and nothing else but what is overridden."""
    of_sae = {name: value for name, value in override.items() if name in SAE_FIELDS}
    of_train = {name: value for name, value in override.items() if name not in SAE_FIELDS}
    return (
        SAEConfig(d_in=width(rows, cell.kind), n_latents=cell.n_latents, k=cell.k, **of_sae),
        TrainConfig(n_tokens=cell.tokens, seed=cell.seed, **of_train),
    )


def width(rows: Path, kind: str) -> int:
    return int(np.load(train_file(rows, kind), mmap_mode="r").shape[1])


def chosen(rows: Path, cell: Cell, override: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a run of ours as it stands before the first step: what was left to the default is chosen."""
    sae_config, config = configs(rows, cell, override)
    with opened(train_file(rows, cell.kind), sae_config, config, None, False, 2, None) as run:
        return run.sae.config.to_dict() | run.config.to_dict()


def ours(rows: Path, cell: Cell, override: Mapping[str, Any]) -> dict[str, Any]:
    return _trained(rows, cell, *configs(rows, cell, override)) | {"source": "saefast"}


def of_preset(rows: Path, cell: Cell, peer: str) -> dict[str, Any]:
    """A peer's recipe in our engine, which the tests hold equal to the peer's own package."""
    name = peer.lower()
    sae_config, config = preset(
        name, width(rows, cell.kind), cell.n_latents, cell.k, n_tokens=cell.tokens, seed=cell.seed,
        batch_size=PRESET_BATCH[peer],
    )  # fmt: skip
    found = _trained(rows, cell, sae_config, config)
    settings = {"batch_size": config.batch_size, "lr": choose(sae_config, config).lr, "optimizer": "Adam"}
    return found | {"source": "preset", "settings": settings}


def _trained(rows: Path, cell: Cell, sae_config: SAEConfig, config: TrainConfig) -> dict[str, Any]:
    lines: list[Line] = []
    begin = time.perf_counter(), time.process_time()
    try:
        sae = train(train_file(rows, cell.kind), sae_config, config, progress=False, on_log=lines.append)
    except InputError as error:
        # A rate that is too high may end a run; that is a result too.
        return {"failed": str(error)} | _taken(*begin)
    taken = _taken(*begin)
    last = {"silent_in_training": lines[-1]["sparsity/silent_share"]} if lines else {}
    return measure(rows, cell.kind, sae) | taken | {"tokens": cell.tokens} | last


def _taken(wall: float, processor: float) -> dict[str, float]:
    """Seconds by the clock and of all processors since then."""
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - processor}


def of_package(
    rows: Path, cell: Cell, peer: str, cpu_seconds: float | None = None, python: Path = PEERS_PYTHON
) -> dict[str, Any]:
    """A peer's own package with its own defaults, for the cell's tokens or for some seconds of processor time."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "weights.npz"
        asked = {
            "peer": peer, "rows": str(train_file(rows, cell.kind).resolve()), "n_latents": cell.n_latents, "k": cell.k,
            "tokens": cell.tokens, "cpu_seconds": cpu_seconds, "seed": cell.seed, "out": str(out),
        }  # fmt: skip
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [str(python), str(CHILD), json.dumps(asked)], capture_output=True, text=True, env=environment
        )
        if done.returncode:
            return {"failed": done.stderr[-500:], "source": "package"}
        reply = json.loads(done.stdout.splitlines()[-1])
        sae = _peer_sae(out, cell, peer)
    settings = {"batch_size": reply["batch"], "lr": reply["lr"], "optimizer": reply["optimizer"]}
    return measure(rows, cell.kind, sae) | {
        "source": "package", "settings": settings,
        **{name: reply[name] for name in ("seconds", "cpu_seconds", "tokens", "version")},
    }  # fmt: skip


def _peer_sae(file: Path, cell: Cell, peer: str) -> SAE:
    with np.load(file) as found:
        weights = {name: torch.from_numpy(found[name]) for name in found.files}
    config, _ = preset(peer.lower(), weights["W_dec"].shape[1], cell.n_latents, cell.k)
    sae = SAE(replace(config, unit_norm_decoder=False), seed=0)
    with torch.no_grad():
        for name, value in weights.items():
            getattr(sae, name).copy_(value)
    return sae


@torch.no_grad()
def measure(rows: Path, kind: str, sae: SAE) -> dict[str, Any]:
    """Held-out FVU, the share of latents that no held-out row fires, and of the world which features were found."""
    held = np.load(heldout_file(rows, kind), mmap_mode="r")[:HELDOUT_ROWS]
    found, fired = Reconstruction(), torch.zeros(sae.config.n_latents, dtype=torch.bool, device="cpu")
    sae = sae.cpu()
    for start in range(0, len(held), CHUNK):
        x = torch.from_numpy(held[start : start + CHUNK].astype(np.float32))
        out = sae(x)
        found.update(x, out.x_hat.float())
        fired[out.idx[out.acts > 0].long()] = True
    result = {"fvu": found.compute()["fvu"], "silent": 1 - float(fired.double().mean()), "heldout_rows": len(held)}
    return result | ({"world": _features_found(rows, sae)} if kind == "world" else {})


def _features_found(rows: Path, sae: SAE) -> dict[str, Any]:
    with np.load(truth_file(rows)) as truth:
        directions, p = torch.from_numpy(truth["directions"]), torch.from_numpy(truth["p"])
    cosines = best_cosines(directions, sae.W_dec)
    return found_by_frequency(cosines, p, EDGES.double()) | {"found": int((cosines > 0.9).sum())}
