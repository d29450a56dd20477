"""bench.gpu, the one command for a GPU machine: a stage that fails, hangs or dies costs only the case it was at."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import test_aot

from bench import gpu, gpu_process, lines
from bench.gpu_plan import ROOT, Stage, benchmarks, plan
from bench.gpu_process import TAIL_LINES, run_stage

PYTHON = sys.executable
# A stage of five cases of bench/cases.py whose third does what is asked.
CASES = """
import os, sys, time
from bench import lines
from bench.cases import Case, run_cases
how, marker = sys.argv[1:]
def hang():
    with open(marker, "w") as file: file.write(str(os.getpid()))
    time.sleep(1e6)
def third():
    if how == "raises": raise ValueError("this case is bad")
    if how == "exits": sys.exit("gives up")
    if how == "dies": os.abort()
    if how == "loses the device": os._exit(lines.LOST)
    if how == "hangs": hang()
    if how == "dies in a line":
        with open(os.environ[lines.FILE], "a") as file: file.write('{"stage": "half')
        os.abort()
    return {"value": 3}
run_cases([Case(f"case {i}", third if i == 3 else lambda i=i: {"value": i}) for i in range(1, 6)], "cpu")
"""


def command(text: str, *arguments: str) -> list[str]:
    return [PYTHON, "-c", text, *arguments]


def run(stage: Stage, out: Path, limit: float | None = None, patience: float = 600) -> list[dict[str, Any]]:
    file = out / "lines.jsonl"
    run_stage(stage, file, limit, patience)
    return lines.read(file)


def outcomes(found: list[dict[str, Any]]) -> dict[str, str]:
    return {line["case"]: line["outcome"] for line in found}


GOOD = {f"case {i}": "ok" for i in (1, 2, 4, 5)}


@pytest.mark.parametrize(
    ("how", "third", "says"),
    [
        ("is good", "ok", {"value": 3}),
        ("raises", "failed", {"error": "ValueError", "message": "this case is bad"}),
        ("exits", "failed", {"error": "SystemExit", "message": "gives up"}),
        ("dies", "failed", {"message": "ended by SIGABRT"}),
        ("dies in a line", "failed", {"message": "ended by SIGABRT"}),
        ("loses the device", None, {}),
    ],
)
def test_a_bad_case_costs_itself(how: str, third: str | None, says: dict[str, Any], tmp_path: Path) -> None:
    """Whatever the third case does, the other four have their lines, in order, each once."""
    found = run(Stage("five", command(CASES, how, ""), resumes=True), tmp_path)
    expected = GOOD | ({"case 3": third} if third else {}) | {"stage": "ok"}
    assert outcomes(found) == expected
    assert [line["case"] for line in found] == sorted(expected, key=lambda case: (case == "stage", case))
    for name, value in says.items():
        assert next(line for line in found if line["case"] == "case 3")[name] == value


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to which a process writes its id when it hangs: from then on the runner's clock runs fast.

    So no test waits for a limit, and none depends on how long a busy machine takes to start a process.
    """
    file, ahead, real = tmp_path / "marker", [0.0], time.monotonic

    def clock() -> float:
        if file.exists() and file.read_text() and alive(int(file.read_text())):
            ahead[0] += 400
        return real() + ahead[0]

    monkeypatch.setattr(gpu_process.time, "monotonic", clock)
    return file


def alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_case_that_hangs_is_given_up_and_the_rest_runs(marker: Path, tmp_path: Path) -> None:
    found = run(Stage("five", command(CASES, "hangs", str(marker)), resumes=True), tmp_path, patience=900)
    assert outcomes(found) == GOOD | {"case 3": "stopped", "stage": "ok"}
    assert next(line for line in found if line["case"] == "case 3")["message"] == "no output for 900 s"


def test_a_stage_that_is_no_list_of_cases(tmp_path: Path) -> None:
    """Its end is its line: the exit code, and the last that it printed."""
    bad = run(Stage("bad", command("for i in range(99): print(i)\nraise SystemExit('why it failed')")), tmp_path)
    assert outcomes(bad) == {"process": "failed", "stage": "ended"}
    assert bad[0]["message"] == "exit code 1"
    assert bad[0]["tail"][-2:] == ["98", "why it failed"]
    assert len(bad[0]["tail"]) == TAIL_LINES
    good = run(Stage("good", command("print('fine')")), tmp_path)[2:]
    assert outcomes(good) == {"stage": "ok"}
    missing = run(Stage("missing", command("import there_is_no_such_module"), resumes=True), tmp_path)[3:]
    assert outcomes(missing) == {"process": "failed", "stage": "ended"}


