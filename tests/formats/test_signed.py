"""SAELens' abstopk: latents that act with their sign, each of which is two of ours."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from their_files import D, K, L, Statement, assert_same, drawn, rows
from torch import Tensor

import saefast


@pytest.mark.parametrize("by_norm", [False, True])
def test_abstopk_of_saelens(by_norm: bool, tmp_path: Path) -> None:
    w = {"W_enc": drawn(D, L, scale=D**-0.5), "W_dec": drawn(L, D), "b_enc": drawn(L, scale=0.2), "b_dec": drawn(D)}
    cfg = {
        "architecture": "abstopk", "k": K, "d_in": D, "d_sae": L, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": by_norm, "metadata": {"sae_lens_version": "6.54.12"},
    }  # fmt: skip
    (tmp_path / "a").mkdir()
    save_file(w, tmp_path / "a" / "sae_weights.safetensors")
    (tmp_path / "a" / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")
    w = {name: tensor.double() for name, tensor in w.items()}
    norms = w["W_dec"].norm(dim=1) if by_norm else torch.ones(L, dtype=torch.float64)

    def encode(x: Tensor) -> Tensor:
        pre = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms
        chosen = pre.abs().topk(K, dim=1).indices
        return torch.zeros_like(pre).scatter(1, chosen, pre.gather(1, chosen))

    theirs = Statement(encode, lambda f, x: (f / norms) @ w["W_dec"] + w["b_dec"])
    sae, x = saefast.load(tmp_path / "a"), rows()
    assert bool((encode(x.double()) < 0).any())
    assert sae.config.n_latents == 2 * L
    assert_same(sae, theirs, x, lambda f: f[:, :L] - f[:, L:])
    # It is an SAE like any other, and goes into other formats.
    saefast.save(sae, tmp_path / "b", format="saelens")
    torch.testing.assert_close(saefast.load(tmp_path / "b")(x).x_hat, sae(x).x_hat)
