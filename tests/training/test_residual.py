"""Residual SAEs: their rows, training and resume, the sum that they make, and what no residual can be trained on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import train_job
from torch import Tensor

from saefast.analysis.evaluation import evaluate_run
from saefast.data.opening import open_source
from saefast.data.provenance import describe_data
from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, load
from saefast.training.api import train
from saefast.training.finetune import finetune
from saefast.training.residual import Part, ResidualSource, Stack, describe_residual, stack_of

SMALL = SAEConfig(d_in=12, n_latents=48, k=2)
KINDS = ["error", "x"]


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**(train_job.CONFIG | {"n_tokens": 32 * 60, "save_every": 0} | changes))


def config(kind: str) -> SAEConfig:
    return SMALL if kind == "error" else dataclasses.replace(SMALL, d_out=12)


def left_over(sae: SAE, x: Tensor) -> Tensor:
    with torch.no_grad():
        return x - sae(x).x_hat


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.pt"
    torch.save(train_job.rows(2000), path)
    return path


@pytest.fixture(scope="module")
def first(rows: Path) -> Path:
    """A run on the rows."""
    train(rows, SMALL, settings(), rows.parent / "first")
    return rows.parent / "first"


def residual_run(first: Path, rows: Path, out: Path, kind: Any = "error", on_log: Any = None, **changes: Any) -> Path:
    """A run on what `first` leaves over, as the command line makes it; it goes on if it is there."""
    stack, inner = stack_of(first, load(first)), open_source(rows)
    told = describe_data(rows, out, inner, hook=None, key=None, heldout=0.05) | describe_residual(first, stack, kind)
    asked = dataclasses.replace(config(kind), metadata=told)
    train(ResidualSource(inner, stack, kind), asked, settings(**changes), out, resume=out.exists(), on_log=on_log)
    return out


def test_its_rows_are_what_is_left_over() -> None:
    sae, x = SAE(SMALL, seed=1), train_job.rows(400)
    for kind in KINDS:
        source = ResidualSource(open_source(x), Stack([Part(sae)]), kind)
        plain = open_source(x)
        ours, theirs = source.batches(50, 3), plain.batches(50, 3)
        for _ in range(12):
            given, batch = next(theirs)["x"], next(ours)
            torch.testing.assert_close(batch["x" if kind == "error" else "target"], left_over(sae, given))
            assert kind == "error" or torch.equal(batch["x"], given)
            assert source.describe_row(7) == plain.describe_row(7)
        held = torch.cat([batch["x" if kind == "error" else "target"] for batch in source.heldout(7)])
        torch.testing.assert_close(held, left_over(sae, torch.cat([batch["x"] for batch in plain.heldout(20)])))


@pytest.mark.parametrize("kind", KINDS)
def test_a_stack_is_the_sum_of_its_parts(kind: Any) -> None:
    x, (a, b, c) = train_job.rows(90), (SAE(config(kind), seed=seed) for seed in range(3))
    a = SAE(SMALL, seed=0)
    whole = Stack([Part(a), Part(b, kind), Part(c, kind)])
    with torch.no_grad():
        one = a(x).x_hat
        two = one + b(x - one if kind == "error" else x).x_hat
        three = two + c(x - two if kind == "error" else x).x_hat
    torch.testing.assert_close(whole.x_hat(x), three)
    torch.testing.assert_close(whole.before.x_hat(x), two)
    torch.testing.assert_close(whole.last_given(x), x - two if kind == "error" else x)
    assert int(whole.l0(x).max()) <= 3 * SMALL.k
    assert float(whole.l0(x).double().mean()) > SMALL.k


@pytest.mark.parametrize("kind", KINDS)
def test_both_together_explain_more_and_eval_says_how_much(first: Path, rows: Path, tmp_path: Path, kind: Any) -> None:
    second = residual_run(first, rows, tmp_path / "second", kind)
    found = evaluate_run(second)
    x = torch.cat([batch["x"] for batch in open_source(rows).heldout(1000)])
    base, error = load(first), left_over(load(first), x)
    with torch.no_grad():
        rest = error - load(second)(error if kind == "error" else x).x_hat
    spread = (x - x.mean(0)).square().sum()
    expected = {
        "fvu_before": float(error.square().sum() / spread),
        "fvu_together": float(rest.square().sum() / spread),
    }
    for name, value in expected.items():
        assert found.together[name] == pytest.approx(value, rel=1e-4)
    assert found.metrics["fvu"] == pytest.approx(
        float(rest.square().sum() / (error - error.mean(0)).square().sum()), rel=1e-4
    )
    assert found.together["fvu_together"] < 0.9 * found.together["fvu_before"]
    assert 0 < found.together["l0_before"] <= base.config.k < found.together["l0_together"] <= 2 * SMALL.k
    written = json.loads((second / "eval.json").read_text(encoding="utf-8"))
    assert written["together"] == pytest.approx(found.together)
    assert set(found.together) <= set(written["formulas"])
    assert evaluate_run(first, write=False).together == {}


def test_a_residual_of_a_residual(first: Path, rows: Path, tmp_path: Path) -> None:
    second = residual_run(first, rows, tmp_path / "second")
    third = residual_run(second, rows, tmp_path / "third")
    found, before = evaluate_run(third).together, evaluate_run(second).together
    assert found["fvu_before"] == pytest.approx(before["fvu_together"])
    assert found["fvu_together"] < found["fvu_before"]
    assert len(stack_of(third, load(third)).parts) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_it_resumes_to_the_bit(first: Path, rows: Path, tmp_path: Path, kind: Any) -> None:
    def breaks(line: dict[str, Any]) -> None:
        if line["step"] == 26:
            raise ZeroDivisionError

    out, saves = tmp_path / "part", dict(save_every=10, log_every=1)
    with pytest.raises(ZeroDivisionError):
        residual_run(first, rows, out, kind, breaks, **saves)
    assert (out / "checkpoints" / "step_00000020").is_dir()
    resumed = load(residual_run(first, rows, out, kind, **saves)).state_dict()
    for name, tensor in load(residual_run(first, rows, tmp_path / "whole", kind)).state_dict().items():
        assert torch.equal(tensor, resumed[name]), name


def test_another_sae_in_the_place_of_the_first_is_refused(first: Path, rows: Path, tmp_path: Path) -> None:
    copied = tmp_path / "first"
    load(first).save(copied)
    second = residual_run(copied, rows, tmp_path / "second", save_every=20)
    SAE(SMALL, seed=7).save(copied)
    with pytest.raises(InputError, match="that SAE was changed since: put it back"):
        evaluate_run(second)
    with pytest.raises(InputError, match="the position to resume from was reached with another SAE's residual"):
        residual_run(copied, rows, second, n_tokens=32 * 80)
    (copied / "sae.safetensors").unlink()
    with pytest.raises(InputError, match=r"second is trained on what .*first leaves over, which does not load"):
        evaluate_run(second)


def test_what_has_no_residual(first: Path, rows: Path, tmp_path: Path) -> None:
    stack, x = Stack([Part(SAE(SMALL, seed=1))]), train_job.rows(100)
    with pytest.raises(InputError, match=r"rows of 5 columns .* maps 12 to 12: give the data that it was trained on"):
        ResidualSource(open_source(x[:, :5]), stack)
    with pytest.raises(InputError, match=r"has a target besides x: .*--residual-input x"):
        ResidualSource(open_source({"x": x, "target": x}), stack)
    assert ResidualSource(open_source({"x": x, "target": x}), stack, "x").widths == {"x": 12, "target": 12}
    sae = load(residual_run(first, rows, tmp_path / "second"))
    with pytest.raises(InputError, match=r"stands in for nothing by itself: take that one"):
        finetune(sae, torch.nn.Linear(2, 2), ["text"])
    sae = load(first)
    sae.config.metadata["residual_of"] = {"run": str(tmp_path), "input": "error", "digest": "0"}
    sae.save(tmp_path)
    with pytest.raises(InputError, match="is the residual of itself"):
        stack_of(tmp_path, load(tmp_path))
