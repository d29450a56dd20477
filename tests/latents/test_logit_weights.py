"""Logit weights against models' own norms and heads in float64: each kind of model, both signs, ties, refusals."""

import math
from typing import Any

import item_models
import pytest
import tiny_models
import torch
from allocations import Allocations
from torch import Tensor, nn

from saefast.errors import InputError
from saefast.latents.logit_weights import Unembedding, logit_weights, unembedding, written
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = {
    "vocab_size": 66, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip


def causal(kind: str) -> Any:
    """A causal language model with scales and shifts of its final norm that are not 1 and 0."""
    torch.manual_seed(0)
    match kind:
        case "gemma":
            config: Any = transformers.GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=8)
            made = transformers.GemmaForCausalLM(config)
        case "neox":
            made = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES))
        case "opt":
            config = transformers.OPTConfig(
                vocab_size=66, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32,
                word_embed_proj_dim=16, max_position_embeddings=64,
            )  # fmt: skip
            made = transformers.OPTForCausalLM(config)
        case "gpt1":
            made = transformers.OpenAIGPTLMHeadModel(
                transformers.OpenAIGPTConfig(vocab_size=66, n_embd=16, n_layer=2, n_head=2, n_positions=64)
            )
        case _:
            made = tiny_models.model(kind, head=True)
    for name, parameter in made.named_parameters():
        if "norm" in name or "ln_f" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return made.eval()


FINAL = {
    "llama": "model.norm", "gemma": "model.norm", "gpt2": "transformer.ln_f", "neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm", "gpt1": None,
}  # fmt: skip


def derivative(model: Any, kind: str, directions: Tensor) -> Tensor:
    """(L, V) how logits change along directions (L, d) at a vector far from them, times what the norm divides by there.

    The norm also turns what it reads towards its sphere; along directions at right angles to x and to 1 it does not.
    """
    model = model.double()
    norm = model.get_submodule(FINAL[kind]) if FINAL[kind] else nn.Identity()
    x = torch.zeros(directions.shape[1], dtype=torch.float64)
    x[0], x[1] = 1e3, -1e3
    scale = x.square().mean().sqrt() if FINAL[kind] else 1.0
    bias = model.get_output_embeddings()(norm(x))
    along = model.get_output_embeddings()(norm(x + directions.double() * 1e-3)) - bias
    logits = along / 1e-3 * scale
    return (logits - logits.mean(1, keepdim=True)).detach()


