"""`saefast features --out`: each export of a run, of the latents asked for; and what is refused before or after."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
from safetensors.numpy import load_file

from saefast.analysis.export_folder import MANIFEST
from saefast.cli import main as cli
from saefast.latents.database import LatentsDB

SMALL = [
    "--n-latents",
    "24",
    "--k",
    "4",
    "--engine",
    "fused",
    "--n-tokens",
    "2000",
    "--batch-size",
    "64",
    "--seed",
    "1",
]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a harvest of it, and a run on that with its latents.db."""
    folder = tmp_path_factory.mktemp("run")
    tiny_models.model("gpt2", head=True).save_pretrained(folder / "tiny-model")
    tiny_models.tokenizer(special=False).save_pretrained(folder / "tiny-model")
    lines = [json.dumps({"text": document}) for document in tiny_models.documents(60)]
    (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    argv = ["harvest", "--model", folder / "tiny-model", "--text", folder / "text.jsonl", "--hook", "h.1"]
    argv += ["--forward", "float32", "--out", folder / "acts"]
    assert cli.main([str(word) for word in argv]) == 0
    assert cli.main(["train", str(folder / "acts"), "--out", str(folder / "run"), *SMALL]) == 0
    assert cli.main(["features", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def features(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `saefast features` on the run: exit code, stdout, stderr."""

    def call(*argv: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["features", str(folder / "run"), *map(str, argv)])
        return code, *capsys.readouterr()

    return call


def test_a_page_to_share(features: Run, folder: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").iterdir() if path.suffix in (".html", ".png")}
    code, out, err = features("--out", tmp_path / "page", "--top", "3")
    assert (code, err) == (0, "")
    assert f"written: 3 latents in {tmp_path / 'page' / 'index.html'}" in out
    assert len(list((tmp_path / "page" / "latents").iterdir())) == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before
    code, _, err = features("--out", tmp_path / "page", "--latents", "5,17,20-22")
    assert (code, err) == (0, "")
    assert {path.stem for path in (tmp_path / "page" / "latents").iterdir()} == {"5", "17", "20", "21", "22"}
    assert "tiny-model h.1" in (tmp_path / "page" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["neuronpedia", "neuronpedia-folder", "saedashboard", "delphi"])
def test_other_peoples_formats(features: Run, folder: Path, tmp_path: Path, kind: str) -> None:
    code, out, err = features("--export", kind, "--out", tmp_path / "out", "--model-id", "tiny", "--source-set", "res")
    assert code == 0
    # delphi's rows are of one width, and this text does not fill the last.
    assert not err or "tokens are left out" in err
    assert f"in {tmp_path / 'out'}" in out
    assert json.loads((tmp_path / "out" / MANIFEST).read_text(encoding="utf-8"))["export"] == kind
    db = LatentsDB(folder / "run" / "latents.db")
    fired = sum(n for (n,) in db.query("SELECT n_fired FROM latents"))
    if kind == "neuronpedia":
        body = json.loads((tmp_path / "out" / "batch-0.json").read_text(encoding="utf-8"))
        assert (body["modelId"], body["source"]) == ("tiny", "1-res")
        assert len(body["features"]) == sum(not latent.dead for latent in db.latents(range(24)))
    if kind == "delphi":
        files = list((tmp_path / "out" / "latents" / "h.1").glob("*.safetensors"))
        assert len(files) == 5
        assert 0.8 * fired < sum(len(load_file(file)["activations"]) for file in files) <= fired


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--export", "delphi"], "out is not given: name a new folder with --out"),
        (["--latents", "24", "--out", "new"], "there is no latent 24: expected 0 to 23"),
        (["--latents", "x"], "latents is 'x': expected numbers and ranges"),
        (["--top", "0"], "top is 0: expected at least 1"),
        (["--export", "neuronpedia", "--source-set", "A b", "--out", "new"], "--source-set is 'A b'"),
        (["--out", "taken"], "taken is not empty and no export of saefast"),
        (["--export", "pdf", "--out", "new"], "pdf"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    features: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("x", encoding="utf-8")
    code, out, err = features(*argv)
    assert code == 2
    assert message in err
    assert "written" not in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_a_folder_that_is_taken_is_refused_before_the_pass(
    features: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **given: object) -> None:
        raise AssertionError("the pass began")

    monkeypatch.setattr("saefast.cli.features.make_latents", never)
    (tmp_path / "mine.txt").write_text("x", encoding="utf-8")
    code, _, err = features("--out", tmp_path)
    assert code == 2
    assert "is not empty and no export" in err


@pytest.mark.parametrize("kind", ["page", "saedashboard", "delphi"])
def test_who_watches_sees_it_go_on(features: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("saefast.cli.features.watched", lambda: True)
    code, _, err = features("--export", kind, "--out", tmp_path / "out", "--source-set", "res", "--model-id", "tiny")
    assert code == 0
    assert f"{kind}: " in err
    assert (" rows" if kind == "delphi" else " latents") in err


@pytest.mark.parametrize("latents", ["x", "24", "9-5", "0-99999999999"])
def test_latents_that_are_not_there_are_refused_before_the_pass(
    features: Run, monkeypatch: pytest.MonkeyPatch, latents: str
) -> None:
    def never(*args: object, **given: object) -> None:
        raise AssertionError("the pass began")

    monkeypatch.setattr("saefast.cli.features.make_latents", never)
    code, _, err = features("--latents", latents)
    assert code == 2
    assert "latent" in err
