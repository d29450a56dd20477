"""`saefast train --crosscode`, from the command line: harvest to features, live, resume, two models, wrong input."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch

import saefast
from saefast.cli import main as cli
from saefast.training.run_folder import read_config

SMALL = ["--n-latents", "60", "--k", "4", "--batch-size", "64", "--device", "cpu", "--n-tokens", "2000"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command line in tmp_path: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*argv: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and beside it one that differs by its weights."""
    folder = tmp_path_factory.mktemp("model")
    for name, moved in (("base", 0.0), ("chat", 0.05)):
        made = tiny_models.model("gpt2", head=True)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += moved * torch.randn_like(parameter)
        made.save_pretrained(folder / name)
        tiny_models.tokenizer(special=False).save_pretrained(folder / name)
    lines = [json.dumps({"text": document}) for document in tiny_models.documents(60)]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def reading(model: Path, name: str = "base") -> list[str | Path]:
    return ["--model", model / name, "--text", model / "text.jsonl"]


def test_a_crosscoder_from_text_to_features(run: Run, model: Path) -> None:
    code, _, err = run("train", *reading(model), "--crosscode", "layers.*", "--out", "run", *SMALL)
    assert (code, err) == (0, "")
    config, _ = read_config("run")
    assert (config.d_in, config.crosscode_widths) == (48, (16, 16, 16))
    assert config.metadata["data"]["hooks"] == {"x": ["layers.0", "layers.1", "layers.2"]}
    code, out, err = run("eval", "run")
    assert (code, err) == (0, "")
    assert "layers.2" in out
    assert "of 3 on average" in out
    assert len(json.loads(Path("run/eval.json").read_text(encoding="utf-8"))["by_part"]["parts"]) == 3
    assert run("features", "run", "--n", "2")[0] == 0
    # What is trained on the same harvest again, without the widths of anything being said, is the same.
    code, _, err = run(
        "train", "run/activations", "--crosscode", "layers.0,layers.1,layers.2", "--out", "again", *SMALL
    )
    assert (code, err) == (0, "")
    for a, b in zip(saefast.load("run").parameters(), saefast.load("again").parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_crosscoder_goes_on_where_it_was_stopped(run: Run, model: Path) -> None:
    given = [*reading(model), "--crosscode", "layers.0,layers.2", *SMALL, "--save-every", "7"]
    assert run("train", *given, "--out", "whole")[0] == 0
    assert run("train", *given, "--out", "cut")[0] == 0
    # As it stood at a checkpoint in the middle.
    for file in ("sae.safetensors", "metrics.jsonl"):
        (Path("cut") / file).unlink()
    for folder in sorted(Path("cut/checkpoints").iterdir())[1:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    code, _, err = run("train", "--resume", "--out", "cut")
    assert code == 0, err
    for a, b in zip(saefast.load("whole").parameters(), saefast.load("cut").parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_crosscoder_trains_live(run: Run, model: Path) -> None:
    code, _, err = run("train", "--live", *reading(model), "--crosscode", "layers.*", "--out", "run", *SMALL)
    assert (code, err) == (0, "")
    assert saefast.load("run").config.crosscode_widths == (16, 16, 16)
    code, out, err = run("eval", "run")
    assert (code, err) == (0, "")
    assert "of 3 on average" in out


def test_two_models_of_the_same_text(run: Run, model: Path) -> None:
    for name in ("base", "chat"):
        assert run("harvest", *reading(model, name), "--hook", "layers.1", "--out", name)[0] == 0
    code, _, err = run("train", "base", "--beside", "chat", "--crosscode", "layers.1", "--out", "run", *SMALL)
    assert (code, err) == (0, "")
    config, _ = read_config("run")
    assert config.crosscode_widths == (16, 16)
    assert config.metadata["data"]["beside"] == [str(Path("chat").absolute())]
    code, out, err = run("eval", "run")
    assert (code, err) == (0, "")
    assert "shared" in out
    assert run("features", "run", "--n", "2")[0] == 0


def test_what_does_not_go_together(run: Run, model: Path) -> None:
    for words, message in {
        ("--crosscode", "layers.0"): "--crosscode layers.0 names one hook: expected at least two",
        ("--crosscode", "layers.0,layers.1", "--hook", "layers.0"): "--crosscode and --hook are given",
        ("--crosscode", "layers.0,layers.1", "--hooks", "layers.0"): "--crosscode and --hooks are given",
        ("--beside", "chat"): "--beside chat is given without --crosscode",
        ("--crosscode", "layers.0,layers.1", "--beside", "chat"): "--beside and --model or --text are given",
    }.items():
        code, _, err = run("train", *reading(model), *words, "--out", "run", *SMALL)
        assert code != 0
        assert message in err
        assert err.count("\n") == 1


def test_a_cross_layer_transcoder_from_text_to_features(run: Run, model: Path) -> None:
    hooks = ["--cross-layer", "layers.*.mlp:in", "--transcode", "layers.*.mlp"]
    small = [*SMALL, "--k", "6"]
    code, _, err = run("train", *reading(model), *hooks, "--out", "run", *small)
    assert (code, err) == (0, "")
    config, _ = read_config("run")
    assert (config.d_in, config.d_out, config.n_layers, config.apply_b_dec_to_input) == (48, None, 3, False)
    assert config.metadata["data"]["hooks"]["target"] == ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]
    code, out, err = run("eval", "run")
    assert (code, err) == (0, "")
    assert "layers or models, scaled alike: fvu of each\n  layers.0.mlp  " in out
    assert run("features", "run", "--n", "2")[0] == 0
    # Live too, and both go on where they end.
    code, _, err = run("train", "--live", *reading(model), *hooks, "--out", "live", *small)
    assert (code, err) == (0, "")
    for folder in ("run", "live"):
        assert run("train", "--resume", "--out", folder)[0] == 0


def test_what_a_cross_layer_transcoder_is_not(run: Run, model: Path) -> None:
    inputs = "layers.0.mlp:in,layers.1.mlp:in,layers.2.mlp:in"
    both = ["--cross-layer", inputs, "--transcode", inputs.replace(":in", "")]
    one = ["--cross-layer", inputs, "--transcode", "layers.0.mlp"]
    cases: list[tuple[list[str], str]] = [
        (both[:2], "--cross-layer names the inputs of layers: name their outputs with --transcode"),
        (one, "--cross-layer names 3 inputs and --transcode 1 outputs: expected as many of each"),
        ([*both, "--hook", "layers.0"], "--cross-layer and --hook are given"),
        ([*both, "--k", "4"], "k is 4, which 3 layers (n_layers) cannot share"),
    ]
    for words, message in cases:
        code, _, err = run("train", *reading(model), "--out", "run", *SMALL, "--k", "6", *words)
        assert code != 0
        assert message in err
        assert err.count("\n") == 1
        assert not Path("run/activations").exists()
