"""Imports run one way, heavy packages are imported where they are used, and `import saefast` costs nothing."""

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A room is a folder of saefast and imports from rooms above it in this list alone. "ground" is the files beside the
# folders, "saefast" the package itself and its __main__. Files of one room have an order too: no circle.
ROOMS = (
    "ground", "kernels", "metrics", "ops", "data", "harvest", "models", "formats", "optim", "engines", "training",
    "latents", "analysis", "integrations", "explorer", "cli", "saefast",
)  # fmt: skip
MOST_FLOORS = 10
# The fused engine exists to do without autograd: it stands above it and still does not use it.
WITHOUT_AUTOGRAD = ("engines.fused", "engines.fused_pass", "optim.reference", "ops.mixed")
HEAVY = {"transformers", "datasets", "matplotlib", "triton", "tyro", "tqdm", "sentence_transformers", "pyarrow"}


def modules() -> dict[str, str]:
    """Dotted name below saefast -> source; "" is saefast itself."""
    found = {}
    for path in [*(ROOT / "saefast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[0] == "saefast":
            parts = parts[1:]
        found[".".join(parts).removesuffix("__init__").removesuffix(".")] = path.read_text(encoding="utf-8")
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def statements(tree: ast.AST, top_level: bool = False) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import, those for type checkers included; with top_level, those that run with the module."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif not (top_level and (is_type_checking(node) or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))):
            yield from statements(node, top_level)


def imported(source: str, top_level: bool = False) -> set[str]:
    """Dotted names that a module imports by statement: for `from a import b`, a.b."""
    names: set[str] = set()
    for node in statements(ast.parse(source), top_level):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        else:
            assert node.level == 0, f"relative import on line {node.lineno}"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def spelled(source: str) -> set[str]:
    """Dotted names below saefast that are the whole of a string, which is how a module is imported by its name."""
    texts = [n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return {text for text in texts if re.fullmatch(r"saefast(\.\w+)+", text)}


def edges(module: str, tree: dict[str, str]) -> set[str]:
    """The files that a file of `tree` (name -> source) imports, in whatever way it does."""
    targets = {name.removeprefix("saefast.") for name in spelled(tree[module])}
    for name in imported(tree[module]):
        if first(name) == "saefast":
            inner = name.removeprefix("saefast").removeprefix(".")
            # saefast.models.SAE is no file but a name that the room's __init__ hands on.
            targets.add(inner if inner in tree else inner.rpartition(".")[0])
    return targets & set(tree) - {module}


def first(name: str) -> str:
    return name.split(".")[0]


def room(module: str) -> str:
    if module in ("", "__main__"):
        return "saefast"
    return first(module) if first(module) in ROOMS else "ground"


def back_arrows(tree: dict[str, str]) -> list[str]:
    """What stands against the order of the rooms."""
    found = []
    for module in tree:
        for target in sorted(edges(module, tree)):
            here, there = room(module), room(target)
            if here != there and ROOMS.index(there) >= ROOMS.index(here):
                found.append(f"{module} imports {target or 'saefast'}: {there} is not above {here} in ROOMS")
    return found


def floors(tree: dict[str, str]) -> int:
    """The longest chain of rooms that import each other. Raises graphlib.CycleError for a circle of files."""
    TopologicalSorter({module: edges(module, tree) for module in tree}).prepare()
    above: dict[str, set[str]] = {name: set() for name in ROOMS}
    for module in tree:
        above[room(module)] |= {room(target) for target in edges(module, tree)} - {room(module)}
    floor: dict[str, int] = {}
    for name in TopologicalSorter(above).static_order():
        floor[name] = 1 + max((floor[other] for other in above[name]), default=0)
    return max(floor.values())


MODULES = modules()
NAMES = sorted(name for name in MODULES if name)


def test_the_walk_sees_imports() -> None:
    # The tests below pass on an empty graph, so the walk itself is held to arrows that are known to be there.
    assert "ops.reference" in edges("ops.spmm", MODULES)
    assert "ops.triton_spmm" in edges("ops.spmm", MODULES), "an import inside a function was missed"
    assert "errors" in edges("ops.native", MODULES)
    assert "ops.spmm" in edges("ops", MODULES)
    assert {"engines", "engines.config"} <= edges("", MODULES), "an import by string or for type checkers was missed"
    assert "cli.train" in edges("cli.main", MODULES)
    assert any(name.startswith("kernels.") for name in NAMES)


HIDDEN = {
    "a statement": "from saefast.engines.fused import FusedEngine",
    "a room's name": "from saefast.engines import FusedEngine",
    "a module": "import saefast.engines.fused",
    "in a function": "def f():\n    from saefast.engines import fused",
    "for type checkers": "if TYPE_CHECKING:\n    from saefast.engines.fused import FusedEngine",
    "by string": "importlib.import_module('saefast.engines.fused')",
    "of the package": "from saefast import train",
}


@pytest.mark.parametrize("kind", HIDDEN)
def test_a_hidden_back_arrow_is_seen(kind: str) -> None:
    assert back_arrows(MODULES | {"models.sae": MODULES["models.sae"] + "\n" + HIDDEN[kind]})


def test_a_circle_in_a_room_is_seen() -> None:
    with pytest.raises(CycleError):
        floors(MODULES | {"ops.reference": "def f():\n    from saefast.ops import native"})
    with pytest.raises(CycleError):
        floors(MODULES | {"ops.native": MODULES["ops.native"] + "\nfrom saefast.ops import encode_topk"})


def test_rooms_import_one_way() -> None:
    assert back_arrows(MODULES) == []


def test_no_circles_and_few_floors() -> None:
    assert floors(MODULES) <= MOST_FLOORS


def test_the_list_holds_the_rooms_that_are_there() -> None:
    folders = {path.parent.name for path in (ROOT / "saefast").glob("*/*.py")}
    assert folders == set(ROOMS) - {"ground", "saefast"}


@pytest.mark.parametrize("name", [name for name in ROOMS if name not in ("ground", "saefast", "kernels")])
def test_a_room_says_what_it_is_for_and_hands_on_its_names(name: str) -> None:
    module = importlib.import_module(f"saefast.{name}")
    assert module.__doc__
    assert module.__doc__.count("\n") == 0
    for public in getattr(module, "__all__", ()):
        assert not isinstance(getattr(module, public), ModuleType), f"{public} is a file's name too: rename the file"


@pytest.mark.parametrize("module", WITHOUT_AUTOGRAD)
def test_the_fused_engine_does_without_autograd(module: str) -> None:
    assert "engines.autograd" not in edges(module, MODULES)


@pytest.mark.parametrize("module", [name for name in NAMES if room(name) == "kernels"])
def test_a_kernel_imports_triton_and_tuning_alone(module: str) -> None:
    allowed = {"kernels.tuning"} - {module}
    assert edges(module, MODULES) <= allowed, "one op per file: what two ops share belongs to tuning or to the caller"
    outside = {first(name) for name in imported(MODULES[module])} - {"saefast"}
    assert outside <= {"torch", "triton", *sys.stdlib_module_names}


def test_reference_is_plain_torch() -> None:
    assert edges("ops.reference", MODULES) <= {"errors"}
    outside = {first(name) for name in imported(MODULES["ops.reference"])} - {"saefast"}
    assert outside <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("module", NAMES)
def test_nothing_imports_tests_bench_or_a_second_copy_of_the_kernels(module: str) -> None:
    assert not {first(name) for name in imported(MODULES[module])} & {"tests", "bench", "kernels", "conftest"}


@pytest.mark.parametrize("module", NAMES)
def test_heavy_packages_are_imported_where_they_are_used(module: str) -> None:
    may_be: set[str] = set()
    if room(module) == "kernels" or module.split(".")[-1].startswith("triton"):
        may_be = {"triton"}
    elif room(module) == "cli" and module not in ("cli", "cli.main"):
        may_be = {"tyro"}
    assert {first(name) for name in imported(MODULES[module], top_level=True)} & HEAVY <= may_be


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
@pytest.mark.parametrize(
    "before", ["import saefast.training.api", "from saefast.training import train", "saefast.train"]
)
def test_train_is_the_function_whatever_was_imported_first(before: str) -> None:
    program = f"import saefast; {before}; import types; assert isinstance(saefast.train, types.FunctionType)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")
