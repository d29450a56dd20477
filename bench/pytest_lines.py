"""A pytest plugin for bench/gpu.py: each failure a line at once, a line a file, and tests begun before are left out.

python -m pytest -p bench.pytest_lines …
"""

import os
import time
from collections import Counter, defaultdict

import pytest

from bench import lines

LONGEST = 3000
_counts: dict[str, Counter[str]] = defaultdict(Counter)
_began: dict[str, float] = {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    done = set(lines.begun())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    items[:] = [item for item in items if item.nodeid not in done]


def pytest_runtest_logstart(nodeid: str) -> None:
    lines.begin(nodeid)
    _began.setdefault(file_of(nodeid), time.monotonic())


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if not report.failed:
        return
    text = str(report.longrepr)
    # A package that a GPU's machine lacks costs its tests and says so; anything else is a fault.
    missing = "ModuleNotFoundError" in text and "saefast" not in text.rsplit("ModuleNotFoundError", 1)[-1]
    lines.record(report.nodeid, "skipped" if missing else "failed", message=text[-LONGEST:])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:
        return
    _counts[file_of(report.nodeid)][report.outcome] += 1
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash else ""
        lines.record(
            report.nodeid, "failed", when=report.when, message=message[:LONGEST], text=str(report.longrepr)[-LONGEST:]
        )
        if context_lost(str(report.longrepr)):
            os._exit(lines.LOST)


def pytest_runtest_logfinish(nodeid: str) -> None:
    """Tests come file by file: what another file begins ends the one before."""
    for file in [file for file in _began if file != file_of(nodeid)]:
        finish(file)


def pytest_sessionfinish() -> None:
    for file in list(_began):
        finish(file)


def finish(file: str) -> None:
    counts = _counts.pop(file, Counter())
    lines.record(file, "ok", tests=dict(counts), took=round(time.monotonic() - _began.pop(file), 2))


def file_of(nodeid: str) -> str:
    return nodeid.split("::")[0]


def context_lost(text: str) -> bool:
    """Whether a failure may have cost the process its CUDA context, and has."""
    if "CUDA" not in text:
        return False
    import torch

    from bench.cases import context_lost as lost

    return torch.cuda.is_available() and lost("cuda")
