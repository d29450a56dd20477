"""What is killed besides plain training runs: several runs at once, runs from shards and running models, harvests.

Each task is a function of a job (see train_job.py), whose "acts" is a folder that `prepare` has filled.
"""

import dataclasses
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
import train_job

from saefast.data.opening import open_source
from saefast.data.shard_writer import ShardWriter
from saefast.engines.config import TrainConfig
from saefast.harvest.live import live_sources
from saefast.harvest.to_disk import HarvestConfig, harvest
from saefast.training.api import train
from saefast.training.several import Member, train_many

Job = dict[str, Any]
HOOKS = ("layers.0", "layers.1", "layers.2")
# Shards of 64 rows and a commit for each: a harvest of 60 texts has a dozen moments that matter on disk.
HARVEST = HarvestConfig(
    hooks=HOOKS[:2], ctx_len=16, dtype="bfloat16", batch_tokens=100, heldout=0.2, device="cpu", rows_per_shard=64,
    max_norm_multiple=1.1,
    forward="float32",
)  # fmt: skip


def prepare(folder: Path) -> None:
    """The data of all tasks: a shard folder of three hooks, and a file."""
    hooks = [{"name": name, "hf_name": name} for name in HOOKS]
    with ShardWriter(folder / "shards", hooks, "float32", rows_per_shard=256) as writer:
        for first in range(0, 600, 200):
            x = {name: train_job.rows(200, seed=first + i) for i, name in enumerate(HOOKS)}
            writer.add("train" if first < 400 else "heldout", x, torch.arange(200) + first, torch.zeros(200))
            writer.commit({"docs": 0, "seqs": 0, "done": 0, "tokens": first}, complete=first == 400)
    np.save(folder / "rows.npy", train_job.rows().numpy())


def config(job: Job) -> TrainConfig:
    return TrainConfig(**(train_job.CONFIG | job.get("config", {})))


def mapped(job: Job) -> None:
    """One run from a shard folder, or from a file, named by its path as most runs are."""
    data = Path(job["acts"], job["data"])
    source = data if data.is_file() else open_source(data, hook=HOOKS[0], shuffle=job.get("shuffle", "mapped"))
    train(source, train_job.SAE, config(job), job["out_dir"], resume=job.get("resume", False))


def several(job: Job) -> None:
    """Three runs side by side from one folder."""
    sources = {hook: open_source(Path(job["acts"], "shards"), hook=hook, shuffle="buffer") for hook in HOOKS}
    members = {hook: Member(source, train_job.SAE, config(job)) for hook, source in sources.items()}
    train_many(members, job["out_dir"], resume=job.get("resume", False))


def live(job: Job) -> None:
    """Two runs from a model that is running."""
    sources = live_sources(HARVEST, text=tiny_models.documents(), reservoir_rows=256, **language_model())
    sae = dataclasses.replace(train_job.SAE, d_in=16)
    members = {hook: Member(source, sae, config(job)) for hook, source in sources.items()}
    train_many(members, job["out_dir"], resume=job.get("resume", False))


def harvested(job: Job) -> None:
    harvest(job["out_dir"], HARVEST, text=tiny_models.documents(), progress=False, **language_model())


@cache
def language_model() -> dict[str, Any]:
    return {"model": tiny_models.model("gpt2"), "tokenizer": tiny_models.tokenizer()}


def warm_up(task: str) -> None:
    """Before the server forks: what a task imports is then there in every child."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if task in ("live", "harvest"):
        model = language_model()
        model["model"](torch.ones(1, 3, dtype=torch.long))


TASKS: dict[str, Callable[[Job], None]] = {"mapped": mapped, "several": several, "live": live, "harvest": harvested}
