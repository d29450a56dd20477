"""No test depends on how fast the machine is."""

import ast
from collections.abc import Iterator
from pathlib import Path

import hanging
import pytest

ROOT = Path(__file__).resolve().parent
CLOCKS = {"time", "monotonic", "perf_counter"}


def found(tree: ast.AST) -> Iterator[str]:
    """What ties a test to the machine's speed: limits in numbers, and assertions on what a clock says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "timeout":
            limit = getattr(node.value, "value", None)
            if isinstance(limit, int | float):
                yield f"line {node.value.lineno}: timeout={limit}: say HANG"
        if isinstance(node, ast.Assert) and any(_is_clock(part) for part in ast.walk(node.test)):
            yield f"line {node.lineno}: asserts how long something took"


def _is_clock(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in CLOCKS
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "time"
    )


@pytest.mark.parametrize(
    "path", sorted(set(ROOT.rglob("*.py")) - {ROOT / "hanging.py"}), ids=lambda path: str(path.relative_to(ROOT))
)
def test_nothing_is_timed(path: Path) -> None:
    assert not [*found(ast.parse(path.read_text(encoding="utf-8")))]


@pytest.mark.parametrize(
    ("line", "n"),
    [
        ("run(timeout=500)", 1),
        ("thread.join(timeout=0.5)", 1),
        ("assert time.monotonic() - start < 5", 1),
        ("run(timeout=HANG)", 0),
        ("run(timeout=None)", 0),
        ("end = time.monotonic() + HANG", 0),
    ],
)
def test_the_walk_sees_what_it_must(line: str, n: int) -> None:
    assert len([*found(ast.parse(line))]) == n


def test_waiting_ends_with_the_condition_or_says_what_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter([False, 0, "yes"])
    hanging.wait_until(lambda: next(turns), "the third turn")
    monkeypatch.setattr(hanging, "HANG", 0.0)
    with pytest.raises(AssertionError, match="hangs: it did not come about"):
        hanging.wait_until(lambda: False, "it")
