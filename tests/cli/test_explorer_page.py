"""docs/explorer.md runs as it is written, on a small run, and names what is there."""

import os
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
import tiny_models

from saefast.analysis.exports import Kind
from saefast.cli import main as cli
from saefast.harvest.to_disk import HarvestConfig, harvest
from saefast.latents.sentences import LONGEST
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "explorer.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)
COMMANDS = [shlex.split(line, comments=True) for kind, text in BLOCKS if not kind for line in text.splitlines()]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/first, whose latents are as many as the page speaks of."""
    folder = tmp_path_factory.mktemp("page")
    tiny_models.model("gpt2", head=True).save_pretrained(folder / "model")
    tiny_models.tokenizer(special=False).save_pretrained(folder / "model")
    config = HarvestConfig(
        model=str(folder / "model"), hooks=("layers.1",), ctx_len=24, dtype="float32", heldout=0.2, device="cpu"
    )
    harvest(folder / "acts", config, text=tiny_models.documents(40), progress=False)
    run = folder / "runs" / "first"
    kept = {"path": os.path.relpath(folder / "acts", run), "hook": None, "key": None, "heldout": 0.2}
    metadata = {"data": kept | {"shuffle": "mapped"}, "hook_name": "layers.1", "model_name": "tiny"}
    SAE(SAEConfig(d_in=16, n_latents=8200, k=16, metadata=metadata), seed=0).save(run)
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
