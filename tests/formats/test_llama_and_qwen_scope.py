"""Llama Scope and Qwen Scope, against what their authors' code makes of their files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from public_files import HOOK, read_llama, read_qwen, write_llama, write_qwen
from safetensors.torch import load_file
from their_files import D, K, L, assert_same, double, drawn, rows, there_and_back

import saefast
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

OUT = dict(hook_point_in="blocks.8.ln2.hook_normalized", hook_point_out="blocks.8.hook_mlp_out")
LLAMA: dict[str, dict[str, Any]] = {
    "as published": {},
    "a transcoder": OUT | dict(dataset_average_activation_norm={"in": 4.0, "out": 3.390625}),
    "norms left out": dict(sparsity_include_decoder_norm=False),
    "topk": dict(act_fn="topk", top_k=K, jump_relu_threshold=0.0),
    "topk that is served by a threshold": dict(act_fn="topk"),
    "relu": dict(act_fn="relu"),
    "rows as they are": dict(norm_activation="inference"),
    "each token for itself": dict(norm_activation="token-wise"),
    "centred": dict(apply_decoder_bias_to_pre_encoder=True),
}


@pytest.mark.parametrize("name", LLAMA)
def test_llama_scope_and_back(name: str, tmp_path: Path) -> None:
    write_llama(tmp_path / "Llama3_1-8B-Base-L8R-8x", **LLAMA[name])
    sae, x = saefast.load(tmp_path / "Llama3_1-8B-Base-L8R-8x"), rows()
    assert sae.config.metadata["format"] == "llama_scope"
    assert_same(sae, read_llama(tmp_path / "Llama3_1-8B-Base-L8R-8x"), x)
    facts = sae.config.metadata
    assert facts["hook_name"] == LLAMA[name].get("hook_point_in", HOOK)
    assert facts.get("hook_name_out") == LLAMA[name].get("hook_point_out")
    if name == "each token for itself":
        with pytest.raises(InputError, match="input_norm is 'constant_norm', which Llama Scope cannot say"):
            saefast.save(sae, tmp_path / "again", format="llama_scope")
        return
    again = there_and_back(sae, tmp_path / "again", "llama_scope", read_llama, x)
    assert again.config.metadata | {"source": ""} == facts | {"source": ""}
    assert again.config.architecture().has_target is (name == "a transcoder")


def test_without_a_decoder_bias_and_with_a_latent_that_decodes_to_nothing(tmp_path: Path) -> None:
    W_dec = drawn(D, L)
    W_dec[:, 3] = 0
    write_llama(tmp_path, {"decoder.weight": W_dec}, use_decoder_bias=False)
    sae, x = saefast.load(tmp_path), rows()
    assert not sae.b_dec.any()
    assert sae(x).x_hat.isfinite().all()
    assert not sae.W_dec[3].any()


def test_what_another_reader_of_llama_scope_makes_of_ours(tmp_path: Path) -> None:
    """SAELens' way: a factor √d / norm on W_enc, of which W_dec and b_dec are rid, and on the threshold."""
    sae, x = ours(activation="batchtopk"), rows()
    saefast.save(sae, tmp_path, format="llama_scope")
    cfg = json.loads((tmp_path / "hyperparams.json").read_text(encoding="utf-8"))
    w = double(load_file(tmp_path / "checkpoints/final.safetensors"))
    factor = cfg["d_model"] ** 0.5 / cfg["dataset_average_activation_norm"]["in"]
    pre = x.double() @ w["encoder.weight"].T * factor + w["encoder.bias"]
    f = pre.relu() * (pre > cfg["jump_relu_threshold"] * factor)
    torch.testing.assert_close(sae.encode(x).double(), f, rtol=1e-5, atol=1e-5)
    x_hat = (f @ w["decoder.weight"].T + w["decoder.bias"]) / factor
    torch.testing.assert_close(sae(x).x_hat.double(), x_hat, rtol=1e-5, atol=1e-5)


def ours(**changes: Any) -> SAE:
    sae = SAE(SAEConfig(**dict(d_in=D, n_latents=L, k=K) | changes), seed=0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name != "log_threshold":
                parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        if "threshold" in dict(sae.named_buffers()):
            sae.get_buffer("threshold").fill_(0.6)
    return sae


OURS: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk by norm": dict(rescale_acts_by_decoder_norm=True, unit_norm_decoder=False),
    "relu": dict(activation="relu"),
    "jumprelu": dict(activation="jumprelu"),
    "batchtopk": dict(activation="batchtopk"),
    "batchtopk by norm": dict(activation="batchtopk", rescale_acts_by_decoder_norm=True, unit_norm_decoder=False),
    "transcoder": dict(d_out=D),
}


@pytest.mark.parametrize("name", OURS)
def test_ours_as_llama_scope(name: str, tmp_path: Path) -> None:
    there_and_back(ours(**OURS[name]), tmp_path, "llama_scope", read_llama, rows())


