"""SAE and SAEConfig: sparse and dense interface agree, files come back as they went, bad input is named."""

import json

import pytest
import torch

from saefast import ops
from saefast.errors import InputError
from saefast.models import sae as sae_module
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, load


def make(**changes):
    sae = SAE(SAEConfig(**(dict(d_in=6, n_latents=20, k=4) | changes)), seed=1)
    with torch.no_grad():
        sae.b_enc.uniform_(-0.1, 0.1)
        sae.b_dec.uniform_(-1, 1)
    return sae


@pytest.mark.parametrize(
    "changes",
    [{}, {"apply_b_dec_to_input": False}, {"rescale_acts_by_decoder_norm": True, "init": "tied_0.1"}],
)
def test_sparse_and_dense_interface_agree(changes):
    sae, x = make(**changes), torch.randn(2, 5, 6)
    x_hat, acts, idx = sae(x)
    assert acts.shape == idx.shape == (2, 5, 4)
    assert idx.dtype == torch.int32
    dense = sae.encode(x)
    assert dense.shape == (2, 5, 20)
    torch.testing.assert_close(dense.gather(-1, idx.long()), acts)
    assert int((dense != 0).sum()) == int((acts != 0).sum())
    torch.testing.assert_close(sae.decode(dense), x_hat)


def test_encode_is_the_formula():
    sae, x = make(), torch.randn(9, 6)
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    top = pre.topk(4)
    torch.testing.assert_close(sae.encode_sparse(x)[0], top.values.relu())
    assert torch.equal(sae.encode_sparse(x)[1].long(), top.indices)


def test_rescaled_acts_do_not_depend_on_how_norm_is_split():
    # Doubling decoder rows and halving the encoder describes the same function in SAELens' convention.
    sae, x = make(rescale_acts_by_decoder_norm=True), torch.randn(9, 6)
    before = sae(x)
    with torch.no_grad():
        sae.W_dec *= 2
        sae.W_enc /= 2
        sae.b_enc /= 2
    after = sae(x)
    torch.testing.assert_close(after.x_hat, before.x_hat)
    torch.testing.assert_close(after.acts, before.acts)


@pytest.mark.parametrize("init", ["tied", "kaiming"])
def test_decoder_starts_with_unit_rows(init):
    torch.testing.assert_close(make(init=init).decoder_norms(), torch.ones(20))


def test_encoder_and_decoder_do_not_share_memory():
    sae = SAE(SAEConfig(d_in=4, n_latents=8, k=2))
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_save_and_load_round_trip(tmp_path, dtype):
    sae = make(dtype=dtype, metadata={"hook_name": "layers.4"})
    sae.save(tmp_path / "a")
    for path in (tmp_path / "a", tmp_path / "a" / "sae.safetensors"):
        again = load(path)
        assert again.config == sae.config
        for name, tensor in sae.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor)
            assert again.state_dict()[name].dtype == tensor.dtype
    assert SAEConfig.from_dict(json.loads((tmp_path / "a" / "config.json").read_text())) == sae.config
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "sae.safetensors"]


def test_loading_a_truncated_or_foreign_or_missing_file_says_so(tmp_path):
    make().save(tmp_path)
    file = tmp_path / "sae.safetensors"
    whole = file.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"sae\.safetensors is truncated"):
            load(tmp_path)
    from safetensors.torch import save_file

    save_file({"W_enc": torch.zeros(2, 2)}, file)
    with pytest.raises(InputError, match="not written by saefast"):
        load(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        load(tmp_path / "nowhere")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    sae = make()
    sae.save(tmp_path)
    whole = (tmp_path / "sae.safetensors").read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("saefast.data.shardfile._Hashing.write_tensor", full_disk)
    with pytest.raises(InputError, match="No space left"):
        make(d_in=7).save(tmp_path)
    assert (tmp_path / "sae.safetensors").read_bytes() == whole
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(d_in=4, n_latents=8, k=9), "k is 9 but n_latents only 8"),
        (dict(d_in=0, n_latents=8), "d_in is 0"),
        (dict(d_in=4, n_latents=8, k=2, activation="gelu"), "activation is 'gelu'"),
        (dict(d_in=4, n_latents=8, k=2, width=3), "unknown keys"),
        (dict(n_latents=8, k=2), "lacks"),
    ],
)
def test_bad_config_is_named(values, message):
    with pytest.raises(InputError, match=message):
        SAEConfig.from_dict(values)


