"""Loading, training, streaming and closing over and over in one process: memory, threads and files must not grow."""

import os
import shutil
import statistics
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tiny_models
import torch
from attack import outcome, readers
from attack.summary import Row

from saefast.analysis.evaluation import evaluate
from saefast.data.opening import open_source
from saefast.engines.config import TrainConfig
from saefast.harvest.live import live_sources
from saefast.models.config import SAEConfig
from saefast.models.sae import load
from saefast.training.api import train

# A megabyte of weights, so that one tensor kept a round is seen; torch and malloc settle within a few MB.
SIZE = SAEConfig(d_in=readers.D_IN, n_latents=1 << 15, k=3)
SLACK = {"memory, MB": 24.0, "threads": 0.0, "open files": 0.0}


class Use(NamedTuple):
    """What this process holds, in the order of SLACK."""

    memory: float
    threads: float
    files: float


def use() -> Use:
    task, files = Path("/proc/self/task"), Path("/dev/fd")
    threads = len(list(task.iterdir())) if task.is_dir() else threading.active_count()
    return Use(_memory(), threads, len(list(files.iterdir())))


def _memory() -> float:
    """Megabytes in memory now; elsewhere than on Linux the most there ever were, which a leak raises as well."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def one_round(folder: Path) -> None:
    """A run of each kind of source, from its beginning over a resume to its end; an SAE loaded, used and saved."""
    config = dict(batch_size=16, save_every=2, eval_every=2, log_every=1, device="cpu", lr=1e-3)
    for shuffle in ("mapped", "buffer"):
        for n_steps in (2, 4):
            source = open_source(folder / "shards", hook="layers.0", shuffle=shuffle)  # type: ignore[arg-type]
            settings = TrainConfig(n_tokens=16 * n_steps, lr_decay_start=-1, **config)  # type: ignore[arg-type]
            train(source, SIZE, settings, folder / "run", resume=n_steps > 2, progress=False)
        loaded = load(folder / "run")
        evaluate(loaded, [readers.rows(20)])
        loaded.save(folder / "saved")
        shutil.rmtree(folder / "run")
    text = tiny_models.documents(30)
    sources = live_sources(readers.HARVEST, text=text, reservoir_rows=256, **readers.language_model())
    for source in sources.values():
        next(source.batches(8))
    for source in sources.values():
        source.close()


def run(rounds: int) -> Iterator[Row]:
    """SAME, or GROWTH of memory, threads or open files from the second quarter of the rounds to the last."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="saefast-attack-") as place:
        folder = Path(place)
        (folder / "shards").mkdir()
        readers.make_shards(folder / "shards", "float32")
        used = []
        for _ in range(rounds):
            one_round(folder)
            used.append(use())
    quarter = max(rounds // 4, 1)
    for i, (name, slack) in enumerate(SLACK.items()):
        early, late = (statistics.median(u[i] for u in part) for part in (used[quarter : 2 * quarter], used[-quarter:]))
        found = outcome.GROWTH if late > early + slack else outcome.SAME
        again = f"make attack ARGS='--part soak --rounds {rounds}'"
        yield Row(name, found, f"soak, {name}", f"{early:g}, then {late:g}", again)
