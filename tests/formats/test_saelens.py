"""SAELens' format without SAELens: what is written comes back with the same numbers, and what cannot be is named."""

import json

import pytest
import torch
from safetensors.torch import load_file

from saefast.formats import load, save
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

D, L = 12, 40
KINDS = {
    "topk": {},
    "topk, by norm": dict(rescale_acts_by_decoder_norm=True),
    "matryoshka": dict(matryoshka=(8, 40)),
    "standard": dict(activation="relu", apply_b_dec_to_input=False),
    "gated": dict(activation="gated"),
    "jumprelu": dict(activation="jumprelu"),
    "batchtopk": dict(activation="batchtopk"),
    "batchtopk, by norm": dict(activation="batchtopk", rescale_acts_by_decoder_norm=True),
    "transcoder": dict(activation="relu", d_out=7),
    "skip_transcoder": dict(activation="relu", d_out=D, skip=True),
    "jumprelu_transcoder": dict(activation="jumprelu", d_out=7),
    "jumprelu_skip_transcoder": dict(activation="jumprelu", d_out=7, skip=True),
    "layer norm": dict(input_norm="layer_norm"),
    "constant norm": dict(input_norm="constant_norm"),
}


def make(**changes):
    """An SAE none of whose parameters is 0."""
    sae = SAE(
        SAEConfig(**dict(d_in=D, n_latents=L, k=4, metadata={"hook_name": "blocks.3.hook_mlp_out"}) | changes), seed=0
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        if "threshold" in dict(sae.named_buffers()):
            sae.threshold.fill_(0.7)
    return sae


def rows(n=50):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_comes_back_with_the_same_numbers(kind, tmp_path):
    sae, x = make(**KINDS[kind]), rows()
    lost = save(sae, tmp_path / "a", format="saelens")
    again = load(tmp_path / "a")
    f = sae.encode(x)
    assert 0 < int((f > 0).sum()) < f.numel()
    torch.testing.assert_close(again.encode(x), f)
    torch.testing.assert_close(again.decode(f, x), sae.decode(f, x))
    assert again.config.metadata["hook_name"] == "blocks.3.hook_mlp_out"
    assert bool(lost) is kind.startswith("batchtopk")
    cfg = json.loads((tmp_path / "a" / "cfg.json").read_text())
    assert int(cfg["metadata"]["sae_lens_version"].split(".")[0]) >= 6
    assert load_file(tmp_path / "a" / "sae_weights.safetensors")["W_enc"].shape == (D, L)
    if not kind.startswith("batchtopk"):
        known = {"metadata", "init"}
        for name, value in sae.config.to_dict().items():
            assert name in known or getattr(again.config, name) == value, name
