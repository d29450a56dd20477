"""Gemma Scope and Gemma Scope 2, against the maths of their papers, in the shapes that they are published in."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from public_files import (
    F,
    M,
    across,
    drawn_tensors,
    jumprelu,
    of,
    read_2,
    read_clt,
    read_npz,
    write_2,
    write_clt,
    write_npz,
)
from safetensors.torch import save_file
from their_files import B, D, L, Statement, assert_same, double, drawn, rows, there_and_back
from torch import Tensor

import saefast
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

PUBLISHED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "residual stream": (
        "2b-pt-res",
        "layer_20/width_16k/average_l0_71",
        {"model_name": "gemma-2-2b", "hook_name": "blocks.20.hook_resid_post", "l0": 71},
    ),
    "MLP": (
        "9b-it-mlp",
        "layer_3/width_131k/average_l0_9",
        {"model_name": "gemma-2-9b-it", "hook_name": "blocks.3.hook_mlp_out", "l0": 9},
    ),
    "attention": (
        "2b-pt-att",
        "layer_5/width_16k/average_l0_30",
        {"hook_name": "blocks.5.attn.hook_z", "reshape_activations": "hook_z"},
    ),
    "transcoder": (
        "2b-pt-transcoders",
        "layer_8/width_16k/average_l0_51",
        {"hook_name": "blocks.8.ln2.hook_normalized", "hook_name_out": "blocks.8.hook_mlp_out"},
    ),
    "nothing said": ("elsewhere", "mine", {}),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("compressed", [False, True])
def test_an_npz_of_theirs_and_back(name: str, compressed: bool, tmp_path: Path) -> None:
    repository, inside, facts = PUBLISHED[name]
    folder, x = tmp_path / of(repository, inside), rows()
    write_npz(folder, drawn_tensors(), compressed)
    for path in (folder, folder / "params.npz"):
        sae = saefast.load(path)
        assert_same(sae, read_npz(folder), x)
    assert facts.items() <= sae.config.metadata.items()
    assert (sae.config.d_out is None) is (name != "transcoder")
    assert sae.config.k == min(facts.get("l0", 30 if name == "attention" else 51 if name == "transcoder" else 32), L)
    there_and_back(sae, tmp_path / "again", "gemma_scope", read_npz, x)


def test_lower_case_names_a_wider_target_and_a_fine_tuned_decoder(tmp_path: Path) -> None:
    tensors = drawn_tensors(d_out=7)
    factor = torch.rand(L, dtype=torch.float32) + 0.5
    write_npz(tmp_path, {name.lower(): tensor for name, tensor in tensors.items()} | {"scaling_factor": factor})
    sae, w = saefast.load(tmp_path), double(tensors)
    assert sae.config.d_out == 7
    assert_same(sae, jumprelu(w | {"W_dec": w["W_dec"] * factor.double()[:, None]}), rows())


def test_an_sae_of_embeddings_takes_what_the_models_hook_gives(tmp_path: Path) -> None:
    folder = tmp_path / of("2b-pt-res", "embedding/width_4k/average_l0_21")
    tensors = drawn_tensors()
    write_npz(folder, tensors)
    sae, x = saefast.load(folder), rows() * D**0.5
    assert_same(sae, jumprelu(double(tensors), size=D**0.5), x)
    assert sae.config.metadata["hook_name"] == "hook_embed"
    # What is written is for such rows, and is not scaled again.
    there_and_back(sae, tmp_path / "plain", "gemma_scope", read_npz, x)


def test_what_is_written_can_be_mapped_and_is_theirs_in_shape_and_dtype(tmp_path: Path) -> None:
    saefast.save(jumprelu_sae(), tmp_path, format="gemma_scope")
    with np.load(tmp_path / "params.npz") as arrays:
        found = {name: (arrays[name].shape, arrays[name].dtype.name) for name in arrays}
    wide = {"W_enc": (D, L), "W_dec": (L, D), "b_enc": (L,), "b_dec": (D,), "threshold": (L,)}
    assert found == {name: (shape, "float32") for name, shape in wide.items()}
    first = (tmp_path / "params.npz").read_bytes()
    saefast.save(jumprelu_sae(), tmp_path, format="gemma_scope")
    assert (tmp_path / "params.npz").read_bytes() == first


def jumprelu_sae(**changes: Any) -> SAE:
    values: dict[str, Any] = dict(d_in=D, n_latents=L, activation="jumprelu", k=5) | changes
    sae = SAE(SAEConfig(**values), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        for block in sae.architecture.blocks():
            sae.W_dec[block.latents, : block.writes.start] = 0
        if values["activation"] == "batchtopk":
            sae.get_buffer("threshold").fill_(0.7)
    return sae


OURS: dict[str, dict[str, Any]] = {
    "jumprelu": {},
    "jumprelu, not centred": dict(apply_b_dec_to_input=False),
    "relu": dict(activation="relu"),
    "batchtopk": dict(activation="batchtopk"),
    "batchtopk, by norm": dict(activation="batchtopk", rescale_acts_by_decoder_norm=True, unit_norm_decoder=False),
    "transcoder": dict(d_out=7),
    "half": dict(dtype="bfloat16"),
}


@pytest.mark.parametrize("format", ["gemma_scope", "gemma_scope_2"])
@pytest.mark.parametrize("name", OURS)
def test_ours_that_decide_by_thresholds(name: str, format: str, tmp_path: Path) -> None:
    sae, x = jumprelu_sae(**OURS[name]), rows()
    lost = saefast.save(sae, tmp_path / "a", format=format)
    again = saefast.load(tmp_path / "a")
    close = dict(rtol=2e-2, atol=5e-2) if name == "half" else dict(rtol=1e-5, atol=1e-5)
    f, found = sae.encode(x).float(), again.encode(x).float()
    if name == "half":
        # A bias rounded anew moves what is near its threshold.
        near = (f > 0) == (found > 0)
        assert near.float().mean() > 0.98
        f, found = f * near, found * near
    torch.testing.assert_close(found, f, **close)
    torch.testing.assert_close(again.decode(f.to(again.dtype)).float(), sae.decode(f.to(sae.dtype)).float(), **close)
    assert not any("hook" in line for line in lost)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(activation="topk"), "activation is 'topk', which Gemma Scope does not know.*as_jumprelu"),
        (dict(activation="gated"), "activation is 'gated'"),
        (dict(skip=True), "skip is True"),
        (dict(input_norm="layer_norm"), "input_norm is 'layer_norm', which Gemma Scope cannot say"),
        (dict(crosscode_widths=(8, 8)), "crosscode_widths"),
    ],
)
def test_what_an_npz_cannot_hold_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        saefast.save(jumprelu_sae(**changes), tmp_path, format="gemma_scope")
    assert not (tmp_path / "params.npz").exists()


def test_a_batchtopk_without_a_threshold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a batchtopk without a threshold yet, which is what Gemma Scope"):
        saefast.save(SAE(SAEConfig(D, L, activation="batchtopk", k=5)), tmp_path, format="gemma_scope")


def test_what_is_lost_is_said(tmp_path: Path) -> None:
    sae = jumprelu_sae(metadata={"model_name": "gpt2"}, jumprelu_bandwidth=0.5)
    lost = saefast.save(sae, tmp_path, format="gemma_scope")
    assert sorted(line.split(" ")[0] for line in lost) == ["jumprelu_bandwidth", "k", "metadata"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "transposed": (dict(W_enc=drawn(L, D)), r"W_enc has shape \(64, 16\): it is transposed"),
    "of another size": (dict(W_dec=drawn(L, D + 1)), r"W_dec has shape \(64, 17\), expected \(64, 16\)"),
    "not a number": (dict(b_dec=torch.full((D,), torch.nan)), "b_dec is not finite"),
    "a vector": (dict(W_enc=drawn(L)), "has no matrix W_enc"),
    "of whole numbers": (dict(W_dec=torch.ones(L, D, dtype=torch.int64)), "W_dec is of torch.int64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tensors(name: str, tmp_path: Path) -> None:
    changes, said = BAD[name]
    write_npz(tmp_path, drawn_tensors() | changes)
    with pytest.raises(InputError, match=said):
        saefast.load(tmp_path)


def test_a_pickle_in_an_npz_is_not_read(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in drawn_tensors().items()}
    np.savez(tmp_path / "params.npz", **arrays | {"threshold": np.array([Tells(tmp_path / "ran")], dtype=object)})
    with pytest.raises(InputError, match="of no format that is known"):
        saefast.load(tmp_path)
    with pytest.raises(InputError, match="lacks the tensor 'threshold'"):
        saefast.load(tmp_path, format="gemma_scope")
    assert not (tmp_path / "ran").exists()


class Tells:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


# Gemma Scope 2


PRE, POST = "model.layers.5.pre_feedforward_layernorm.output", "model.layers.5.post_feedforward_layernorm.output"
SITES: dict[str, tuple[str, dict[str, Any], str]] = {
    "resid_post/layer_5_width_16k_l0_big": ("model.layers.5.output", {}, "blocks.5.hook_resid_post"),
    "attn_out/layer_5_width_16k_l0_big": ("model.layers.5.self_attn.o_proj.input", {}, "blocks.5.attn.hook_z"),
    "mlp_out/layer_5_width_16k_l0_big": (POST, {}, "blocks.5.hook_mlp_out"),
    "transcoder/layer_5_width_16k_l0_big": (PRE, dict(out=POST), "blocks.5.hook_mlp_in"),
    "transcoder/layer_5_width_16k_l0_big_affine": (PRE, dict(out=POST, skip=True), "blocks.5.hook_mlp_in"),
}


@pytest.mark.parametrize("inside", SITES)
@pytest.mark.parametrize("config", [True, False])
def test_a_folder_of_gemma_scope_2_and_back(inside: str, config: bool, tmp_path: Path) -> None:
    hook, settings, name = SITES[inside]
    folder, x = tmp_path / "models--google--gemma-scope-2-4b-pt/snapshots/0a1b" / inside, rows()
    write_2(folder, hook, config=config, **settings)
    sae = saefast.load(folder)
    assert_same(sae, read_2(folder), x)
    facts = sae.config.metadata
    assert (facts["hook_name"], facts["hf_hook_name"]) == (name, hook)
    assert facts["model_name"] == "google/gemma-3-4b-pt"
    assert facts.get("hook_name_out") == ("blocks.5.hook_mlp_out" if "out" in settings else None)
    assert facts.get("reshape_activations") == ("hook_z" if "attn" in inside else None)
    assert sae.config.architecture().has_target is ("out" in settings)
    if config:
        assert sae.config.k == 7
    again = there_and_back(sae, tmp_path / "again", "gemma_scope_2", read_2, x)
    own = {
        "source",
        "l0",
        "width",
        "architecture",
        "affine_connection",
        "type",
        "hf_hook_point_in",
        "hf_hook_point_out",
    }
    assert {k: v for k, v in facts.items() if k not in own}.items() <= again.config.metadata.items()
    if config:
        written = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
        assert json.loads((folder / "config.json").read_text(encoding="utf-8")).items() <= written.items()


def test_a_cross_layer_transcoder_and_back(tmp_path: Path) -> None:
    folder, x = tmp_path / "clt" / "width_16_l0_small", rows(B, M * D)
    stated = across(write_clt(folder))
    sae = saefast.load(folder)
    assert (sae.config.n_layers, sae.config.n_latents, sae.config.k) == (M, M * F, M * 5)
    assert_same(sae, stated, x)
    there_and_back(sae, tmp_path / "again", "gemma_scope_2", read_clt, x)


@pytest.mark.parametrize("skip", [False, True])
def test_one_layer_of_it_gives_the_outputs_of_all(skip: bool, tmp_path: Path) -> None:
    layers, i = write_clt(tmp_path / "clt", skip), 1
    sae, x, w = saefast.load(tmp_path / "clt" / "params_layer_1.safetensors"), rows(), layers[1]

    def encode(x: Tensor) -> Tensor:
        pre = x @ w["w_enc"] + w["b_enc"]
        return pre.relu() * (pre > w["threshold"])

    def decode(f: Tensor, x: Tensor) -> Tensor:
        y = torch.stack([f @ w["w_dec"][:, m] if m >= i else torch.zeros_like(x) for m in range(M)], dim=1)
        y[:, i] += w["b_dec"] + (x @ w["affine_skip_connection"] if skip else 0)
        return y.flatten(1)

    assert_same(sae, Statement(encode, decode), x)
    assert sae.d_out == M * D


def test_a_cross_layer_transcoder_that_is_not_whole_or_has_a_skip(tmp_path: Path) -> None:
    write_clt(tmp_path / "clt", skip=True)
    with pytest.raises(InputError, match=r"with a skip .* name one of its layers"):
        saefast.load(tmp_path / "clt")
    (tmp_path / "clt" / "params_layer_1.safetensors").unlink()
    with pytest.raises(InputError, match="expected one file for each of the 3 layers"):
        saefast.load(tmp_path / "clt")


def test_other_kinds_of_gemma_scope_2_are_named(tmp_path: Path) -> None:
    write_2(tmp_path / "a", "model.layers.5.output")
    (tmp_path / "a" / "config.json").write_text('{"architecture": "topk"}', encoding="utf-8")
    with pytest.raises(InputError, match="architecture is 'topk': expected 'jump_relu'"):
        saefast.load(tmp_path / "a")
    folder = tmp_path / "crosscoder"
    folder.mkdir()
    save_file({name.lower(): t for name, t in drawn_tensors().items()}, folder / "params_layer_0.safetensors")
    with pytest.raises(InputError, match="crosscoders of Gemma Scope 2 are not read"):
        saefast.load(folder)
