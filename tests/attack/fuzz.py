"""Damaged files against every reader: case `number` of a seed is one reader, one of its files, one kind of damage."""

import os
import random
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from attack import outcome, readers
from attack.mutate import damage
from attack.pool import HANG, Arena, run_all
from attack.readers import Reader
from attack.summary import Row

from saefast.errors import InputError

# What a run of few steps says of itself; other warnings are about a damaged checkpoint.
SHORT = ".*(an SAE needs|no latent can be called dead)"


class Case(NamedTuple):
    """What is damaged, and how: data is the file's new content, None where it is no file any more."""

    number: int
    reader: Reader
    file: str
    kind: str
    data: bytes | None


class Fuzz:
    """An arena (see pool.py): the readers' whole folders, and what they are read as."""

    def __init__(self, place: str, seed: int, only: str = "", part: str = "fuzz") -> None:
        torch.set_num_threads(1)
        self._seed = seed
        self._readers = [reader for reader in readers.available(part) if only in reader.name]
        self._place = Path(place, str(os.getpid()))
        self._expected: dict[str, str] = {}

    def run(self, number: int) -> dict[str, Any]:
        case = self.case(number)
        folder = self._place / "work"
        readers.copy_of(self._whole(case.reader), folder)
        apply(case, folder / case.file)
        found, detail = self._outcome(case, folder)
        return _answer(case, found, detail)

    def show(self, number: int) -> str:
        """The same case again, for a person: raises whatever the reader raises."""
        case, folder = self.case(number), self._place / "work"
        readers.copy_of(self._whole(case.reader), folder)
        print(f"{case.reader.name}: {folder / case.file} after {case.kind}")
        apply(case, folder / case.file)
        found = outcome.digest(case.reader.read(folder))
        return f"read as {found}, whole it is {self._expected[case.reader.name]}"

    def case(self, number: int) -> Case:
        """The same for the same seed and number, in any process."""
        rng = random.Random(f"{self._seed}/{number}")
        reader = rng.choices(self._readers, [reader.weight for reader in self._readers])[0]
        whole = self._whole(reader)
        files = sorted({str(path.relative_to(whole)) for glob in reader.files for path in whole.glob(glob)})
        file = rng.choice(files)
        return Case(number, reader, file, *damage(file, (whole / file).read_bytes(), rng))

    def _whole(self, reader: Reader) -> Path:
        """The folder that every case is a damaged copy of. Read where the copies lie, for messages and paths."""
        folder = self._place / "whole" / reader.name
        if not folder.exists():
            readers.write_all(self._place / "work", reader)
            readers.copy_of(self._place / "work", folder)
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                warnings.filterwarnings("ignore", SHORT)
                self._expected[reader.name] = outcome.digest(reader.read(self._place / "work"))
        return folder

    def _outcome(self, case: Case, folder: Path) -> tuple[str, str]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            warnings.filterwarnings("ignore", SHORT)
            try:
                found = outcome.digest(case.reader.read(folder))
            except InputError as error:
                return outcome.refusal(error, folder)
            except BaseException as error:
                return outcome.TRACEBACK, outcome.frame_of(error)
        if not case.reader.writes and case.data is not None and (folder / case.file).read_bytes() != case.data:
            return outcome.ALTERED, "reading changed the file"
        warned = [str(warning.message) for warning in said if warning.category is RuntimeWarning]
        return self._compared(case, found, warned)

    def _compared(self, case: Case, found: str, warned: list[str]) -> tuple[str, str]:
        expected = self._expected[case.reader.name]
        if warned:
            # A run that falls back to an older checkpoint still ends with the same bits.
            same = found == expected or not covered(case)
            return (outcome.FELL_BACK if same else outcome.SILENT), warned[0]
        if found == expected:
            return outcome.SAME, ""
        return (outcome.SILENT if covered(case) else outcome.NO_DIGEST), f"read as {found}, whole it is {expected}"


def covered(case: Case) -> bool:
    return any(fnmatch(case.file, glob) for glob in case.reader.covered)


def apply(case: Case, file: Path) -> None:
    """Puts the damage where the file was: a new file, never the bytes of one that somebody has mapped."""
    file.unlink()
    if case.data is not None or case.kind == "empty":
        file.write_bytes(case.data or b"")
    elif case.kind == "folder":
        file.mkdir()
    elif case.kind == "loop":
        file.symlink_to(file.name)
    elif case.kind == "pipe":
        os.mkfifo(file)


def open_arena(**arguments: Any) -> Fuzz:
    return Fuzz(**arguments)


def run(numbers: Iterable[int], seed: int, workers: int = 1, only: str = "", part: str = "fuzz") -> Iterator[Row]:
    """What came of every case of a part, "fuzz", "formats" or "latents", in whatever order they are done."""
    with tempfile.TemporaryDirectory(prefix="saefast-attack-") as place:
        arena = Arena("attack.fuzz", {"place": place, "seed": seed, "only": only, "part": part})
        for number, answer in run_all(arena, numbers, workers):
            if isinstance(answer, str):
                # The worker is gone and could not say what it was doing: the case is the same in this process.
                lost = outcome.HANG if answer == HANG else outcome.CRASH
                answer = _answer(Fuzz(place, seed, only, part).case(number), lost, answer)
            filtered = f' --only "{only}"' if only else ""
            yield Row(**answer, again=f"make attack ARGS='--part {part} --seed {seed}{filtered} --case {number}'")


def _answer(case: Case, found: str, detail: str) -> dict[str, str]:
    what = f"{case.file} after {case.kind} ({case.number})"
    return {"subject": case.reader.name, "outcome": found, "what": f"{case.reader.name}, {what}", "detail": detail}
