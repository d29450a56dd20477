"""Files named compiled_*.py need a process in which Triton compiles; in one that interprets, each runs in a child."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hanging import HANG

from ptx.child import ROOT, compiles, environment


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    is_ours = module_path.name.startswith("compiled_") and not compiles()
    return Child.from_parent(parent, path=module_path) if is_ours else None


class Child(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        yield ChildRun.from_parent(self, name="child")


class ChildRun(pytest.Item):
    """All tests of a file, in a child."""

    def runtest(self) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(self.path)]
        child = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=HANG)
        if child.returncode:
            raise ChildFailed(child.stdout[-20000:] + child.stderr[-4000:])

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: str | None = None) -> str:
        if isinstance(excinfo.value, ChildFailed):
            return str(excinfo.value)
        return str(super().repr_failure(excinfo))

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"{self.path.name} in a child"


class ChildFailed(Exception):
    pass
