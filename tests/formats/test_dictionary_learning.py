"""dictionary_learning's files: every class read and written, against what its own loader gives."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from their_files import (
    B,
    D,
    K,
    L,
    assert_same,
    best,
    dictionary_learning_tensors,
    double,
    read_dictionary_learning,
    rows,
    there_and_back,
    write_dictionary_learning,
)

import saefast
from saefast.errors import InputError
from saefast.formats.dictionary_learning import KINDS
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE


@pytest.mark.parametrize("name", KINDS)
def test_theirs_and_back(name: str, tmp_path: Path) -> None:
    write_dictionary_learning(tmp_path / "trainer_0", name)
    sae, x = saefast.load(tmp_path / "trainer_0"), rows()
    assert_same(sae, read_dictionary_learning(tmp_path / "trainer_0"), x)
    assert sae.config.metadata["model_name"] == "EleutherAI/pythia-70m-deduped"
    there_and_back(sae, tmp_path / "again", "dictionary_learning", read_dictionary_learning, x)
    old, new = (torch.load(tmp_path / folder / "ae.pt", weights_only=True) for folder in ("trainer_0", "again"))
    assert old.keys() == new.keys()
    for key, tensor in old.items():
        assert tensor.dtype == new[key].dtype
        # A threshold is kept as a logarithm.
        rounding = dict(rtol=1e-6, atol=0.0) if key == "threshold" else dict(rtol=0.0, atol=0.0)
        torch.testing.assert_close(new[key], tensor, **rounding)
    read, written = (
        json.loads((tmp_path / folder / "config.json").read_text(encoding="utf-8"))["trainer"]
        for folder in ("trainer_0", "again")
    )
    assert {key: written[key] for key in read} == read


def test_free_decoder_rows_come_as_their_loader_gives_them(tmp_path: Path) -> None:
    tensors = dictionary_learning_tensors("AutoEncoder")
    tensors["decoder.weight"] *= torch.rand(L) + 0.5
    write_dictionary_learning(tmp_path / "april", "AutoEncoder", tensors)
    sae, x = saefast.load(tmp_path / "april"), rows()
    torch.testing.assert_close(sae.decoder_norms().detach(), torch.ones(L))
    assert_same(sae, read_dictionary_learning(tmp_path / "april"), x)
    # Ours with free rows go into the class whose loader leaves activations alone.
    with torch.no_grad():
        sae.W_dec *= torch.rand(L, 1) + 0.5
    there_and_back(sae, tmp_path / "free", "dictionary_learning", read_dictionary_learning, x)
    assert set(torch.load(tmp_path / "free" / "ae.pt", weights_only=True)) > {"decoder.bias"}


@pytest.mark.parametrize("name", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_is_not_set(name: str, tmp_path: Path) -> None:
    write_dictionary_learning(tmp_path / "a", name, dictionary_learning_tensors(name, threshold=-1.0))
    with pytest.warns(RuntimeWarning, match="has no threshold yet: a batch's k · B best are served"):
        sae = saefast.load(tmp_path / "a")
    assert float(sae.threshold) == -1
    x, w = rows(), double(torch.load(tmp_path / "a" / "ae.pt", weights_only=True))
    W_enc, bias = (w["W_enc"], w["b_enc"]) if "W_enc" in w else (w["encoder.weight"].T, w["encoder.bias"])
    acts = ((x.double() - w["b_dec"]) @ W_enc + bias).relu()
    expected = best(acts.flatten(), K * B).view_as(acts)
    torch.testing.assert_close(sae.encode(x).detach().double(), expected, rtol=1e-5, atol=1e-5)
    saefast.save(sae, tmp_path / "b", format="dictionary_learning")
    assert float(torch.load(tmp_path / "b" / "ae.pt", weights_only=True)["threshold"]) == -1


def test_old_files_and_checkpoints(tmp_path: Path) -> None:
    """Before k and threshold were kept, the config alone had k; a checkpoint is a file without a config."""
    tensors = dictionary_learning_tensors("AutoEncoderTopK")
    del tensors["k"], tensors["threshold"]
    write_dictionary_learning(tmp_path, "AutoEncoderTopK", tensors, k=7)
    sae, x = saefast.load(tmp_path), rows()
    assert sae.config.k == 7
    assert int((sae.encode(x) > 0).sum(1).max()) == 7
    (tmp_path / "checkpoints").mkdir()
    torch.save(dictionary_learning_tensors("GatedAutoEncoder"), tmp_path / "checkpoints" / "ae_100.pt")
    assert saefast.load(tmp_path / "checkpoints" / "ae_100.pt").config.activation == "gated"
    torch.save(tensors, tmp_path / "checkpoints" / "ae_200.pt")
    with pytest.raises(InputError, match="the tensors of AutoEncoderTopK and of BatchTopKSAE: put its config"):
        saefast.load(tmp_path / "checkpoints" / "ae_200.pt")


def test_a_k_that_was_still_being_annealed(tmp_path: Path) -> None:
    write_dictionary_learning(tmp_path, "AutoEncoderTopK", k=K - 1)
    with pytest.warns(RuntimeWarning, match=f"was trained to serve k = {K}, its config.json says {K - 1}"):
        assert saefast.load(tmp_path).config.k == K


OURS: dict[str, dict[str, Any]] = {
    "topk": dict(),
    "topk, not centred": dict(apply_b_dec_to_input=False),
    "topk, in units of norms": dict(rescale_acts_by_decoder_norm=True, unit_norm_decoder=False),
    "transcoder of one width": dict(d_out=D),
    "batchtopk": dict(activation="batchtopk"),
    "batchtopk, in units of norms": dict(activation="batchtopk", rescale_acts_by_decoder_norm=True),
    "matryoshka": dict(activation="batchtopk", matryoshka=(8, 24)),
    "jumprelu, centred": dict(activation="jumprelu"),
    "gated, not centred": dict(activation="gated", apply_b_dec_to_input=False),
    "relu": dict(activation="relu"),
    "relu, not centred": dict(activation="relu", apply_b_dec_to_input=False),
}


@pytest.mark.parametrize("name", OURS)
def test_ours_in_their_words(name: str, tmp_path: Path) -> None:
    sae = SAE(SAEConfig(D, L, K, **OURS[name]), seed=1)
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1)
        sae.b_dec.normal_()
        for value in sae.own().values():
            value.normal_(-0.5, 0.3)
        if sae.config.rescale_acts_by_decoder_norm:
            sae.W_dec *= torch.rand(L, 1) + 0.5
    if sae.config.activation == "batchtopk":
        sae.threshold.fill_(0.4)
    there_and_back(sae, tmp_path / "out", "dictionary_learning", read_dictionary_learning, rows())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(activation="groupmax", k=8), "activation is 'groupmax', which dictionary_learning does not know"),
        (dict(d_out=8), "d_out is 8 and d_in 16"),
        (dict(skip=True), "skip is True, which dictionary_learning cannot say"),
        (dict(input_norm="layer_norm"), "input_norm is 'layer_norm'"),
    ],
)
def test_what_they_cannot_say(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    sae = SAE(SAEConfig(**(dict(d_in=D, n_latents=L, k=K) | changes)), seed=1)
    with pytest.raises(InputError, match=message):
        saefast.save(sae, tmp_path / "out", format="dictionary_learning")


def test_bad_files(tmp_path: Path) -> None:
    write_dictionary_learning(tmp_path / "a", "BatchTopKSAE", dict_class="GatedAutoEncoder")
    with pytest.raises(InputError, match=r"AutoEncoderTopK or BatchTopKSAE, but .* says dict_class 'GatedAutoEncoder'"):
        saefast.load(tmp_path / "a")
    tensors = dictionary_learning_tensors("MatryoshkaBatchTopKSAE")
    write_dictionary_learning(
        tmp_path / "b", "MatryoshkaBatchTopKSAE", tensors | {"group_sizes": torch.tensor([8, 24])}
    )
    with pytest.raises(InputError, match=r"group_sizes are \[8, 24\], expected sizes that add up to 64"):
        saefast.load(tmp_path / "b")
    tensors = dictionary_learning_tensors("AutoEncoderTopK")
    tensors["decoder.weight"] = tensors["decoder.weight"].T.contiguous()
    write_dictionary_learning(tmp_path / "c", "AutoEncoderTopK", tensors)
    with pytest.raises(InputError, match=r"decoder\.weight"):
        saefast.load(tmp_path / "c")
    tensors = dictionary_learning_tensors("AutoEncoderTopK")
    tensors["encoder.weight"][3, 4] = torch.nan
    write_dictionary_learning(tmp_path / "d", "AutoEncoderTopK", tensors)
    with pytest.raises(InputError, match="W_enc is not finite"):
        saefast.load(tmp_path / "d")


def test_what_is_loaded_is_not_warned_of(tmp_path: Path) -> None:
    for name in KINDS:
        write_dictionary_learning(tmp_path / name, name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            saefast.load(tmp_path / name)
