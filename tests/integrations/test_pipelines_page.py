"""docs/pipelines.md runs as it is written, on a small model, and says what the code does."""

import re
import shlex
from pathlib import Path

import pytest
import tiny_models
import torch

import saefast
from saefast.analysis.latent_stats import LATENTS, write_latent_stats
from saefast.cli import main as cli
from saefast.integrations import recording
from saefast.integrations.passes import Chosen
from saefast.metrics.streaming import Sparsity
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

PAGE = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page's first lines open."""
    monkeypatch.chdir(tmp_path)
    lm = tiny_models.model("llama", head=True)
    lm.generation_config.eos_token_id = None
    lm.save_pretrained("model")
    tiny_models.tokenizer(special=False).save_pretrained("model")
    SAE(SAEConfig(d_in=16, n_latents=8300, k=8, metadata={"hook_name": "layers.1"}), seed=0).save("runs/mine")
    sparsity = Sparsity(8300)
    sparsity.max_act += 2.0
    write_latent_stats(Path("runs/mine") / LATENTS, sparsity)
    return tmp_path


def test_every_block_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [kind for kind, _ in BLOCKS].count("python") >= 6
    names: dict[str, object] = {}
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, "docs/pipelines.md", "exec"), names)
    assert "5 passes: [5, 1, 1, 1, 1] tokens each" in capsys.readouterr().out
    found = names["codes"]
    assert isinstance(found, saefast.RecordedCodes)
    assert found.complete
    assert {path.relative_to(here / "codes").as_posix() for path in (here / "codes").rglob("*") if path.is_file()} == {
        "index.json", "tokens/00000.safetensors", "layers.0/00000.safetensors", "layers.1.mlp/00000.safetensors",
    }  # fmt: skip
    steered = names["steered"]
    assert isinstance(steered, torch.Tensor)
    for kind, text in BLOCKS:
        if not kind:
            assert cli.main(shlex.split(text)[1:]) == 0
    assert "before" in capsys.readouterr().out


def test_numbers_and_names_of_the_page_are_those_of_the_code() -> None:
    assert f"at most {recording.ROWS_PER_SHARD:,} rows and {recording.MOST_ENTRIES // 10**6} million" in PAGE.replace(
        "\n", " "
    )
    for mode in ("clamp", "add", "scale", "ablate"):
        assert f'`"{mode}"`' in PAGE
    for positions in ("all", "prompt", "generated"):
        assert f'`"{positions}"`' in PAGE
        Chosen(positions)
