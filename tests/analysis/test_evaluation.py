"""`evaluate_run` on runs of every kind: its figures, what it leaves behind, and when language-model loss is there."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from batches import xs
from safetensors.torch import load_file

from saefast.analysis import evaluation as evaluate_module
from saefast.analysis.evaluation import evaluate, evaluate_run
from saefast.cli import main as cli
from saefast.cli.eval import table
from saefast.data.opening import open_source
from saefast.data.provenance import describe_data
from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.harvest.to_disk import HarvestConfig, harvest
from saefast.metrics.language_model import LM_METRICS, _scores
from saefast.metrics.streaming import METRICS
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, SAEOutput
from saefast.training.api import train
from saefast.training.run_folder import read_config

CONFIG = dict(hooks=("layers.1",), ctx_len=24, dtype="float32", forward="float32", heldout=0.25, device="cpu")


def save_model(folder: Path, kind: str, head: bool) -> Path:
    tiny_models.model(kind, head=head).save_pretrained(folder)
    tiny_models.tokenizer(special=kind == "bert").save_pretrained(folder)
    return folder


def fitted(folder: Path, texts: list[str]) -> None:
    """The model in the folder after it has seen the texts a few times: it knows more than one without a middle."""
    from transformers import AutoModelForCausalLM

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), tiny_models.tokenizer(special=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(6):
        for text in texts[:20]:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            if ids.shape[1] > 1:
                optimizer.zero_grad()
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
    model.save_pretrained(folder)


def make_run(folder: Path, data: Path, d_in: int = 16, seed: int = 0) -> Path:
    """A run's folder as the command line leaves it, around an SAE that was not trained."""
    source = open_source(data)
    metadata = describe_data(data, folder, source, hook=None, key=None, heldout=0.05)
    SAE(SAEConfig(d_in=d_in, n_latents=48, k=4, metadata=metadata), seed=seed).save(folder)
    return folder


@pytest.fixture(scope="module")
def lm_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    model = save_model(folder / "model", "gpt2", head=True)
    fitted(model, tiny_models.documents(60))
    text = folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": document}) for document in tiny_models.documents(60)))
    run = folder / "run"
    harvest(run / "activations", HarvestConfig(model=str(model), text=str(text), **CONFIG), progress=False)
    return make_run(run, run / "activations")


def test_figures_are_those_of_the_held_out_rows(lm_run: Path) -> None:
    result = evaluate_run(lm_run, batch_size=50)
    x = torch.cat(xs(open_source(lm_run / "activations").heldout(1000))).double()
    sae = SAE(SAEConfig(d_in=16, n_latents=48, k=4), seed=0)
    with torch.no_grad():
        x_hat, acts, _ = sae(x.float())
    fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert result.metrics["fvu"] == pytest.approx(float(fvu), rel=1e-6)
    assert result.metrics["l0"] == pytest.approx(float((acts != 0).sum(1).double().mean()))
    assert list(result.metrics) == list(METRICS)
    assert result.about["heldout_rows"] == len(x)


def test_what_it_leaves_behind(lm_run: Path) -> None:
    result = evaluate_run(lm_run)
    written = json.loads((lm_run / "eval.json").read_text())
    assert written["lm_missing"] == {}
    assert written["metrics"] == pytest.approx(result.metrics)
    assert written["lm"] == pytest.approx(result.lm)
    assert set(written["formulas"]) == set(METRICS) | set(LM_METRICS)
    assert written["formulas"]["fvu"]["formula"] == METRICS["fvu"].formula
    histogram = written["density_histogram"]
    assert sum(histogram["latents"]) + histogram["never_fired"] == 48
    latents = load_file(lm_run / "latents.safetensors")
    assert torch.equal(latents["counts"], result.accumulated.sparsity.counts)
    assert int(latents["n_rows"]) == result.about["heldout_rows"]


