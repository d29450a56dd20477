"""What a user gets: kernels/ as saefast.kernels and nowhere else, whole sources and wheels, no compiler needed."""

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))
TEMPLATES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "saefast").rglob("*.html"))
# The pages of saefast explore, their style sheets and scripts.
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("templates", "static")
    for path in (ROOT / "saefast" / "explorer" / folder).iterdir()
)
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv*", ".peers", "build", "dist", "runs", "*.egg-info", "*.so", ".*_cache"
)


def test_kernels_directory_is_not_a_regular_package() -> None:
    # A kernels/__init__.py would shadow Hugging Face's package `kernels` whenever Python runs from the checkout, and
    # break every import of transformers there.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert importlib.import_module("saefast.kernels").__file__ is None
    assert KERNELS


def test_the_link_to_kernels_is_relative() -> None:
    link = ROOT / "saefast" / "kernels"
    assert link.is_symlink()
    assert os.readlink(link) == os.path.join("..", "kernels")


def pins(text: str, separator: str = "==") -> dict[str, str]:
    return dict(re.findall(rf"^([\w.-]+){separator}([\w.]+)", text, flags=re.MULTILINE))


def test_ruff_is_the_same_everywhere() -> None:
    tested = pins((ROOT / "constraints.txt").read_text())["ruff"]
    assert f'"ruff=={tested}"' in (ROOT / "pyproject.toml").read_text()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"ruff-pre-commit\s+rev: v([\d.]+)", hooks) == [tested]


def test_every_dependency_has_a_tested_version_inside_its_range() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    tested = {name.lower().replace("_", "-"): v for name, v in pins((ROOT / "constraints.txt").read_text()).items()}
    for line in importlib.metadata.requires("saefast") or []:
        requirement = packaging.Requirement(line)
        # The extra hf is for those who bring their own transformers and datasets; the demo does not install it.
        if requirement.name == "datasets":
            continue
        assert requirement.specifier.contains(tested[requirement.name]), line


def test_torch_brings_the_template_engine() -> None:
    """analysis/page.py renders pages with jinja2, which is no dependency of saefast's own."""
    packaging = pytest.importorskip("packaging.requirements")
    assert TEMPLATES
    assert "jinja2" in {packaging.Requirement(line).name.lower() for line in importlib.metadata.requires("torch") or []}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution made from a copy of the checkout without anything built in it."""
    pytest.importorskip("pybind11")
    tree, out = tmp_path_factory.mktemp("tree") / "saefast", tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=NOT_COPIED)
    program = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=tree, check=True, capture_output=True)
    return next(out.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The wheel of that source distribution where no compiler works, and what the build said."""
    pytest.importorskip("pip")
    out = tmp_path_factory.mktemp("wheel")
    no_compiler = {"CC": "/bin/false", "CXX": "/bin/false", "SAEFAST_CUDA": "0"}
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--no-cache-dir",
    ]
    ran = subprocess.run(
        [*command, "-w", str(out), str(sdist)], env={**os.environ, **no_compiler}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return next(out.glob("*.whl")), ran.stdout + ran.stderr


def test_the_explorer_has_pages_styles_and_scripts() -> None:
    assert {Path(name).suffix for name in PAGES} == {".html", ".css", ".js", ".svg"}


@pytest.mark.slow
def test_source_distribution_is_whole(sdist: Path) -> None:
    with tarfile.open(sdist) as tar:
        names = [name.partition("/")[2] for name in tar.getnames()]
    for name in KERNELS:
        assert names.count(f"kernels/{name}") == 1
    for folder in ("csrc", "tests", "bench"):
        there = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.[chp]*") if path.is_file()}
        there = {name for name in there if "__pycache__" not in name}
        assert there <= set(names)
    assert {"LICENSE", "constraints.txt", "saefast/py.typed", "csrc/gather.cu", *TEMPLATES, *PAGES} <= set(names)
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@pytest.mark.slow
def test_wheel_is_whole(wheel: tuple[Path, str]) -> None:
    with zipfile.ZipFile(wheel[0]) as archive:
        names = set(archive.namelist())
    assert {f"saefast/kernels/{name}" for name in KERNELS} <= names
    assert "saefast/kernels/__init__.py" not in names
    ours = {path.relative_to(ROOT).as_posix() for path in (ROOT / "saefast").rglob("*.py")}
    assert {"saefast/py.typed", *ours, *TEMPLATES, *PAGES} <= names
    assert {name.split("/")[0] for name in names} == {"saefast", wheel[0].name.split("-cp")[0] + ".dist-info"}


@pytest.mark.slow
def test_without_a_compiler_the_build_warns_and_torch_serves(wheel: tuple[Path, str], tmp_path: Path) -> None:
    path, said = wheel
    assert said.count("installed without its C++ extension") == 1
    with zipfile.ZipFile(path) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path)
    program = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch, saefast
    from saefast import extension
    from saefast.data import gather
    assert saefast.__file__.startswith(FOLDER), saefast.__file__
    assert not [w for w in caught if "saefast" in str(w.message)], "warned before it was asked for anything"
    src, index = torch.randn(9, 4), torch.tensor([8, 0])
    for _ in range(3):
        assert torch.equal(gather.gather_rows(src, index), src[index])
        assert not extension.available()
ours = [w for w in caught if "saefast" in str(w.message)]
assert len(ours) == 1, ours
assert ours[0].category is RuntimeWarning
assert "install a C++17 compiler" in str(ours[0].message)
"""
    # -S leaves out the editable install of the checkout, whose import hook would find the extension built there.
    packages = os.pathsep.join([str(tmp_path), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    ran = subprocess.run(
        [sys.executable, "-S", "-c", f"FOLDER = {str(tmp_path)!r}\n{program}"],
        env={**os.environ, "PYTHONPATH": packages},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