def test_a_stage_ends_with_its_children_when_its_time_is_over(marker: Path, tmp_path: Path) -> None:
    text = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1e6)'])\n"
        "pathlib.Path(sys.argv[1]).write_text(str(child.pid)); time.sleep(1e6)"
    )
    found = run(Stage("hangs", command(text, str(marker))), tmp_path, limit=3600, patience=1e9)
    assert outcomes(found) == {"process": "stopped", "stage": "ended"}
    assert "share of the time" in found[0]["message"]
    assert not alive(int(marker.read_text()))
    assert outcomes(run(Stage("late", ["true"]), tmp_path, limit=-1)[2:]) == {"stage": "skipped"}


def test_a_budget_is_shared_out_by_weight(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a stage leaves goes to those behind it; without a budget there is no limit."""
    clock, limits = [0.0], []

    def stage_run(stage: Stage, file: Path, limit: float | None, patience: float) -> None:
        limits.append(limit)
        clock[0] += 1.0

    monkeypatch.setattr(gpu, "run_stage", stage_run)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    stages = [Stage(str(weight), [], weight) for weight in (1, 2, 1)]
    gpu.run(stages, tmp_path / "x", budget=100)
    assert limits == [25, 66, 98]
    limits.clear()
    gpu.run(stages, tmp_path / "x")
    assert limits == [None, None, None]


def test_benchmarks_are_the_modules_with_a_main_that_takes_arguments(tmp_path: Path) -> None:
    sources = {
        "b": "def main(argv=None): ...",
        "a": "def main(argv): ...",
        "part": "def main(): ...",
        "helper": "X = 1",
    }
    for name, text in sources.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "common.py").write_text("def main(argv): ...")
    assert benchmarks(tmp_path) == ["a", "b"]
    assert {"encode_topk", "spmm", "step", "memory"} <= set(benchmarks())
    assert not {"recipe", "recipe_rows", "common"} & set(benchmarks())


def test_the_plan_begins_with_what_says_most(tmp_path: Path) -> None:
    names = [stage.name for stage in plan(tmp_path, seconds=3)]
    assert names[:4] == ["machine", "smoke", "kernels", "step"]
    assert names.index("tests") < names.index("spmm bench") < names.index("sanitizer") == len(names) - 1
    assert [stage.name for stage in plan(tmp_path, seconds=3, only=["step"])] == ["machine", "step"]
    with pytest.raises(SystemExit, match="no stage stepp; there are machine"):
        plan(tmp_path, seconds=3, only=["stepp"])


def test_without_a_gpu_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match="no CUDA device here: --rehearse"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_lines_are_strict_json_and_half_ones_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    lines.append(file, {"a": float("nan"), "b": [1.5, float("-inf")], "path": file})
    with open(file, "a") as end:
        end.write('{"half": ')
    lines.end_line(file)
    lines.append(file, {"c": 1})
    assert lines.read(file) == [{"a": "nan", "b": [1.5, "-inf"], "path": str(file)}, {"c": 1}]


def test_results_are_distilled_from_lines_but_not_from_a_rehearsals(tmp_path: Path) -> None:
    file, out = tmp_path / "gpu.jsonl", tmp_path / "results"
    machine = {"stage": "machine", "case": "machine", "outcome": "ok", "device": "NVIDIA H200", "rehearsal": False}
    lines.append(file, machine | {"versions": {"torch": "2.11"}})
    lines.append(file, {"stage": "kernels", "case": "encode", "outcome": "ok", "seconds": {"fused": {"median": 0.5}}})
    lines.append(file, {"stage": "kernels", "case": "stage", "outcome": "ok", "seconds": 9})
    assert [path.name for path in gpu.distil(file, out)] == ["nvidia-h200-gpu-kernels.json"]
    written = json.loads((out / "nvidia-h200-gpu-kernels.json").read_text())
    assert written["device"] == "NVIDIA H200"
    assert written["versions"] == {"torch": "2.11"}
    assert [row["case"] for row in written["results"]] == ["encode"]
    other = tmp_path / "rehearsal.jsonl"
    lines.append(other, machine | {"device": "cpu, interpreter", "rehearsal": True})
    with pytest.raises(SystemExit, match="nobody's results"):
        gpu.distil(other, out)
    lines.append(tmp_path / "none.jsonl", {"stage": "smoke", "case": "x", "outcome": "ok"})
    with pytest.raises(SystemExit, match="what machine"):
        gpu.distil(tmp_path / "none.jsonl", out)


def test_needs_no_package_that_a_gpu_machine_lacks(tmp_path: Path) -> None:
    """Engines, kernels, benchmarks and the tests that a GPU runs, with torch, triton, numpy and pytest alone."""
    for name in ("safetensors", "tqdm", "tyro", "hypothesis", "transformers", "pytest_benchmark", "matplotlib"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError({name!r}, name={name!r})")
    names = [path.stem for path in (ROOT / "kernels").glob("*.py")]
    kernels, benches = [f"test_{name}.py" for name in names], [f"bench.{name}" for name in names if name != "tuning"]
    modules = "bench.gpu_smoke, bench.gpu_kernels, bench.gpu_step, bench.gpu_sanitizer, bench.memory, bench.encode_topk"
    engines = "saefast.engines.fused, saefast.engines.autograd, saefast.ops.triton_encode_topk, saefast.optim.triton"
    program = f"import {modules}, {', '.join(benches)}, {engines}, saefast\nsaefast.SAE(saefast.SAEConfig(8, 16, 2))"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command(program), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = ("test_encode_topk_triton.py", "test_threshold_encode.py", "engines/test_fused.py", "engines/test_hot.py",
             "optim/test_lean.py", "optim/test_row_ops.py", "data/test_gather.py", *kernels)  # fmt: skip
    paths = [str(ROOT / "tests" / name) for name in files]
    collect = [PYTHON, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=--import-mode=importlib", *paths]
    done = subprocess.run(collect, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_tests_that_take_the_device_are_a_gpus_where_there_is_one(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = request.config.pluginmanager.get_plugins()
    conftest = next(p for p in plugins if str(getattr(p, "__file__", "")) == str(ROOT / "tests" / "conftest.py"))

    class Item:
        nodeid = "tests/test_x.py::test"

        def __init__(self, *fixtures: str) -> None:
            self.fixturenames, self.marks = fixtures, []

        def add_marker(self, mark: Any) -> None:
            self.marks.append(mark.name)

        def get_closest_marker(self, name: str) -> None:
            return None

    for there in (True, False):
        monkeypatch.setattr(conftest.torch.cuda, "is_available", lambda there=there: there)
        items = [Item("device", "tmp_path"), Item("tmp_path")]
        conftest.pytest_collection_modifyitems(items)
        assert [item.marks for item in items] == [["gpu"] if there else [], []]


def test_the_rehearsal_that_is_committed_is_one_and_went_well() -> None:
    found = lines.read(ROOT / "bench" / "results" / "rehearsal.jsonl")
    assert found[0]["case"] == "machine"
    assert all(line["device"] == "cpu, interpreter" for line in found)
    assert gpu.bad(found) == []


@pytest.mark.slow
def test_a_rehearsal_runs_the_whole_plan_around_stages_that_fail(tmp_path: Path) -> None:
    """Every stage of `make gpu` at tiny sizes in the interpreter, with three bad ones among them."""
    stages = plan(tmp_path, seconds=0.05, rehearse=True)
    bad = [
        Stage("aborts", command(CASES, "dies", ""), resumes=True),
        Stage("no module", command("import there_is_no_such_module")),
        Stage("raises", command(CASES, "raises", ""), resumes=True),
    ]
    order = [stages[0], bad[0], *stages[1:3], bad[1], *stages[3:], bad[2]]
    file = tmp_path / "rehearsal.jsonl"
    gpu.run(order, file)
    found = lines.read(file)
    assert found[0]["case"] == "machine"
    assert found[0]["device"] == "cpu, interpreter"
    assert {"versions", "commit", "time"} <= found[0].keys()
    failed = {(line["stage"], line["case"]) for line in gpu.bad(found)}
    assert failed == {("aborts", "case 3"), ("no module", "process"), ("raises", "case 3")}, gpu.summary(found)
    own = [line for line in found if line["stage"] not in {stage.name for stage in bad}]
    assert all(line["device"] == "cpu, interpreter" for line in own), "a figure that could be taken for a GPU's"
    for stage in stages:
        kept = [line for line in own if line["stage"] == stage.name]
        assert kept[-1]["case"] == "stage"
        assert len(kept) >= 2 or stage.skipped or stage.name == "build", stage.name
    cases = {line["case"].split(" 5x")[0] for line in own if line["outcome"] == "ok"}
    assert {"encode_topk fused float16", "encode_topk chunked float32", "update_rows lean", "decode_loss"} <= cases
    for name in ("dense", "clipped", "settled", "lean", "hot", "AuxK"):
        assert any(case.startswith(f"three steps {name} ") for case in cases), name
    smoke = next(line for line in own if line["stage"] == "smoke" and line["case"] == "kernels launched")
    # The interpreter serves the encoder's other form; what is compiled ahead of time is all that is ever launched.
    compiled = {name.split()[0] for name in test_aot.REGISTERS} - {"tiles_descriptor"}
    assert compiled <= set(smoke["names"]), f"no smoke case launches {sorted(compiled - set(smoke['names']))}"
    by_stage = next(line for line in own if line["case"].startswith("step adam by stage"))
    assert {"update_rows", "decode_loss", "rest", "whole step"} <= by_stage["ms"].keys()
