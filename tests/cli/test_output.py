"""Text in and out: any encoding of the terminal will do, and every text file is UTF-8 whatever the machine's is."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import saefast
from saefast import SAEConfig, TrainConfig

ROOT = Path(__file__).resolve().parent.parent.parent
NAME = "дані œ"
# Commands in one process, which costs one start; what each prints lies between marks.
COMMANDS = """
import sys
from saefast.cli.main import main
for line in sys.argv[1:]:
    print("<<", main(line.split("|")), ">>", flush=True)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("output")
    np.save(folder / f"{NAME}.npy", np.random.default_rng(0).standard_normal((600, 16)).astype("float32"))
    config = TrainConfig(batch_size=128, device="cpu")
    saefast.train(folder / f"{NAME}.npy", SAEConfig(d_in=16, n_latents=64, k=4), config, folder / "run")
    return folder


def child(folder: Path, commands: list[str], **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", COMMANDS, *commands],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        check=True,
    )


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "latin-1", "ascii", "koi8-r"])
def test_every_encoding_of_the_terminal_gets_the_table(run: Path, encoding: str) -> None:
    commands = ["eval|run", "train|--help", "plan|--device|h200", f"eval|{NAME}-is-not-there", "eval|bad\udcff"]
    ran = child(run, commands, PYTHONIOENCODING=encoding)
    out, err = ran.stdout.decode(encoding), ran.stderr.decode(encoding)
    evaluation, training_help, plan, missing, _ = out.split(" >>")[:5]
    assert evaluation.rstrip().endswith("<< 0")
    formula = "Σ‖x−x̂‖² / Σ‖x−x̄‖²" if encoding == "utf-8" else "||x-x^||"
    assert "fvu" in evaluation
    assert formula in evaluation
    assert "density.png" in evaluation
    assert "2^14" in training_help
    assert "latents" in plan
    assert missing.rstrip().endswith("<< 2")
    complaints = err.splitlines()
    assert len(complaints) == 2
    assert all(line.startswith("saefast: error: ") for line in complaints)
    assert "-is-not-there" in complaints[0]
    if encoding in ("utf-8", "koi8-r"):
        assert "дані"[:2] in complaints[0]
    if encoding != "utf-8":
        assert "\\udcff" in complaints[1]


def test_files_are_utf8_on_a_machine_that_is_not(run: Path) -> None:
    """A locale of ASCII alone: what one machine writes, another reads."""
    other = {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}
    train = f"train|{NAME}.npy|--out|there|--n-latents|32|--k|4|--batch-size|128"
    commands = [train, "eval|there", f"eval|run|--data|{NAME}.npy"]
    ran = child(run, commands, **other)
    assert ran.stdout.count(b"<< 0 >>") == 3, ran.stdout + ran.stderr
    assert "Σ" in json.loads((run / "there" / "eval.json").read_text(encoding="utf-8"))["formulas"]["fvu"]["formula"]
    assert child(run, ["eval|there"]).stdout.endswith(b"<< 0 >>\n")


def test_a_reader_that_has_gone_is_no_error(run: Path) -> None:
    command = [sys.executable, "-m", "saefast", "eval", "run"]
    process = subprocess.Popen(
        command, cwd=run, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 0


def opens_text_without_encoding(tree: ast.AST) -> Iterator[int]:
    """Lines that open a text file, or a child's output as text, and leave its encoding to the machine."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _is_text(node) and "encoding" not in {word.arg for word in node.keywords}:
            yield node.lineno


def _is_text(call: ast.Call) -> bool:
    words = {word.arg: getattr(word.value, "value", None) for word in call.keywords}
    if words.get("text") is True or words.get("universal_newlines") is True:
        return True
    if isinstance(call.func, ast.Name):
        return call.func.id == "open" and not _is_binary(call.args[1:2], words)
    if not isinstance(call.func, ast.Attribute):
        return False
    owner = getattr(call.func.value, "id", "")
    if call.func.attr in ("read_text", "write_text"):
        return True
    if call.func.attr == "fdopen" or (call.func.attr == "open" and owner in ("io", "codecs", "gzip", "bz2", "lzma")):
        return not _is_binary(call.args[1:2], words)
    # Path.open(mode): what opens with another first argument is no path (a shard folder, for one).
    is_path = call.func.attr == "open" and owner != "os" and all(_is_mode(arg) for arg in call.args[:1])
    return is_path and not _is_binary(call.args[:1], words)


def _is_mode(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and set(node.value) <= set("rwaxbt+")


def _is_binary(mode: list[ast.expr], words: dict[str | None, object]) -> bool:
    given = getattr(mode[0], "value", "") if mode else words.get("mode", "")
    return "b" in str(given)


SOURCES = [path for room in ("saefast", "kernels") for path in sorted((ROOT / room).rglob("*.py"))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_text_file_is_opened_as_utf8(path: Path) -> None:
    lines = [*opens_text_without_encoding(ast.parse(path.read_text(encoding="utf-8")))]
    assert not lines, f'{path.name}, lines {lines}: say encoding="utf-8"'


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("open(p)", 1),
        ("open(p, 'w')", 1),
        ("open(p, mode='a')", 1),
        ("p.open()", 1),
        ("p.open('a')", 1),
        ("p.read_text()", 1),
        ("p.write_text(x)", 1),
        ("os.fdopen(1, 'w')", 1),
        ("gzip.open(p, 'rt')", 1),
        ("subprocess.run(c, text=True)", 1),
        ("open(p, 'rb')", 0),
        ("p.open('r+b')", 0),
        ("p.open(mode='rb')", 0),
        ("p.open(encoding='utf-8')", 0),
        ("os.open(p, flags)", 0),
        ("folder.open(info, hook)", 0),
        ("safe_open(p, framework='pt')", 0),
        ("subprocess.run(c, text=True, encoding='utf-8')", 0),
    ],
)
def test_the_walk_sees_what_it_must(line: str, found: int) -> None:
    assert len([*opens_text_without_encoding(ast.parse(line))]) == found
