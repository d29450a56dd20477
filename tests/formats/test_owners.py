"""Round trips with the owners' own packages: what they write we read, what we write they read, by numbers.

`make peers` runs this where they are installed. Statements of tests/their_files.py are held to them, too.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from owners import CLOSE, assert_alike, assert_stated, filled, ours
from their_files import (
    D,
    K,
    L,
    drawn,
    read_dictionary_learning,
    read_sparsify,
    rows,
)
from torch import Tensor

import saefast

pytestmark = pytest.mark.peers

# SAELens

LENS: dict[str, dict[str, Any]] = {
    "standard": {},
    "gated": {},
    "topk": dict(k=K, rescale_acts_by_decoder_norm=False),
    "topk by norms": dict(k=K, rescale_acts_by_decoder_norm=True),
    "topk of normalised rows": dict(k=K, normalize_activations="layer_norm"),
    "abstopk": dict(k=K, rescale_acts_by_decoder_norm=False),
    "abstopk by norms": dict(k=K, rescale_acts_by_decoder_norm=True),
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
    if "abstopk" in name:
        # Each of its latents is two of ours, one for each sign.
        f = sae.encode(x).detach()
        torch.testing.assert_close(f[:, :L] - f[:, L:], theirs.encode(x), **CLOSE)
        torch.testing.assert_close(sae(x).x_hat.detach(), theirs(x), **CLOSE)
        return
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
