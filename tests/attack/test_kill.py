"""Runs of every kind, and harvests, killed a few times each.

tests/training/test_resume_kill.py has the moments that matter.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from attack import kill, outcome
from attack.kill import Condition, Killer

# The others are killed until they are done by tests/training/test_resume_kill.py.
CONDITIONS = [condition for condition in kill.CONDITIONS if "task" in condition.job]


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killer]:
    killer = Killer(tmp_path_factory.mktemp("kill") / "place", CONDITIONS)
    yield killer
    killer.close()


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda condition: condition.name)
def test_killed_and_resumed(killer: Killer, condition: Condition) -> None:
    report = killer.attack(condition, seed=0, most=5)
    assert (report.outcome, report.fault) == (outcome.SAME, "")
    assert sum(report.kills.values()) >= 2


def test_other_bits_and_litter_are_seen(killer: Killer) -> None:
    file = next(condition for condition in CONDITIONS if condition.name == "file")
    others = {"config": {"seed": 4}}
    killer.attack(file, seed=1, most=0)  # knows now what an uninterrupted run leaves
    report = killer.attack(Condition("file", file.job | others, file.outcome, file.check), seed=2, most=0)
    assert report.outcome == outcome.SILENT
    (Path(killer.place) / "file 2" / ".left.tmp").touch()
    report = killer.attack(Condition("file", file.job | others, file.outcome, file.check), seed=2, most=0)
    assert report.outcome == outcome.LITTER
