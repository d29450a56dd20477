"""`saefast calibrate`: from a run to an SAE with thresholds, and on to its evaluation."""

import json
import re
from pathlib import Path

import pytest
import torch

import saefast
from saefast.cli import main as cli


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(list(argv))
    return code, *capsys.readouterr()


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.chdir(tmp_path)
    code = torch.rand(3000, 30) * (torch.rand(3000, 30) < torch.linspace(0.02, 0.3, 30))
    torch.save(code @ torch.randn(30, 12), "rows.pt")
    words = ["--n-latents", "40", "--k", "4", "--batch-size", "64", "--device", "cpu", "--n-tokens", "2000"]
    code_, _, err = call(capsys, "train", "rows.pt", "--out", "run", "--activation", "batchtopk", *words)
    assert (code_, err) == (0, "")
    return tmp_path


@pytest.mark.parametrize("flags", [[], ["--per-latent"]])
def test_a_run_is_calibrated_and_evaluated(trained: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    code, out, err = call(capsys, "calibrate", "run", "elsewhere/out", *flags)
    assert (code, err) == (0, "")
    found = re.search(r"l0\s+(\S+)\s+(\S+).*\n\s+fvu\s+(\S+)\s+(\S+)", out)
    assert found, out
    before, after, fvu_before, fvu_after = map(float, found.groups())
    assert 2 < before < 8
    assert abs(after / 4 - 1) < 0.25
    assert 0 < fvu_after < 2 * fvu_before
    sae = saefast.load("elsewhere/out")
    assert sae.config.activation == "jumprelu"
    assert (len(set(sae.log_threshold.tolist())) > 1) == bool(flags)
    assert saefast.load("run").config.activation == "batchtopk"
    # The data is found from the other folder.
    assert call(capsys, "eval", "elsewhere/out", "--lm-tokens", "0")[0] == 0
    metrics = json.loads(Path("elsewhere/out/eval.json").read_text())["metrics"]
    assert metrics["l0"] == pytest.approx(after, rel=0.15)


def test_what_cannot_be_is_said_in_one_line(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["run", "run"], "OUT is run, the run itself"),
        (["run", "out", "--rows", "0"], "rows is 0: expected at least 1"),
        (["nowhere", "out"], "nowhere"),
    ):
        code, _, err = call(capsys, "calibrate", *words)
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
    assert call(capsys, "calibrate", "run", "out")[0] == 0
    code, _, err = call(capsys, "calibrate", "out", "again")
    assert code == 2
    assert "which decides over each latent alone already" in err
