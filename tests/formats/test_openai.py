"""OpenAI's SAEs of GPT-2, against what the code of their repository computes, restated here."""

from pathlib import Path
from typing import Any

import pytest
import torch
from their_files import D, K, L, Statement, assert_same, best, double, drawn, rows, there_and_back, unit_columns
from torch import Tensor

import saefast
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE


def state(activation: str | None, tied: bool = False, **changes: Any) -> dict[str, Any]:
    """As `Autoencoder.state_dict` of theirs; activation None is a file from before there was one."""
    found: dict[str, Any] = {
        "pre_bias": drawn(D), "latent_bias": drawn(L, scale=0.1),
        "stats_last_nonzero": torch.ones(L, dtype=torch.int64),
        "latents_activation_frequency": torch.rand(L, dtype=torch.float32),
        "latents_mean_square": torch.rand(L, dtype=torch.float32), "encoder.weight": drawn(L, D, scale=D**-0.5),
    }  # fmt: skip
    found["decoder.linear.weight" if tied else "decoder.weight"] = (
        found["encoder.weight"] if tied else unit_columns(drawn(D, L))
    )
    if activation is not None:
        found["activation"] = activation
    if activation == "TopK":
        found["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"}
    return found | changes


def write(path: Path, found: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, path)
    return path


