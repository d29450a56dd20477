"""docs/explorer.md runs as it is written, on a small run, and names what is there."""

import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
from harvested_runs import harvested, save

from saefast.analysis.exports import Kind
from saefast.cli import main as cli
from saefast.latents.sentences import LONGEST

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "explorer.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)
COMMANDS = [shlex.split(line, comments=True) for kind, text in BLOCKS if not kind for line in text.splitlines()]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/first, whose latents are as many as the page speaks of."""
    folder = harvested(tmp_path_factory.mktemp("page"))
    save(folder / "runs" / "first", folder / "acts", n_latents=8200, k=16)
    return folder


def test_every_command_and_block_runs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    features = [command for command in COMMANDS if command[1] == "features"]
    assert len(features) >= 7
    for number, command in enumerate(features):
        # The page's two examples of a page to share name the same folder.
        words = pairwise(command)
        out = [f"{word}-{number}" if before == "--out" else word for before, word in words]
        assert cli.main(out) == 0, (command, capsys.readouterr().err)
    (sql,) = (text for kind, text in BLOCKS if kind == "python")
    capsys.readouterr()
    exec(compile(sql, "docs/explorer.md", "exec"), {})
    assert re.fullmatch(r"(\d+ .* \d+\.\d\n){1,10}", capsys.readouterr().out)


def test_every_export_is_on_the_page_and_every_link_leads_somewhere() -> None:
    named = {command[command.index("--export") + 1] for command in COMMANDS if "--export" in command}
    assert named == set(get_args(Kind)) - {"page"}
    assert f"up to {LONGEST} tokens" in PAGE
    for link in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (DOCS / link).exists(), link
