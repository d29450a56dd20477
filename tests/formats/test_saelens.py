"""SAELens' format without SAELens: what is written comes back with the same numbers, and what cannot be is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from saefast.errors import InputError
from saefast.formats import density, load, save
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

D, L = 12, 48
KINDS = {
    "topk": {},
    "topk, by norm": dict(rescale_acts_by_decoder_norm=True),
    "matryoshka": dict(matryoshka=(8, 48)),
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


# --- files as SAELens wrote them


def theirs(folder, cfg, **tensors):
    """A folder with a cfg.json and tensors by SAELens' names, (d_in, d_sae) and so on. -> the tensors, in float64."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"W_enc": (D, L), "W_dec": (L, D), "b_enc": (L,), "b_dec": (D,)}
    found = {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    found = {name: value for name, value in (found | tensors).items() if value is not None}
    folder.mkdir()
    save_file(found, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return {name: value.double() for name, value in found.items()}


def served(sae, x):
    f = sae.encode(x)
    return f.double(), sae.decode(f, x).double()


def best(pre, k):
    top = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())


# A config of before version 6, flat, as a training run of that time left it.
OLD = {
    "model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8,
    "hook_point_head_index": None, "d_in": D, "d_sae": L, "dtype": "torch.float32", "device": "cuda", "lr": 4e-4,
    "expansion_factor": 4, "context_size": 128, "prepend_bos": True, "dataset_path": "Skylion007/openwebtext",
}  # fmt: skip


def test_an_old_standard_sae(tmp_path):
    w = theirs(tmp_path / "a", OLD)
    sae = load(tmp_path / "a")
    assert (sae.config.activation, sae.config.apply_b_dec_to_input) == ("relu", True)
    facts = sae.config.metadata
    assert (facts["hook_name"], facts["model_name"], facts["hook_head_index"]) == (
        OLD["hook_point"],
        "gpt2-small",
        None,
    )
    assert (facts["context_size"], facts["dataset_path"]) == (128, "Skylion007/openwebtext")
    x = rows().double()
    f = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    for found, wanted in zip(served(sae, x), (f, f @ w["W_dec"] + w["b_dec"]), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    # Saved again, it is one of version 6 with the same facts.
    save(sae, tmp_path / "b", "saelens")
    cfg = json.loads((tmp_path / "b" / "cfg.json").read_text())
    assert cfg["architecture"] == "standard"
    assert cfg["metadata"]["hook_name"] == OLD["hook_point"]
    assert "format" not in cfg["metadata"]


def test_an_old_topk_sae_and_an_old_flag(tmp_path):
    old = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}, "apply_b_dec_to_input": False}
    w = theirs(tmp_path / "a", OLD | old | {"normalize_activations": False, "architecture": "standard"})
    sae = load(tmp_path / "a")
    assert (sae.config.activation, sae.config.k) == ("topk", 3)
    x = rows().double()
    torch.testing.assert_close(served(sae, x)[0], best(x @ w["W_enc"] + w["b_enc"], 3), rtol=1e-5, atol=1e-5)


def test_an_old_scaling_factor_is_folded(tmp_path):
    factor = torch.rand(L, generator=torch.Generator().manual_seed(5)) + 0.5
    w = theirs(tmp_path / "a", OLD | {"finetuning_scaling_factor": True}, scaling_factor=factor)
    x = rows().double()
    f = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    found, x_hat = served(load(tmp_path / "a"), x)
    torch.testing.assert_close(found, f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_hat, (f * w["scaling_factor"]) @ w["W_dec"] + w["b_dec"], rtol=1e-5, atol=1e-5)


NEW = {
    "d_in": D,
    "d_sae": L,
    "dtype": "float32",
    "device": "cpu",
    "metadata": {"sae_lens_version": "6.54.12", "l0": 9.4},
}


def test_thresholds_and_what_is_active_at_them(tmp_path):
    threshold = torch.rand(L, generator=torch.Generator().manual_seed(5)) - 0.3
    cfg = NEW | {"architecture": "jumprelu", "apply_b_dec_to_input": False, "reshape_activations": "hook_z"}
    w = theirs(tmp_path / "a", cfg, threshold=threshold)
    assert int((threshold < 0).sum()) > 5
    sae = load(tmp_path / "a")
    assert sae.config.k == 9
    x = rows().double()
    pre = x @ w["W_enc"] + w["b_enc"]
    torch.testing.assert_close(served(sae, x)[0], pre.relu() * (pre > w["threshold"]), rtol=1e-5, atol=1e-5)
    save(sae, tmp_path / "b", "saelens")
    assert json.loads((tmp_path / "b" / "cfg.json").read_text())["reshape_activations"] == "hook_z"


def test_a_gated_sae(tmp_path):
    generator = torch.Generator().manual_seed(5)
    own = {name: 0.3 * torch.randn(L, generator=generator) for name in ("b_gate", "b_mag", "r_mag")}
    w = theirs(tmp_path / "a", NEW | {"architecture": "gated"}, b_enc=None, **own)
    x = rows().double()
    pre = (x - w["b_dec"]) @ w["W_enc"]
    f = (pre + w["b_gate"] > 0) * (pre * w["r_mag"].exp() + w["b_mag"]).relu()
    torch.testing.assert_close(served(load(tmp_path / "a"), x)[0], f, rtol=1e-5, atol=1e-5)


