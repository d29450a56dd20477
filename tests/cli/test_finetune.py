"""`saefast finetune`: what it leaves, what it reports, and what it refuses."""

import json
import math
import os
import shutil
import signal

import pytest
import tiny_models
import torch

from saefast.analysis.evaluation import evaluate_run
from saefast.cli import finetune as command
from saefast.cli import main as cli
from saefast.data.opening import open_source
from saefast.data.provenance import describe_data
from saefast.data.shards import ShardFolder
from saefast.engines.config import TrainConfig
from saefast.harvest.to_disk import HarvestConfig, harvest
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, load
from saefast.training.api import train
from saefast.training.finetune import FINETUNED, RECORD
from saefast.training.progress import read_metrics

SETTINGS = ["--n-tokens", "2Ki", "--batch-tokens", "128", "--lr", "3e-3", "--log-every", "4", "--lm-tokens", "400"]
TEXTS = tiny_models.documents(60)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model in a folder, its harvest inside a run's folder, and that run."""
    place = tmp_path_factory.mktemp("place")
    tiny_models.model("llama", head=True).save_pretrained(place / "model")
    tiny_models.tokenizer(special=False).save_pretrained(place / "model")
    (place / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS), encoding="utf-8")
    config = HarvestConfig(
        model=str(place / "model"), text=str(place / "text.jsonl"), hooks=("layers.1",), ctx_len=24, dtype="float32",
        forward="float32", heldout=0.25, device="cpu", prepend_bos=True,
    )  # fmt: skip
    run = place / "run"
    harvest(run / "activations", config, progress=False)
    source = open_source(run / "activations")
    about = describe_data(run / "activations", run, source, hook=None, key=None, heldout=0.25)
    recipe = TrainConfig(n_tokens=4096, batch_size=128, device="cpu", eval_every=0, save_every=0)
    train(source, SAEConfig(d_in=16, n_latents=48, k=4, metadata=about), recipe, run, progress=False)
    return place


def figures(out):
    """The table's lines by name."""
    return {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith("  ")}


def test_it_leaves_a_run_like_the_one_it_began_with(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    assert cli.main(["finetune", "run", str(tmp_path / "tuned"), *SETTINGS]) == 0
    out = capsys.readouterr().out
    assert "step 16/16  KL " in out
    assert f"next: saefast eval {tmp_path / 'tuned'}" in out
    assert sorted(os.listdir(tmp_path / "tuned")) == [
        "config.json", "eval.json", "finetune.json", "latents.safetensors", "metrics.jsonl", "sae.safetensors",
    ]  # fmt: skip
    record = json.loads((tmp_path / "tuned" / RECORD).read_text(encoding="utf-8"))
    shown = figures(out)
    monkeypatch.chdir(tmp_path)
    for when, folder, column in (("before", place / "run", 0), ("after", tmp_path / "tuned", 1)):
        result = evaluate_run(folder, lm_tokens=400, write=False)
        exist = {name: value for name, value in (result.metrics | result.lm).items() if not math.isnan(value)}
        assert {name: value for name, value in record[when].items() if value is not None} == pytest.approx(exist)
        for name in ("kl_sae", "ce_sae", "fvu", "l0"):
            assert float(shown[name][column]) == pytest.approx(record[when][name], rel=1e-3)
    assert record["after"]["kl_sae"] < record["before"]["kl_sae"]
    assert record["finetune"]["batch_tokens"] == 128
    tuned = load(tmp_path / "tuned")
    assert tuned.config.metadata[FINETUNED]["n_tokens"] == 2048
    assert tuned.config.metadata["hook_name"] == "layers.1"
    assert [line["step"] for line in read_metrics(tmp_path / "tuned")] == [4, 8, 12, 16]
    assert cli.main(["features", str(tmp_path / "tuned"), "--n", "3"]) == 0
    capsys.readouterr()
    assert cli.main(["finetune", str(place / "run"), str(tmp_path / "tuned"), *SETTINGS]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_stopped_command_goes_on(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    words = [*SETTINGS, "--lm-tokens", "0"]
    assert cli.main(["finetune", "run", str(tmp_path / "whole"), *words]) == 0
    asked = command._print
    monkeypatch.setattr(command, "_print", lambda line: os.kill(os.getpid(), signal.SIGINT))
    assert cli.main(["finetune", "run", str(tmp_path / "out"), *words]) == 130
    assert "stopped at step 4; the same command with --resume goes on" in capsys.readouterr().err
    monkeypatch.setattr(command, "_print", asked)
    assert cli.main(["finetune", "run", str(tmp_path / "out"), *words, "--resume"]) == 0
    assert "figures of the language model left out: not asked for" in capsys.readouterr().out
    one, other = (load(tmp_path / name).state_dict() for name in ("whole", "out"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_other_text_is_cut_as_the_harvest_was(place, tmp_path, capsys, monkeypatch):
    other = tmp_path / "other.jsonl"
    texts = tiny_models.documents(40, seed=9)
    other.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    seen = []
    real = command.finetune
    monkeypatch.setattr(command, "finetune", lambda *args, **more: (seen.append((args, more)), real(*args, **more)))
    words = [*SETTINGS, "--lm-tokens", "0", "--text", str(other)]
    assert cli.main(["finetune", str(place / "run"), str(tmp_path / "tuned"), *words]) == 0
    _, given = seen[0]
    settings = ShardFolder(place / "run" / "activations").index["settings"]
    assert {name: getattr(given["harvest"], name) for name in settings if name != "text"} == {
        name: tuple(value) if isinstance(value, list) else value for name, value in settings.items() if name != "text"
    }
    assert load(tmp_path / "tuned").config.metadata[FINETUNED]["text"] == str(other)


def test_what_is_impossible_is_refused(place, tmp_path, capsys):
    def refused(*words, saying):
        capsys.readouterr()
        assert cli.main(["finetune", *map(str, words)]) == 2
        error = capsys.readouterr().err
        assert saying in error, error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()

    out = tmp_path / "out"
    torch.save(torch.randn(200, 16), tmp_path / "rows.pt")
    recipe = TrainConfig(n_tokens=64, batch_size=32, device="cpu", save_every=0, eval_every=0)
    train(tmp_path / "rows.pt", SAEConfig(d_in=16, n_latents=32, k=2), recipe, tmp_path / "rows", progress=False)
    refused(tmp_path / "rows", out, saying="the data is not a harvest, so no model is known")
    refused(tmp_path / "nothing", out, saying="does not exist")
    tiny_models.model("bert").save_pretrained(tmp_path / "bert")
    refused(place / "run", out, "--model", tmp_path / "bert", saying="which has no language-model head")
    torch.manual_seed(1)
    other = tiny_models.model("llama", head=True)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    tiny_models.tokenizer(special=False).save_pretrained(tmp_path / "other")
    refused(place / "run", out, "--model", tmp_path / "other", saying="is not the model that was harvested")
    shutil.copytree(place / "model", tmp_path / "model")
    tiny_models.tokenizer(special=True).save_pretrained(tmp_path / "model")
    text = ["--text", place / "text.jsonl", "--model", tmp_path / "model"]
    refused(place / "run", out, *text, saying="is not the tokenizer that was harvested")
    SAE(SAEConfig(d_in=16, n_latents=32, k=2), seed=0).save(tmp_path / "bare")
    refused(tmp_path / "bare", out, saying="does not say what data")
    refused(place / "run", out, "--kl-share", "2", saying="kl_share is 2.0: expected a number between 0 and 1")
    refused(place / "run", out, "--lm-tokens", "-1", saying="lm_tokens is -1")
