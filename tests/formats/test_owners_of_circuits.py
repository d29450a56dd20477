"""Round trips with circuit-tracer and llamascopium, which have an environment of their own (`make peers`)."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from owners import CLOSE, assert_alike, assert_stated, ours
from their_files import (
    B,
    D,
    K,
    L,
    assert_same,
    drawn,
    read_across,
    read_circuit_tracer,
    rows,
    write_yaml,
)
from torch import Tensor, nn

import saefast

pytestmark = pytest.mark.peers

# circuit-tracer


def redrawn(theirs: nn.Module) -> Any:
    """Numbers in all of its parameters, positive ones in thresholds."""
    for name, parameter in theirs.requires_grad_(False).named_parameters():
        drawn_anew = drawn(*parameter.shape, scale=0.4)
        parameter.copy_(drawn_anew.abs() if "threshold" in name else drawn_anew)
    return theirs


@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_circuit_tracer_writes_and_we_read(kind: str, skip: bool, tmp_path: Path) -> None:
    single = pytest.importorskip("circuit_tracer.transcoder.single_layer_transcoder")
    functions = pytest.importorskip("circuit_tracer.transcoder.activation_functions")
    if kind == "topk" and not hasattr(functions, "TopK"):
        pytest.skip("this circuit-tracer has no TopK")
    act = {"relu": nn.functional.relu, "jumprelu": functions.JumpReLU(torch.rand(L)), "topk": functions.TopK(K)}[kind]
    layers = {}
    for layer in range(2):
        theirs = single.SingleLayerTranscoder(D, L, act, layer, skip, device=torch.device("cpu"), dtype=torch.float32)
        layers[layer] = redrawn(theirs)
    single.TranscoderSet(layers, "mlp.hook_in", "hook_mlp_out").to_safetensors(str(tmp_path))
    write_yaml(tmp_path, model_kind="transcoder_set", **(dict(activation="topk", k=K) if kind == "topk" else {}))
    x = rows()
    for layer, theirs in layers.items():
        file = tmp_path / f"layer_{layer}.safetensors"
        assert_alike(saefast.load(file), theirs.encode, lambda f, theirs=theirs: theirs.decode(f, x), x)
        assert_stated(read_circuit_tracer(file), theirs.encode(x), theirs(x), x)


CIRCUITS_OURS: dict[str, dict[str, Any]] = {
    "topk": dict(d_out=D),
    "skip": dict(d_out=D, skip=True),
    "jumprelu with a skip": dict(activation="jumprelu", d_out=D, skip=True),
    "relu": dict(activation="relu", d_out=D),
    "batchtopk by its threshold": dict(activation="batchtopk", d_out=D),
    "an SAE": dict(activation="jumprelu"),
}


@pytest.mark.parametrize("name", CIRCUITS_OURS)
@pytest.mark.parametrize("lazy", [False, True], ids=["", "lazy"])
def test_we_write_and_circuit_tracer_reads(name: str, lazy: bool, tmp_path: Path) -> None:
    hub = pytest.importorskip("circuit_tracer.utils.hf_utils")
    single = pytest.importorskip("circuit_tracer.transcoder.single_layer_transcoder")
    reads_topk = "k" in inspect.signature(single.load_transcoder_set).parameters
    if "activation" not in CIRCUITS_OURS[name] and not reads_topk:
        pytest.skip("circuit-tracer 0.5.0 reads no topk; later code does")
    yaml = pytest.importorskip("yaml")
    made = [ours(metadata={"layer": layer, "model_name": "m"}, **CIRCUITS_OURS[name]) for layer in range(2)]
    for sae in made:
        saefast.save(sae, tmp_path, format="circuit_tracer")
    config = yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))
    # Where the files are, as their own loader says it once they are there.
    config["transcoders"] = [str(tmp_path / f"layer_{layer}.safetensors") for layer in range(2)]
    theirs = hub.load_transcoders(config, torch.device("cpu"), torch.float32, lazy, lazy).requires_grad_(False)
    x = rows()
    for layer, sae in enumerate(made):
        f = theirs[layer].encode(x)
        torch.testing.assert_close(f, sae.encode(x).detach(), **CLOSE)
        torch.testing.assert_close(theirs[layer].decode(f, x), sae(x).x_hat.detach(), **CLOSE)


def side_by_side(theirs: Any, layers: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Their encode and decode, which take (layers, B, d), of inputs, codes and outputs side by side."""

    def encode(x: Tensor) -> Tensor:
        return torch.cat(list(theirs.encode(torch.stack(x.chunk(layers, dim=1)))), dim=1)

    def decode(f: Tensor) -> Tensor:
        return torch.cat(list(theirs.decode(torch.stack(f.chunk(layers, dim=1)))), dim=1)

    return encode, decode