def test_thresholds_of_latents_that_differ_are_refused(tmp_path: Path) -> None:
    sae = ours(activation="jumprelu")
    with torch.no_grad():
        sae.own()["log_threshold"][0] += 1
    with pytest.raises(InputError, match=r"thresholds of latents differ \(1 to 2.718\), and Llama Scope has one"):
        saefast.save(sae, tmp_path, format="llama_scope")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no norm": (dict(dataset_average_activation_norm=None), "dataset_average_activation_norm is None"),
    "a norm of 0": (dict(dataset_average_activation_norm={"in": 0, "out": 1}), "expected the mean norms of rows"),
    "by batch": (dict(norm_activation="batch-wise"), "norm_activation is 'batch-wise'"),
    "a token's norm in a transcoder": (OUT | dict(norm_activation="token-wise"), "in an SAE that is no transcoder"),
    "a centred transcoder": (OUT | dict(apply_decoder_bias_to_pre_encoder=True), "is set in a transcoder"),
    "no threshold": (dict(jump_relu_threshold=None), "without a number for jump_relu_threshold"),
    "glu": (dict(use_glu_encoder=True), "use_glu_encoder is set"),
    "another activation": (dict(act_fn="gelu"), "act_fn is 'gelu'"),
    "of another SAE": (dict(d_sae=L + 1), "d_sae is 65, but the tensors beside it have 64"),
    "k of another kind": (dict(act_fn="topk", jump_relu_threshold=0, top_k="many"), "k is 'many'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_hyperparameters(name: str, tmp_path: Path) -> None:
    changes, said = BAD[name]
    write_llama(tmp_path, **changes)
    with pytest.raises(InputError, match=said):
        saefast.load(tmp_path)


def test_bad_tensors_of_llama_scope(tmp_path: Path) -> None:
    write_llama(tmp_path, {"decoder.weight": drawn(L, D)})
    with pytest.raises(InputError, match=r"decoder.weight has shape \(64, 16\): it is transposed"):
        saefast.load(tmp_path)
    write_llama(tmp_path, {"encoder.weight": torch.full((L, D), torch.nan)})
    with pytest.raises(InputError, match="W_enc is not finite"):
        saefast.load(tmp_path)


# Qwen Scope

REPOSITORY = f"models--Qwen--SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"


def test_qwen_scope_and_back(tmp_path: Path) -> None:
    folder, x = tmp_path / REPOSITORY / "snapshots" / "0a1b", rows()
    file = write_qwen(folder / "layer7.sae.pt")
    for path in (file, folder):
        sae = saefast.load(path)
        assert_same(sae, read_qwen(folder), x)
    facts = sae.config.metadata
    assert (sae.config.k, facts["model_name"]) == (K, "Qwen/Qwen3-1.7B-Base")
    assert (facts["hook_name"], facts["hf_hook_name"]) == ("blocks.7.hook_resid_post", "model.layers.7")
    again = there_and_back(sae, tmp_path / "again", "qwen_scope", read_qwen, x)
    assert (again.config.k, again.config.metadata["hook_name"]) == (K, facts["hook_name"])
    old, new = (torch.load(path, weights_only=True) for path in (file, tmp_path / "again" / "layer7.sae.pt"))
    assert {name: new[name].shape for name in old} == {name: old[name].shape for name in old}
    assert all(torch.equal(new[name], old[name]) for name in old)


@pytest.mark.parametrize("name", ["topk", "topk by norm", "transcoder"])
def test_ours_as_qwen_scope(name: str, tmp_path: Path) -> None:
    there_and_back(ours(**OURS[name]), tmp_path, "qwen_scope", read_qwen, rows())


def test_what_qwen_scope_cannot_hold(tmp_path: Path) -> None:
    for changes, said in (
        (dict(activation="relu"), "activation is 'relu', which Qwen Scope does not know"),
        (dict(input_norm="layer_norm"), "input_norm is 'layer_norm'"),
        (dict(d_out=7), "d_out is 7"),
    ):
        with pytest.raises(InputError, match=said):
            saefast.save(ours(**changes), tmp_path, format="qwen_scope")


def test_qwen_scope_without_k_and_with_several_layers(tmp_path: Path) -> None:
    write_qwen(tmp_path / "layer0.sae.pt")
    with pytest.raises(InputError, match=r"does not say how many latents a token has.*SAE-Res-Qwen3"):
        saefast.load(tmp_path)
    write_qwen(tmp_path / "layer0.sae.pt", {"k": "five"})
    with pytest.raises(InputError, match="k is 'five': expected a whole number"):
        saefast.load(tmp_path)
    write_qwen(tmp_path / "layer1.sae.pt")
    with pytest.raises(InputError, match="holds SAEs of 2 layers, one file each: name one of them"):
        saefast.load(tmp_path)
