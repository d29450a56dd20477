"""SAEs that other libraries wrote are evaluated on a harvest, at the hook that their own config names."""

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import saefast
from saefast.analysis.evaluation import evaluate_run, run_source
from saefast.data.source import X
from saefast.errors import InputError
from saefast.harvest.to_disk import HarvestConfig, harvest

HARVEST = HarvestConfig(
    hooks=("layers.0", "layers.1"), ctx_len=16, dtype="float32", batch_tokens=100, heldout=0.3, device="cpu",
    forward="float32", max_tokens=400,
)  # fmt: skip


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harvest") / "acts"
    given: dict[str, Any] = {"model": tiny_models.model("gpt2"), "tokenizer": tiny_models.tokenizer()}
    harvest(folder, HARVEST, text=tiny_models.documents(40), progress=False, **given)
    return folder


def saved(folder: Path, **facts: Any) -> Path:
    config = saefast.SAEConfig(d_in=16, n_latents=40, k=4, metadata=facts)
    assert saefast.save(saefast.SAE(config, seed=0), folder, "saelens") == []
    return folder


@pytest.mark.parametrize("key", ["hook_name", "hf_hook_name"])
def test_the_hook_is_the_one_that_the_sae_is_of(key: str, acts: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", **{key: "layers.1"})
    found = evaluate_run(folder, acts, lm_tokens=0)
    rows = torch.cat([batch[X] for batch in run_source(folder, saefast.load(folder), acts).heldout(64)])
    named = torch.cat([batch[X] for batch in saefast.data.open_source(acts, hook="layers.1").heldout(64)])
    assert torch.equal(rows, named)
    acts_, _ = saefast.load(folder).encode_sparse(rows)
    assert found.metrics["l0"] == pytest.approx(float((acts_ > 0).sum(1).double().mean()))
    assert (folder / "eval.json").is_file()


@pytest.mark.parametrize("facts", [{}, {"hook_name": "layers.9"}, {"hook_name": ["layers.1"]}])
def test_an_sae_that_names_no_hook_of_the_harvest(facts: dict[str, Any], acts: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", **facts)
    with pytest.raises(InputError, match=r"layers\.0, layers\.1"):
        evaluate_run(folder, acts, lm_tokens=0)
