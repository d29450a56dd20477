"""`saefast bench`: the benchmarks of a checkout, each in a process of its own."""

import ast
import difflib
import os
import subprocess
import sys
from pathlib import Path

from saefast.errors import InputError

ROOT = Path(__file__).resolve().parent.parent.parent
# gpu.py is `make gpu`, which runs all the others.
FOLDER, NOT_LISTED = ROOT / "bench", {"gpu"}


def main(argv: list[str]) -> int:
    found = benchmarks()
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, found))
        lines = [f"  {name:<{width}}  {about}" for name, about in found.items()]
        print(
            "\n".join(
                ["usage: saefast bench NAME [options]", "", *lines, "", "saefast bench NAME --help lists options."]
            )
        )
        return 0
    name = argv[0]
    if name not in found:
        near = difflib.get_close_matches(name, found, n=1)
        raise InputError(f"there is no benchmark {name!r}: {f'perhaps {near[0]}' if near else ', '.join(found)}")
    # Run where it was typed, so that paths on the command line mean what they say; the folder bench is found in ROOT.
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", f"bench.{name}", *argv[1:]]
    # As for this process's own commands: a sign that the terminal lacks must not end a benchmark.
    speaks = os.environ.get("PYTHONIOENCODING") or f"{sys.stdout.encoding}:backslashreplace"
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONIOENCODING": speaks}
    return subprocess.run(command, env=environment, check=False).returncode


def benchmarks() -> dict[str, str]:
    """Name and first line of every script in bench/ that has a main(argv)."""
    found = {}
    for file in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        if "main" in functions and functions["main"].args.args and file.stem not in NOT_LISTED:
            found[file.stem] = (ast.get_docstring(tree) or "").split("\n")[0]
    return found
