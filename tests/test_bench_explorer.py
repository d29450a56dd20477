"""bench/explorer.py: the made-up run is one that everything reads, and all parts are measured, at a small size."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from bench import explorer, explorer_run
from saefast.analysis.evaluation import load_finished
from saefast.data.shards import ShardFolder
from saefast.explorer.listing import SORTS


def test_all_parts_are_measured_and_one_alone_keeps_the_others(tmp_path: Path) -> None:
    asked = ["--quick", "--out", str(tmp_path), "--run", str(tmp_path / "run")]
    assert explorer.main(asked) == 0
    (file,) = tmp_path.glob("*-explorer.json")
    found = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert found["size"] == explorer.QUICK._asdict()
    steps = {step["name"]: step for step in found["build"]["steps"]}
    assert steps.keys() >= {"encoding", "latents", "neighbours", "indexes"}
    # torch alone is more than this.
    assert 50e6 < found["build"]["anonymous"] <= found["build"]["resident"]
    assert found["build"]["rows"] == explorer.QUICK.n_rows // explorer.QUICK.length * explorer.QUICK.length
    assert found["start"]["times"] == 1
    pages = {page["what"]: page for page in found["pages"]}
    assert {f"browse by {sort}, deep page" for sort in SORTS} | {"latent", "search: rare word"} <= pages.keys()
    assert all(0 < page["seconds"][0] <= page["most"] and page["bytes"] > 500 for page in pages.values())
    assert explorer.main([*asked, "--parts", "start"]) == 0
    again = json.loads(file.read_text(encoding="utf-8"))["results"]
    assert (again["build"], again["pages"]) == (found["build"], found["pages"])
    assert again["start"] != found["start"]


def test_latents_of_the_made_up_run_fire_as_trained_ones_do(tmp_path: Path) -> None:
    """On some tokens of their own, a few often and most seldom."""
    size = explorer_run.Size(2048, 20_000, 128, 24, 400, 100)
    run = explorer_run.make(tmp_path / "run", size)
    sae, folder = load_finished(run), ShardFolder(run / "activations")
    assert folder.index["complete"]
    rows = folder.open(folder.shards("train")[0])
    acts, idx = sae.encode_sparse(rows.acts[:8000].float())
    n = np.bincount(idx[acts > 0].numpy(), minlength=size.n_latents)
    assert (n[::50] == 0).all()
    alive = np.sort(np.delete(n, np.s_[::50]))
    assert alive[len(alive) // 2] > 0
    assert alive[-1] > 5 * alive[len(alive) // 2]
    tokens = folder.token_ids(rows.seq[:8000], rows.pos[:8000]).numpy()
    for token in range(1, 20):
        own = (token * 2_654_435_761 + np.arange(explorer_run.OWN) * 40_503) % size.n_latents
        here = np.isin(idx.numpy(), own[own % 50 > 0]) & (acts.numpy() > 0)
        assert here[tokens == token].any(1).mean() > 0.75 > 3 * here[tokens != token].any(1).mean()


def test_a_run_is_made_once_and_of_one_size(tmp_path: Path) -> None:
    size = explorer_run.Size(64, 300, 16, 4, 50, 20)
    run = explorer_run.make(tmp_path / "run", size)
    weights = (run / "sae.safetensors").stat().st_mtime_ns
    explorer_run.make(run, size)
    assert (run / "sae.safetensors").stat().st_mtime_ns == weights
    with pytest.raises(SystemExit, match="other sizes"):
        explorer_run.make(run, size._replace(n_latents=65))


def test_words_of_the_vocabulary_are_all_different() -> None:
    words = explorer_run.vocabulary(40_000)
    assert len(set(words)) == len(words) == 40_000
