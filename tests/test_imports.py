"""Imports run one way, heavy packages are imported where they are used, and `import saefast` costs nothing."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Bottom first. A module imports from the floors below its own, a package counts as one, and nothing else.
# kernels and reference are held to more: see the tests below.
FLOORS = (
    ("errors",),
    ("ambient", "schema", "typed"),
    ("counts", "devices", "files", "machine", "output", "placement", "reference", "kernels", "optim", "runs"),
    ("triton_launch", "chunks"),
    ("triton_encode",),
    ("native", "triton_ops", "metrics", "token_text"),
    ("ops", "rows_native", "rows_lean"),
    ("autograd", "data", "splice", "rows", "screen"),
    ("init", "batch_triton"),
    ("sae", "rows_triton"),
    ("recipe", "engine", "features"),
    ("losses", "feed", "progress", "checkpoint", "feature_table", "plots", "hot", "auxk_block", "plan"),
    ("autograd_step", "gradient", "limits", "rundir"),
    ("step",),
    ("trainer",),
    ("train", "evaluate"),
    ("report", "sweep", "cli_args"),
    ("cli_harvest", "cli_eval", "cli_features", "cli_plan", "cli_bench"),
    ("cli_train",),
    ("cli_demo",),
    ("cli",),
    ("__main__",),
)
# The fused step exists to do without autograd: it stands above it and still does not use it.
NEVER = {"step": {"autograd"}, "gradient": {"autograd"}, "rows": {"autograd"}, "screen": {"autograd"}}
HEAVY = {"transformers", "datasets", "matplotlib", "triton", "tyro", "tqdm", "sentence_transformers", "pyarrow"}
TRITON = ("kernels", "triton_launch", "triton_encode", "triton_ops", "batch_triton", "rows_triton")
# Each sub-command's module is imported by cli when that sub-command was typed.
COMMANDS = [room for floor in FLOORS for room in floor if room.startswith("cli_")]
MAY_BE_HEAVY = {name: {"triton"} for name in TRITON} | {name: {"tyro"} for name in COMMANDS}


def modules() -> dict[str, Path]:
    """Dotted name below saefast -> file; "" is saefast itself."""
    found = {}
    for path in [*(ROOT / "saefast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "saefast":
            parts = parts[1:]
        found[".".join(parts).removesuffix("__init__").removesuffix(".")] = path
    return found


MODULES = modules()
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(tree: ast.AST, top_level: bool = False) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import that can run, wherever it stands; with top_level, those that run with the module."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif is_type_checking(node) or (top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            continue
        else:
            yield from imports(node, top_level)


@cache
def imported_names(module: str, top_level: bool = False) -> frozenset[str]:
    """Dotted names that a module imports: for `from a import b`, both a and a.b."""
    names: set[str] = set()
    for node in imports(ast.parse(MODULES[module].read_text()), top_level):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        else:
            assert node.level == 0, f"{module}: relative import on line {node.lineno}"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(names)


def edges(module: str) -> set[str]:
    """Modules of saefast that a module imports."""
    inner = {name.removeprefix("saefast").removeprefix(".") for name in imported_names(module) if is_ours(name)}
    return {name for name in inner if name in MODULES and name} - {module}


def is_ours(name: str) -> bool:
    return name.split(".")[0] == "saefast"


def room(module: str) -> str:
    return module.split(".")[0]


NAMES = sorted(name for name in MODULES if name)


def test_the_walk_sees_imports() -> None:
    # The tests below pass on an empty graph, so the walk itself is held to arrows that are known to be there.
    assert "reference" in edges("ops")
    assert "triton_ops" in edges("ops"), "an import inside a function was missed"
    assert "errors" in edges("native")
    assert any(name.startswith("kernels.") for name in NAMES)


@pytest.mark.parametrize("module", NAMES)
def test_arrows_do_not_run_back(module: str) -> None:
    here = room(module)
    assert here in FLOOR, f"give {here} a place in FLOORS"
    for target in edges(module):
        there = room(target)
        assert there == here or FLOOR[there] < FLOOR[here], f"{module} imports {target}, which is not below it"
        assert there not in NEVER.get(here, ()), f"{module} must not import {target}"


@pytest.mark.parametrize("module", [name for name in NAMES if room(name) == "kernels"])
def test_a_kernel_imports_triton_and_tuning_alone(module: str) -> None:
    allowed = {"kernels.tuning"} - {module}
    assert edges(module) <= allowed, "one op per file: what two ops share belongs to tuning or to the caller"
    outside = {room(name) for name in imported_names(module) if not is_ours(name)}
    assert outside <= {"torch", "triton", *sys.stdlib_module_names}


def test_reference_is_plain_torch() -> None:
    assert edges("reference") <= {"errors"}
    assert {room(name) for name in imported_names("reference") if not is_ours(name)} <= {
        "torch",
        *sys.stdlib_module_names,
    }


def test_no_cycles() -> None:
    TopologicalSorter({module: edges(module) for module in NAMES}).prepare()


@pytest.mark.parametrize("module", NAMES)
def test_nothing_imports_tests_bench_or_a_second_copy_of_the_kernels(module: str) -> None:
    assert not {room(name) for name in imported_names(module)} & {"tests", "bench", "kernels", "conftest"}


@pytest.mark.parametrize("module", NAMES)
def test_heavy_packages_are_imported_where_they_are_used(module: str) -> None:
    heavy = {room(name) for name in imported_names(module, top_level=True)} & HEAVY
    assert heavy <= MAY_BE_HEAVY.get(room(module), set())


COST = """
import json, sys, threading, torch
before, threads = set(sys.modules), threading.active_count()
{statement}
new = sorted({{name.split(".")[0] for name in set(sys.modules) - before}})
print("REPORT", json.dumps([new, threading.active_count() - threads]))
"""


def cost(statement: str) -> tuple[list[str], int, str]:
    """Beyond `import torch`: the top-level packages imported, threads started, and all that was printed on the way."""
    program = COST.format(statement=statement)
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/")
    printed, _, report = ran.stdout.rpartition("REPORT ")
    new, threads = json.loads(report)
    return new, threads, printed + ran.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement", ["import saefast", "from saefast import SAE, SAEConfig, SAEOutput, TrainConfig, load, preset, train"]
)
def test_importing_is_silent_and_costs_nothing_but_saefast_and_safetensors(statement: str) -> None:
    """What an import takes is what it imports: in packages, because seconds are the machine's."""
    new, threads, printed = cost(statement)
    assert printed == ""
    assert threads == 0
    assert set(new) <= {"saefast", "safetensors", *sys.stdlib_module_names}


def test_public_names_are_there() -> None:
    import saefast

    for name in saefast.__all__:
        assert getattr(saefast, name) is not None
    assert set(saefast.__all__) <= set(dir(saefast))
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = saefast.trian


@pytest.mark.slow
@pytest.mark.parametrize("first", ["import saefast.train", "from saefast.train import train", "saefast.train"])
def test_train_is_the_function_whatever_was_imported_first(first: str) -> None:
    program = f"import saefast; {first}; import types; assert isinstance(saefast.train, types.FunctionType)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")
