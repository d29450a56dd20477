"""Training runs in processes of their own, for the tests that kill them.

Run as a script this is a server: it imports torch once, and for every JSON line on stdin forks a child that trains.
It answers with two lines: the child's process id, and how it ended. So a test can afford dozens of kills.
"""

import importlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from hanging import HANG

from saefast.engines.config import TrainConfig
from saefast.models.config import SAEConfig
from saefast.training.api import Stopped, train

SAE = SAEConfig(d_in=12, n_latents=48, k=4)
# Every number that the recipe would choose, and all that brings latents back.
CONFIG: dict[str, Any] = dict(
    engine="fused", device="cpu", n_tokens=32 * 40, n_epochs=1, batch_size=32, lr=1e-2, lr_warmup_steps=5,
    dead_after=100, init_rows=32, beta1=0.9, lr_decay_share=0.2, resample_every=2, auxk_coef=1 / 32, auxk_k=4,
    log_every=2, save_every=3, eval_every=10, seed=3,
)  # fmt: skip
FAILED, STOPPED = 1, 130
# Against hangs alone.
PATIENCE = 600.0


def rows(n: int = 700, seed: int = 0) -> torch.Tensor:
    """(n, 12) made of few directions, around a mean that is not 0."""
    generator = torch.Generator().manual_seed(seed)
    code = torch.rand(n, 20, generator=generator) ** 6
    return code @ torch.randn(20, 12, generator=generator) * 3 + 1


def data(kind: str) -> Any:
    """The same rows as an array, or as a function that gives ragged batches of them."""
    x = rows()
    return x if kind == "array" else lambda: iter(x.split([100, 150, 50, 250, 150]))


def run(job: dict[str, Any]) -> None:
    """A job: out_dir, and where wanted resume, data (a kind), config (fields of TrainConfig), and stop_at: signal
    itself, once or `signals` times, with the first line of metrics from that step on. A job with a task is one of
    attack/jobs.py."""
    if "task" in job:
        importlib.import_module("attack.jobs").TASKS[job["task"]](job)
        return

    def on_log(line: dict[str, Any]) -> None:
        if line["step"] >= job.get("stop_at", 1e9):
            for _ in range(job.get("signals", 1)):
                os.kill(os.getpid(), job.get("signal", signal.SIGINT))

    config = TrainConfig(**(CONFIG | job.get("config", {})))
    train(data(job.get("data", "array")), SAE, config, job["out_dir"], resume=job.get("resume", False), on_log=on_log)


def die_at(call: int, made: list[int] | None = None) -> None:
    """From here on this process kills itself right before its call number `call` that makes a change on disk final.
    `made` counts those that it does make."""
    left = [call]

    def deadly(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            if made is not None:
                made[0] += 1
            return original(*args, **kwargs)

        return wrapper

    for owner, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "truncate"), (shutil, "rmtree")):
        setattr(owner, name, deadly(getattr(owner, name)))


def die_after(events: int) -> None:
    """From here on this thread kills its process at Python's call or return number `events`, of C functions too."""
    left = [events]

    def count(frame: FrameType, event: str, argument: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def count_all(file: Path) -> None:
    """Keeps in a file how many calls (see die_after) and changes on disk (die_at) this process has made by its end."""
    calls, changes = [0], [0]
    die_at(-1, changes)

    def count(frame: FrameType, event: str, argument: Any) -> None:
        calls[0] += 1

    AT_END.append(lambda: file.write_text(json.dumps([calls[0], changes[0]])))
    sys.setprofile(count)


def read_counts(file: Path) -> tuple[int, int]:
    calls, changes = json.loads(file.read_text())
    return calls, changes


# What a child does when its job is done.
AT_END: list[Callable[[], Any]] = []


def child(job: dict[str, Any]) -> int:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "die_at" in job:
        die_at(job["die_at"])
    if "die_after" in job:
        die_after(job["die_after"])
    if "count" in job:
        count_all(Path(job["count"]))
    try:
        run(job)
    except Stopped as stopped:
        Path(job["out_dir"], "stopped.txt").write_text(str(stopped))
        return STOPPED
    except BaseException as error:
        Path(job["out_dir"]).with_suffix(".error").write_text(repr(error))
        return FAILED
    sys.setprofile(None)
    for act in AT_END:
        act()
    return 0


def serve() -> None:
    torch.set_num_threads(1)
    # What the first training step imports is then there in every child.
    for engine in ("fused", "autograd"):
        train(data("array"), SAE, TrainConfig(**(CONFIG | {"n_tokens": 64, "engine": engine})))
    for task in sys.argv[1:]:
        importlib.import_module("attack.jobs").warm_up(task)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os._exit(child(json.loads(line)))
        answer(pid)
        answer(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def answer(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


class Server:
    """The test's end of the server. `start` a job, act on its `pid`, `wait` for its exit code (-9 after SIGKILL).

    tasks: those of attack/jobs.py that the server is to be warm for.
    """

    def __init__(self, *tasks: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, *tasks],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
        )
        self.pid = 0

    def start(self, **job: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job, default=str) + "\n")
        self.process.stdin.flush()
        self.pid = self._read()

    def wait(self) -> int:
        return self._read()

    def run(self, **job: Any) -> int:
        self.start(**job)
        return self.wait()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=HANG)

    def _read(self) -> int:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], PATIENCE)[0]:
            self.process.kill()
            raise TimeoutError(f"process {self.pid} hangs")
        return int(self.process.stdout.readline())


if __name__ == "__main__":
    serve()