def test_d_sae_is_taken_for_n_latents():
    config = SAEConfig.from_dict(dict(d_in=4, d_sae=8, k=2))
    assert config.n_latents == config.d_sae == 8


def test_wrong_width_is_named():
    with pytest.raises(InputError, match=r"x has shape \(3, 5\): expected \(..., d_in = 6\)"):
        make()(torch.randn(3, 5))
    with pytest.raises(InputError, match="n_latents = 20"):
        make().decode(torch.randn(3, 5))


x, W, b = torch.zeros(3, 4), torch.zeros(8, 4), torch.zeros(8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.encode_topk(x, W, b, 9), "k is 9: expected an int between 1 and n_latents = 8"),
        (lambda: ops.encode_topk(x, W, b, 0), "k is 0"),
        (lambda: ops.encode_topk(x, W, b, 2.0), "k is 2.0"),
        (lambda: ops.encode_topk(x[:, :3], W, b, 1), r"x has shape \(3, 3\)"),
        (lambda: ops.encode_topk(x, W[:0], b[:0], 1), "n_latents >= 1"),
        (lambda: ops.encode_topk(x, W.half(), b, 1), "float16"),
        (lambda: ops.encode_topk(x.int(), W.int(), b, 1), "int32"),
        (lambda: ops.encode_topk(x, W, b[:3], 1), r"b_enc has shape \(3,\)"),
        (lambda: ops.encode_topk(x, W, b, 1, method="best"), "method is 'best'"),
        (lambda: ops.encode_topk(x, W, b, 1, max_scratch_bytes=0), "max_scratch_bytes is 0"),
        (lambda: ops.encode_topk(x, W, b, 2, latents=torch.tensor([3])), r"len\(latents\) = 1"),
        (lambda: ops.encode_topk(x, W, b, 1, latents=torch.tensor([3, 3])), "strictly ascending"),
        (lambda: ops.encode_topk(x, W, b, 1, latents=torch.tensor([8])), r"ids in \[0, 8\)"),
        (
            lambda: ops.spmm(torch.zeros(3, 2), torch.full((3, 2), 8), W),
            # C++ names the first place, torch the values.
            r"idx\[0, 0\] is 8, outside \[0, 8\)|idx holds 8..8: expected values in \[0, 8\)",
        ),
        (lambda: ops.spmm(torch.zeros(3, 2), torch.zeros(3, 3).int(), W), "acts is"),
        (lambda: ops.spmm(torch.zeros(3, 2), torch.zeros(3, 2), W), "idx is torch.float32"),
        (lambda: ops.sddmm(x, torch.zeros(2, 2).int(), W), "idx has 2 rows and x 3"),
        (lambda: ops.threshold_encode(x, W, b, b[:2]), r"threshold has shape \(2,\)"),
    ],
)
def test_ops_name_the_argument_that_cannot_be_served(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_non_contiguous_inputs_are_served():
    x, W, b = torch.randn(4, 3).T, torch.randn(4, 9).T, torch.randn(18)[::2]
    acts, idx = ops.encode_topk(x, W, b, 4)
    expected = (x @ W.T + b).topk(4)
    torch.testing.assert_close(acts, expected.values.relu())
    assert torch.equal(idx.long(), expected.indices)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize("rescale", [False, True])
def test_mixed_precision_gives_the_same_code(activation, rescale, monkeypatch):
    """On a dictionary whose rows bf16 holds exactly, so that candidates cannot be missed; the copy follows W_enc."""
    monkeypatch.setattr(sae_module, "pays_off", lambda W: True)
    config = SAEConfig(16, 200, 5, activation=activation, rescale_acts_by_decoder_norm=rescale)
    sae, x = SAE(config, seed=1), torch.randn(30, 16).to(torch.bfloat16).float()
    for _ in range(2):
        with torch.no_grad():
            sae.W_enc.copy_(torch.randn(200, 16).to(torch.bfloat16))
        plain, mixed = sae.encode(x), torch.zeros(30, 200)
        acts, idx = sae.encode_sparse(x, mixed=True)
        mixed = mixed.scatter(1, idx.long(), acts.detach())
        torch.testing.assert_close(mixed, plain.detach())
