"""The folder of a training run: its settings, its lock, and whether a run may go on in it.

RUN/config.json       SAEConfig's fields, and under "train" the TrainConfig; `read_config` gives both back
    metrics.jsonl     one line per logged step
    checkpoints/      see saefast.training.checkpoint
    sae.safetensors   the finished SAE: `saefast.load(RUN)`
    ema/              the moving average of the weights as an SAE of its own, where TrainConfig.ema_decay asks for it
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saefast.engines.config import TrainConfig
from saefast.engines.recipe import Recipe
from saefast.errors import InputError
from saefast.files import read_json, usable, write_json
from saefast.models.config import SAEConfig
from saefast.models.sae import CONFIG, WEIGHTS, check_config_file
from saefast.training import checkpoint
from saefast.training.progress import METRICS
from saefast.typed import typed

CHECKPOINTS, EMA = "checkpoints", "ema"
TRAIN = "train"
# What may differ when a run is resumed: its length, what it reports and saves, where it runs.
FREE = ("n_tokens", "n_epochs", "device", "log_every", "save_every", "eval_every", "stop_at_plateau")


def write_config(folder: Path, sae_config: SAEConfig, train_config: TrainConfig) -> None:
    write_json(folder / CONFIG, sae_config.to_dict() | {TRAIN: train_config.to_dict()})


@typed
def read_config(path: str | Path) -> tuple[SAEConfig, TrainConfig]:
    """The settings of a run, from its folder or its config.json, ready to be given to `train` again.

    A config.json that `SAE.save` wrote has no training settings: then they are the defaults.

    Raises:
        InputError: no such file, or one with unknown or impossible settings.
    """
    file = usable(path)
    file = file / CONFIG if file.is_dir() else file
    values = read_json(file)
    if not isinstance(values, dict):
        raise InputError(f"{file} is no config: expected a JSON object with d_in and n_latents")
    try:
        train_config = TrainConfig.from_dict(values.pop(TRAIN, {}))
        return SAEConfig.from_dict(values), train_config
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def check_ours(folder: Path) -> None:
    """Raises InputError where a run in this folder would overwrite the config.json of another program.

    A folder with checkpoints is a run's, even if its config.json was changed or is gone: the run writes it anew.
    """
    if not checkpoint.list_steps(folder / CHECKPOINTS):
        for place in (folder, folder / EMA):
            check_config_file(place)


def check_new(folder: Path) -> None:
    """Raises InputError where a run, or anything else, is in the way of a new one."""
    if folder.is_dir() and (any((folder / name).exists() for name in (WEIGHTS, CHECKPOINTS, METRICS))):
        raise InputError(f"{folder} already holds a run: continue it with resume=True, or choose another out_dir")


def check_same(
    path: Path, old: dict[str, Any], sae_config: SAEConfig, train_config: Recipe, step: int, total_steps: int
) -> None:
    """Raises InputError where a checkpoint is of another run than the one asked for, naming every field that differs.

    Args:
        path: the checkpoint, for the message.
        old: its {"sae": ..., "train": ...} settings.
        step: optimiser steps it has behind it; total_steps: those the run is to have.
    """
    new = settings(sae_config, train_config)
    differ = _differences(old["sae"], new["sae"], ("metadata",))
    # A setting that a newer version added had its default when the checkpoint was written.
    differ += _differences(TrainConfig().to_dict() | old["train"], new[TRAIN], FREE)
    if differ:
        raise InputError(
            f"{path} is of a run with other settings ({'; '.join(differ)}): resume with its own (config.json in the "
            f"run's folder), or train into another folder; only {', '.join(FREE)} may change"
        )
    if step > total_steps:
        raise InputError(
            f"{path} is at step {step}, beyond the {total_steps} steps asked for: raise n_tokens to at least "
            f"{step * train_config.batch_size}"
        )


def _differences(old: dict[str, Any], new: dict[str, Any], free: tuple[str, ...]) -> list[str]:
    names = [name for name in {**old, **new} if name not in free and old.get(name) != new.get(name)]
    return [f"{name} was {old.get(name)!r}, is {new.get(name)!r}" for name in names]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Creates the folder and holds it for one process; the lock goes away with the process, however it ends.

    Folders that are new and still empty at the end are removed: nothing began.

    Raises:
        InputError: another process is training into it, or it cannot be written.
    """
    new = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, new)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)  # a folder can be locked like a file, and leaves no lock file
        stack.callback(os.close, descriptor)
        _lock(descriptor, folder)
        yield


def _remove_empty(folders: list[Path]) -> None:
    for path in folders:
        with contextlib.suppress(OSError):
            path.rmdir()


@contextlib.contextmanager
def nothing_begun(folder: Path, *more: str) -> Iterator[None]:
    """Removes the files of a new run that bad input ends before its first checkpoint; older files stay.

    more: files that it has beside config.json and metrics.jsonl.
    """
    new = [folder / name for name in (CONFIG, METRICS, *more) if not (folder / name).exists()]
    try:
        yield
    except InputError:
        if not checkpoint.list_steps(folder / CHECKPOINTS):
            for path in new:
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                (folder / CHECKPOINTS).rmdir()
        raise


def _lock(descriptor: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: two runs into one folder go unnoticed there
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{folder} is in use: another process is training into it; wait or choose another out_dir"
        ) from None
    except OSError:
        # Some network file systems have no locks; a run there is not refused for that.
        return


def remove_leftovers(folder: Path) -> None:
    """Removes the temporary files of a run that was killed while it wrote. Only for the process that holds the lock."""
    checkpoint.remove_leftovers(folder / CHECKPOINTS)
    for place in (folder, folder / EMA):
        for name in (CONFIG, WEIGHTS):
            for leftover in place.glob(f".{name}.*.tmp"):
                leftover.unlink()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a full disk or a read-only folder raises into one line; what was saved before stays as it was."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot write {path} ({reason}): {_intact(path)}") from error


def _intact(path: Path) -> str:
    folder = next((p for p in (path, *path.parents) if os.path.isdir(p / CHECKPOINTS)), None)
    steps = checkpoint.list_steps(folder / CHECKPOINTS) if folder else []
    if not steps:
        return "nothing was saved; free space or choose another out_dir"
    return f"free space and resume; {steps[-1]} is intact"


def settings(sae_config: SAEConfig, train_config: TrainConfig) -> dict[str, Any]:
    """What a checkpoint remembers of the settings, for `check_same`, as JSON gives it back (no tuples)."""
    found: dict[str, Any] = json.loads(json.dumps({"sae": sae_config.to_dict(), TRAIN: train_config.to_dict()}))
    return found
