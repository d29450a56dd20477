"""`saefast features` from the command line: what is there is used, what is not is made, and nothing is half done."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import harvested_runs
import numpy as np
import pytest
import tiny_models
import torch
from hanging import HANG
from safetensors.torch import load_file

from saefast import formats
from saefast.cli import main as cli
from saefast.latents.database import LatentsDB

ROOT = Path(__file__).resolve().parent.parent.parent
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(pictured: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command line, without pictures: -> exit code, stdout, stderr."""
    monkeypatch.setattr("saefast.cli.features.draw_features", lambda *_: [])
    return pictured


@pytest.fixture
def pictured(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*argv: str | Path | int) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["features", *map(str, argv)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model, a folder, and acts, a harvest of it."""
    return harvested_runs.harvested(tmp_path_factory.mktemp("harvested"))


@pytest.fixture
def saved(harvested: Path, tmp_path: Path) -> Path:
    return harvested_runs.save(tmp_path / "run", harvested / "acts")


def test_what_is_there_is_used(pictured: Run, saved: Path) -> None:
    code, out, err = pictured(saved, "--top", "3")
    assert (code, err) == (0, "")
    assert out.count("  latent ") == 3
    assert {"latents.db", "features.html", "features.md", "features.png"} <= {path.name for path in saved.iterdir()}
    made = (saved / "latents.db").stat()
    assert pictured(saved, "--n", "2")[0] == 0
    assert (saved / "latents.db").stat() == made
    assert LatentsDB(saved / "latents.db").meta["logits"]["what"] == "logit"


def test_how_often_latents_fire_is_left_for_steering(run: Run, saved: Path) -> None:
    assert run(saved)[0] == 0
    db, stats = LatentsDB(saved / "latents.db"), load_file(saved / "feature_stats.safetensors")
    rows = db.page("latent", descending=False, limit=40)[0]
    assert stats["counts"].tolist() == [row.n_fired for row in rows]
    assert stats["max_act"].tolist() == [row.max_act for row in rows]
    assert stats["total_act"].tolist() == pytest.approx([row.n_fired * row.mean_act for row in rows])
    assert int(stats["n_rows"]) == db.meta["n_rows"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run, acts: harvested_runs.save(run, acts, seed=1), "the SAE has other weights now"),
        (lambda run, acts: (run / "latents.db").write_bytes(b"damage" * 100), "is damaged"),
    ],
)
def test_what_is_of_something_else_is_made_anew(
    change: Callable[[Path, Path], object], said: str, run: Run, saved: Path, harvested: Path
) -> None:
    assert run(saved)[0] == 0
    change(saved, harvested / "acts")
    code, out, _ = run(saved)
    assert code == 0
    assert "latents.db is made anew: " in out
    assert said in out
    assert "made anew" not in run(saved)[1]


def test_more_rows_than_there_were_are_read_and_fewer_are_not(run: Run, saved: Path) -> None:
    assert run(saved, "--rows", "50")[0] == 0
    assert LatentsDB(saved / "latents.db").meta["n_rows"] == 50
    assert "made anew: it is of 50 rows, and more are asked for" in run(saved, "--rows", "100")[1]
    assert "made anew" not in run(saved, "--rows", "30")[1]
    assert LatentsDB(saved / "latents.db").meta["n_rows"] == 100


def test_other_data_is_other_latents(run: Run, saved: Path, tmp_path: Path) -> None:
    assert run(saved)[0] == 0
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).standard_normal((200, 16)).astype(np.float32))
    code, out, err = run(saved, "--data", tmp_path / "rows.npy")
    assert (code, err) == (0, "")
    assert "made anew: it is of" in out
    # Nothing says which of these tell most: the strongest are shown.
    db = LatentsDB(saved / "latents.db")
    assert db.meta["kind"] == "rows"
    strongest = db.page("max_act", limit=1)[0][0].latent
    assert f"latent {strongest:>6}" in out.splitlines()[1]


def test_latents_that_are_asked_for_are_shown(run: Run, saved: Path) -> None:
    code, out, _ = run(saved, "--latents", "7,3,20-21")
    assert code == 0
    assert [line.split()[1] for line in out.splitlines() if line.startswith("  latent")] == ["7", "3", "20", "21"]
    code, _, err = run(saved, "--latents", "40")
    assert (code, err) == (2, "saefast: error: there is no latent 40: expected 0 to 39\n")


def test_exports_go_to_a_folder_of_their_own(run: Run, saved: Path, tmp_path: Path) -> None:
    code, out, _ = run(saved, "--top", "5", "--out", tmp_path / "page")
    assert code == 0
    assert "5 latents in" in out
    assert len(list((tmp_path / "page" / "latents").iterdir())) == 5
    assert not (saved / "features.html").exists()
    names = "--model-id", "tiny", "--layer", "1"
    code, out, _ = run(saved, "--export", "neuronpedia", "--out", tmp_path / "upload", *names)
    assert code == 0
    assert "latents in" in out
    code, _, err = run(saved, "--export", "neuronpedia")
    assert (code, err.count("\n")) == (2, 1)
    assert "name a new folder with --out" in err


def test_an_sae_of_another_library_needs_data(run: Run, saved: Path, harvested: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "elsewhere" / "theirs"
    formats.save(formats.load(saved), theirs, format="saelens")
    code, _, err = run(theirs)
    assert code == 2
    assert "is gone: name where it is with --data" in err
    assert run(theirs, "--data", harvested / "acts")[0] == 0
    assert run(saved)[0] == 0
    ours, found = LatentsDB(saved / "latents.db"), LatentsDB(theirs / "latents.db")
    rows = [db.page("latent", limit=40)[0] for db in (ours, found)]
    assert [row.n_fired for row in rows[0]] == [row.n_fired for row in rows[1]]
    assert ours.telling() == found.telling()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ended_in_the_middle_nothing_is_left(number: signal.Signals, saved: Path) -> None:
    before = sorted(path.name for path in saved.iterdir())
    program = f"""
import os, sys
from saefast.cli import features, main
from saefast.latents import build

def neighbours(*args, **more):
    os.kill(os.getpid(), {int(number)})
    raise SystemExit("the signal was not taken")

build.neighbours = neighbours
sys.exit(main.main(["features", {str(saved)!r}]))
"""
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=HANG, check=False
    )
    assert found.returncode == 130, found.stderr
    assert sorted(path.name for path in saved.iterdir()) == before


def test_impossible_arguments_are_refused_in_a_line(run: Run, saved: Path) -> None:
    for name in ("top", "contexts", "rows"):
        code, _, err = run(saved, f"--{name}", "0")
        assert (code, err) == (2, f"saefast: error: {name} is 0: expected at least 1\n")
    assert not (saved / "latents.db").exists()


def test_a_model_that_is_gone_is_done_without(run: Run, harvested: Path, tmp_path: Path) -> None:
    shutil.copytree(harvested, tmp_path / "moved")
    index = tmp_path / "moved" / "acts" / "index.json"
    said = json.loads(index.read_text(encoding="utf-8"))
    assert said["model"] == str(harvested / "model")
    other = tiny_models.model("gpt2", head=True)
    with torch.no_grad():
        other.transformer.wte.weight += 1
    other.save_pretrained(harvested / "model")
    try:
        folder = harvested_runs.save(tmp_path / "run", tmp_path / "moved" / "acts")
        code, _, err = run(folder)
        assert code == 0
        assert err.startswith("saefast: warning: latents are described without the model: ")
        meta = LatentsDB(folder / "latents.db").meta
        assert meta["logits"]["why"] == "the model was not at hand"
        assert run(folder, "--model", tmp_path / "moved" / "model", "--rows", "50")[0] == 0
        # What is there was made without it.
        (folder / "latents.db").unlink()
        assert run(folder, "--model", tmp_path / "moved" / "model")[0] == 0
        assert LatentsDB(folder / "latents.db").meta["logits"]["what"] == "logit"
    finally:
        tiny_models.model("gpt2", head=True).save_pretrained(harvested / "model")
