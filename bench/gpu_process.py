"""Runs one stage of bench/gpu.py: a process group with a log, started again behind a case that it died of."""

import contextlib
import os
import platform
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from bench import lines
from bench.gpu_plan import ROOT, Stage

LOOK_EVERY_S = 0.1
TAIL_LINES = 25


def run_stage(stage: Stage, file: Path, limit: float | None, patience: float) -> None:
    """Lines of the stage's own, and one at its end with the seconds it took.

    Args:
        limit: seconds for the whole stage, or None.
        patience: seconds without a line, a case begun or output after which its process is ended.
    """
    start = time.monotonic()
    note = note_of(stage, file)
    if stage.skipped:
        return note("stage", "skipped", seconds=0.0, message=stage.skipped)
    if limit is not None and limit <= 0:
        return note("stage", "skipped", seconds=0.0, message="no time left")
    logs = file.parent / "logs" / file.stem
    logs.mkdir(parents=True, exist_ok=True)
    log, begun = logs / f"{stage.name}.log", logs / f"{stage.name}.begun"
    deadline = None if limit is None else start + limit
    print(f"--- {stage.name}" + ("" if limit is None else f" (at most {limit:.0f} s)"), flush=True)
    while True:
        before, size = lines.begun(begun), file.stat().st_size if file.exists() else 0
        code, why = run_process(stage, file, log, begun, deadline, patience)
        lines.end_line(file)
        wrote = file.exists() and file.stat().st_size > size
        if why is None and (code == 0 or (code in stage.expected and wrote)):
            break
        last = lines.begun(begun)[len(before) :][-1:]
        if code != lines.LOST or why:
            outcome = "stopped" if why else "failed"
            note(last[0] if last else "process", outcome, message=why or ended(code), tail=tail(log))
        # After the case at fault there may be others; a process that began none would die again at once.
        if not last or not stage.resumes or (deadline is not None and time.monotonic() >= deadline):
            break
    seconds = round(time.monotonic() - start, 1)
    note("stage", "ok" if code == 0 and why is None else "ended", seconds=seconds, exit=code)
    print(f"--- {stage.name}: {seconds} s", flush=True)


def note_of(stage: Stage, file: Path) -> Any:
    def note(case: str, outcome: str, **fields: Any) -> None:
        if stage.first and not (file.exists() and file.stat().st_size):
            # The machine's stage could not say what machine this is; the first line does as far as Python knows.
            fields |= {"system": f"{platform.system()} {platform.machine()}", "python": platform.python_version()}
            case = "machine"
        device = {"device": stage.device} if stage.device else {}
        head = {"time": lines.now(), "stage": stage.name, "case": case, "outcome": outcome}
        lines.append(file, head | device | fields)

    return note


def run_process(
    stage: Stage, file: Path, log: Path, begun: Path, deadline: float | None, patience: float
) -> tuple[int, str | None]:
    """Exit code, and why the process was ended if it was."""
    with open(log, "ab") as sink:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
            env=environment(stage, file, begun), start_new_session=True,
        )  # fmt: skip
        try:
            why = wait(process, (log, file, begun), deadline, patience)
        finally:
            end_group(process)
    return process.returncode, why


def wait(
    process: "subprocess.Popen[bytes]", watched: tuple[Path, ...], deadline: float | None, patience: float
) -> str | None:
    """None when it ended by itself; else why it has to be ended."""
    sizes, grew = [-1], time.monotonic()
    while process.poll() is None:
        now, found = time.monotonic(), [path.stat().st_size if path.exists() else 0 for path in watched]
        if found != sizes:
            sizes, grew = found, now
        if deadline is not None and now > deadline:
            return "its share of the time is over"
        if now - grew > patience:
            return f"no output for {patience:.0f} s"
        time.sleep(LOOK_EVERY_S)
    return None


def end_group(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment(stage: Stage, file: Path, begun: Path) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
    own = {lines.FILE: str(file), lines.STAGE: stage.name, lines.BEGUN: str(begun), "PYTHONPATH": paths}
    if stage.device:
        own[lines.DEVICE] = stage.device
    # The tests do not need the plugins that a machine happens to have.
    return os.environ | {"PYTHONUNBUFFERED": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | own | dict(stage.environment)


def ended(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def tail(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
