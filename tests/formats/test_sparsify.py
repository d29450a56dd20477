"""sparsify's folders: read and written, against what it computes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from their_files import D, K, L, assert_same, read_sparsify, rows, there_and_back, write_sparsify
from torch import Tensor

import saefast
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

KINDS: dict[str, dict[str, Any]] = {
    "sae": {},
    "groupmax": dict(activation="groupmax", k=8),
    "transcoder": dict(transcode=True),
    "skip transcoder": dict(transcode=True, skip_connection=True),
    # x - b_dec is encoded, and W_skip takes x itself.
    "sae with a skip": dict(skip_connection=True),
    # Of 2024, before it was called so.
    "old": dict(expansion_factor=4, num_latents=0),
}


@pytest.mark.parametrize("name", KINDS)
def test_theirs_and_back(name: str, tmp_path: Path) -> None:
    write_sparsify(tmp_path / "layers.10.mlp", **KINDS[name])
    sae, x = saefast.load(tmp_path / "layers.10.mlp"), rows()
    assert_same(sae, read_sparsify(tmp_path / "layers.10.mlp"), x)
    again = there_and_back(sae, tmp_path / "again", "sparsify", read_sparsify, x)
    written = json.loads((tmp_path / "again" / "cfg.json").read_text(encoding="utf-8"))
    read = json.loads((tmp_path / "layers.10.mlp" / "cfg.json").read_text(encoding="utf-8"))
    if name not in ("old", "sae with a skip"):
        assert {key: written[key] for key in read} == read
        old, new = (load_file(tmp_path / folder / "sae.safetensors") for folder in ("layers.10.mlp", "again"))
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert again.config.metadata["format"] == "sparsify"


def test_signed_latents_are_two_each(tmp_path: Path) -> None:
    write_sparsify(tmp_path, signed=True)
    sae = saefast.load(tmp_path)
    assert sae.config.n_latents == 2 * L

    def folded(f: Tensor) -> Tensor:
        return f[:, :L] - f[:, L:]

    theirs, x = read_sparsify(tmp_path), rows()
    assert bool((theirs.encode(x.double()) < 0).any())
    assert_same(sae, theirs, x, folded)
    # sparsify of today has no signed latents, and reads it as it is now.
    there_and_back(sae, tmp_path / "again", "sparsify", read_sparsify, x)


def test_a_run_of_several_hooks(tmp_path: Path) -> None:
    for hook in ("layers.0", "layers.0.mlp"):
        write_sparsify(tmp_path / "run" / hook)
    (tmp_path / "run" / "config.json").write_text('{"sae": {"k": 5}}', encoding="utf-8")
    with pytest.raises(InputError, match=r"holds some: name one of layers\.0, layers\.0\.mlp"):
        saefast.load(tmp_path / "run")
    x = rows()
    for hook in ("layers.0", "layers.0.mlp"):
        assert_same(saefast.load(tmp_path / "run" / hook), read_sparsify(tmp_path / "run" / hook), x)
    # The file itself, with the config beside it.
    file = tmp_path / "run" / "layers.0" / "sae.safetensors"
    assert_same(saefast.load(file), read_sparsify(file.parent), x)


def test_bfloat16_stays_it(tmp_path: Path) -> None:
    write_sparsify(tmp_path, torch.bfloat16)
    sae = saefast.load(tmp_path)
    assert sae.dtype == torch.bfloat16
    assert_same(saefast.load(tmp_path, dtype="float32"), read_sparsify(tmp_path), rows())


OURS: dict[str, dict[str, Any]] = {
    "in units of norms": dict(rescale_acts_by_decoder_norm=True, unit_norm_decoder=False),
    "not centred": dict(apply_b_dec_to_input=False),
    "matryoshka": dict(matryoshka=(8, 24)),
    "crosscoder": dict(crosscode_widths=(6, 10)),
}


@pytest.mark.parametrize("name", OURS)
def test_ours_in_their_words(name: str, tmp_path: Path) -> None:
    sae = SAE(SAEConfig(D, L, K, metadata={"hook_name": "blocks.3.hook_resid_post"}, **OURS[name]), seed=1)
    with torch.no_grad():
        sae.b_enc.normal_(0, 0.1)
        sae.b_dec.normal_()
        sae.W_dec *= torch.rand(L, 1) + 0.5
    again = there_and_back(sae, tmp_path / "out", "sparsify", read_sparsify, rows())
    assert again.config.metadata["hook_name"] == "blocks.3.hook_resid_post"
    lost = saefast.save(sae, tmp_path / "out", format="sparsify")
    assert len(lost) == ("matryoshka" in OURS[name] or "crosscode_widths" in OURS[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(activation="jumprelu"), "activation is 'jumprelu', which sparsify does not know: it has topk, groupmax"),
        (dict(activation="batchtopk"), "activation is 'batchtopk', which sparsify does not know"),
        (dict(d_out=8), "d_out is 8 and d_in 16: sparsify knows SAEs of one width alone"),
        (dict(input_norm="layer_norm"), "input_norm is 'layer_norm', which sparsify cannot say: expected 'none'"),
        (dict(n_layers=4, k=4), "n_layers is 4, which sparsify cannot say: expected None"),
    ],
)
def test_what_they_cannot_say(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    sae = SAE(SAEConfig(**(dict(d_in=D, n_latents=L, k=K) | changes)), seed=1)
    with pytest.raises(InputError, match=message):
        saefast.save(sae, tmp_path / "out", format="sparsify")
    assert not list(tmp_path.glob("out/*"))


def test_bad_files(tmp_path: Path) -> None:
    write_sparsify(tmp_path / "a", k=0)
    with pytest.raises(InputError, match="k is 0"):
        saefast.load(tmp_path / "a")
    write_sparsify(tmp_path / "b", transcode="yes")
    with pytest.raises(InputError, match=r"cfg\.json: transcode"):
        saefast.load(tmp_path / "b")
    write_sparsify(tmp_path / "c", activation="softmax")
    with pytest.raises(InputError, match="softmax"):
        saefast.load(tmp_path / "c")
    write_sparsify(tmp_path / "e", d_in=D + 1)
    with pytest.raises(InputError, match="d_in is 17, but the tensors beside it have 16: one is of another SAE"):
        saefast.load(tmp_path / "e")
    # SAELens' way round, which is what its own reader expects of sparsify.
    write_sparsify(tmp_path / "d")
    tensors = load_file(tmp_path / "d" / "sae.safetensors")
    save_file(tensors | {"W_dec": tensors["W_dec"].T.contiguous()}, tmp_path / "d" / "sae.safetensors")
    with pytest.raises(InputError, match="W_dec"):
        saefast.load(tmp_path / "d")
    del tensors["W_dec"]
    save_file(tensors, tmp_path / "d" / "sae.safetensors")
    with pytest.raises(InputError, match="lacks the tensor 'W_dec'"):
        saefast.load(tmp_path / "d")


def test_a_file_is_mapped(tmp_path: Path) -> None:
    """Their matrices have a latent in a row, as ours: nothing is copied but biases."""
    write_sparsify(tmp_path, transcode=True)
    sae, x = saefast.load(tmp_path, map=True), rows()
    assert_same(sae, read_sparsify(tmp_path), x)
    with (tmp_path / "sae.safetensors").open("r+b") as file:
        file.seek(-4 * L * D, 2)
        file.write(bytes(4 * L * D))
    # The last tensor by name.
    assert bool((sae.W_enc == 0).all())
