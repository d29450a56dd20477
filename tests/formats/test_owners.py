"""Round trips with the owners' own packages: what they write we read, what we write they read, by numbers.

`make peers` runs this where they are installed. Statements of tests/their_files.py are held to them, too.
"""

import importlib.util
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from their_files import (
    B,
    D,
    K,
    L,
    Statement,
    assert_same,
    drawn,
    read_across,
    read_batchtopk,
    read_circuit_tracer,
    read_dictionary_learning,
    read_sparsify,
    rows,
    write_yaml,
)
from torch import Tensor, nn

import saefast
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

pytestmark = pytest.mark.peers
CLOSE: dict[str, float] = dict(rtol=1e-5, atol=1e-5)


def filled(theirs: nn.Module, scale: float = 0.3) -> Any:
    """Numbers in all biases and thresholds, and decoder rows of different norms where they are free."""
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "threshold" in name:
                parameter.copy_(torch.rand(parameter.shape))
            elif parameter.dim() == 1:
                parameter.copy_(drawn(*parameter.shape, scale=scale))
    return theirs.requires_grad_(False)


def ours(**changes: Any) -> SAE:
    """An SAE of ours with numbers in all biases."""
    sae = filled(SAE(SAEConfig(**(dict(d_in=D, n_latents=L, k=K) | changes)), seed=1))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name in ("log_threshold", "W_skip"):
                parameter.copy_(drawn(*parameter.shape, scale=0.3) - 0.5)
        if not sae.config.unit_norm_decoder:
            sae.W_dec *= torch.rand(len(sae.W_dec), 1) + 0.5
    if sae.config.activation == "batchtopk":
        sae.get_buffer("threshold").fill_(0.4)
    return sae


def assert_alike(sae: SAE, encode: Callable[[Tensor], Tensor], decode: Callable[..., Tensor], x: Tensor) -> None:
    """Codes and reconstructions of ours and of a peer's own methods, both in fp32."""
    f, expected = sae.encode(x).detach(), encode(x)
    assert int((expected != 0).sum()) > len(x)
    torch.testing.assert_close(f, expected, **CLOSE)
    torch.testing.assert_close(sae.decode(f, x).detach(), decode(expected), **CLOSE)


# SAELens

LENS: dict[str, dict[str, Any]] = {
    "standard": {},
    "gated": {},
    "topk": dict(k=K, rescale_acts_by_decoder_norm=False),
    "topk by norms": dict(k=K, rescale_acts_by_decoder_norm=True),
    "topk of normalised rows": dict(k=K, normalize_activations="layer_norm"),
    "jumprelu": dict(apply_b_dec_to_input=False),
    "transcoder": dict(d_out=9, apply_b_dec_to_input=False),
    "skip_transcoder": dict(d_out=9, apply_b_dec_to_input=False),
    "jumprelu_transcoder": dict(d_out=9, apply_b_dec_to_input=False),
    "jumprelu_skip_transcoder": dict(d_out=9, apply_b_dec_to_input=False),
}


@pytest.mark.parametrize("name", LENS)
def test_saelens_writes_and_we_read(name: str, tmp_path: Path) -> None:
    registry = pytest.importorskip("sae_lens.registry")
    sae_class, config_class = registry.get_sae_class(name.partition(" ")[0])
    config = config_class(d_in=D, d_sae=L, **LENS[name])
    config.metadata.hook_name = "blocks.2.hook_resid_post"
    theirs = filled(sae_class(config))
    if "skip" in name:
        theirs.W_skip.copy_(drawn(9, D))
    theirs.save_model(tmp_path)
    sae, x = saefast.load(tmp_path), rows()
    assert sae.config.metadata["hook_name"] == "blocks.2.hook_resid_post"
    # Their decode of normalised rows takes the figures of the rows that were encoded last, and a skip the rows.
    assert_alike(sae, theirs.encode, lambda f: theirs.forward(x) if "skip" in name else theirs.decode(f), x)
    torch.testing.assert_close(sae(x).x_hat.detach(), theirs(x), **CLOSE)


LENS_OURS: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk by norms": dict(rescale_acts_by_decoder_norm=True, unit_norm_decoder=False),
    "relu": dict(activation="relu", unit_norm_decoder=False),
    "gated": dict(activation="gated"),
    "jumprelu": dict(activation="jumprelu"),
    "batchtopk": dict(activation="batchtopk"),
    "matryoshka": dict(activation="batchtopk", matryoshka=(8, 24)),
    "transcoder": dict(activation="relu", d_out=9),
    "skip transcoder": dict(activation="jumprelu", d_out=9, skip=True),
    "normalised rows": dict(input_norm="layer_norm"),
}


