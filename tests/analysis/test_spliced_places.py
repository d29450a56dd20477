"""`evaluate_run` splices an SAE in where its rows were harvested: on the same side, at the same turn, in every part."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from saefast.analysis.evaluation import Evaluation, evaluate_run
from saefast.data.opening import open_source
from saefast.data.provenance import describe_data
from saefast.harvest.to_disk import HarvestConfig, harvest
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, SAEOutput

transformers = pytest.importorskip("transformers")


def run(folder: Path, hook: str, model: nn.Module, special: bool = False) -> Path:
    """A run around an SAE that was not trained, on a harvest of a model that lies in a folder."""
    model.save_pretrained(folder / "model")
    tiny_models.tokenizer(special=special).save_pretrained(folder / "model")
    text = folder / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": words}) for words in tiny_models.documents(30)), encoding="utf-8")
    config = HarvestConfig(
        model=str(folder / "model"), text=str(text), hooks=(hook,), ctx_len=16, dtype="float32", forward="float32",
        heldout=0.3, device="cpu",
    )  # fmt: skip
    harvest(folder / "run" / "activations", config, progress=False)
    source = open_source(folder / "run" / "activations")
    metadata = describe_data(folder / "run" / "activations", folder / "run", source, hook=None, key=None, heldout=0.05)
    SAE(SAEConfig(d_in=source.widths["x"], n_latents=64, k=4, metadata=metadata)).save(folder / "run")
    return folder / "run"


def evaluated(folder: Path, monkeypatch: pytest.MonkeyPatch, change: Any) -> tuple[Evaluation, list[Tensor]]:
    """With change(x) in place of x̂; and what x was in the spliced model."""
    seen: list[Tensor] = []

    def forward(self: SAE, x: Tensor) -> SAEOutput:
        seen.append(x.clone())
        return SAEOutput(change(x), *self.encode_sparse(x))

    monkeypatch.setattr(SAE, "forward", forward)
    return evaluate_run(folder, write=False), seen


HOOKS = ("layers.1:in", "blocks.1.hook_resid_mid", "layers.0.mlp.c_proj:in", "layers.1@-1", "layers.0+layers.2.attn")


@pytest.mark.parametrize("hook", HOOKS)
def test_rows_in_place_of_themselves_cost_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str) -> None:
    folder = run(tmp_path, hook, tiny_models.model("gpt2", head=True))
    same, seen = evaluated(folder, monkeypatch, torch.clone)
    assert same.lm_left_out == ""
    assert same.lm["delta_loss"] == same.lm["kl_sae"] == 0
    assert same.lm["kl_zero"] > 0
    # What the spliced model has there are the rows that were harvested.
    heldout = torch.cat([batch["x"] for batch in open_source(folder / "activations").heldout(1000)])
    for x in seen:
        assert torch.cdist(x, heldout).min(1).values.max() < 1e-3
    other, _ = evaluated(folder, monkeypatch, lambda x: -x)
    assert other.lm["kl_sae"] > 0


def test_an_encoder_with_a_decoder_is_left_out_with_the_reason(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=66, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    folder = run(tmp_path, "decoder.block.1", transformers.T5Model(config))
    model = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "model")
    for given in (None, model):
        result = evaluate_run(folder, model=given, write=False)
        assert result.lm == {}
        assert result.metrics["fvu"] > 0
    assert "which writes after another text" in result.lm_left_out