def test_language_model_loss_of_the_run(lm_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = evaluate_run(lm_run, write=False)
    assert list(result.lm) == list(LM_METRICS)
    assert result.lm["delta_loss"] != 0
    assert result.lm["lm_tokens"] > 50
    # With x itself in place of x_hat nothing is lost: the hook, the model and the text are the right ones.
    monkeypatch.setattr(SAE, "forward", lambda self, x: SAEOutput(x, *self.encode_sparse(x)))
    same = evaluate_run(lm_run, write=False)
    assert same.lm["delta_loss"] == 0
    assert same.lm["loss_recovered"] == 1
    assert same.lm["ce_clean"] == result.lm["ce_clean"]


def test_a_figure_that_means_nothing_is_null_with_a_reason(lm_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros in place of x do better than x itself: no share of a loss is recovered, whatever the SAE does."""
    monkeypatch.setattr(evaluate_module, "lm_scores", lambda *_: _scores([4.0, 4.25, 3.9, 0.1, 0.4]) | {"lm_tokens": 9})
    result = evaluate_run(lm_run)
    written = json.loads((lm_run / "eval.json").read_text(encoding="utf-8"))
    assert written["lm"]["loss_recovered"] is None
    assert written["lm"]["ce_zero"] == 3.9
    assert list(written["lm_missing"]) == ["loss_recovered"]
    line = next(line for line in table(result).splitlines() if "loss_recovered" in line)
    assert line.split()[1] == "none"
    assert written["lm_missing"]["loss_recovered"] in line


def test_less_text_for_the_language_model(lm_run: Path) -> None:
    few = evaluate_run(lm_run, lm_tokens=20, write=False)
    assert few.lm["lm_tokens"] < 60
    none = evaluate_run(lm_run, lm_tokens=0, write=False)
    assert none.lm == {}
    assert none.lm_left_out == "not asked for"


def test_a_moved_run_finds_its_data(lm_run: Path, tmp_path: Path) -> None:
    shutil.copytree(lm_run, tmp_path / "elsewhere")
    moved = evaluate_run(tmp_path / "elsewhere", write=False, lm_tokens=0)
    assert moved.metrics == evaluate_run(lm_run, write=False, lm_tokens=0).metrics
    shutil.rmtree(tmp_path / "elsewhere" / "activations")
    with pytest.raises(InputError, match="is gone: name where it is with --data"):
        evaluate_run(tmp_path / "elsewhere")


def test_a_model_without_a_head_is_said_to_have_none(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "bert", head=False)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(tiny_models.documents(40)))
    config = HarvestConfig(model=str(model), text=str(text), **CONFIG)
    harvest(tmp_path / "acts", config, text=tiny_models.documents(40), progress=False)
    result = evaluate_run(make_run(tmp_path / "run", tmp_path / "acts"))
    assert result.lm == {}
    assert result.lm_left_out == f"{model} is a BertModel, which has no language-model head"
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["lm_left_out"] == result.lm_left_out


def test_a_file_of_rows(tmp_path: Path) -> None:
    rows = torch.randn(400, 16)
    torch.save(rows, tmp_path / "rows.pt")
    run = make_run(tmp_path / "run", tmp_path / "rows.pt")
    result = evaluate_run(run)
    assert result.about["heldout_rows"] == 20
    assert "not a harvest" in result.lm_left_out
    torch.save(torch.randn(100, 16), tmp_path / "other.pt")
    assert evaluate_run(run, str(tmp_path / "other.pt")).about["heldout_rows"] == 5


def test_a_run_of_train_knows_its_data(tmp_path: Path) -> None:
    torch.save(torch.randn(400, 16), tmp_path / "rows.pt")
    config = TrainConfig(n_tokens=64, batch_size=32, device="cpu")
    train(tmp_path / "rows.pt", SAEConfig(d_in=16, n_latents=48, k=4), config, tmp_path / "run")
    assert evaluate_run(tmp_path / "run").about["heldout_rows"] == 20
    # Another run with the same settings has data of its own.
    torch.save(torch.randn(200, 16), tmp_path / "other.pt")
    train(tmp_path / "other.pt", *read_config(tmp_path / "run"), tmp_path / "again")
    assert evaluate_run(tmp_path / "again").about["heldout_rows"] == 10


def test_bad_input_is_named(tmp_path: Path) -> None:
    sae = SAE(SAEConfig(d_in=8, n_latents=20, k=2), seed=0)
    bad = torch.zeros(10, 8)
    bad[7, 3] = math.inf
    with pytest.raises(InputError, match="row 17 of the held-out rows holds NaN or inf"):
        evaluate(sae, [torch.zeros(10, 8), bad])
    with pytest.raises(InputError, match=r"x has shape \(1, 9\) after 10 rows"):
        evaluate(sae, [torch.zeros(10, 8), torch.zeros(1, 9)])
    with pytest.raises(InputError, match=r"x has shape \(10, 9\)"):
        evaluate(sae, [torch.zeros(10, 9)])
    sae.save(tmp_path / "bare")
    with pytest.raises(InputError, match="does not say what data"):
        evaluate_run(tmp_path / "bare")
    with pytest.raises(InputError, match="does not exist"):
        evaluate_run(tmp_path / "nothing")
    (tmp_path / "begun" / "checkpoints" / "step_00000010").mkdir(parents=True)
    with pytest.raises(InputError, match=r"not trained to its end: go on with saefast train --out .*begun --resume"):
        evaluate_run(tmp_path / "begun")
    torch.save(torch.randn(50, 9), tmp_path / "wide.pt")
    with pytest.raises(InputError, match="expected d_in = 8"):
        evaluate_run(tmp_path / "bare", str(tmp_path / "wide.pt"))
    assert not (tmp_path / "bare" / "eval.json").exists()


def test_a_heldout_row_that_is_not_finite_is_named_with_its_file(tmp_path):
    x = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    run = tmp_path / "run"
    config = TrainConfig(n_tokens=64, batch_size=16, device="cpu")
    train(str(tmp_path / "x.npy"), SAEConfig(d_in=8, n_latents=16, k=2), config, run, progress=False)
    x[-3, 2] = np.nan
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(InputError, match=r"row 17 of the held-out rows holds NaN or inf: .*x.npy row 397"):
        evaluate_run(run)


def test_sinks_do_not_pass_for_quality(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An SAE that gives out one row's direction and nothing else: FVU near 0, but not on ordinary rows."""
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    x[::100] = 1000.0
    torch.save(x, tmp_path / "x.pt")
    sae = SAE(SAEConfig(d_in=8, n_latents=4, k=1), seed=0)
    with torch.no_grad():
        sae.W_enc.zero_()[0] = sae.W_dec.zero_()[0] = 8**-0.5
    sae.save(tmp_path / "run")
    found = evaluate_run(tmp_path / "run", tmp_path / "x.pt", write=False)
    assert found.metrics["fvu"] < 1e-3
    assert found.metrics["fvu_ordinary"] > 0.8
    assert found.metrics["fvu_median"] > 0.8
    assert found.about["ordinary"] == {"max_norm_multiple": 5.0, "far": 2}
    assert "2 rows lie beyond 5 times the median distance from the centre" in table(found)
    every = evaluate_run(tmp_path / "run", tmp_path / "x.pt", max_norm_multiple=None, write=False)
    assert every.metrics["fvu_ordinary"] == pytest.approx(every.metrics["fvu"], rel=1e-12)
    assert every.about["ordinary"] == {"max_norm_multiple": None, "far": 0}
    assert "rows lie beyond" not in table(every)
    flags = ["--data", str(tmp_path / "x.pt"), "--max-norm-multiple", "2000"]
    assert cli.main(["eval", str(tmp_path / "run"), *flags]) == 0
    assert "rows lie beyond" not in capsys.readouterr().out
    with pytest.raises(InputError, match=r"max_norm_multiple is 0\.5: expected a finite number above 1"):
        evaluate_run(tmp_path / "run", tmp_path / "x.pt", max_norm_multiple=0.5)