@pytest.mark.parametrize("name", LENS_OURS)
def test_we_write_and_saelens_reads(name: str, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    sae, x = ours(metadata={"hook_name": "blocks.2.hook_resid_post"}, **LENS_OURS[name]), rows()
    saefast.save(sae, tmp_path, format="saelens")
    theirs = sae_lens.SAE.load_from_disk(tmp_path).requires_grad_(False)
    assert theirs.cfg.metadata.hook_name == "blocks.2.hook_resid_post"
    torch.testing.assert_close(theirs.encode(x), sae.encode(x).detach(), **CLOSE)
    torch.testing.assert_close(theirs(x), sae(x).x_hat.detach(), **CLOSE)


@pytest.mark.parametrize("kind", ["BatchTopK", "MatryoshkaBatchTopK"])
def test_saelens_trains_and_we_read(kind: str, tmp_path: Path) -> None:
    """What its trainer leaves at the end, where BatchTopK has become JumpReLU."""
    sae_lens = pytest.importorskip("sae_lens")
    more = dict(matryoshka_widths=[8, L]) if kind.startswith("M") else {}
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=D, d_sae=L, k=K, **more)
    theirs = filled(getattr(sae_lens, f"{kind}TrainingSAE")(config))
    theirs.topk_threshold.fill_(0.05)
    theirs.save_inference_model(tmp_path)
    read = sae_lens.SAE.load_from_disk(tmp_path).requires_grad_(False)
    sae, x = saefast.load(tmp_path), rows()
    assert_alike(sae, read.encode, read.decode, x)


# sparsify

SPARSIFY: dict[str, dict[str, Any]] = {
    "sae": {},
    "groupmax": dict(activation="groupmax", k=8),
    "transcoder": dict(transcode=True),
    "skip transcoder": dict(transcode=True, skip_connection=True),
    "sae with a skip": dict(skip_connection=True),
    "by the factor": dict(num_latents=0, expansion_factor=4),
}


def dense(coder: Any, x: Tensor) -> Tensor:
    acts, idx, _ = coder.encode(x)
    return acts.new_zeros(len(x), coder.num_latents).scatter(1, idx, acts)


@pytest.mark.parametrize("name", SPARSIFY)
def test_sparsify_writes_and_we_read(name: str, tmp_path: Path) -> None:
    sparsify = pytest.importorskip("sparsify")
    config = sparsify.SparseCoderConfig(**(dict(num_latents=L, k=K) | SPARSIFY[name]))
    theirs = filled(sparsify.SparseCoder(D, config, device="cpu", dtype=torch.float32))
    for matrix in (theirs.W_dec, theirs.W_skip):
        if matrix is not None:
            matrix.copy_(drawn(*matrix.shape))
    theirs.save_to_disk(tmp_path / "layers.3.mlp")
    sae, x = saefast.load(tmp_path / "layers.3.mlp"), rows()
    torch.testing.assert_close(sae.encode(x).detach(), dense(theirs, x), **CLOSE)
    torch.testing.assert_close(sae(x).x_hat.detach(), theirs(x).sae_out, **CLOSE)
    assert_stated(read_sparsify(tmp_path / "layers.3.mlp"), dense(theirs, x), theirs(x).sae_out, x)


SPARSIFY_OURS: dict[str, dict[str, Any]] = {
    "topk": {},
    "groupmax": dict(activation="groupmax", k=8),
    "not centred": dict(apply_b_dec_to_input=False),
    "by norms": dict(rescale_acts_by_decoder_norm=True, unit_norm_decoder=False),
    "skip transcoder": dict(d_out=D, skip=True),
}


@pytest.mark.parametrize("name", SPARSIFY_OURS)
def test_we_write_and_sparsify_reads(name: str, tmp_path: Path) -> None:
    sparsify = pytest.importorskip("sparsify")
    sae, x = ours(metadata={"hook_name": "blocks.2.hook_resid_post"}, **SPARSIFY_OURS[name]), rows()
    saefast.save(sae, tmp_path, format="sparsify")
    theirs = sparsify.SparseCoder.load_from_disk(tmp_path, device="cpu").requires_grad_(False)
    torch.testing.assert_close(dense(theirs, x), sae.encode(x).detach(), **CLOSE)
    torch.testing.assert_close(theirs(x).sae_out, sae(x).x_hat.detach(), **CLOSE)


