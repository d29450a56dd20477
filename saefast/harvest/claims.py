"""Who works at which part of a shared harvest: a file for each part, made by one process and no other.

Claim g of part n is the file `n.g.claim`, created with O_CREAT|O_EXCL, which one process alone succeeds at, on a disk
and on NFS (version 3 or later). It says who made it, is locked (flock) as long as that process lives, and its time is
set anew every BEAT seconds. A process that finds one asks whether its maker is gone; if so it creates claim g + 1.

What is sure: on one machine a lock that is free means that its holder has ended, however it ended, and one that is
held means that it lives, though it may stand still. What is not: of another machine only the time is known. A claim
that was not renewed for `patience` seconds is taken to be of a process that is gone. If it only stood still (stopped,
or its network was away), both harvest the part: the work is done twice, and the rows are right, since each claim has a
folder of its own. Times are compared as the file server sets them, so that clocks need not agree.
"""

import contextlib
import fcntl
import json
import os
import platform
import tempfile
import threading
import time
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypedDict

from saefast.errors import InputError
from saefast.schema import Count, fits

# Seconds between two signs of life.
BEAT = 10.0
_TRIES, _PAUSE = 50, 0.02


class Maker(TypedDict):
    """What a claim says: the process, its machine, and whether it could lock the file."""

    host: str
    machine: str
    pid: Count
    locked: bool


class Holder(NamedTuple):
    """Who has a claim, in words, and how long ago it gave a sign of life."""

    name: str
    age: float
    dead: bool


class Claim:
    """This process's claim: renewed by a thread until it is released, or the process ends."""

    def __init__(self, folder: Path, part: int, generation: int, file: BinaryIO) -> None:
        self.generation = generation
        self._path, self._next = (_path(folder, part, generation + more) for more in (0, 1))
        self._file = file
        self._ended = threading.Event()
        _write_maker(file, _locked_soon(file))
        threading.Thread(target=self._beat, name="saefast-claim", daemon=True).start()

    @property
    def lost(self) -> bool:
        """Whether another process took this one to be gone, and has the part now."""
        return self._next.exists()

    def release(self) -> None:
        """Leaves the part to others, unless one has it already: what comes after a claim must be seen to do so."""
        self._ended.set()
        if not self.lost:
            self._path.unlink(missing_ok=True)
        self._file.close()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            # A file server that is away for a while is no reason to end.
            with contextlib.suppress(OSError):
                os.utime(self._path)


def take(folder: Path, part: int, patience: float) -> Claim | Holder:
    """A claim on the part, or who has it. `folder` is where the claims are.

    Raises:
        InputError: the folder cannot be written.
    """
    while True:
        generation = _next_generation(folder, part)
        if generation:
            holder = holder_of(_path(folder, part, generation - 1), patience)
            if holder is None:
                continue
            if not holder.dead:
                return holder
        try:
            file = _path(folder, part, generation).open("x+b")
        except FileExistsError:
            continue
        except OSError as error:
            raise InputError(f"{folder} cannot be written: {error.strerror or error}") from None
        return Claim(folder, part, generation, file)


def latest(folder: Path, part: int, patience: float) -> Holder | None:
    """Who had the part last; None where nobody has it."""
    generation = _next_generation(folder, part)
    return holder_of(_path(folder, part, generation - 1), patience) if generation else None


def holder_of(path: Path, patience: float) -> Holder | None:
    """Whose claim a file is; None if it is there no more."""
    try:
        with path.open("r+b") as file:
            free = _locked(file)
            if os.fstat(file.fileno()).st_ino != path.stat().st_ino:
                return None
            age = max(_server_time(path.parent) - os.fstat(file.fileno()).st_mtime, 0.0)
            maker = _read_maker(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    if maker is None:  # its maker is just writing it, or was killed at that
        return Holder("a process that says no more", age, age > patience)
    name = f"process {maker['pid']} on {maker['host']}"
    if maker["locked"] and maker["machine"] == _machine():
        return Holder(name, age, free)
    return Holder(name, age, age > patience)


def _path(folder: Path, part: int, generation: int) -> Path:
    return folder / f"{part:05d}.{generation}.claim"


def _next_generation(folder: Path, part: int) -> int:
    generation = 0
    while _path(folder, part, generation).exists():
        generation += 1
    return generation


def _locked(file: BinaryIO) -> bool:
    """Whether the file could be locked: not while another process has it, nor where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _locked_soon(file: BinaryIO) -> bool:
    """As `_locked`, where others may have it for a moment, to see whether they can."""
    for _ in range(_TRIES):
        if _locked(file):
            return True
        time.sleep(_PAUSE)
    return False


def _write_maker(file: BinaryIO, locked: bool) -> None:
    maker = Maker(host=platform.node(), machine=_machine(), pid=os.getpid(), locked=locked)
    file.write(json.dumps(maker).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _read_maker(file: BinaryIO) -> Maker | None:
    try:
        found = json.loads(file.read())
    except ValueError:
        return None
    return found if fits(found, Maker) else None


@cache
def _machine() -> str:
    """The running system: two machines may have one name, and one machine several, in containers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text(encoding='ascii').strip()} {platform.node()}" if boot.exists() else platform.node()


def _server_time(folder: Path) -> float:
    """Now, by the clock that the times of files in the folder are set by."""
    with tempfile.TemporaryFile(dir=folder) as file:
        os.utime(file.fileno())
        return os.fstat(file.fileno()).st_mtime
