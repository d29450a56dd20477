"""Evaluation of what maps x to something else: figures are about the target, which is also what is spliced in."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import Tensor

from saefast.analysis.evaluation import evaluate, evaluate_run
from saefast.cli.eval import table
from saefast.data.opening import open_source
from saefast.data.provenance import describe_data
from saefast.errors import InputError
from saefast.harvest.to_disk import HarvestConfig, harvest
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, SAEOutput

HOOKS = {"x": "layers.1.mlp:in", "target": "layers.1.mlp"}


def pairs(n: int = 300) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 16, generator=torch.Generator().manual_seed(1))
    return x, 3 * x.roll(1, 1) + 2


def test_figures_are_those_of_the_target() -> None:
    x, target = pairs()
    sae = SAE(SAEConfig(16, 48, 4, apply_b_dec_to_input=False), seed=0)
    whole = evaluate(sae, {"x": x, "target": target}).compute()
    batches = zip(x.split(70), target.split(70), strict=True)
    found = evaluate(sae, ({"x": a, "target": b} for a, b in batches)).compute()
    with torch.no_grad():
        error = (target - sae(x).x_hat).double().square().sum() / (target - target.mean(0)).double().square().sum()
    assert found["fvu"] == pytest.approx(float(error), rel=1e-6)
    assert found["fvu"] == pytest.approx(whole["fvu"])
    assert evaluate(sae, x).compute()["fvu"] != pytest.approx(found["fvu"], rel=0.1)


def test_batches_that_are_no_pair_are_refused() -> None:
    x, target = pairs(8)
    sae = SAE(SAEConfig(16, 48, 4), seed=0)
    for batch, message in (
        ({"target": x}, "the batch after 0 rows has target: expected 'x', perhaps with 'target'"),
        ({"x": x, "y": x}, "has x, y: expected"),
        ({"x": x, "target": target[:5]}, "target has 5 rows after 0 rows, x 8: expected as many"),
        ({"x": x, "target": target[:, :3]}, "target has shape .* expected .B, d_out = 16"),
        ({"x": x, "target": 3}, "the batch of 'target' after 0 rows is a int"),
        ({"x": x, "target": target / 0}, "row 0 of the held-out rows holds NaN or inf"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(sae, [batch])


@pytest.fixture(scope="module")
def harvested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and what its second MLP takes and gives."""
    folder = tmp_path_factory.mktemp("mlp")
    tiny_models.model("gpt2", head=True).save_pretrained(folder / "model")
    tiny_models.tokenizer(special=False).save_pretrained(folder / "model")
    text = folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": words}) for words in tiny_models.documents(30)), encoding="utf-8")
    config = HarvestConfig(
        model=str(folder / "model"), text=str(text), hooks=tuple(HOOKS.values()), ctx_len=16, dtype="float32",
        forward="float32", heldout=0.3, device="cpu", max_norm_multiple=3.0,
    )  # fmt: skip
    harvest(folder / "acts", config, progress=False)
    source = open_source(folder / "acts", hooks=HOOKS)
    metadata = describe_data(folder / "acts", folder, source, hook=None, key=None, heldout=0.05, hooks=HOOKS)
    config_of_sae = SAEConfig(16, 48, 4, apply_b_dec_to_input=False, metadata=metadata)
    SAE(config_of_sae, seed=0).save(folder)
    return folder


def replaced_by(monkeypatch: pytest.MonkeyPatch, made: Callable[[Tensor], Tensor]) -> None:
    monkeypatch.setattr(SAE, "forward", lambda self, x: SAEOutput(made(x), *self.encode_sparse(x)))


def test_the_target_is_replaced_by_what_is_made_of_x(harvested: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = tiny_models.model("gpt2", head=True).transformer.h[1].mlp
    replaced_by(monkeypatch, mlp)
    same = evaluate_run(harvested, write=False)
    assert same.lm_left_out == ""
    assert same.metrics["fvu"] < 1e-9
    assert abs(same.lm["delta_loss"]) < 1e-5
    assert abs(same.lm["kl_sae"]) < 1e-8
    assert same.lm["kl_zero"] > 1e-6
    # The clean model is the same, whatever is spliced in; zeros are put where the MLP's output was, not its input.
    replaced_by(monkeypatch, torch.zeros_like)
    zero = evaluate_run(harvested, write=False)
    assert zero.lm["ce_sae"] == zero.lm["ce_zero"] == same.lm["ce_zero"]
    assert zero.lm["ce_clean"] == same.lm["ce_clean"]
    replaced_by(monkeypatch, lambda x: x)
    other = evaluate_run(harvested, write=False)
    assert other.lm["kl_sae"] > 1e-6


def test_the_table_says_what_is_mapped_to_what(harvested: Path) -> None:
    result = evaluate_run(harvested, lm_tokens=0)
    assert "it maps layers.1.mlp:in to layers.1.mlp: in the formulas below x is layers.1.mlp" in table(result)
    written = json.loads((harvested / "eval.json").read_text(encoding="utf-8"))
    assert written["about"]["maps"] == HOOKS
