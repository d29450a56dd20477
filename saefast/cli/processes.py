"""`saefast harvest --data-parallel`: this process takes part in a shared harvest, or starts several that do.

On a GPU this is unproven: nothing has run on more than one.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from saefast.errors import InputError
from saefast.harvest.config import HarvestConfig
from saefast.harvest.parts import harvest_parts, tokens_done
from saefast.harvest.to_disk import HarvestReport

# More processes than these, or than there are cores, only take each other's memory.
_A_GPU, _ANYWHERE = 4, 8
# What torchrun and srun call a process's number on its machine, and how many there are of the whole program.
_RANKS = (("LOCAL_RANK", "WORLD_SIZE"), ("SLURM_LOCALID", "SLURM_NTASKS"))

# Gives the settings and the text, in each process; can be sent to it.
Settings = Callable[[], tuple[HarvestConfig, Any]]


class Place(NamedTuple):
    """Where a process runs its model, and with how many of torch's threads."""

    device: str
    threads: int


def places(n: int | Literal["auto"], device: str, environment: Mapping[str, str] = os.environ) -> list[Place]:
    """Where each process of this command runs; where it is one, that is the command's own.

    "auto" is one process a GPU; or the command's own, at the GPU of its number, where torchrun or srun has started
    several. Where the device is named it is that of all, and "auto" is one process.
    """
    if n != "auto" and n < 1:
        raise InputError(f"data_parallel is {n}, expected 'auto' or a number of processes")
    gpus = torch.cuda.device_count() if device == "auto" else 0
    most = max(os.cpu_count() or 1, _A_GPU * gpus, _ANYWHERE)
    if n != "auto" and n > most:
        raise InputError(f"data_parallel is {n}, expected at most {most} on this machine")
    rank = next((environment[name] for name, size in _RANKS if int(environment.get(size, "1")) > 1), None)
    first = int(rank or 0)
    wanted = (1 if rank is not None else max(gpus, 1)) if n == "auto" else n
    threads = max(torch.get_num_threads() // wanted, 1)
    named = [f"cuda:{(first + number) % gpus}" if gpus else device for number in range(wanted)]
    return [Place(name, threads) for name in named]


def harvest_in(out: Path, settings: Settings, where: Sequence[Place], patience: float, shown: bool) -> HarvestReport:
    """Takes part in the harvest into `out` with a process at each place; see harvest_parts for `patience`.

    Ctrl-C ends them all; parts that are done stay. A process that is killed does not end the others.

    Raises:
        InputError: what a process raised, where none came to the end.
    """
    if len(where) == 1:
        config, text = settings()
        config = dataclasses.replace(config, device=where[0].device)
        return harvest_parts(out, config, text=text, progress=shown, take_over_after=patience)
    started = time.perf_counter()
    workers = [_Worker(out, settings, place, patience) for place in where]
    try:
        with _bar(out, settings()[0].max_tokens, shown) as bar:
            _listen(workers, bar)
    except BaseException:
        for worker in workers:
            worker.interrupt()
        raise
    finally:
        for worker in workers:
            worker.process.join()
    return dataclasses.replace(_outcome(workers), seconds=time.perf_counter() - started)


class _Worker:
    """A process that takes part, and what it has said so far."""

    def __init__(self, out: Path, settings: Settings, place: Place, patience: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, its = context.Pipe(duplex=False)
        self.process: SpawnProcess = context.Process(target=_take_part, args=(out, settings, place, patience, its))
        self.process.start()
        # Its end must be open in the process alone, so that this one's ends with it.
        its.close()
        self.report: HarvestReport | None = None
        self.error = ""
        self.tokens = 0

    def interrupt(self) -> None:
        if self.process.is_alive() and self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGINT)

    def receive(self) -> tuple[str, Any] | None:
        """The next thing that it says; None at its end, however it ended."""
        try:
            kind, value = self.pipe.recv()
        except (EOFError, OSError):
            return None
        if kind == "report":
            self.report = value
        elif kind == "error":
            self.error = value
        elif kind == "tokens":
            self.tokens += value
        return kind, value


def _take_part(out: Path, settings: Settings, place: Place, patience: float, pipe: Connection) -> None:
    """What a worker process does."""

    def say(kind: str, value: object) -> None:
        try:
            pipe.send((kind, value))
        except BrokenPipeError:
            # The command itself was killed: what it started must not go on by itself.
            raise KeyboardInterrupt from None

    def warn(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, RuntimeWarning):
            say("warning", str(message))

    warnings.showwarning = warn
    torch.set_num_threads(place.threads)
    try:
        config, text = settings()
        config = dataclasses.replace(config, device=place.device)
        told = lambda tokens: say("tokens", tokens)  # noqa: E731
        say("report", harvest_parts(out, config, text=text, progress=told, take_over_after=patience))
    except (InputError, OSError) as error:
        say("error", str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _listen(workers: Sequence[_Worker], bar: Any) -> None:
    """Until all workers have ended."""
    by_pipe = {worker.pipe: worker for worker in workers}
    warned: set[str] = set()
    while by_pipe:
        for pipe in wait([*by_pipe]):
            said = by_pipe[pipe].receive()  # type: ignore[index]
            if said is None:
                del by_pipe[pipe]  # type: ignore[arg-type]
            elif said[0] == "tokens" and bar is not None:
                bar.update(said[1])
            elif said[0] == "warning" and said[1] not in warned:
                warned.add(said[1])
                warnings.warn(said[1], RuntimeWarning, stacklevel=3)


def _outcome(workers: Sequence[_Worker]) -> HarvestReport:
    reports = [worker.report for worker in workers if worker.report]
    ended = [f"process {worker.process.pid} {_ending(worker)}" for worker in workers if worker.report is None]
    if not reports:
        errors = [worker.error for worker in workers if worker.error]
        raise InputError(errors[0] if errors else f"{'; '.join(ended)}; finished parts stay: the same command goes on")
    if ended:
        warnings.warn(f"{'; '.join(ended)}; the others did its part", RuntimeWarning, stacklevel=3)
    return dataclasses.replace(reports[0], tokens=sum(worker.tokens for worker in workers))


def _ending(worker: _Worker) -> str:
    code = worker.process.exitcode or 0
    return worker.error or (f"was killed by signal {-code}" if code < 0 else f"ended with code {code}")


@contextlib.contextmanager
def _bar(out: Path, max_tokens: int | None, shown: bool) -> Iterator[Any]:
    """One progress line for all processes of this command."""
    if not shown:
        yield None
        return
    from tqdm.auto import tqdm

    total = None if max_tokens is None else max(max_tokens - tokens_done(out), 0)
    with tqdm(desc="harvest", unit=" tokens", unit_scale=True, total=total, dynamic_ncols=True) as bar:
        yield bar
