"""`saefast train --transcode` and `--residual-of`, from the command line: harvest to features, resume, wrong input."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch

import saefast
from saefast.cli import main as cli
from saefast.training.run_folder import read_config

SMALL = ["--n-latents", "40", "--k", "4", "--batch-size", "64", "--device", "cpu"]
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
    folder = tmp_path_factory.mktemp("model")
    tiny_models.model("gpt2", head=True).save_pretrained(folder)
    tiny_models.tokenizer(special=False).save_pretrained(folder)
    lines = [json.dumps({"text": document}) for document in tiny_models.documents(60)]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def reading(model: Path) -> list[str | Path]:
    return ["--model", model, "--text", model / "text.jsonl"]


def test_a_transcoder_from_text_to_features(run: Run, model: Path) -> None:
    hooks = ["--hook", "layers.1.mlp:in", "--transcode", "layers.1.mlp"]
    code, out, err = run("train", *reading(model), *hooks, "--skip", "--out", "run", *SMALL, "--n-tokens", "2000")
    assert (code, err) == (0, "")
    config, _ = read_config("run")
    assert (config.d_in, config.d_out, config.skip, config.apply_b_dec_to_input) == (16, 16, True, False)
    assert config.metadata["hook_name"] == "layers.1.mlp:in"
    assert config.metadata["hook_name_out"] == "layers.1.mlp"
    code, out, err = run("eval", "run")
    assert (code, err) == (0, "")
    assert "it maps layers.1.mlp:in to layers.1.mlp" in out
    assert "loss left out" not in out
    assert "delta_loss" in out
    assert run("features", "run", "--n", "2")[0] == 0
    # It goes on with what it was trained on, named nowhere.
    assert run("train", "--out", "run", "--resume", "--n-tokens", "3000")[0] == 0
    assert saefast.load("run").W_skip.shape == (16, 16)


def test_a_transcoder_for_each_block(run: Run, model: Path) -> None:
    hooks = ["--hook", "layers.*.mlp.c_fc", "layers.*.ln_2:in"]
    assert run("harvest", *reading(model), *hooks, "--out", "acts", "--ctx-len", "24")[0] == 0
    argv = ["--hooks", "layers.*.ln_2:in", "--transcode", "layers.*.mlp.c_fc", "--out", "runs"]
    assert run("train", "acts", *argv, *SMALL, "--n-tokens", "1000")[0] == 0
    for block in range(3):
        config, _ = read_config(f"runs/layers.{block}.ln_2:in")
        assert (config.d_in, config.d_out) == (16, 64)
        assert config.metadata["hook_name_out"] == f"layers.{block}.mlp.c_fc"
    assert run("train", "--out", "runs", "--hooks", "layers.*.ln_2:in", "--resume", "--n-tokens", "1500")[0] == 0
    assert run("eval", "runs/layers.2.ln_2:in")[0] == 0


def test_live_and_keys_of_a_file(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    monkeypatch.setattr("saefast.harvest.reharvest.TOKENS", 700)
    hooks = ["--hook", "layers.1.mlp:in", "--transcode", "layers.1.mlp"]
    argv = ["train", "--live", *reading(model), *hooks, "--out", "live", *SMALL]
    code, _, err = run(*argv, "--n-tokens", "1000")
    assert (code, err) == (0, "")
    assert run("eval", "live")[0] == 0
    assert run("train", "--out", "live", "--resume", "--n-tokens", "1500")[0] == 0
    x = torch.randn(900, 12)
    save_file({"into": x, "out": x[:, :5] ** 2}, "rows.safetensors")
    argv = ["train", "rows.safetensors", "--key", "into", "--transcode", "out", "--out", "file", *SMALL]
    assert run(*argv, "--n-tokens", "1000")[0] == 0
    code, out, _ = run("eval", "file")
    assert code == 0
    assert "it maps x to target" in out
    assert run("train", "--out", "file", "--resume", "--n-tokens", "1500")[0] == 0
    # Other data of the same names; and some without a target, which no figure could be of.
    save_file({"into": x[:300], "out": x[:300, :5] ** 2}, "other.safetensors")
    assert run("eval", "file", "--data", "other.safetensors")[0] == 0
    torch.save(x, "alone.pt")
    code, _, err = run("eval", "file", "--data", "alone.pt")
    assert code == 2
    assert err.count("\n") == 1
    assert "alone.pt" in err


def test_a_residual_sae_from_training_to_features(run: Run, model: Path) -> None:
    base = ["train", *reading(model), "--hook", "layers.1", "--out", "base", *SMALL, "--n-tokens", "2000"]
    assert run(*base)[0] == 0
    for kind in ("error", "x"):
        argv = ["--residual-of", "base", "--residual-input", kind, "--out", kind, *SMALL, "--n-tokens", "2000"]
        code, out, err = run("train", *argv)
        assert (code, err) == (0, "")
        code, out, err = run("eval", kind)
        assert (code, err) == (0, "")
        assert "with the SAEs that it is the residual of" in out
        assert "delta_loss" in out
        found = json.loads(Path(kind, "eval.json").read_text(encoding="utf-8"))["together"]
        assert found["fvu_together"] < found["fvu_before"]
        assert run("features", kind, "--n", "2")[0] == 0
        assert run("train", "--out", kind, "--resume", "--n-tokens", "2500")[0] == 0
    assert read_config("error")[0].apply_b_dec_to_input
    assert not read_config("x")[0].apply_b_dec_to_input
    # Named data counts for more than that of the run.
    shutil.copytree("base/activations", "copied")
    assert run("train", "copied", "--residual-of", "base", "--out", "other", *SMALL, "--n-tokens", "500")[0] == 0
    assert read_config("other")[0].metadata["data"]["path"].endswith("copied")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A harvest with two hooks, and a file of rows with a run on it."""
    folder = tmp_path_factory.mktemp("made")
    hooks = ["--hook", "layers.1.mlp:in", "layers.1.mlp"]
    assert cli.main([str(w) for w in ["harvest", *reading(model), *hooks, "--out", folder / "acts"]]) == 0
    torch.save(torch.randn(900, 12), folder / "rows.pt")
    argv = ["train", folder / "rows.pt", "--out", folder / "run", *SMALL, "--n-tokens", "500"]
    assert cli.main([str(word) for word in argv]) == 0
    return folder


