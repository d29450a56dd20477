"""The C++ without Python: tests/cpp/test_*.cpp, built with csrc/ under each sanitizer and run in an empty folder."""

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hanging import HANG

ROOT = Path(__file__).resolve().parent.parent
TESTS = sorted((ROOT / "tests" / "cpp").glob("test_*.cpp"))
SOURCES = sorted(path for path in (ROOT / "csrc").glob("*.cpp") if not path.name.startswith("bindings"))
CXX = shlex.split(os.environ.get("CXX", "c++"))
FLAGS = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-pthread", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}"]

pytestmark = pytest.mark.slow


def compile_with(sanitizer: str, *arguments: str | Path) -> None:
    built = subprocess.run([*CXX, *FLAGS, f"-fsanitize={sanitizer}", *arguments], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


def can_run(sanitizer: str, folder: Path) -> bool:
    """Whether this machine has a compiler and the sanitizer's run time, and a program built so can start."""
    if shutil.which(CXX[0]) is None:
        return False
    source, program = folder / "empty.cpp", folder / "empty"
    source.write_text("int main() {}\n")
    built = subprocess.run([*CXX, f"-fsanitize={sanitizer}", source, "-o", program], capture_output=True)
    return built.returncode == 0 and subprocess.run([program], capture_output=True).returncode == 0


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def sanitized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Path]]:
    """The sanitizer and csrc/ compiled with it."""
    sanitizer, folder = request.param, tmp_path_factory.mktemp("objects")
    if not can_run(sanitizer, folder):
        pytest.skip(f"no C++ compiler with -fsanitize={sanitizer}")
    objects = [folder / f"{source.stem}.o" for source in SOURCES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(
            pool.map(
                lambda pair: compile_with(sanitizer, "-c", pair[0], "-o", pair[1]), zip(SOURCES, objects, strict=True)
            )
        )
    return sanitizer, objects


@pytest.mark.parametrize("test", TESTS, ids=lambda path: path.stem)
def test_runs_clean(test: Path, sanitized: tuple[str, list[Path]], tmp_path: Path) -> None:
    sanitizer, objects = sanitized
    program = tmp_path / test.stem
    compile_with(sanitizer, test, *objects, "-o", program)
    ran = subprocess.run([program, tmp_path], capture_output=True, text=True, timeout=HANG)
    assert ran.returncode == 0, ran.stdout + ran.stderr
