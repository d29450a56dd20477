"""Runs that are killed at random moments, and at every moment that matters on disk, end with the same bits."""

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import train_job
from train_job import Server

from saefast.models.sae import load
from saefast.training import checkpoint, run_folder
from saefast.training.progress import read_metrics

CLOCKS = ("seconds", "tokens_per_second", "idle_share")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that nobody interrupted, by kind of data and engine."""
    folders = {}
    for kind, engine in (("array", "fused"), ("iterable", "fused"), ("array", "autograd")):
        folder = tmp_path_factory.mktemp("whole") / kind
        assert server.run(out_dir=folder, data=kind, config={"engine": engine}) == 0
        folders[f"{kind} {engine}"] = folder
    return folders


def bits(tensors: dict[str, Any]) -> dict[str, bytes]:
    """The bytes of every tensor among the values. (Whole files differ: safetensors shuffles the header's keys.)"""
    return {k: v.detach().numpy().tobytes() for k, v in tensors.items() if isinstance(v, torch.Tensor)}


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves, clocks apart: the SAE's bytes, the last checkpoint's state, the metrics."""
    last = checkpoint.latest(folder / "checkpoints")
    assert last is not None
    state = checkpoint.load(last)
    lines = [{k: v for k, v in line.items() if k not in CLOCKS} for line in read_metrics(folder)]
    return {
        "weights": bits(dict(load(folder).state_dict())),
        "state": bits(state | state["engine"]),
        "numbers": {name: state[name] for name in ("step", "tokens", "cursor", "scale", "ahead")},
        "metrics": lines,
    }


def check_clean(folder: Path) -> None:
    """No temporary file, two checkpoints, steps ascending without a double."""
    assert not list(folder.rglob("*.tmp"))
    assert not list(folder.rglob(".step*"))
    assert [path.name for path in checkpoint.list_steps(folder / "checkpoints")] == ["step_00000039", "step_00000040"]
    steps = [line["step"] for line in read_metrics(folder)]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize(
    ("kind", "engine", "seed"),
    [("array", "fused", 0), ("array", "fused", 1), ("iterable", "fused", 2), ("array", "autograd", 3)],
)
def test_sigkill_at_random_moments(
    server: Server, whole: dict[str, Path], tmp_path: Path, kind: str, engine: str, seed: int
) -> None:
    moments = random.Random(seed)
    # From less than the start of a run takes to more than all of it: no machine is too fast or too busy for a kill.
    folder, kills, code, patience = tmp_path / "run", 0, None, 0.02
    while code != 0:
        assert kills < 200, "the run makes no headway"
        server.start(out_dir=folder, data=kind, resume=True, config={"engine": engine})
        time.sleep(moments.uniform(0, patience))
        patience *= 1.05
        with suppress(ProcessLookupError):
            os.kill(server.pid, signal.SIGKILL)
        code = server.wait()
        assert code in (0, -signal.SIGKILL), folder.with_suffix(".error").read_text()
        kills += code != 0
    assert kills >= 2
    assert outcome(folder) == outcome(whole[f"{kind} {engine}"])
    check_clean(folder)


@pytest.fixture(scope="module")
def stopped(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that Ctrl-C stopped at step 38 of 40."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    assert server.run(out_dir=folder, stop_at=38) == train_job.STOPPED
    return folder


def test_sigkill_before_every_change_on_disk(
    server: Server, whole: dict[str, Path], stopped: Path, tmp_path: Path
) -> None:
    """Every fsync, rename, truncation and removal of a run's last steps: one kill each, then resumed to the end."""
    expected = outcome(whole["array fused"])
    for call in range(1000):
        folder = tmp_path / f"run{call}"
        shutil.copytree(stopped, folder)
        code = server.run(out_dir=folder, resume=True, die_at=call)
        if code == 0:
            assert call > 30  # two checkpoints of a dozen changes each, and the end
            return
        assert code == -signal.SIGKILL
        assert server.run(out_dir=folder, resume=True) == 0, folder.with_suffix(".error").read_text()
        assert outcome(folder) == expected
        check_clean(folder)
    pytest.fail("die_at never let the run finish")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_saves_and_says_how_to_go_on(
    server: Server, whole: dict[str, Path], tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    assert server.run(out_dir=folder, stop_at=17, signal=number) == train_job.STOPPED
    said = (folder / "stopped.txt").read_text()
    assert said == f"stopped at step 18; resume with train(..., out_dir={str(folder)!r}, resume=True)"
    assert checkpoint.list_steps(folder / "checkpoints")[-1].name == "step_00000018"
    assert not (folder / "sae.safetensors").exists()
    assert server.run(out_dir=folder, resume=True) == 0
    assert outcome(folder) == outcome(whole["array fused"])


def test_a_second_ctrl_c_ends_at_once_without_damage(server: Server, whole: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert server.run(out_dir=folder, stop_at=17, signals=2) == train_job.FAILED
    assert "KeyboardInterrupt()" in folder.with_suffix(".error").read_text()
    assert checkpoint.list_steps(folder / "checkpoints")[-1].name == "step_00000015"
    assert server.run(out_dir=folder, resume=True) == 0
    assert outcome(folder) == outcome(whole["array fused"])


def test_two_processes_cannot_share_a_folder(server: Server, stopped: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    with run_folder.locked(folder):
        assert server.run(out_dir=folder, resume=True) == train_job.FAILED
    assert "another process is training into it" in folder.with_suffix(".error").read_text()
    assert server.run(out_dir=folder, resume=True) == 0
