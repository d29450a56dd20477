"""Words that were private to this code, or meant several things, stay out of it: see "Words" in CONTRIBUTING.md."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"saefast": ("*.py",), "kernels": ("*.py",), "csrc": ("*pp", "*.cu"), "bench": ("*.py",), "docs": ("*.md",)}
FOLDERS["tests"] = ("*.py", "*.cpp")

# What is said instead, and the words.
SAID = {
    "settle (rows), several (SAEs), autotune (launch settings)": r"sweeps?|sweeping|swept",
    "left alone, unsettled, missed": r"asleep|slept|sleep(s|y|ing)?|wak(e|es|ing|ed)|awake|woken?|ow(e|es|ed|ing)",
    "gets a gradient, belongs to a prefix": r"hear(s|d|ing)?",
    "mixed": r"screened",
    "run folder": r"rundir",
    "the kernels beside it, the like": r"kin",
    "FusedEngine, AutogradEngine": r"(Fused|Autograd)Step",
}
# time.sleep is what it says.
ALLOWED = r"(?<!time\.)(?<!\w)"


def found(text: str) -> list[str]:
    """Lines with a word of SAID, and what to say instead."""
    patterns = {instead: re.compile(rf"{ALLOWED}({words})(?!\w)", re.IGNORECASE) for instead, words in SAID.items()}
    lines = enumerate(text.replace("_", " ").splitlines(), start=1)
    return [
        f"line {n}: {hit[0]!r}: say {instead}"
        for n, line in lines
        for instead, pattern in patterns.items()
        if (hit := pattern.search(line))
    ]


def files() -> list[Path]:
    every = {path for folder, ends in FOLDERS.items() for end in ends for path in (ROOT / folder).rglob(end)}
    return sorted(every - {Path(__file__).resolve()})


@pytest.mark.parametrize(
    "word", ["Sweeps", "slept", "owes", "waking", "heard", "screened", "rundir", "kin", "FusedStep"]
)
def test_the_search_finds(word: str) -> None:
    assert len(found(f"a line\na_{word}_b, or {word}.")) == 1
    assert not found(f"x{word} {word}xx")


def test_the_search_leaves_what_is_meant() -> None:
    assert not found("time.sleep(1), shown, a screen, kind, towers, run_dir")


@pytest.mark.parametrize("folder", FOLDERS)
def test_private_words_stay_out(folder: str) -> None:
    here = [path for path in files() if path.relative_to(ROOT).parts[0] == folder]
    assert here
    hits = {str(path.relative_to(ROOT)): found(path.read_text(encoding="utf-8")) for path in here}
    assert {name: lines for name, lines in hits.items() if lines} == {}


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one, a field of a class included."""
    module, left = name, [""]
    while True:
        try:
            owner = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            left.insert(0, last)
    for part in left[:-1]:
        if not hasattr(owner, part):
            return part in getattr(owner, "__annotations__", {})
        owner = getattr(owner, part)
    return True


def test_a_name_resolves_or_not() -> None:
    assert resolves("saefast.ops.reference.spmm")
    assert resolves("saefast.engines.config.TrainConfig.lr")
    assert resolves("saefast.ops.code.Code.acts")
    assert not resolves("saefast.rows.catch_up")


@pytest.mark.parametrize("folder", ["saefast", "kernels", "csrc", "bench", "docs"])
def test_names_in_text_exist(folder: str) -> None:
    """Comments and pages name what is there, where it is: a file that moves takes its mentions along."""
    here = [path for path in files() if path.relative_to(ROOT).parts[0] == folder]
    named = {
        (name, path.name)
        for path in here
        for name in re.findall(r"(?<![\w/.\"\-])saefast(?:\.[A-Za-z]\w*)+(?![\w/])", path.read_text(encoding="utf-8"))
    }
    assert [pair for pair in sorted(named) if not resolves(pair[0])] == []
