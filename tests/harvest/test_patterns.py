"""A pattern such as "layers.*": one pass of the model, one folder, a hook for each block, and an SAE of any of them."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import tiny_models
import torch

from saefast.cli.main import main
from saefast.data.shards import ShardFolder
from saefast.errors import InputError
from saefast.harvest import HarvestConfig, harvest, live_source, live_sources
from saefast.harvest import to_disk as to_disk_module
from saefast.harvest.capture import runner_for

pytest.importorskip("transformers")
CONFIG = HarvestConfig(hooks=("layers.*",), ctx_len=16, dtype="float32", forward="float32", heldout=0.2)
MIDDLE = "blocks.1.hook_resid_mid"
LAYERS = ["layers.0", "layers.1", "layers.2"]


@pytest.fixture(scope="module")
def options():
    model, tokenizer = tiny_models.model("gpt2"), tiny_models.tokenizer(special=False)
    return {"model": model, "tokenizer": tokenizer, "text": tiny_models.documents(200)}


def rows_of(folder, hook):
    """(seq, pos) -> row, of both shares."""
    out = {}
    for split in ("train", "heldout"):
        for info in folder.shards(split, hook):
            shard = folder.open(info, hook)
            out |= dict(zip(zip(shard.seq.tolist(), shard.pos.tolist(), strict=True), shard.acts, strict=True))
    return out


def test_one_folder_holds_all_blocks_row_by_row(tmp_path, options):
    harvest(tmp_path / "all", CONFIG, progress=False, **options)
    folder = ShardFolder(tmp_path / "all")
    assert folder.index["hooks"] == [{"name": f"layers.{n}", "hf_name": f"h.{n}", "d": 16} for n in range(3)]
    for info in folder.shards("train", "layers.0"):
        places = [(shard.seq, shard.pos) for shard in (folder.open(info, hook) for hook in LAYERS)]
        assert all(torch.equal(a, b) for other in places[1:] for a, b in zip(places[0], other, strict=True))
    for hook in LAYERS:
        harvest(tmp_path / hook, dataclasses.replace(CONFIG, hooks=(hook,)), progress=False, **options)
        alone, together = rows_of(ShardFolder(tmp_path / hook), hook), rows_of(folder, hook)
        assert alone.keys() == together.keys()
        assert all(torch.equal(alone[key], together[key]) for key in alone)


def test_a_pattern_goes_on_and_is_known_to_be_finished(tmp_path, options, monkeypatch):
    few, more = (dataclasses.replace(CONFIG, max_tokens=n) for n in (300, 900))
    harvest(tmp_path / "on", few, progress=False, **options)
    before = ShardFolder(tmp_path / "on").index["n_rows"]
    report = harvest(tmp_path / "on", more, progress=False, **options)
    assert report.tokens > 0
    assert ShardFolder(tmp_path / "on").index["n_rows"] > before
    harvest(tmp_path / "once", more, progress=False, **options)
    for hook in LAYERS:
        went_on, at_once = (rows_of(ShardFolder(tmp_path / name), hook) for name in ("on", "once"))
        assert went_on.keys() == at_once.keys()
        assert all(torch.equal(went_on[key], at_once[key]) for key in at_once)
    # The same blocks by their names are the same harvest; others are not.
    harvest(tmp_path / "on", dataclasses.replace(more, hooks=tuple(LAYERS)), progress=False, **options)
    with pytest.raises(InputError, match=r"begun with hooks layers.0, layers.1, layers.2, now layers.0 are asked for"):
        harvest(tmp_path / "on", dataclasses.replace(more, hooks=("layers.0",)), progress=False, **options)
    # A folder of some blocks is not taken for one of all that a pattern means.
    harvest(tmp_path / "some", dataclasses.replace(more, hooks=("layers.0",)), progress=False, **options)
    with pytest.raises(InputError, match=r"begun with hooks layers.0, now layers.0, layers.1, layers.2 are asked for"):
        harvest(tmp_path / "some", more, progress=False, **options)
    monkeypatch.setattr(to_disk_module, "Harvester", None)
    assert harvest(tmp_path / "on", more, progress=False, **options).tokens == 0


def test_live_sources_of_a_pattern_are_one_for_each_block(options):
    sources = live_sources(CONFIG, **options)
    assert list(sources) == LAYERS
    batches = [next(iter(source.batches(8, seed=1)))["x"] for source in sources.values()]
    for source in sources.values():
        source.close()
    source = live_source(CONFIG, **options)
    batch = next(iter(source.batches(8, seed=1)))
    source.close()
    assert list(batch) == LAYERS
    assert all(torch.equal(a, b) for a, b in zip(batches, batch.values(), strict=True))
    with pytest.raises(InputError, match=r"hooks names 'layers.3': expected hooks of the config, layers\.0, layers\.1"):
        live_source(CONFIG, ["layers.3"], **options)


def test_a_pattern_over_the_hook_points_of_a_model_with_run_with_hooks():
    known = ["hook_embed", *(f"blocks.{n}.{hook}" for n in (0, 1) for hook in ("attn.hook_z", "hook_resid_post"))]

    def run_with_hooks(tokens, fwd_hooks=()):
        for name in known:
            for wanted, function in fwd_hooks:
                if wanted == name:
                    function(tokens[..., None].float() * len(name), hook=SimpleNamespace(name=name))

    model = SimpleNamespace(hook_dict=dict.fromkeys(known), run_with_hooks=run_with_hooks)
    runner = runner_for(model, ["blocks.*.hook_resid_post", "hook_embed"])
    names = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "hook_embed"]
    assert runner.hooks == [{"name": name, "hf_name": name} for name in names]
    with runner.attached():
        rows = runner.run(torch.ones(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.bool))
    assert {name: float(row[0, 0, 0]) for name, row in rows.items()} == {name: len(name) for name in names}
    back = runner_for(model, ["blocks.-1.hook_resid_post+blocks.-2.attn.hook_z"])
    assert back.hooks[0]["hf_name"] == "blocks.1.hook_resid_post+blocks.0.attn.hook_z"
    with pytest.raises(InputError, match=r"hook 'blocks.-3.hook_resid_post' is not in this model; there are blocks.0"):
        runner_for(model, ["blocks.-3.hook_resid_post"])
    with pytest.raises(InputError, match=r"hook 'blocks.\*.hook_q' matches nothing; there are hook_embed"):
        runner_for(model, ["blocks.*.hook_q"])


@pytest.mark.slow
def test_the_command_line_harvests_trains_and_looks_at_all_blocks(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, tokenizer = tiny_models.model("gpt2", head=True), tiny_models.tokenizer(special=False)
    model.save_pretrained("m")
    tokenizer.save_pretrained("m")
    lines = [json.dumps({"text": document}) for document in tiny_models.documents(300)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    text = ["--model", "m", "--text", "t.jsonl"]
    assert main(["harvest", *text, "--hook", "layers.*", MIDDLE, "--ctx-len", "32", "--out", "acts"]) == 0
    assert f"next: saefast train acts --hooks 'layers.*,{MIDDLE}' --out" in capsys.readouterr().out
    small = ["--k", "4", "--n-latents", "32", "--n-tokens", "2000"]
    assert main(["train", "acts", "--hooks", "layers.*", "--out", "runs", *small]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir() if path.is_dir()) == LAYERS
    assert main(["eval", "runs/layers.1"]) == 0
    assert "ce_sae" in capsys.readouterr().out
    assert main(["features", "runs/layers.2"]) == 0
    assert main(["train", "acts", "--hook", MIDDLE, "--out", "one", *small]) == 0
    assert main(["eval", "one"]) == 0
    assert "ce_sae" in capsys.readouterr().out
    assert main(["train", "--live", *text, "--hooks", "blocks.*.hook_mlp_out", "--out", "live", *small]) == 0
    found = sorted(path.name for path in (tmp_path / "live").iterdir() if path.is_dir())
    assert found == [f"blocks.{n}.hook_mlp_out" for n in range(3)]
    assert main(["eval", "live/blocks.1.hook_mlp_out"]) == 0
    assert "ce_sae" in capsys.readouterr().out
    # What was begun is gone on with, by the same pattern.
    longer = [*small[:4], "--n-tokens", "3000"]
    assert main(["train", "--hooks", "layers.*", "--out", "runs", "--resume", *longer]) == 0
    assert main(["train", "--hooks", "blocks.*.hook_mlp_out", "--out", "live", "--resume", *longer]) == 0
    capsys.readouterr()
    assert main(["train", *text, "--hook", "layers.*", "--out", "none", *small]) == 2
    assert "--hook layers.* means several hooks: --hooks layers.* trains an SAE for each" in capsys.readouterr().err
    assert main(["train", "acts", "--hooks", "heads.*", "--out", "none", *small]) == 2
    assert "hook 'heads.*' matches nothing; there are layers.0, layers.1, layers.2, blocks.1" in capsys.readouterr().err
