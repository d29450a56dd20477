"""Runs and harvests killed at random moments, resumed until they are done, compared with uninterrupted ones."""

import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import train_job
from attack import jobs
from attack.outcome import HANG, LITTER, SAME, SILENT, TRACEBACK
from attack.readers import read_shards
from attack.summary import Row
from train_job import Server

from saefast.data.shards import read_index
from saefast.models.sae import load
from saefast.training import checkpoint
from saefast.training.progress import read_metrics

CLOCKS = ("seconds", "tokens_per_second", "idle_share")
STATE = ("step", "tokens", "cursor", "scale", "ahead")
# How a process dies: at a call of Python's, before a change on disk becomes final, or whenever the clock says.
CALL, DISK, CLOCK = "a call", "a change on disk", "the clock"
MOST_KILLS = 200


def bits(tensors: dict[str, Any]) -> dict[str, bytes]:
    """The bytes of every tensor among the values. (Whole files differ: safetensors shuffles the header's keys.)"""
    flat = {name: value.detach().contiguous().reshape(-1) for name, value in tensors.items() if _is_tensor(value)}
    return {name: value.view(torch.uint8).numpy().tobytes() for name, value in flat.items() if value.numel()}


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves, clocks apart: the SAE's bytes, the last checkpoint's state, the metrics."""
    last = checkpoint.latest(folder / "checkpoints")
    assert last is not None
    state = checkpoint.load(last)
    lines = [{k: v for k, v in line.items() if k not in CLOCKS} for line in read_metrics(folder)]
    return {
        "weights": bits(dict(load(folder).state_dict())),
        "state": bits(state | state["engine"]),
        "numbers": {name: state[name] for name in STATE},
        "metrics": lines,
    }


def check_clean(folder: Path) -> None:
    """No temporary file, two checkpoints, steps ascending without a double."""
    check_no_leftovers(folder)
    assert [path.name for path in checkpoint.list_steps(folder / "checkpoints")] == ["step_00000039", "step_00000040"]
    steps = [line["step"] for line in read_metrics(folder)]
    assert steps == sorted(set(steps))


def check_no_leftovers(folder: Path) -> None:
    hidden = [path for path in folder.rglob(".*") if path.name not in (".", "..")]
    assert not hidden + list(folder.rglob("*.tmp")), f"left over: {hidden}"


def outcome_of_many(folder: Path) -> dict[str, Any]:
    return {path.name: outcome(path) for path in sorted(folder.iterdir()) if path.is_dir()}


def check_many(folder: Path) -> None:
    for path in folder.iterdir():
        check_clean(path)


def harvest_outcome(folder: Path) -> dict[str, Any]:
    """The index, every row with its place, tokens and statistics."""
    return {"index": read_index(folder), "rows": [str(part) for part in read_shards(folder, verify=True)]}


@dataclass(frozen=True)
class Condition:
    """What is killed: a job, what its folder holds in the end, and what must not be left in it."""

    name: str
    job: dict[str, Any]
    outcome: Callable[[Path], Any] = outcome
    check: Callable[[Path], None] = check_clean


LEAN = {"optimizer": "adam-lean"}
CONDITIONS = [
    Condition("array", {"data": "array"}),
    Condition("iterable", {"data": "iterable"}),
    Condition("autograd engine", {"data": "array", "config": {"engine": "autograd", "ema_decay": 0.9}}),
    Condition("file", {"task": "mapped", "data": "rows.npy"}),
    Condition("shards, mapped", {"task": "mapped", "data": "shards"}),
    Condition("shards, buffer, lean", {"task": "mapped", "data": "shards", "shuffle": "buffer", "config": LEAN}),
    Condition("several", {"task": "several"}, outcome_of_many, check_many),
    Condition("live", {"task": "live"}, outcome_of_many, check_many),
    Condition("harvest", {"task": "harvest"}, harvest_outcome, check_no_leftovers),
]


@dataclass
class Report:
    """Of one run that was killed again and again: kills by kind, what came of it and what was wrong, if anything."""

    condition: str
    seed: int
    kills: Counter[str] = field(default_factory=Counter)
    outcome: str = SAME
    fault: str = ""


class Killer:
    """Kills runs of each condition; the uninterrupted ones are made once."""

    def __init__(self, place: Path, conditions: list[Condition]) -> None:
        self.place, self._server = place, Server(*{c.job["task"] for c in conditions if "task" in c.job})
        self._whole: dict[str, tuple[Any, int, int]] = {}
        (place / "acts").mkdir(parents=True)
        jobs.prepare(place / "acts")

    def close(self) -> None:
        self._server.close()

    def attack(self, condition: Condition, seed: int, most: int = MOST_KILLS) -> Report:
        """One run, killed at most `most` times, then left alone to its end."""
        expected, calls, changes = self._untouched(condition)
        report, rng = Report(condition.name, seed), random.Random(f"{condition.name}/{seed}")
        folder = self.place / f"{condition.name} {seed}"
        job, patience = condition.job | {"out_dir": str(folder), "acts": str(self.place / "acts")}, 0.02
        try:
            for number in range(most + 1):
                kind = rng.choice([CALL, DISK, CLOCK]) if number < most else ""
                # A run gets about a third of the way at most, so that several kills fall into each.
                limits = {
                    CALL: {"die_after": rng.randrange(calls // 3)},
                    DISK: {"die_at": rng.randrange(changes // 3 + 1)},
                }
                self._server.start(**job, resume=True, **limits.get(kind, {}))
                if kind == CLOCK:
                    patience = self._kill_by_clock(rng, patience)
                code = self._server.wait()
                if code == 0:
                    break
                if code != -signal.SIGKILL:
                    report.outcome, report.fault = TRACEBACK, f"exit code {code}: {self._error(folder)}"
                    return report
                report.kills[kind] += 1
            report.outcome, report.fault = self._verdict(condition, folder, expected)
        except TimeoutError as error:
            report.outcome, report.fault = HANG, str(error)
        if report.outcome == SAME:
            shutil.rmtree(folder)
        return report

    def _kill_by_clock(self, rng: random.Random, patience: float) -> float:
        """Kills after a random time, from a range that grows with every kill: right for machines of any speed."""
        time.sleep(rng.uniform(0, patience))
        with suppress(ProcessLookupError):
            os.kill(self._server.pid, signal.SIGKILL)
        return patience * 1.3

    def _untouched(self, condition: Condition) -> tuple[Any, int, int]:
        """What an uninterrupted run leaves, and how many calls and changes on disk it makes."""
        if condition.name not in self._whole:
            folder, counted = self.place / f"{condition.name} whole", self.place / "counted.json"
            job = condition.job | {"out_dir": str(folder), "acts": str(self.place / "acts")}
            if self._server.run(**job, count=str(counted)) != 0:
                raise RuntimeError(f"{condition.name}: {self._error(folder)}")
            condition.check(folder)
            calls, changes = train_job.read_counts(counted)
            self._whole[condition.name] = condition.outcome(folder), calls, changes
        return self._whole[condition.name]

    def _verdict(self, condition: Condition, folder: Path, expected: Any) -> tuple[str, str]:
        try:
            condition.check(folder)
        except AssertionError as error:
            return LITTER, str(error)
        if condition.outcome(folder) != expected:
            return SILENT, "other bits than an uninterrupted run"
        return SAME, ""

    def _error(self, folder: Path) -> str:
        file = folder.with_suffix(".error")
        return file.read_text() if file.exists() else "died without a word"


def run(place: Path, kills: int, seed: int, conditions: list[Condition] | None = None) -> Iterator[Row]:
    """Runs of one condition after another, until `kills` processes were killed: SAME, or what was wrong in the end."""
    chosen = conditions or CONDITIONS
    killer, done, number = Killer(place, chosen), 0, seed
    try:
        while done < kills:
            for condition in chosen:
                report = killer.attack(condition, number, max(kills - done, 1))
                done += (n := sum(report.kills.values()))
                yield _row(report, n)
                if done >= kills:
                    break
            number += 1
    finally:
        killer.close()


def _row(report: Report, kills: int) -> Row:
    kinds = ", ".join(f"{n} by {kind}" for kind, n in sorted(report.kills.items()))
    again = f"make attack ARGS='--part kill --only \"{report.condition}\" --seed {report.seed} --kills {kills}'"
    what = f"{report.condition}, run {report.seed}, killed {kinds}"
    return Row(report.condition, report.outcome, what, report.fault, again, kills)