@pytest.mark.parametrize("kind", list(FINAL))
def test_weights_are_what_the_model_does_with_a_direction(kind: str) -> None:
    model = causal(kind)
    found = unembedding(model, 16)
    assert isinstance(found, Unembedding)
    assert found.what == "logit"
    assert found.weight.dtype == torch.float32
    directions = torch.randn(40, 16)
    directions[:, :2] = 0
    directions[:, 2:] -= directions[:, 2:].mean(1, keepdim=True)
    exact = derivative(model, kind, directions)
    torch.testing.assert_close(directions @ found.weight.T, exact.float(), atol=2e-4, rtol=2e-4)
    tokens = logit_weights(directions, found, 5)
    top, low = exact.topk(5, dim=1), (-exact).topk(5, dim=1)
    torch.testing.assert_close(tokens.raised, top.values.float(), atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(tokens.lowered, -low.values.float(), atol=2e-4, rtol=2e-4)
    assert (tokens.raised_ids == top.indices).float().mean() > 0.99
    assert (tokens.lowered_ids == low.indices).float().mean() > 0.99
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(("kind", "centred"), [("llama", False), ("gpt2", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norms_scale_is_folded_in(kind: str, centred: bool, dtype: torch.dtype) -> None:
    model = causal(kind).to(dtype)
    found = unembedding(model, 16)
    assert isinstance(found, Unembedding)
    norm, head = model.get_submodule(FINAL[kind] or ""), model.get_output_embeddings()
    weight = head.weight.double() * norm.weight.double()
    if centred:
        weight = weight - weight.mean(1, keepdim=True)
    weight = weight - weight.mean(0)
    torch.testing.assert_close(found.weight, weight.float(), atol=1e-6, rtol=1e-5)
    constant = torch.ones(16) @ found.weight.T
    assert (constant.abs().max() < 1e-5) == centred


def test_odd_widths_and_norms_without_weights() -> None:
    config: Any = transformers.GPT2Config(vocab_size=20, n_embd=15, n_layer=1, n_head=3, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.transformer.ln_f.weight.data += torch.randn(15)
    found = unembedding(model, 15)
    assert isinstance(found, Unembedding)
    weight = model.lm_head.weight * model.transformer.ln_f.weight
    weight = weight - weight.mean(1, keepdim=True)
    torch.testing.assert_close(found.weight, (weight - weight.mean(0)).detach(), atol=1e-6, rtol=1e-5)
    model.transformer.ln_f = nn.LayerNorm(15, elementwise_affine=False)
    bare = unembedding(model, 15)
    assert isinstance(bare, Unembedding)
    weight = model.lm_head.weight - model.lm_head.weight.mean(1, keepdim=True)
    torch.testing.assert_close(bare.weight, (weight - weight.mean(0)).detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_models_without_a_head_give_cosines_with_the_input_embedding(kind: str) -> None:
    model = tiny_models.model(kind)
    found = unembedding(model, 16, vocabulary=60)
    assert isinstance(found, Unembedding)
    assert found.what == "embedding"
    assert len(found.weight) == 60
    rows = torch.randn(30, 16) * 7
    tokens = logit_weights(rows, found, 60)
    embedding = model.get_input_embeddings().weight.double()[:60]
    cosines = nn.functional.normalize(rows.double(), dim=1) @ nn.functional.normalize(embedding, dim=1).T
    torch.testing.assert_close(tokens.raised, cosines.sort(dim=1, descending=True).values.float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(tokens.lowered, cosines.sort(dim=1).values.float(), atol=1e-6, rtol=0)
    assert (tokens.raised <= 1 + 1e-6).all()


def test_a_head_that_reads_something_else_is_not_taken() -> None:
    """BERT's head has a layer of its own before it, masked or causal."""
    config: Any = transformers.BertConfig(**SIZES, max_position_embeddings=64, is_decoder=True)
    for model in (transformers.BertLMHeadModel(config).eval(), tiny_models.model("bert", head=True)):
        found = unembedding(model, 16)
        assert isinstance(found, Unembedding)
        assert found.what == "embedding"


def test_vectors_of_another_width_and_other_models_are_told_why() -> None:
    assert "vectors of 8 numbers" in str(unembedding(tiny_models.model("llama", head=True), 8))
    assert "vectors of 16" in str(unembedding(tiny_models.model("bert"), 32))
    assert "reads pixel_values" in str(unembedding(item_models.model("vit"), 16))
    assert "reads input_values" in str(unembedding(item_models.model("wav2vec2"), 16))
    assert "no model of transformers" in str(unembedding(nn.Linear(2, 2), 2))
    assert "no model of transformers" in str(unembedding(None, 2))


def test_ties_go_to_the_lower_token_and_memory_is_no_matrix_of_all() -> None:
    weight = torch.randint(-2, 3, (4096, 8)).float()
    rows = torch.randint(-2, 3, (4096, 8)).float()
    # Rows of whole length, so that the products are integers.
    rows[:, :] = 0
    rows[torch.arange(4096), torch.arange(4096) % 8] = 2
    with Allocations(weight, rows) as watched:
        found = logit_weights(rows, Unembedding(weight, "logit"), 7)
    exact = rows @ weight.T
    top = exact.argsort(dim=1, descending=True, stable=True)[:, :7]
    low = exact.argsort(dim=1, stable=True)[:, :7]
    assert torch.equal(found.raised_ids, top)
    assert torch.equal(found.lowered_ids, low)
    assert torch.equal(found.raised, exact.gather(1, top))
    assert torch.equal(found.lowered, exact.gather(1, low))
    assert watched.peak < 4096 * 4096 * 4 / 4


def test_dead_rows_single_latents_and_refusals() -> None:
    unembedded = Unembedding(torch.randn(9, 4), "logit")
    dead = logit_weights(torch.zeros(1, 4), unembedded, 3)
    assert dead.raised.tolist() == dead.lowered.tolist() == [[0, 0, 0]]
    assert dead.raised_ids.tolist() == [[0, 1, 2]]
    none = logit_weights(torch.zeros(0, 4), unembedded, 3)
    assert none.raised.shape == none.lowered_ids.shape == (0, 3)
    with pytest.raises(InputError, match="n is 10"):
        logit_weights(torch.ones(1, 4), unembedded, 10)
    with pytest.raises(InputError, match=r"rows has shape \(1, 5\)"):
        logit_weights(torch.ones(1, 5), unembedded)
    with pytest.raises(InputError, match="row 0"):
        logit_weights(torch.tensor([[math.nan] * 4]), unembedded, 3)


@pytest.mark.parametrize("by_norm", [False, True])
def test_what_a_latent_writes_is_what_an_activation_of_one_decodes_to(by_norm: bool) -> None:
    sae = SAE(SAEConfig(d_in=6, n_latents=11, k=2, rescale_acts_by_decoder_norm=by_norm), seed=0)
    sae.W_dec.data *= torch.rand(11, 1) * 5
    sae.W_dec.data[4] = 0
    rows = written(sae)
    decoded = sae.decode(torch.eye(11)) - sae.b_dec
    torch.testing.assert_close(rows, decoded.detach())
