"""Cases run in worker processes: one that crashes or hangs costs its worker, and the next case gets a new one.

An arena is an object with `run(number) -> dict`, made in the worker by calling `module.open_arena(**arguments)`. What a
case prints goes nowhere; its answer travels as one line of JSON over a pipe of its own.
"""

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

# Against hangs alone: the slowest case takes a second on an idle machine.
HANG_SECONDS = 300.0
# A header that claims a terabyte must end in an error message, not in the machine's memory.
MEMORY = 8 << 30
ROOT = Path(__file__).resolve().parent.parent.parent
CRASH, HANG = "crash", "hang"


class Arena(NamedTuple):
    """How a worker makes its arena: the module's name, and what its open_arena is called with (JSON)."""

    module: str
    arguments: dict[str, Any]


class Worker:
    """One process with an arena in it."""

    def __init__(self, arena: Arena) -> None:
        self._answers, theirs = os.pipe()
        paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "PYTHONFAULTHANDLER": "1"}
        command = [sys.executable, "-m", "attack.pool", arena.module, json.dumps(arena.arguments), str(theirs)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if "ATTACK_STDERR" not in os.environ else None,
            pass_fds=[theirs],
            env=os.environ | settings,
        )
        os.close(theirs)
        self._unread = b""

    def run(self, number: int) -> dict[str, Any] | str:
        """The arena's answer; CRASH with the signal, or HANG, after which this worker is of no further use."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{number}\n".encode())
            self._process.stdin.flush()
        while b"\n" not in self._unread:
            if not select.select([self._answers], [], [], HANG_SECONDS)[0]:
                return HANG
            got = os.read(self._answers, 1 << 16)
            if not got:
                code = self._process.wait()
                if code > 0:
                    raise RuntimeError(f"case {number} ended its worker with exit code {code}: a fault of the attack")
                return f"{CRASH}: {signal.Signals(-code).name}"
            self._unread += got
        line, _, self._unread = self._unread.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()
        os.close(self._answers)


def run_all(arena: Arena, numbers: Iterable[int], workers: int) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(number, answer) of every case, in whatever order they are done."""
    waiting: SimpleQueue[int] = SimpleQueue()
    for number in numbers:
        waiting.put(number)
    done: SimpleQueue[tuple[int, dict[str, Any] | str] | None] = SimpleQueue()
    with ThreadPoolExecutor(workers) as threads:
        loops = [threads.submit(_loop, arena, waiting, done) for _ in range(workers)]
        for loop in loops:
            loop.add_done_callback(lambda _: done.put(None))
        left = workers
        while left:
            got = done.get()
            if got is None:
                left -= 1
            else:
                yield got
        for loop in loops:
            loop.result()


def _loop(arena: Arena, waiting: "SimpleQueue[int]", done: "SimpleQueue[Any]") -> None:
    worker = Worker(arena)
    try:
        while True:
            try:
                number = waiting.get_nowait()
            except Empty:
                return
            answer = worker.run(number)
            done.put((number, answer))
            if isinstance(answer, str):
                worker.close()
                worker = Worker(arena)
    finally:
        worker.close()


def serve(module: str, arguments: str, pipe: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    arena = importlib.import_module(module).open_arena(**json.loads(arguments))
    for line in sys.stdin:
        answer = json.dumps(arena.run(int(line))) + "\n"
        os.write(pipe, answer.encode())


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