@pytest.mark.parametrize("kind", ["relu", "jump_relu"])
def test_circuit_tracer_writes_one_across_layers(kind: str, tmp_path: Path) -> None:
    across = pytest.importorskip("circuit_tracer.transcoder.cross_layer_transcoder")
    theirs = redrawn(
        across.CrossLayerTranscoder(3, L, D, kind, lazy_decoder=False, device=torch.device("cpu"), dtype=torch.float32)
    )
    theirs.to_safetensors(str(tmp_path))
    write_yaml(tmp_path, model_kind="cross_layer_transcoder")
    sae, x = saefast.load(tmp_path), rows(B, 3 * D)
    encode, decode = side_by_side(theirs, 3)
    assert_alike(sae, encode, decode, x)
    assert_stated(read_across(tmp_path), encode(x), decode(encode(x)), x)


@pytest.mark.parametrize("lazy", [False, True], ids=["", "lazy"])
def test_circuit_tracer_reads_one_across_layers(lazy: bool, tmp_path: Path) -> None:
    across = pytest.importorskip("circuit_tracer.transcoder.cross_layer_transcoder")
    trained = ours(d_in=3 * D, n_latents=3 * L, k=3 * K, n_layers=3)
    x = rows(500, 3 * D)
    sae = saefast.as_jumprelu(trained, x, x).sae
    saefast.save(sae, tmp_path, format="circuit_tracer")
    theirs = across.load_clt(
        str(tmp_path), device=torch.device("cpu"), dtype=torch.float32, lazy_decoder=lazy, lazy_encoder=lazy
    ).requires_grad_(False)
    encode, decode = side_by_side(theirs, 3)
    assert_alike(sae, encode, decode, x[:B])
    assert_same(sae, read_across(tmp_path), x[:B])


# llamascopium

SCOPIUM: dict[str, dict[str, Any]] = {
    "relu": dict(act_fn="relu"),
    "jumprelu": dict(act_fn="jumprelu"),
    "jumprelu without norms": dict(act_fn="jumprelu", sparsity_include_decoder_norm=False),
    "topk": dict(act_fn="topk", top_k=K),
    "topk without norms": dict(act_fn="topk", top_k=K, sparsity_include_decoder_norm=False),
    "of each token's norm": dict(act_fn="topk", top_k=K, norm_activation="token-wise"),
}


@pytest.mark.parametrize("name", SCOPIUM)
def test_llamascopium_writes_and_we_read(name: str, tmp_path: Path) -> None:
    models = pytest.importorskip("llamascopium.models.sae")
    hook = "blocks.5.hook_resid_post"
    config = models.SAEConfig(
        hook_point_in=hook, hook_point_out=hook, d_model=D, expansion_factor=L / D, dtype=torch.float32, device="cpu",
        **SCOPIUM[name],
    )  # fmt: skip
    theirs = models.SparseAutoEncoder(config).requires_grad_(False)
    for key, parameter in theirs.named_parameters():
        parameter.copy_(drawn(*parameter.shape, scale=0.3) + (0.3 if "log" not in key and parameter.dim() == 1 else 0))
    theirs.set_dataset_average_activation_norm({hook: 7.0})
    theirs.save_pretrained(tmp_path)
    config.save_hyperparameters(tmp_path)
    sae, x = saefast.load(tmp_path), rows()
    assert sae.config.metadata["hook_name"] == hook
    batch = theirs.normalize_activations({hook: x})
    f = theirs.encode(batch[hook])
    per_token = "token" in name
    scale = (x.norm(dim=1, keepdim=True) if per_token else torch.full((B, 1), 7.0)) / D**0.5
    torch.testing.assert_close(sae(x).x_hat.detach(), theirs.decode(f) * scale, **CLOSE)
    units = theirs.decoder_norm() if sae.config.rescale_acts_by_decoder_norm else 1.0
    torch.testing.assert_close(sae.encode(x).detach(), f * units * (1 if per_token else scale), **CLOSE)


SCOPIUM_OURS: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk by norms": dict(rescale_acts_by_decoder_norm=True, unit_norm_decoder=False),
    "relu, not centred": dict(activation="relu", apply_b_dec_to_input=False),
    "jumprelu": dict(activation="jumprelu"),
    "batchtopk": dict(activation="batchtopk"),
}


@pytest.mark.parametrize("name", SCOPIUM_OURS)
def test_we_write_and_llamascopium_reads(name: str, tmp_path: Path) -> None:
    models = pytest.importorskip("llamascopium.models.sae")
    sae, x = ours(metadata={"hook_name": "blocks.5.hook_resid_post"}, **SCOPIUM_OURS[name]), rows()
    saefast.save(sae, tmp_path, format="llamascopium")
    theirs = models.SparseAutoEncoder.from_pretrained(str(tmp_path), device="cpu", dtype=torch.float32)
    f = theirs.requires_grad_(False).encode(x)
    units = theirs.decoder_norm() if sae.config.rescale_acts_by_decoder_norm else 1.0
    torch.testing.assert_close(sae.encode(x).detach(), f * units, **CLOSE)
    torch.testing.assert_close(sae(x).x_hat.detach(), theirs.decode(f), **CLOSE)