def stated(found: dict[str, Any]) -> Statement:
    """Their `preprocess`, `encode_pre_act`, activation and `decode`; a layer norm is there where there is TopK."""
    w = double({name: item for name, item in found.items() if isinstance(item, Tensor)})
    topk = found.get("activation", "ReLU") == "TopK"
    W_dec = w["decoder.linear.weight"] if "decoder.linear.weight" in w else w["decoder.weight"].T

    def layer_norm(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mu = x.mean(dim=-1, keepdim=True)
        std = (x - mu).std(dim=-1, keepdim=True)
        return (x - mu) / (std + 1e-5), mu, std

    def encode(x: Tensor) -> Tensor:
        x = layer_norm(x)[0] if topk else x
        pre = (x - w["pre_bias"]) @ w["encoder.weight"].T + w["latent_bias"]
        return best(pre, found["activation_state_dict"]["k"]).relu() if topk else pre.relu()

    def decode(f: Tensor, x: Tensor) -> Tensor:
        y, (_, mu, std) = f @ W_dec + w["pre_bias"], layer_norm(x)
        return y * std + mu if topk else y

    return Statement(encode, decode)


def read(folder: Path) -> Statement:
    return stated(torch.load(folder / "autoencoder.pt", weights_only=True))


KINDS: dict[str, dict[str, Any]] = {
    "TopK": dict(activation="TopK"),
    "ReLU": dict(activation="ReLU"),
    "ReLU, not said": dict(activation=None),
    "tied": dict(activation="ReLU", tied=True),
}


@pytest.mark.parametrize("name", KINDS)
def test_theirs_and_back(name: str, tmp_path: Path) -> None:
    found, x = state(**KINDS[name]), rows() * 3
    file = write(tmp_path / "resid_delta_mlp_v5_32k" / "autoencoders" / "6.pt", found)
    for path in (file, file.parent):
        sae = saefast.load(path)
        assert_same(sae, stated(found), x)
    assert sae.config.input_norm == ("layer_norm" if name == "TopK" else "none")
    assert sae.config.metadata["model_name"] == "gpt2"
    assert sae.config.metadata["hook_name"] == "blocks.6.hook_mlp_out"
    again = there_and_back(sae, tmp_path / "again", "openai", read, x)
    assert again.config.input_norm == sae.config.input_norm
    written = torch.load(tmp_path / "again" / "autoencoder.pt", weights_only=True)
    tensors = {name.replace(".linear", ""): item for name, item in found.items() if isinstance(item, Tensor)}
    assert tensors.keys() == {name for name, item in written.items() if isinstance(item, Tensor)}
    assert written["activation"] == (found.get("activation") or "ReLU")
    for key in ("pre_bias", "latent_bias", "encoder.weight"):
        assert torch.equal(written[key], found[key])


def test_weights_are_mapped_and_held_once(tmp_path: Path) -> None:
    """encoder.weight lies in the file as it is used; the decoder does not."""
    write(tmp_path / "1.pt", state("ReLU", tied=True))
    sae, mapped = saefast.load(tmp_path), saefast.load(tmp_path, map=True)
    assert torch.equal(mapped.W_enc, sae.W_enc)
    assert torch.equal(mapped.W_dec, sae.W_dec)
    write(tmp_path / "2.pt", state("ReLU"))
    with pytest.raises(InputError, match=r"map is True, but W_dec is not in .* with a latent in a row"):
        saefast.load(tmp_path / "2.pt", map=True)


def ours(**changes: Any) -> SAE:
    sae = SAE(SAEConfig(**dict(d_in=D, n_latents=L, k=K) | changes), seed=0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return sae


OURS: dict[str, dict[str, Any]] = {
    "topk": dict(input_norm="layer_norm"),
    "not centred": dict(input_norm="layer_norm", apply_b_dec_to_input=False),
    "by norm": dict(input_norm="layer_norm", rescale_acts_by_decoder_norm=True, unit_norm_decoder=False),
    "relu": dict(activation="relu"),
    "matryoshka": dict(input_norm="layer_norm", matryoshka=(8, L)),
}


@pytest.mark.parametrize("name", OURS)
def test_ours(name: str, tmp_path: Path) -> None:
    there_and_back(ours(**OURS[name]), tmp_path, "openai", read, rows() * 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "OpenAI's code normalises rows where the activation is TopK, and only there"),
        (dict(activation="relu", input_norm="layer_norm"), "can hold input_norm='none'"),
        (dict(activation="jumprelu"), "activation is 'jumprelu', which OpenAI's format does not know"),
        (dict(d_out=7), "d_out is 7 and d_in 16"),
        (dict(skip=True), "skip is True"),
    ],
)
def test_what_it_cannot_hold_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        saefast.save(ours(**changes), tmp_path, format="openai")


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "negative activations": (
        dict(activation_state_dict={"k": K, "postact_fn": "Identity"}),
        "postact_fn is 'Identity', by which activations may be negative",
    ),
    "no k": (dict(activation_state_dict={}), "activation_state_dict has no k"),
    "another activation": (dict(activation="Softplus"), "activation is 'Softplus': expected 'TopK' or 'ReLU'"),
    "k of all latents and more": (
        dict(activation_state_dict={"k": L + 1, "postact_fn": "ReLU"}),
        "k is 65 but n_latents only 64",
    ),
    "transposed": ({"encoder.weight": drawn(D, L)}, r"encoder.weight has shape \(16, 64\): it is transposed"),
    "not finite": ({"latent_bias": torch.full((L,), torch.inf)}, "b_enc is not finite"),
    "of another size": ({"decoder.weight": drawn(D, L - 1)}, r"decoder.weight has shape \(16, 63\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name: str, tmp_path: Path) -> None:
    changes, said = BAD[name]
    write(tmp_path / "1.pt", state("TopK") | changes)
    with pytest.raises(InputError, match=said):
        saefast.load(tmp_path)


def test_several_in_a_folder(tmp_path: Path) -> None:
    for i in range(2):
        write(tmp_path / f"{i}.pt", state("ReLU"))
    with pytest.raises(InputError, match=r"holds 2 \.pt files, one for each SAE: name one of them, such as .*0\.pt"):
        saefast.load(tmp_path)


class Evil:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_a_pickle_beside_an_sae_of_another_format_is_left_alone(tmp_path: Path) -> None:
    sae = ours()
    saefast.save(sae, tmp_path, format="saelens")
    write(tmp_path / "trainer_state.pt", {"optimizer": Evil(tmp_path / "ran")})
    assert torch.equal(saefast.load(tmp_path).W_enc, sae.W_enc)
    assert not (tmp_path / "ran").exists()


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    write(tmp_path / "1.pt", state("ReLU") | {"activation_state_dict": Evil(tmp_path / "ran")})
    for format in ("auto", "openai"):
        for path in (tmp_path, tmp_path / "1.pt"):
            with pytest.raises(InputError, match=r"holds Python objects.* nothing else is read"):
                saefast.load(path, format=format)
    assert not (tmp_path / "ran").exists()
