"""bench.accelerated: losses that come apart end it, and with the peers it runs from end to end at a tiny size."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import accelerated


def test_losses_have_to_stay_together() -> None:
    losses = {"theirs": [2.0, 1.0], "theirs, accelerated": [2.0, 1.0 + 0.9 * accelerated.TOLERANCE]}
    accelerated.together(losses)
    for wrong in (1.0 + 1.1 * accelerated.TOLERANCE, float("nan")):
        losses["theirs, accelerated"][1] = wrong
        with pytest.raises(SystemExit, match="theirs, accelerated: losses are up to"):
            accelerated.together(losses)


def test_contenders_take_turns_and_another_begins_each_round() -> None:
    asked: list[str] = []

    def contender(name: str) -> Any:
        def ask(order: str) -> dict[str, float]:
            asked.append(name)
            return {"seconds": float(len(asked)), "loss": 1.0}

        return SimpleNamespace(name=name, ask=ask)

    losses: dict[str, list[float]] = {"a": [], "b": []}
    seconds = accelerated.in_turn([contender("a"), contender("b")], "step", "cuda", 3, losses)
    assert asked == ["a", "b", "b", "a", "a", "b"]
    assert seconds == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert losses == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_without_the_peers_it_says_what_makes_them(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="make peers makes it"):
        accelerated.main(["--device", "cpu", "--python", str(tmp_path / "python")])


@pytest.mark.slow
@pytest.mark.peers
def test_a_rehearsal(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--rehearse", "--no-check", "--python", sys.executable, "--out", str(tmp_path)]
    assert accelerated.main(options) == 0
    (file,) = tmp_path.glob("*-accelerate.json")
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert [found["peer"] for found in results] == ["sparsify", "dictionary_learning", "SAELens"]
    for found in results:
        assert [row["what"] for row in found["contenders"]] == [
            found["peer"], *(f"{found['peer']}, {form}" for form in accelerated.FORMS[1:])
        ]  # fmt: skip