def assert_stated(theirs: Statement, f: Tensor, x_hat: Tensor, x: Tensor) -> None:
    """The statement that `make test` holds us to is what the owner's own code computes."""
    code = theirs.encode(x.double())
    torch.testing.assert_close(f.double(), code, **CLOSE)
    torch.testing.assert_close(x_hat.double(), theirs.decode(code, x.double()), **CLOSE)


# dictionary_learning

# Module and class of each trainer, its settings, and the class of what it saves.
TRAINERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "StandardTrainer": ("standard", {}, "AutoEncoder"),
    "StandardTrainerAprilUpdate": ("standard", {}, "AutoEncoder"),
    "PAnnealTrainer": ("p_anneal", dict(anneal_start=1), "AutoEncoder"),
    "GatedSAETrainer": ("gdm", {}, "GatedAutoEncoder"),
    "GatedAnnealTrainer": ("gated_anneal", dict(anneal_start=1), "GatedAutoEncoder"),
    "JumpReluTrainer": ("jumprelu", {}, "JumpReluAutoEncoder"),
    "TopKTrainer": ("top_k", dict(k=K), "AutoEncoderTopK"),
    "BatchTopKTrainer": ("batch_top_k", dict(k=K, threshold_start_step=0), "BatchTopKSAE"),
    "MatryoshkaBatchTopKTrainer": (
        "matryoshka_batch_top_k",
        dict(k=K, threshold_start_step=0, group_fractions=[0.25, 0.75]),
        "MatryoshkaBatchTopKSAE",
    ),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_dictionary_learning_trains_and_we_read(name: str, tmp_path: Path) -> None:
    pytest.importorskip("dictionary_learning")
    from dictionary_learning.training import trainSAE
    from dictionary_learning.utils import load_dictionary

    module, settings, written = TRAINERS[name]
    trainer = getattr(__import__(f"dictionary_learning.trainers.{module}", fromlist=[name]), name)
    steps = 8
    config = dict(
        trainer=trainer, activation_dim=D, dict_size=L, steps=steps, layer=3, lm_name="pythia", lr=3e-3, device="cpu",
        warmup_steps=2, **settings,
    )  # fmt: skip
    if name not in ("TopKTrainer", "BatchTopKTrainer", "MatryoshkaBatchTopKTrainer"):
        config["sparsity_warmup_steps"] = 3
    trainSAE(
        data=[rows(64) for _ in range(steps + 1)], trainer_configs=[config], steps=steps, save_dir=str(tmp_path),
        device="cpu",
    )  # fmt: skip
    theirs, about = load_dictionary(str(tmp_path / "trainer_0"), "cpu")
    assert about["trainer"]["dict_class"] == written
    sae, x = saefast.load(tmp_path / "trainer_0"), rows()
    assert_alike(sae, theirs.requires_grad_(False).encode, theirs.decode, x)
    assert_stated(read_dictionary_learning(tmp_path / "trainer_0"), theirs.encode(x), theirs(x), x)
    assert sae.config.metadata["model_name"] == "pythia"


def test_a_class_that_no_trainer_saves(tmp_path: Path) -> None:
    dictionary = pytest.importorskip("dictionary_learning.dictionary")
    theirs = filled(dictionary.AutoEncoderNew(D, L))
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    assert_alike(saefast.load(tmp_path / "ae.pt"), theirs.encode, theirs.decode, rows())


DICTIONARIES_OURS: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk by norms": dict(rescale_acts_by_decoder_norm=True, unit_norm_decoder=False),
    "topk, not centred": dict(apply_b_dec_to_input=False),
    "batchtopk": dict(activation="batchtopk"),
    "matryoshka": dict(activation="batchtopk", matryoshka=(8, 24)),
    "relu": dict(activation="relu"),
    "relu with free rows": dict(activation="relu", unit_norm_decoder=False),
    "gated": dict(activation="gated"),
    "jumprelu": dict(activation="jumprelu"),
}


