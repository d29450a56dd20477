"""A few hundred of `make attack`'s odd arguments: each works or is refused in one line, and harms nothing."""

from pathlib import Path

import pytest
from attack import arguments, outcome

STEP = 41


def test_odd_arguments(tmp_path: Path) -> None:
    numbers = range(0, len(arguments.all_cases()), STEP)
    rows = list(arguments.run(str(tmp_path), numbers))
    assert len(rows) == len(numbers) > 200
    faults = [f"{row.outcome}: {row.what}: {row.detail}; {row.again}" for row in rows if row.outcome in outcome.FAULTS]
    assert not faults, "\n".join(faults)
    counts = {name: sum(row.outcome == name for row in rows) for name in outcome.GOOD}
    assert counts[outcome.REFUSED] > len(rows) / 3
    assert counts[outcome.WORKS] > len(rows) / 20


def test_harm_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes a foreign file, leaves litter or fails is no good outcome."""

    def good() -> str:
        return "x"

    def alters(x: str) -> None:
        Path("foreign/notes.txt").write_text("mine now")

    def litters(x: str) -> None:
        Path("left.txt").write_text("x")
        raise arguments.InputError("refused")

    def fails(x: str) -> None:
        raise KeyError(x)

    def writes_its_own(x: str) -> None:
        Path("out").mkdir()
        Path("out/x").write_text("x")

    functions = [alters, litters, fails, writes_its_own]
    calls = [arguments.Call(f.__name__, f, {}, {"x": {"'x'": good}}) for f in functions]
    monkeypatch.setattr(arguments, "all_cases", lambda only: [case for call in calls for case in call.cases()])
    arena = arguments.Arguments(str(tmp_path))
    found = [arena.run(number)["outcome"] for number in range(len(functions))]
    assert found == [outcome.ALTERED, outcome.LITTER, outcome.TRACEBACK, outcome.WORKS]
