"""The benchmark of fine-tuning: what it compares, and that it measures nothing twice."""

import json
import types

import pytest
import tiny_models

from bench import common, finetune
from saefast.engines.config import TrainConfig
from saefast.harvest.to_disk import HarvestConfig, harvest
from saefast.models.config import SAEConfig
from saefast.training.api import train

CELL = {
    "kl_sae": 0.2, "ce_clean": 3.0, "ce_sae": 3.05, "loss_recovered": 0.99, "fvu": 0.2, "fvu_ordinary": 0.1, "l0": 32.0,
    "dead_share": 0.0,
}  # fmt: skip


def test_a_line_compares_with_the_sae_as_it_was():
    after = CELL | {"kl_sae": 0.15, "fvu_ordinary": 0.11, "lr": 1e-4, "ce_sae": 3.02}
    first, second = finetune.table({"before": CELL, "default": after})
    assert (first["against before"], first["FVU against before"], first["lr"]) == ("+0.0%", "+0.0%", None)
    assert (second["against before"], second["FVU against before"], second["lr"]) == ("-25.0%", "+10.0%", 1e-4)
    assert second["loss lost"] == 0.02


def test_the_page_shows_what_was_measured():
    page = (common.ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
    kept = json.loads((common.RESULTS / "amd-epyc-x1-finetune.json").read_text(encoding="utf-8"))["results"]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    shown = {name: (lr, *map(float, figures)) for name, lr, *figures in lines[1:]}
    assert shown == {
        found["cell"]: (
            f"{found['lr']:.1e}".replace("e-0", "e-") if found["lr"] else "",
            *(found[name] for name in ("KL", "loss lost", "FVU", "of ordinary rows", "L0")),
        )
        for found in finetune.table(kept["cells"])
    }
    assert "20,480 tokens of its own" in page
    assert kept["sizes"] == {"tokens": 20_480, "heldout": 4000}


def test_what_is_known_is_of_the_same_sizes(tmp_path):
    file, sizes = tmp_path / "x.json", {"tokens": 10, "heldout": 5}
    assert finetune.known(file, sizes) == {}
    file.write_text(json.dumps({"results": {"sizes": sizes, "cells": {"before": CELL}}}), encoding="utf-8")
    assert finetune.known(file, sizes) == {"before": CELL}
    assert finetune.known(file, sizes | {"tokens": 11}) == {}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run as `saefast demo --lm` leaves it, of a tiny model."""
    run = tmp_path_factory.mktemp("run")
    model, tokenizer = tiny_models.model("llama", head=True), tiny_models.tokenizer(special=False)
    config = HarvestConfig(hooks=("layers.1",), ctx_len=24, dtype="float32", heldout=0.25, device="cpu")
    acts, text = run / "activations", tiny_models.documents(60)
    harvest(acts, config, model=model, tokenizer=tokenizer, text=text, progress=False)
    recipe = TrainConfig(n_tokens=1024, batch_size=128, device="cpu", eval_every=0, save_every=0)
    about = {"hook_name": "layers.1"}
    train(acts, SAEConfig(d_in=16, n_latents=48, k=4, metadata=about), recipe, run, progress=False)
    return types.SimpleNamespace(folder=run, model=model)


def test_cells_begin_with_the_same_sae_and_differ_by_what_they_change(run):
    before = finetune.measured(run.folder, run.model, 1024, 200, None)
    found = {
        name: finetune.measured(run.folder, run.model, 1024, 200, change) for name, change in finetune.CELLS.items()
    }
    assert before.keys() < found["default"].keys()
    assert len({cell["kl_sae"] for cell in (before, *found.values())}) == len(found) + 1
    assert found["a quarter of the rate"]["lr"] == pytest.approx(found["default"]["lr"] / 4)
    assert {name: cell["kl_share"] for name, cell in found.items() if cell["kl_share"] != 0.5} == {
        "reconstruction alone": 0.0, "KL alone": 1.0,
    }  # fmt: skip