@pytest.mark.parametrize("name", DICTIONARIES_OURS)
def test_we_write_and_dictionary_learning_reads(name: str, tmp_path: Path) -> None:
    utils = pytest.importorskip("dictionary_learning.utils")
    sae, x = ours(metadata={"model_name": "pythia"}, **DICTIONARIES_OURS[name]), rows()
    saefast.save(sae, tmp_path, format="dictionary_learning")
    theirs, about = utils.load_dictionary(str(tmp_path), "cpu")
    theirs.requires_grad_(False)
    assert about["trainer"]["lm_name"] == "pythia"
    torch.testing.assert_close(theirs.encode(x), sae.encode(x).detach(), **CLOSE)
    torch.testing.assert_close(theirs(x), sae(x).x_hat.detach(), **CLOSE)


# circuit-tracer, in an environment of its own


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


# llamascopium, beside circuit-tracer

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


# BatchTopK's and the Matryoshka SAEs' repositories are on no package index: CHECKOUTS names a folder of checkouts


def checked_out(repository: str, module: str) -> Any:
    """A module of a checkout, under a name of its own."""
    file = Path(os.environ.get("CHECKOUTS", ".")) / repository / f"{module}.py"
    if not file.is_file():
        pytest.skip(f"needs a checkout of bartbussmann/{repository} in the folder that CHECKOUTS names")
    spec = importlib.util.spec_from_file_location(f"{repository}_{module}", file)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


SETTINGS: dict[str, Any] = {
    "seed": 49, "act_size": D, "dict_size": L, "device": "cpu", "dtype": torch.float32, "l1_coeff": 0, "top_k": K,
    "n_batches_to_dead": 5, "top_k_aux": 8, "aux_penalty": 1 / 32, "bandwidth": 0.001, "model_name": "gpt2-small",
    "hook_point": "blocks.8.hook_resid_pre", "name": "run", "group_sizes": [8, 24, 32], "top_k_matryoshka": [2, 3],
}  # fmt: skip
REPOSITORIES = {
    "BatchTopK": {"VanillaSAE": "vanilla", "TopKSAE": "topk", "BatchTopKSAE": "batchtopk", "JumpReLUSAE": "jumprelu"},
    "matryoshka_sae": {
        "VanillaSAE": "vanilla", "TopKSAE": "topk", "BatchTopKSAE": "batch-topk",
        "GlobalBatchTopKMatryoshkaSAE": "global-matryoshka-topk", "JumpReLUSAE": "jumprelu",
    },
}  # fmt: skip
BOTH = [(repository, name) for repository, names in REPOSITORIES.items() for name in names]


class NoRun:
    """Where save_checkpoint logs to."""

    def log_artifact(self, artifact: Any) -> None:
        pass


@pytest.mark.parametrize("normed", [True, False], ids=["", "raw rows"])
@pytest.mark.parametrize(("repository", "name"), BOTH)
def test_a_repository_writes_and_we_read(
    repository: str, name: str, normed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = checked_out(repository, "sae")
    settings = SETTINGS | {"input_unit_norm": normed, "sae_type": REPOSITORIES[repository][name]}
    theirs = filled(getattr(code, name)(settings)).eval()
    if "threshold" in theirs.state_dict():
        theirs.threshold.fill_(0.3)
    monkeypatch.chdir(tmp_path)
    checked_out(repository, "logs").save_checkpoint(NoRun(), theirs, settings, 5)
    folder = tmp_path / "checkpoints" / "run_5"
    sae, x = saefast.load(folder), rows()
    found = theirs(x)
    torch.testing.assert_close(sae.encode(x).detach(), found["feature_acts"], **CLOSE)
    torch.testing.assert_close(sae(x).x_hat.detach(), found["sae_out"], **CLOSE)
    if "threshold" not in theirs.state_dict():
        assert_stated(read_batchtopk(folder), found["feature_acts"], found["sae_out"], x)
    # And back.
    format = sae.config.metadata["format"]
    assert format == ("matryoshka_sae" if "threshold" in theirs.state_dict() else "batchtopk")
    saefast.save(sae, tmp_path / "again", format=format)
    written = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    written["dtype"] = getattr(torch, written["dtype"].split(".")[-1])
    if isinstance(written.get("group_sizes"), str):
        written["group_sizes"] = json.loads(written["group_sizes"])
    again = getattr(code, name)(written)
    again.load_state_dict(torch.load(tmp_path / "again" / "sae.pt"))
    found = again.requires_grad_(False).eval()(x)
    torch.testing.assert_close(found["feature_acts"], sae.encode(x).detach(), **CLOSE)
    torch.testing.assert_close(found["sae_out"], sae(x).x_hat.detach(), **CLOSE)