def test_a_transcoder_with_a_skip(tmp_path):
    generator = torch.Generator().manual_seed(5)
    wide = {"W_dec": (L, 7), "b_dec": (7,), "W_skip": (7, D)}
    own = {name: torch.randn(shape, generator=generator) for name, shape in wide.items()}
    cfg = NEW | {"architecture": "skip_transcoder", "d_out": 7, "apply_b_dec_to_input": False}
    w = theirs(tmp_path / "a", cfg, **own)
    x = rows().double()
    f = (x @ w["W_enc"] + w["b_enc"]).relu()
    found, x_hat = served(load(tmp_path / "a"), x)
    torch.testing.assert_close(found, f, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x_hat, f @ w["W_dec"] + w["b_dec"] + x @ w["W_skip"].T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("threshold", [0.8, 0.0])
def test_a_checkpoint_of_training(threshold, tmp_path):
    cfg = NEW | {"architecture": "matryoshka_batchtopk", "k": 4.0, "matryoshka_widths": [8, L]}
    topk_threshold = torch.tensor(threshold, dtype=torch.float64)
    w = theirs(tmp_path / "a", cfg | {"rescale_acts_by_decoder_norm": True}, topk_threshold=topk_threshold)
    sae = load(tmp_path / "a")
    assert (sae.config.activation, sae.config.k, sae.config.matryoshka) == ("batchtopk", 4, (8, L))
    # 0 is where the threshold begins, before there was a batch.
    assert float(sae.threshold) == pytest.approx(threshold or -1)
    if threshold:
        x = rows().double()
        pre = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * w["W_dec"].norm(dim=1)
        torch.testing.assert_close(served(sae, x)[0], pre * (pre > threshold), rtol=1e-5, atol=1e-5)
        return
    with pytest.raises(InputError, match="without a threshold yet"):
        save(sae, tmp_path / "b", "saelens")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"architecture": "temporal"}, "architecture is 'temporal', which predicts"),
        ({"architecture": "matching_pursuit"}, "architecture is 'matching_pursuit', which chooses one latent after"),
        ({"architecture": "mystery"}, "architecture is 'mystery': expected one of standard, gated"),
        ({"architecture": "jumprelu"}, "lacks the tensor 'threshold' of shape"),
        ({"architecture": "topk", "k": "4"}, "k is '4'"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations is 'covariance_whitening'"),
        ({"activation_fn": "tanh-relu"}, "activation_fn is 'tanh-relu'"),
        ({"metadata": [1]}, "metadata"),
        ({"architecture": "transcoder", "d_out": 5}, r"W_dec has shape \(48, 12\), expected \(48, 5\)"),
    ],
)
def test_what_is_not_ours_is_refused_in_a_sentence(cfg, message, tmp_path):
    theirs(tmp_path / "a", NEW | cfg)
    with pytest.raises(InputError, match=message) as caught:
        load(tmp_path / "a")
    assert len(str(caught.value).splitlines()) == 1
    assert str(tmp_path / "a") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(activation="groupmax"), "has no activation 'groupmax': `saefast calibrate`"),
        (dict(d_out=D), "has no activation 'topk' in a transcoder"),
        (dict(crosscode_widths=(6, 6)), "has no crosscoders"),
        (dict(n_layers=2), "has no cross-layer transcoders"),
        (dict(activation="batchtopk"), "without a threshold yet"),
    ],
)
def test_what_saelens_has_not_is_refused_and_nothing_is_written(changes, message, tmp_path):
    sae = SAE(SAEConfig(d_in=D, n_latents=L, k=4, **changes), seed=0)
    with pytest.raises(InputError, match=message):
        save(sae, tmp_path / "a", "saelens")
    assert not (tmp_path / "a").exists()


def test_how_often_latents_fire_is_not_known_of_two_that_were_one(tmp_path):
    theirs(tmp_path / "a", NEW | {"architecture": "abstopk", "k": 4})
    theirs(tmp_path / "b", NEW | {"architecture": "topk", "k": 4})
    for name in ("a", "b"):
        save_file({"sparsity": torch.full((L,), -1.0)}, tmp_path / name / "sparsity.safetensors")
    assert density(tmp_path / "a") is None
    torch.testing.assert_close(density(tmp_path / "b"), torch.full((L,), 0.1))


def test_a_version_of_six_is_kept_and_an_older_one_is_not(tmp_path):
    for kept, written in (("6.3.1", "6.3.1"), ("5.11.0", "6.54.12"), ("odd", "6.54.12"), (None, "6.54.12")):
        save(make(metadata={"sae_lens_version": kept}), tmp_path / str(kept), "saelens")
        cfg = json.loads((tmp_path / str(kept) / "cfg.json").read_text())
        assert cfg["metadata"]["sae_lens_version"] == written


def test_the_file_has_nothing_in_it_that_saelens_does_not_know(tmp_path):
    """It gives all tensors to load_state_dict, which is strict."""
    for kind, names in {"jumprelu": {"threshold"}, "gated": {"b_gate", "b_mag", "r_mag"}, "topk": set()}.items():
        save(make(**KINDS[kind], dtype="bfloat16"), tmp_path / kind, "saelens")
        found = set(load_file(tmp_path / kind / "sae_weights.safetensors"))
        assert found == {"W_enc", "W_dec", "b_dec"} | names | (set() if kind == "gated" else {"b_enc"})