BAD = {
    "no hook": (["acts", "--transcode", "layers.1.mlp"], "names the target alone: say with --hook"),
    "itself": (["acts", "--hook", "layers.1.mlp", "--transcode", "layers.1.mlp"], "an SAE reconstructs that"),
    "no such target": (
        ["acts", "--hook", "layers.1.mlp:in", "--transcode", "layers.9"],
        "'layers.9' is not in it",
    ),
    "too few": (["acts", "--hooks", "layers.1.mlp:in,layers.1.mlp", "--transcode", "layers.1.mlp"], "1 targets for 2"),
    "too many": (["acts", "--hook", "layers.1.mlp:in", "--transcode", "a,b"], "2 targets for 1 inputs"),
    "nothing matches": (["acts", "--hook", "layers.1.mlp:in", "--transcode", "layers.*.x"], "matches nothing"),
    "another width": (
        ["acts", "--hook", "layers.1.mlp:in", "--transcode", "layers.1.mlp", "--d-out", "9"],
        "columns in 'target', expected d_out = 9",
    ),
    "centred": (
        ["acts", "--hook", "layers.1.mlp:in", "--transcode", "layers.1.mlp", "--apply-b-dec-to-input"],
        "leave the first out",
    ),
    "no target": (["rows.pt", "--d-out", "12"], "has no target besides x"),
    "skip alone": (["rows.pt", "--skip"], "has no target besides x"),
    "a file without keys": (["rows.pt", "--key", "a", "--transcode", "b"], "rows.pt"),
    "no run": (["rows.pt", "--residual-of", "nothing"], "nothing"),
    "itself again": (["--residual-of", "out"], "--out too"),
    "several": (["acts", "--hooks", "layers.*", "--residual-of", "run"], "one by one"),
    "input alone": (["rows.pt", "--residual-input", "x"], "goes with --residual-of RUN"),
    "other rows": (["acts", "--hook", "layers.1.mlp", "--residual-of", "run"], "maps 12 to 12"),
    "a kind that is none": (["rows.pt", "--residual-of", "run", "--residual-input", "y"], "--residual-input"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    name: str, made: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    argv, message = BAD[name]
    before = sorted(made.rglob("*"))
    code, _, err = run("train", *argv, "--out", "out", *SMALL, "--n-tokens", "500")
    assert code == 2, err
    assert err.startswith("saefast: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert sorted(made.rglob("*")) == before
