"""A run's metrics.jsonl, read while it grows: what is new, what was cut, what is damaged, and curves thinned."""

import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saefast.explorer.curves import METRICS, Curves, numbers, thinned
from saefast.training import progress

NAMES = ("fvu", "heldout/fvu")


def line(step: int, **more: Any) -> str:
    return json.dumps({"step": step, "tokens": 100 * step, "seconds": step / 2, "fvu": 1 / step} | more) + "\n"


@pytest.fixture
def curves(tmp_path: Path) -> Curves:
    return Curves(tmp_path, NAMES)


def test_the_file_is_the_one_that_a_run_writes() -> None:
    assert METRICS == progress.METRICS


def test_what_a_run_writes_is_read_as_it_grows(curves: Curves) -> None:
    log = progress.MetricsLog(curves.path.parent)
    log.write({"step": 1, "tokens": 10, "fvu": 0.5})
    first = curves.read()
    log.write({"step": 2, "tokens": 20, "fvu": math.nan, "heldout/fvu": 0.25})
    second = curves.read(first.generation, first.lines)
    log.close()
    assert (first.lines, first.since, second.lines, second.since) == (1, 0, 2, 1)
    assert second.generation == first.generation
    assert [x.tolist() for x in first.curves["fvu"]] == [[10], [0.5]]
    # NaN is null in the file: that line has no FVU.
    assert [x.tolist() for x in second.curves["fvu"]] == [[], []]
    assert [x.tolist() for x in second.curves["heldout/fvu"]] == [[20], [0.25]]
    assert [x.tolist() for x in curves.read().curves["fvu"]] == [[10], [0.5]]
    assert second.last == {"step": 2, "tokens": 20, "heldout/fvu": 0.25}


def test_a_half_line_waits_for_its_other_half(curves: Curves) -> None:
    whole = line(1) + line(2)
    for end in range(len(whole) + 1):
        curves.path.write_text(whole[:end], encoding="utf-8")
        read = curves.read()
        assert read.lines == whole[:end].count("\n")
        assert read.unreadable == 0


def test_a_file_that_was_cut_is_read_anew(curves: Curves) -> None:
    curves.path.write_text("".join(line(step) for step in range(1, 9)), encoding="utf-8")
    before = curves.read()
    # As a run that is resumed from step 4 does, before the page asks again.
    log = progress.MetricsLog(curves.path.parent, after=4)
    log.write({"step": 5, "tokens": 500, "fvu": 0.75})
    for step in range(6, 40):
        log.write({"step": step, "tokens": 100 * step, "fvu": 0.5})
    log.close()
    after = curves.read(before.generation, before.lines)
    assert (after.since, after.lines) == (0, 39)
    assert after.generation != before.generation
    assert after.curves["fvu"][1][:6].tolist() == [1, 1 / 2, 1 / 3, 1 / 4, 0.75, 0.5]


def test_a_last_line_that_is_written_anew_is_told_anew(curves: Curves) -> None:
    log = progress.MetricsLog(curves.path.parent)
    log.write({"step": 1, "tokens": 10, "fvu": 0.5})
    before = curves.read()
    log.write({"step": 1, "tokens": 10, "fvu": 0.5, "heldout/fvu": 0.25})
    log.close()
    after = curves.read(before.generation, before.lines)
    assert (after.since, after.lines) == (0, 1)
    assert after.curves["heldout/fvu"][1].tolist() == [0.25]


def test_a_file_that_goes_and_comes_is_another(curves: Curves) -> None:
    assert curves.read().lines == 0
    curves.path.write_text(line(1) + line(2), encoding="utf-8")
    before = curves.read()
    curves.path.unlink()
    gone = curves.read(before.generation, before.lines)
    assert (gone.lines, gone.since, gone.last) == (0, 0, {})
    curves.path.write_text(line(1), encoding="utf-8")
    assert curves.read(before.generation, 1).since == 0


