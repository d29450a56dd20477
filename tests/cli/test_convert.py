"""`saefast convert`, and the other verbs on what other libraries wrote."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import saefast
from saefast.cli import main as cli


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(list(argv))
    return code, *capsys.readouterr()


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows, a batchtopk SAE in "ours", and a topk SAE of SAELens in "theirs"."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    code = torch.rand(600, 30, generator=generator) ** 8
    torch.save(code @ torch.randn(30, 12, generator=generator), "rows.pt")
    ours = saefast.SAE(
        saefast.SAEConfig(d_in=12, n_latents=40, k=4, activation="batchtopk", matryoshka=(8, 40)), seed=0
    )
    ours.threshold.fill_(0.4)
    ours.save("ours")
    theirs = saefast.SAE(saefast.SAEConfig(d_in=12, n_latents=40, k=4, metadata={"hook_name": "layers.0"}), seed=1)
    assert saefast.save(theirs, "theirs", "saelens") == []
    return tmp_path


def test_there_and_back(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "convert", "ours", "a/b", "--format", "saelens")
    assert (code, err) == (0, "")
    assert "ours is batchtopk, 40 latents of width 12, float32" in out
    assert "left out: activation 'batchtopk' is written as 'jumprelu'" in out
    assert "written: a/b/cfg.json, a/b/sae_weights.safetensors" in out
    code, out, err = call(capsys, "convert", "a/b", "c", "--format", "saefast", "--dtype", "float64")
    assert (code, err) == (0, "")
    assert "left out" not in out
    x = torch.load("rows.pt")
    f = saefast.load("ours").encode(x)
    assert int((f > 0).sum()) > 0
    torch.testing.assert_close(saefast.load("c").encode(x).float(), f)
    assert saefast.load("c").config.matryoshka == (8, 40)
    code, out, err = call(capsys, "convert", "c", "d", "--format", "saefast", "--map")
    assert (code, err) == (0, "")
    assert torch.equal(saefast.load("d").W_enc, saefast.load("c").W_enc)


def test_how_often_latents_fire_is_found_where_eval_left_it(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "eval", "ours", "--data", "rows.pt", "--lm-tokens", "0")[0] == 0
    assert call(capsys, "convert", "ours", "a", "--format", "saelens")[0] == 0
    counted = load_file("ours/latents.safetensors")
    shares = counted["counts"] / counted["n_rows"]
    assert 0 < float(shares.max()) < 1
    torch.testing.assert_close(load_file("a/sparsity.safetensors")["sparsity"], (shares.float() + 1e-10).log10())
    torch.testing.assert_close(saefast.formats.density("a"), shares.float(), rtol=1e-5, atol=1e-9)
    code, out, _ = call(capsys, "convert", "a", "b", "--format", "saefast")
    assert code == 0
    assert "left out: how often latents fire" in out


def test_what_cannot_be_is_said_in_one_line(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saefast.SAE(saefast.SAEConfig(d_in=12, n_latents=40, k=4, crosscode_widths=(6, 6)), seed=0).save("cross")
    for words, message in (
        (["ours", "ours", "--format", "saelens"], "OUT is ours, which is what is read"),
        (["theirs", "ours", "--format", "saelens"], "ours holds other files"),
        (["nowhere", "x", "--format", "saelens"], "nowhere does not exist"),
        (["ours", "x", "--format", "saelen"], "saelen"),
        (["theirs", "x", "--format", "saefast", "--map"], "map is True, but W_enc is not in"),
        (["ours", "x", "--format", "saefast", "--source-format", "saelens"], "cfg.json does not exist"),
        (["cross", "x", "--format", "saelens"], "which has no crosscoders"),
        (["ours", "x"], "format"),
    ):
        code, _, err = call(capsys, "convert", *words)
        assert code == 2, words
        assert message in err
        assert err.count("\n") == 1
        assert not Path("x").exists()


def test_other_verbs_read_what_others_wrote(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "eval", "theirs", "--data", "rows.pt", "--lm-tokens", "0")
    assert (code, err) == (0, ""), err
    metrics = json.loads(Path("theirs/eval.json").read_text())["metrics"]
    sae = saefast.load("theirs")
    assert 0 < metrics["l0"] <= 4
    code, _, err = call(capsys, "calibrate", "theirs", "thresholds", "--data", "rows.pt")
    assert (code, err) == (0, ""), err
    found = saefast.load("thresholds").config
    assert (found.activation, found.metadata["format"], found.metadata["hook_name"]) == (
        "jumprelu",
        "saelens",
        "layers.0",
    )
    assert sae.config.activation == "topk"
    code, _, err = call(capsys, "eval", "theirs")
    assert code == 2
    assert "does not say what data it was trained on: name it with --data" in err
