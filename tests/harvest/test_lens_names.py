"""TransformerLens' names of places, held to TransformerLens: the same model in both, and rows that are the same.

`make peers` runs this. TransformerLens has two ways to hold a model: HookedTransformer, which SAEs were mostly trained
with and which computes all anew from converted weights, and TransformerBridge, which runs transformers' own modules.
"""

import logging
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny_models
import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.harvest.capture import runner_for
from saefast.harvest.language_models import load_tokenizer

pytestmark = pytest.mark.peers
IDS = torch.arange(5, 29).view(2, 12)
IN_BLOCK = (
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "hook_in", "hook_out",
    "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post",
    "ln1.hook_normalized", "ln2.hook_normalized",
)  # fmt: skip
NAMES = ("hook_embed", *(f"blocks.1.{name}" for name in IN_BLOCK))
# What every model has, and what of TransformerLens' names no module of these models is.
ALWAYS = {"hook_resid_pre", "hook_resid_post", "attn.hook_z"}
NORMALIZED = {"ln1.hook_normalized", "ln2.hook_normalized"}
FUSED = {"attn.hook_q", "attn.hook_k", "attn.hook_v"}
MISSING: dict[str, set[str]] = {
    "gpt2": FUSED, "bigcode": FUSED, "neox": FUSED, "neox one after the other": FUSED, "bloom": FUSED, "mpt": FUSED,
    "falcon": FUSED, "falcon with two norms": FUSED, "codegen": FUSED,
    "phi3": FUSED | {"mlp.hook_pre", "mlp.hook_pre_linear"},
    "glm4": {"mlp.hook_pre", "mlp.hook_pre_linear"},
    # Of experts TransformerLens takes what one of them, or all together, are given and give.
    "mixtral": {"mlp.hook_pre", "mlp.hook_post"}, "olmoe": {"mlp.hook_pre", "mlp.hook_post"},
    "qwen2moe": {"mlp.hook_pre", "mlp.hook_post"},
    "granite": {"hook_attn_out", "hook_mlp_out"},
    "bert": {"hook_embed", "hook_resid_mid", "hook_attn_out"},
}  # fmt: skip
BRIDGED = [
    "gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi", "phi3", "neox",
    "neox one after the other", "bloom", "gptj", "neo", "mixtral", "olmo", "olmo2", "olmoe", "stablelm", "mpt",
    "granite", "glm4", "exaone4", "codegen", "bigcode", "qwen2moe", "bert",
]  # fmt: skip
# A name by which HookedTransformer knows the architecture and takes its sizes from the config.
HOOKED = {
    "gpt2": "gpt2", "llama": "01-ai/Yi-6B", "mistral": "mistralai/Mistral-7B-v0.1", "qwen2": "Qwen/Qwen2-0.5B",
    "qwen3": "Qwen/Qwen3-0.6B", "phi3": "microsoft/Phi-3-mini-4k-instruct", "neox": "EleutherAI/pythia-70m",
    "opt": "facebook/opt-125m", "bloom": "bigscience/bloom-560m", "gptj": "EleutherAI/gpt-j-6B",
    "neo": "EleutherAI/gpt-neo-125M", "mixtral": "mistralai/Mixtral-8x7B-v0.1",
    "olmoe": "allenai/OLMoE-1B-7B-0924",
}  # fmt: skip


def rows_of(model: Any) -> dict[str, Tensor]:
    """Rows (2, 12, d) by saefast at each of the NAMES that it finds in a model of transformers."""
    rows = {}
    for name in NAMES:
        try:
            runner = runner_for(model, [name])
        except InputError as refused:
            if "has no place in" not in str(refused):
                raise
            continue
        with runner.attached():
            rows |= runner.run(IDS, torch.ones_like(IDS, dtype=torch.bool))
    return rows


def assert_alike(name: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Every name that both have means the same rows, and what only TransformerLens has is known to be missing."""
    compared = set()
    for hook in NAMES:
        short = hook.removeprefix("blocks.1.")
        if hook not in theirs:
            continue
        if hook not in ours:
            assert short in MISSING.get(name, set()) | NORMALIZED, f"{hook} is not found"
            continue
        assert torch.allclose(ours[hook], theirs[hook].flatten(2), atol=1e-4, rtol=1e-4), hook
        compared.add(short)
    assert compared >= ALWAYS
    assert len(compared) >= 6


def folder_of(model: Any, folder: Path) -> str:
    tiny_models.tokenizer(special=False).save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def quiet(monkeypatch):
    """No network, and no advice in the log."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("name", BRIDGED)
def test_names_mean_what_a_transformer_bridge_means(tmp_path, quiet, name):
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    model = architectures.build(name)
    ours = rows_of(model)
    lens = bridge.boot_transformers(folder_of(model, tmp_path), device="cpu")
    _, theirs = lens.run_with_cache(IDS)
    assert_alike(name, ours, dict(theirs.items()))


@pytest.mark.parametrize("name", HOOKED)
def test_names_mean_what_a_hooked_transformer_means(tmp_path, quiet, monkeypatch, name):
    lens = pytest.importorskip("transformer_lens")
    model = architectures.build(name)
    ours = rows_of(model)
    # It asks the hub for the config of the name, and reads GPT-2's under a name that transformers has dropped.
    model.config.n_ctx = 64
    loading = pytest.importorskip("transformer_lens.loading_from_pretrained")
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", lambda *_, **__: model.config)
    tokenizer = load_tokenizer(folder_of(model, tmp_path))
    hooked = lens.HookedTransformer.from_pretrained_no_processing(
        HOOKED[name], hf_model=model, tokenizer=tokenizer, device="cpu"
    )
    _, theirs = hooked.run_with_cache(IDS)
    assert_alike(name, ours, dict(theirs.items()))


def test_the_runner_takes_a_bridge_as_it_is(tmp_path, quiet):
    """A model of TransformerLens given to saefast gives the rows that its module of transformers gives."""
    bridge = pytest.importorskip("transformer_lens.model_bridge").TransformerBridge
    model = architectures.build("llama")
    lens = bridge.boot_transformers(folder_of(model, tmp_path), device="cpu")
    for hooks in (("blocks.*.hook_resid_post",), ("blocks.0.hook_resid_mid", "blocks.1.attn.hook_z")):
        both = []
        for made in (model, lens):
            runner = runner_for(made, hooks)
            with runner.attached():
                both.append(runner.run(IDS, torch.ones_like(IDS, dtype=torch.bool)))
        assert both[0].keys() == both[1].keys()
        assert all(torch.allclose(both[0][hook], both[1][hook], atol=1e-4) for hook in both[0])
