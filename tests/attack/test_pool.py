"""The attack sees what it looks for: crashes, hangs, tracebacks, vague words, silent changes, made on purpose."""

import json
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attack import mutate, outcome, pool, readers, summary
from attack.fuzz import Fuzz
from attack.readers import Reader
from attack.summary import Row

from saefast.errors import InputError


class Troubled:
    """An arena whose cases 1, 4 and 7 crash it, and whose case 5 hangs."""

    def run(self, number: int) -> dict[str, Any]:
        if number % 3 == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        if number == 5:
            time.sleep(3600)
        return {"number": number, "pid": os.getpid()}


def open_arena(**arguments: Any) -> Troubled:
    if arguments.get("broken"):
        raise RuntimeError("a fault of the attack itself")
    return Troubled()


def test_a_crash_or_hang_costs_its_worker_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "HANG_SECONDS", 15.0)
    answers = dict(pool.run_all(pool.Arena("attack.test_pool", {}), range(8), workers=2))
    assert {number for number, answer in answers.items() if answer == "crash: SIGSEGV"} == {1, 4, 7}
    assert answers[5] == outcome.HANG
    assert {number for number, answer in answers.items() if isinstance(answer, dict)} == {0, 2, 3, 6}


def test_a_fault_of_the_attack_itself_is_no_finding() -> None:
    with pytest.raises(RuntimeError, match="a fault of the attack"):
        list(pool.run_all(pool.Arena("attack.test_pool", {"broken": True}), range(2), workers=1))


def silent(folder: Path) -> Any:
    return (folder / "x.json").read_bytes()


def vague(folder: Path) -> Any:
    raise InputError("something is wrong")


class TwoLines(InputError):
    __str__ = ValueError.__str__


def two_lines(folder: Path) -> Any:
    raise TwoLines(f"{folder}\nis damaged")


def failing(folder: Path) -> Any:
    raise KeyError("x")


def altering(folder: Path) -> Any:
    (folder / "x.json").write_bytes(b"altered")
    return 1


def warning(folder: Path) -> Any:
    warnings.warn("the older one is used", RuntimeWarning, stacklevel=1)
    return 1


def refusing(folder: Path) -> Any:
    raise InputError(f"{folder / 'x.json'} is damaged")


@pytest.mark.parametrize(
    ("damaged", "expected"),
    [
        (silent, outcome.SILENT),
        (vague, outcome.VAGUE),
        (two_lines, outcome.VAGUE),
        (failing, outcome.TRACEBACK),
        (altering, outcome.ALTERED),
        (warning, outcome.FELL_BACK),
        (refusing, outcome.REFUSED),
        (lambda folder: 1, outcome.SAME),
    ],
)
def test_outcomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: Callable[[Path], Any], expected: str
) -> None:
    whole = True

    def make(folder: Path) -> None:
        (folder / "x.json").write_text('{"a": [1, 2, 3]}')

    def read(folder: Path) -> Any:
        return 1 if whole else damaged(folder)

    monkeypatch.setattr(readers, "READERS", [Reader("test", make, read, ("x.json",), ("x.json",))])
    monkeypatch.setattr(mutate, "NO_FILE", ["empty"])
    arena = Fuzz(str(tmp_path), seed=0)
    arena.case(0)  # reads the whole folder
    whole = False
    assert arena.run(0)["outcome"] == expected


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.safetensors", "x.npy", "x.pt", "x.txt"])
def test_damage_is_damage_and_comes_back_from_its_seed(name: str) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    data = {
        "x.json": b'{"a": [1, 2.5, "x"], "b": {"c": null}}',
        "x.jsonl": b'{"a": 1}\n{"a": 2}\n',
        "x.safetensors": len(header).to_bytes(8, "little") + header + bytes(24),
    }.get(name, b"some 12 bytes of 3 numbers")
    kinds = set()
    for number in range(300):
        kind, other = mutate.damage(name, data, random.Random(number))
        assert (kind, other) == mutate.damage(name, data, random.Random(number))
        assert other != data
        kinds.add(kind)
    assert len(kinds) >= 14


def test_the_table_counts_by_subject_and_shows_every_kind_of_fault(tmp_path: Path) -> None:
    results = summary.Results(tmp_path / "attack.json", seed=0)
    for row in (Row("a", outcome.SAME), Row("a", outcome.REFUSED, count=1999), Row("b", outcome.CRASH)):
        results.add("fuzz", row)
    results.finish("fuzz")
    results.write()
    again = summary.Results(tmp_path / "attack.json", seed=0)
    again.add("kill", Row("c", outcome.SAME, count=7))
    again.finish("kill")
    table = again.table().splitlines()
    assert table[0].startswith("| | cases | same | refused | silent change | vague | traceback | crash | hang |")
    assert table[2].startswith("| **kill** (")
    assert table[3].startswith("| c | 7 | 7 | 0 |")
    assert "| a | 2,000 | 1 | 1,999 | 0 |" in again.table()
    assert (again.faults(["fuzz"]), again.faults(["kill"])) == (1, 0)