def test_lines_of_steps_that_came_before_take_their_place(curves: Curves) -> None:
    curves.path.write_text(line(1) + line(2) + line(3), encoding="utf-8")
    before = curves.read()
    with curves.path.open("a", encoding="utf-8") as file:
        file.write(line(2, fvu=7.0))
    after = curves.read(before.generation, before.lines)
    assert (after.since, after.lines) == (0, 2)
    assert after.curves["fvu"][1].tolist() == [1, 7]


@pytest.mark.parametrize(
    "damaged",
    [
        b"no json\n",
        b"\n",
        b"[]\n",
        b"null\n",
        b'"text"\n',
        b'{"step": 2}\n',
        b'{"step": null, "tokens": 200}\n',
        b'{"step": "2", "tokens": 200}\n',
        b'{"step": true, "tokens": 200}\n',
        b'{"step": NaN, "tokens": 200}\n',
        b'{"step": 1e999, "tokens": 200}\n',
        b"\xff\xfe\x00\n",
        b"[" * 100_000 + b"\n",
        b'{"step": ' + b"9" * 5000 + b', "tokens": 1}\n',
    ],
)
def test_a_damaged_line_is_counted_and_left_out(curves: Curves, damaged: bytes) -> None:
    curves.path.write_bytes(line(1).encode() + damaged + line(3).encode())
    read = curves.read()
    assert (read.lines, read.unreadable) == (2, 1)
    assert read.curves["fvu"][0].tolist() == [100, 300]


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "null", '"0.5"', "true", "[1]", "1e999", "9" * 400])
def test_a_value_that_is_no_finite_number_is_no_point(curves: Curves, value: str) -> None:
    curves.path.write_text(f'{{"step": 1, "tokens": 10, "fvu": {value}, "heldout/fvu": 2}}\n', encoding="utf-8")
    read = curves.read()
    assert (read.lines, read.unreadable) == (1, 0)
    assert not len(read.curves["fvu"][0])
    assert read.curves["heldout/fvu"][1].tolist() == [2]
    assert "fvu" not in read.last


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_in_its_place_is_not_waited_for(curves: Curves) -> None:
    os.mkfifo(curves.path)
    assert curves.read().lines == 0


@pytest.mark.parametrize(("generation", "since"), [(-1, 1), (0, 0), (10**9, 1), (None, -1), (None, 3), (None, 10**15)])
def test_odd_places_tell_all(curves: Curves, generation: int | None, since: int) -> None:
    curves.path.write_text(line(1) + line(2), encoding="utf-8")
    now = curves.read().generation
    assert curves.read(now if generation is None else generation, since).since == 0


def test_threads_that_ask_at_once_get_all_of_it(curves: Curves) -> None:
    curves.path.write_text("".join(line(step) for step in range(1, 2001)), encoding="utf-8")
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(curves.read().lines)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [2000] * 8


def test_thinned_curves_keep_their_extremes_and_their_end() -> None:
    rng = np.random.default_rng(0)
    xs, ys = np.arange(50_000, dtype=np.float64), rng.normal(size=50_000)
    ys[[777, 31_337]] = [99, -99]
    some_xs, some_ys = thinned(xs, ys, 1000)
    assert 900 <= len(some_xs) <= 1000
    assert (np.diff(some_xs) > 0).all()
    assert np.array_equal(ys[some_xs.astype(int)], some_ys)
    assert {99, -99} <= set(some_ys.tolist())
    assert some_xs[-1] == xs[-1]
    # Every stretch keeps its lowest and its highest: the picture is the same.
    for first in range(0, 49_900, 100):
        inside = (some_xs >= first) & (some_xs < first + 100)
        assert some_ys[inside].max() == ys[first : first + 100].max()
        assert some_ys[inside].min() == ys[first : first + 100].min()
    for kept, all_of_it in zip(thinned(xs[:1000], ys[:1000], 1000), (xs[:1000], ys[:1000]), strict=True):
        assert np.array_equal(kept, all_of_it)


def test_numbers_are_rounded_to_what_a_chart_shows() -> None:
    assert numbers(np.array([1 / 3, 284160.0, 1e-9 / 3])) == [0.333333, 284160.0, 3.33333e-10]
