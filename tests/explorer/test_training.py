"""The view of a run's training: its page, what its script is told, and whether the run is live."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")
from explorer_client import client, explorer_of
from starlette.testclient import TestClient

from saefast.explorer.curves import METRICS, Curves
from saefast.explorer.state import Explorer
from saefast.explorer.training import CHARTS, NAMES, RECENT, evaluation, is_held, state

ASK = {"Accept": "application/json"}


def write(run: Path, lines: list[dict[str, Any]]) -> None:
    (run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def lines(n: int, steps: int = 10) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "tokens": 256 * step,
            "seconds": 2.0 * step,
            "fvu": 1 / step,
            "metrics/l0": 32.0,
            "details/total_steps": steps,
        }
        for step in range(1, n + 1)
    ]


@pytest.fixture
def visitor(tmp_path: Path) -> TestClient:
    return client(Explorer(tmp_path))


def ask(visitor: TestClient, **query: Any) -> dict[str, Any]:
    answer = visitor.get("/training/data", params=query, headers=ASK)
    assert answer.status_code == 200

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is no JSON")

    found: dict[str, Any] = json.loads(answer.text, parse_constant=refuse)
    return found


def test_the_page_names_every_chart_and_curve(tmp_path: Path) -> None:
    write(tmp_path, lines(3))
    for explorer in (Explorer(tmp_path), explorer_of(tmp_path)):
        page = client(explorer).get("/training").text
        for chart in CHARTS:
            assert f"<h2>{chart.title} " in page
            assert all(f'data-name="{curve.name}"' in page for curve in chart.curves)
        assert 'aria-current="page">training' in page


def test_only_what_is_new_is_told(tmp_path: Path, visitor: TestClient) -> None:
    write(tmp_path, lines(3))
    first = ask(visitor)
    assert first["curves"]["fvu"] == [[256, 512, 768], [1, 0.5, 0.333333]]
    assert set(first["curves"]) == {"fvu", "metrics/l0"}
    assert (first["since"], first["lines"], first["unreadable"]) == (0, 3, 0)
    again = ask(visitor, generation=first["generation"], since=3)
    assert (again["since"], again["lines"], again["curves"]) == (3, 3, {})
    write(tmp_path, lines(5))
    more = ask(visitor, generation=first["generation"], since=3)
    assert more["curves"]["fvu"] == [[1024, 1280], [0.25, 0.2]]


@pytest.mark.parametrize("odd", ["", "x", "-1", "1.5", "1e3", "9" * 30, "٣", "NaN", "\x00", "0x1", " 1"])
def test_odd_queries_tell_all(tmp_path: Path, visitor: TestClient, odd: str) -> None:
    write(tmp_path, lines(3))
    generation = ask(visitor)["generation"]
    for query in ({"since": odd, "generation": generation}, {"since": 1, "generation": odd}, {"other": odd}):
        assert len(ask(visitor, **query)["curves"]["fvu"][0]) == 3


def test_thousands_of_lines_are_thinned(tmp_path: Path, visitor: TestClient) -> None:
    write(tmp_path, lines(6000, 6000))
    found = ask(visitor)
    xs, ys = found["curves"]["fvu"]
    assert found["lines"] == 6000
    assert 1000 < len(xs) == len(ys) <= 1200
    assert (xs[0], ys[0], xs[-1]) == (256, 1, 256 * 6000)


def test_figures_that_are_no_numbers_stay_out_of_the_answer(tmp_path: Path, visitor: TestClient) -> None:
    text = (
        '{"step": 1, "tokens": 10, "seconds": NaN, "fvu": Infinity, "details/total_steps": -Infinity, "grad_norm": 1}\n'
    )
    (tmp_path / METRICS).write_text(text + "half a li", encoding="utf-8")
    found = ask(visitor)
    assert found["curves"] == {"grad_norm": [[10], [1]]}
    assert found["state"]["seconds"] is found["state"]["steps"] is found["state"]["seconds_left"] is None


def test_a_run_without_figures_says_so(visitor: TestClient) -> None:
    found = ask(visitor)
    assert found["state"]["is"] == "none"
    assert found["curves"] == {}
    assert "There is no eval.json yet: saefast eval" in visitor.get("/training").text


def test_a_run_is_live_stopped_or_finished(tmp_path: Path) -> None:
    write(tmp_path, lines(4))
    curves = Curves(tmp_path, NAMES)
    written = curves.read().written
    lately, later = (state(tmp_path, curves.read(), written + ago) for ago in (RECENT - 1, RECENT + 1))
    assert lately["is"] == "live"
    assert later["is"] == "stopped"
    assert (later["step"], later["steps"], later["tokens"], later["all_tokens"]) == (4, 10, 1024, 2560)
    assert (later["seconds"], later["seconds_left"], later["seconds_ago"]) == (8.0, 12.0, RECENT + 1)
    write(tmp_path, lines(10))
    assert state(tmp_path, curves.read(), written)["is"] == "finished"
    # A run that is to be longer than it was has steps to do.
    write(tmp_path, lines(10) + [line | {"step": 11} for line in lines(1, 20)])
    assert state(tmp_path, curves.read(), written)["is"] == "live"


def test_lines_that_come_seldom_leave_a_run_live_for_longer(tmp_path: Path) -> None:
    write(tmp_path, [line | {"seconds": 100.0 * line["step"]} for line in lines(4)])
    read = Curves(tmp_path, NAMES).read()
    assert read.interval == 100
    assert state(tmp_path, read, read.written + 299)["is"] == "live"
    assert state(tmp_path, read, read.written + 301)["is"] == "stopped"


@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="the system does not say who holds a lock")
def test_a_run_that_holds_its_folder_is_live_however_long_it_says_nothing(tmp_path: Path) -> None:
    from saefast.training.run_folder import locked

    write(tmp_path, lines(10))
    read = Curves(tmp_path, NAMES).read()
    assert not is_held(tmp_path)
    with locked(tmp_path):
        assert is_held(tmp_path)
        assert state(tmp_path, read, read.written + 10**6)["is"] == "live"
        assert not is_held(tmp_path.parent)
    assert state(tmp_path, read, read.written + 10**6)["is"] == "finished"
    # Looking takes no lock that a run could meet.
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_held_out_figures_are_those_of_eval_json(tmp_path: Path, visitor: TestClient) -> None:
    found = {
        "about": {"heldout_rows": 7244},
        "metrics": {"fvu": 0.218444, "l0": 32.0, "dead_share": 0.0066, "cosine": float("nan")},
        "lm": {"loss_recovered": 0.996125},
        "formulas": {"fvu": {"formula": "Σ<x>", "source": "a paper"}},
    }
    (tmp_path / "eval.json").write_text(json.dumps(found), encoding="utf-8")
    page = visitor.get("/training").text
    for text in ("7,244 rows", "<dd>0.218<", "<dd>0.66 %<", "<dd>0.996<", "<dd>–<", "Σ&lt;x&gt;; a paper"):
        assert text in page, text


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", "{}", '{"metrics": 3, "about": {}}', '{"metrics": {}, "about": 3}', "[" * 100_000],
)
def test_a_damaged_eval_json_is_said(tmp_path: Path, visitor: TestClient, text: str) -> None:
    (tmp_path / "eval.json").write_text(text, encoding="utf-8")
    assert "cannot be read: saefast eval" in evaluation(tmp_path).why
    assert "cannot be read: saefast eval" in visitor.get("/training").text


@pytest.mark.parametrize("odd", ['{"fvu": "high"}', '{"fvu": [1]}', '{"fvu": null}', '{"fvu": true}'])
def test_an_odd_figure_is_a_dash(tmp_path: Path, odd: str) -> None:
    (tmp_path / "eval.json").write_text(f'{{"about": {{"heldout_rows": "x"}}, "metrics": {odd}}}', encoding="utf-8")
    found = evaluation(tmp_path)
    assert [figure.label for figure in found.figures] == ["FVU"]
    assert found.rows is None
    assert found.figures[0].value is None
