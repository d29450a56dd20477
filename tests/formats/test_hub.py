"""Hub ids: huggingface_hub's own code on a cache folder that was filled here, with the network switched off."""

import shutil
import sys

import pytest
import torch

from saefast.errors import InputError
from saefast.formats import density, hub, load, save
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

constants = pytest.importorskip("huggingface_hub.constants")
FIRST, SECOND = "1" * 40, "abcdef0123" * 4


def make(seed):
    return SAE(SAEConfig(d_in=6, n_latents=20, k=3), seed=seed)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache as huggingface_hub leaves it: names are links into a folder of blobs. Two revisions of a repository."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = tmp_path / "hub" / "models--some-one--their.saes"
    for seed, revision in enumerate((FIRST, SECOND)):
        for name in ("layer_0", "layer_1"):
            save(make(seed), tmp_path / "made" / name, "saelens", density=torch.full((20,), 0.25))
            for file in (tmp_path / "made" / name).iterdir():
                blob = repo / "blobs" / f"{seed}{name}{file.name}"
                blob.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, blob)
                link = repo / "snapshots" / revision / name / file.name
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(blob)
        shutil.rmtree(tmp_path / "made")
    make(5).save(repo / "snapshots" / SECOND / "ours")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(SECOND)
    (repo / "refs" / "v1").write_text(FIRST)
    return repo


@pytest.mark.parametrize(
    ("asked", "revision"),
    [("", SECOND), ("@main", SECOND), ("@v1", FIRST), (f"@{FIRST}", FIRST)],
)
def test_an_sae_is_fetched_and_its_config_keeps_the_exact_revision(asked, revision):
    sae = load(f"hub:some-one/their.saes/layer_1{asked}")
    assert torch.equal(sae.W_enc, make([FIRST, SECOND].index(revision)).W_enc)
    assert sae.config.metadata["source"] == f"hub:some-one/their.saes/layer_1@{revision}"
    # What the config keeps is an id itself.
    assert torch.equal(load(sae.config.metadata["source"]).W_enc, sae.W_enc)
    torch.testing.assert_close(density(f"hub:some-one/their.saes/layer_1{asked}"), torch.full((20,), 0.25))


def test_our_own_files_keep_it_too():
    sae = load("hub:some-one/their.saes/ours")
    assert torch.equal(sae.W_enc, make(5).W_enc)
    assert sae.config.metadata["source"] == f"hub:some-one/their.saes/ours@{SECOND}"


def test_one_file_of_a_repository():
    sae = load("hub:some-one/their.saes/ours/sae.safetensors", map=True)
    assert torch.equal(sae.W_enc, make(5).W_enc)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hub:some-one/their.saes", "is no SAE but holds some: name one of layer_0, layer_1, ours"),
        ("hub:some-one/their.saes/layer_7", f"some-one/their.saes holds no layer_7 at revision {SECOND}"),
        ("hub:some-one/their.saes/layer_1@v7", "cannot be fetched"),
        ("hub:some-one/nothing/layer_1", "cannot be fetched"),
        ("hub:some-one", "expected hub:owner/name"),
        ("hub:", "expected hub:owner/name"),
        ("hub:some-one/their.saes/../../x", "expected hub:owner/name"),
        ("hub:some-one/their.saes/a//b", "expected hub:owner/name"),
        ("hub:../their.saes/a", "expected hub:owner/name"),
    ],
)
def test_ids_that_lead_nowhere(name, message):
    with pytest.raises(InputError) as caught:
        load(name)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="pip install huggingface_hub"):
        load("hub:some-one/their.saes/layer_1")


def test_what_is_fetched_of_a_repository():
    """The hub fetches what these patterns pick; here from a list of names."""
    from huggingface_hub.utils import filter_repo_objects

    there = [
        "config.json", "a/cfg.json", "a/w.pt", "a/deep/w.pt", "a/config.json", "ab/w.pt", "b[1]/w.pt", "b1/w.pt",
        "b[1]/w.pt.bak",
    ]  # fmt: skip
    for inside, wanted in {
        "a": {"config.json", "a/cfg.json", "a/w.pt", "a/deep/w.pt", "a/config.json"},
        "a/w.pt": {"a/w.pt", "a/cfg.json", "a/config.json"},
        "b[1]/w.pt": {"b[1]/w.pt"},
        "": set(there),
    }.items():
        assert set(filter_repo_objects(there, allow_patterns=hub._patterns(inside))) == wanted
