"""circuit-tracer's transcoders, of single layers and across layers, against what its code computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from their_files import (
    B,
    D,
    K,
    L,
    Statement,
    assert_same,
    drawn,
    read_across,
    read_circuit_tracer,
    rows,
    there_and_back,
    write_across,
    write_circuit_tracer,
    write_yaml,
)
from torch import Tensor

import saefast
from saefast.errors import InputError
from saefast.formats import circuit_tracer, format
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

pytest.importorskip("yaml")
KINDS: dict[str, dict[str, Any]] = {
    "relu": {},
    "jumprelu": dict(kind="jumprelu"),
    "with a skip": dict(kind="jumprelu", skip=True),
    "topk": dict(activation="topk", k=K),
    "relu by the config": dict(activation="relu"),
}


def read_layer(folder: Path) -> Statement:
    return read_circuit_tracer(next(folder.glob("layer_*.safetensors")))


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_of_theirs_and_back(name: str, tmp_path: Path) -> None:
    write_circuit_tracer(tmp_path / "set", 3, **KINDS[name])
    sae, x = saefast.load(tmp_path / "set"), rows()
    assert_same(sae, read_layer(tmp_path / "set"), x)
    assert sae.config.metadata["hook_name"] == "blocks.3.mlp.hook_in"
    assert sae.config.metadata["hook_name_out"] == "blocks.3.hook_mlp_out"
    there_and_back(sae, tmp_path / "again", "circuit_tracer", read_layer, x)
    old, new = (load_file(tmp_path / folder / "layer_3.safetensors") for folder in ("set", "again"))
    assert old.keys() == new.keys()
    for key, tensor in old.items():
        rounding = dict(rtol=1e-6, atol=0.0) if "threshold" in key else dict(rtol=0.0, atol=0.0)
        torch.testing.assert_close(new[key], tensor, **rounding)


def test_a_set_is_opened_and_written_layer_by_layer(tmp_path: Path) -> None:
    for layer in range(3):
        write_circuit_tracer(tmp_path / "set", layer, kind="jumprelu")
    with pytest.raises(
        InputError, match=r"holds transcoders of 3 layers, one file each: name one of them, such as .*_0"
    ):
        saefast.load(tmp_path / "set")
    x = rows()
    for layer in range(3):
        file = tmp_path / "set" / f"layer_{layer}.safetensors"
        sae = saefast.load(file)
        assert_same(sae, read_circuit_tracer(file), x)
        saefast.save(sae, tmp_path / "again", format="circuit_tracer")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "config.yaml", "layer_0.safetensors", "layer_1.safetensors", "layer_2.safetensors"
    ]  # fmt: skip
    # One config speaks for all of them.
    other = SAE(SAEConfig(D, L, K, d_out=D, metadata={"layer": 3}), seed=1)
    with pytest.raises(InputError, match="says activation None, this one has 'topk': all transcoders in a folder"):
        saefast.save(other, tmp_path / "again", format="circuit_tracer")


OURS: dict[str, dict[str, Any]] = {
    "topk": dict(d_out=D),
    "skip": dict(d_out=D, skip=True),
    "an SAE, whose b_dec goes into b_enc": dict(),
    "in units of norms": dict(rescale_acts_by_decoder_norm=True, unit_norm_decoder=False),
    "batchtopk by its threshold": dict(activation="batchtopk"),
    "jumprelu": dict(activation="jumprelu", d_out=D),
    "relu, centred": dict(activation="relu"),
}


@pytest.mark.parametrize("name", OURS)
def test_ours_in_their_words(name: str, tmp_path: Path) -> None:
    metadata = {"model_name": "gpt2", "hook_name": "blocks.7.hook_resid_mid", "hook_name_out": "blocks.7.hook_mlp_out"}
    sae = SAE(SAEConfig(D, L, K, metadata=metadata, **OURS[name]), seed=1)
    with torch.no_grad():
        for parameter in sae.parameters():
            if parameter.dim() == 1 or parameter.shape == (D, D):
                parameter.normal_(-0.1, 0.3)
        if sae.config.rescale_acts_by_decoder_norm:
            sae.W_dec *= torch.rand(L, 1) + 0.5
    if sae.config.activation == "batchtopk":
        sae.threshold.fill_(0.4)
    again = there_and_back(sae, tmp_path / "out", "circuit_tracer", read_layer, rows())
    assert (tmp_path / "out" / "layer_7.safetensors").is_file()
    assert {key: again.config.metadata[key] for key in metadata} == metadata
    assert 'feature_input_hook: "hook_resid_mid"\n' in (tmp_path / "out" / "config.yaml").read_text(encoding="utf-8")


def test_hooks_that_are_not_known_are_said_to_be_guessed(tmp_path: Path) -> None:
    sae = SAE(SAEConfig(D, L, K, d_out=D, metadata={"hf_hook_name": "model.layers.5.mlp"}), seed=1)
    lost = saefast.save(sae, tmp_path / "out", format="circuit_tracer")
    assert [line for line in lost if "topk" not in line] == [
        "the metadata names no hook that circuit-tracer knows: config.yaml says feature_input_hook: mlp.hook_in, "
        "feature_output_hook: hook_mlp_out; see that it is so"
    ]
    assert (tmp_path / "out" / "layer_5.safetensors").is_file()


@pytest.mark.parametrize("thresholds", [False, True], ids=["relu", "jumprelu"])
@pytest.mark.parametrize("layers", [1, 3])
def test_across_layers_and_back(layers: int, thresholds: bool, tmp_path: Path) -> None:
    write_across(tmp_path / "clt", layers, thresholds)
    sae, x = saefast.load(tmp_path / "clt"), rows(B, 6 * layers)
    assert sae.config.n_layers == (3 if layers > 1 else None)
    assert_same(sae, read_across(tmp_path / "clt"), x)
    if layers == 1:
        return
    again = there_and_back(sae, tmp_path / "again", "circuit_tracer", read_across, x)
    assert again.config.metadata["model_name"] == "Qwen/Qwen3-0.6B"
    for file in (tmp_path / "clt").glob("*.safetensors"):
        old, new = load_file(file), load_file(tmp_path / "again" / file.name)
        assert old.keys() == new.keys()
        for key, tensor in old.items():
            torch.testing.assert_close(new[key], tensor, rtol=1e-6 if "threshold" in key else 0.0, atol=0.0)


def test_decoders_are_laid_out_some_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def flat(rows: Tensor) -> Tensor:
        seen.append(len(rows))
        return rows.flatten(1)

    monkeypatch.setattr(circuit_tracer, "_flat", flat)
    monkeypatch.setattr(format, "PIECE_BYTES", 256)
    write_across(tmp_path, 3, thresholds=False)
    assert_same(saefast.load(tmp_path), read_across(tmp_path), rows(B, 18))
    assert sum(seen) == 36
    assert max(seen) < 12


def test_one_that_was_trained_is_calibrated_first(tmp_path: Path) -> None:
    sae, x = SAE(SAEConfig(18, 36, 6, n_layers=3), seed=1), rows(500, 18)
    with pytest.raises(
        InputError, match=r"'topk', which circuit-tracer does not know: .*saefast\.as_jumprelu\(sae, rows\)"
    ):
        saefast.save(sae, tmp_path / "a", format="circuit_tracer")
    there_and_back(saefast.as_jumprelu(sae, x, x).sae, tmp_path / "b", "circuit_tracer", read_across, x[:B])


def test_bad_files(tmp_path: Path) -> None:
    write_circuit_tracer(tmp_path / "a", activation="topk")
    with pytest.raises(InputError, match="activation is topk and k None: expected a number"):
        saefast.load(tmp_path / "a")
    write_circuit_tracer(tmp_path / "b", kind="jumprelu", activation="topk", k=3)
    with pytest.raises(InputError, match=r"says activation topk, but the file has activation_function\.threshold"):
        saefast.load(tmp_path / "b")
    file = tmp_path / "c" / "layer_0.safetensors"
    write_circuit_tracer(file.parent, kind="jumprelu")
    tensors = load_file(file)
    tensors["activation_function.threshold"][5] = -0.5
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"goes down to -0\.5; circuit-tracer lets negative activations pass"):
        saefast.load(file)
    tensors["activation_function.threshold"][5] = 0.5
    save_file(tensors | {"W_enc": tensors["W_enc"].T.contiguous()}, file)
    with pytest.raises(InputError, match="W_enc"):
        saefast.load(file)
    save_file(tensors | {"W_other": drawn(3)}, file)
    with pytest.raises(InputError, match="has the tensors W_other, which no transcoder has"):
        saefast.load(file)
    write_across(tmp_path / "d", 3, thresholds=False)
    (tmp_path / "d" / "W_enc_1.safetensors").unlink()
    with pytest.raises(InputError, match="expected one for every layer from 0 on"):
        saefast.load(tmp_path / "d")
    write_across(tmp_path / "e", 3, thresholds=False)
    save_file({"W_dec_1": drawn(12, 3, 6)}, tmp_path / "e" / "W_dec_1.safetensors")
    with pytest.raises(InputError, match="W_dec_1"):
        saefast.load(tmp_path / "e")
    write_circuit_tracer(tmp_path / "f")
    # Nine levels of ten names for the level below would be 10^9 values.
    laughs = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
    )
    deep, dated = "a: " + "[" * 300_000, "a: {2020-01-01: 1}\n"
    for text in ("a: [1, 2", "- 1\n", "x: !!python/object/apply:os.system ['true']\n", laughs, deep, dated, "a: b: c"):
        (tmp_path / "f" / "config.yaml").write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=r"config\.yaml"):
            saefast.load(tmp_path / "f")


def test_facts_of_theirs_are_plain(tmp_path: Path) -> None:
    write_circuit_tracer(tmp_path / "a")
    write_yaml(tmp_path / "a", model_kind="transcoder_set", released="2026-03-13")
    (tmp_path / "a" / "config.yaml").write_text("model_name: m\nreleased: 2026-03-13\n", encoding="utf-8")
    json.dumps(saefast.load(tmp_path / "a").config.metadata)
