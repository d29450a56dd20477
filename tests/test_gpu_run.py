"""bench.gpu, the one command for a GPU machine: steps that fail or hang cost their share of the time only."""

import sys
import time
from pathlib import Path

from bench import gpu


def test_benchmarks_are_the_modules_with_a_main(tmp_path: Path) -> None:
    for name, text in {"b": "def main(argv=None): ...", "a": "def main(argv): ...", "helper": "X = 1"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "common.py").write_text("def main(argv): ...")
    assert gpu.benchmarks(tmp_path) == ["a", "b"]
    assert "gpu" not in gpu.benchmarks()


def test_a_step_reports_its_last_lines_and_its_exit_code() -> None:
    step = gpu.run_step("good", [sys.executable, "-c", "for i in range(99): print(i)"], 60)
    assert step.passed
    assert step.tail[-1] == "98"
    assert len(step.tail) == gpu.TAIL_LINES
    bad = gpu.run_step("bad", [sys.executable, "-c", "raise SystemExit('why it failed')"], 60)
    assert (bad.passed, bad.outcome, bad.tail) == (False, "exit code 1", ["why it failed"])


def test_a_step_that_hangs_is_stopped_with_its_children(tmp_path: Path) -> None:
    # The child would leave a file behind if it outlived its parent.
    late = tmp_path / "late"
    child = f"import time, pathlib; print('child', flush=True); time.sleep(3); pathlib.Path({str(late)!r}).touch()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    step = gpu.run_step("hangs", [sys.executable, "-c", program], 1.5)
    assert step.outcome == "stopped after 2 s"
    time.sleep(3)
    assert not late.exists()
    assert gpu.run_step("none", ["true"], -1).outcome == "no time left"


def test_only_this_runs_results_are_collected(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text("{}")
    since = time.time() + 1
    assert gpu.written(tmp_path, since) == {}
    (tmp_path / "half.json").write_text('{"a": ')
    (tmp_path / "new.json").write_text('{"a": 1}')
    found = gpu.written(tmp_path, 0)
    assert found["new"] == {"a": 1}
    assert "not readable" in found["half"]
