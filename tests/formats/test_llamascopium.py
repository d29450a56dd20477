"""llamascopium's SAEs, against what its code computes, restated here; and with the package itself (`make peers`)."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from their_files import D, K, L, Statement, best, double, drawn, rows
from torch import Tensor

import saefast
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

IN, OUT = "blocks.3.hook_resid_post", "blocks.3.hook_mlp_out"
LOG = "activation_function.log_jumprelu_threshold"
CLOSE: dict[str, float] = dict(rtol=1e-5, atol=1e-5)


def config(**changes: Any) -> dict[str, Any]:
    """config.json as version 2 writes it."""
    return {
        "sae_type": "sae", "d_model": D, "expansion_factor": L / D, "use_decoder_bias": True, "act_fn": "topk",
        "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True, "top_k": K, "hook_point_in": IN,
        "use_triton_kernel": False, "sparsity_threshold_for_triton_spmm_kernel": 0.996, "hook_point_out": IN,
        "jumprelu_threshold_window": 2.0, "use_glu_encoder": False,
    } | changes  # fmt: skip


def drawn_tensors(cfg: dict[str, Any]) -> dict[str, Tensor]:
    tensors = {
        "W_E": drawn(D, L, scale=D**-0.5), "b_E": drawn(L, scale=0.3), "b_D": drawn(D),
        "W_D": drawn(L, D, scale=D**-0.5),
    }  # fmt: skip
    if cfg["act_fn"] == "jumprelu":
        tensors[LOG] = (torch.rand(L, dtype=torch.float32) + 0.2).log()
    norms = {cfg["hook_point_in"]: 6.5, cfg["hook_point_out"]: 3.25 if cfg["hook_point_out"] != IN else 6.5}
    if cfg["norm_activation"] == "dataset-wise":
        tensors |= {f"dataset_average_activation_norm.{hook}": torch.tensor(norm) for hook, norm in norms.items()}
    return tensors


def write(folder: Path, cfg: dict[str, Any], tensors: dict[str, Tensor], file: str = "sae_weights.safetensors") -> None:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.endswith(".pt"):
        torch.save({"sae": tensors, "version": "2.0.0"}, path)
    else:
        save_file(tensors, path, {"version": "2.0.0"})
    (folder / "config.json").write_text(json.dumps(cfg, indent=4), encoding="utf-8")


def earlier(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of before version 1, as in Llama Scope R1 Distill."""
    names = {
        "W_E": "encoder.weight", "W_D": "decoder.weight", "b_E": "encoder.bias", "b_D": "decoder.bias",
        LOG: "log_jumprelu_threshold",
    }  # fmt: skip
    return {
        names.get(name, name): tensor.T.contiguous() if tensor.dim() == 2 else tensor
        for name, tensor in tensors.items()
    }


def stated(cfg: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Statement, Tensor]:
    """`normalize_activations`, `encode`, `decode` and `denormalize_activations` of theirs; and decoder norms.

    Activations come in units of the rows as they are, which is what their folding of the scale does to them.
    """
    w, size = double(tensors), math.sqrt(D)
    norms = w["W_D"].norm(dim=1)

    def factor(x: Tensor, side: str) -> Tensor:
        if cfg["norm_activation"] == "token-wise":
            return size / x.norm(dim=1, keepdim=True)
        if cfg["norm_activation"] == "dataset-wise":
            return size / w[f"dataset_average_activation_norm.{cfg[f'hook_point_{side}']}"]
        return torch.ones((), dtype=torch.float64)

    def encode(x: Tensor) -> Tensor:
        pre = x * factor(x, "in") @ w["W_E"] + w["b_E"]
        scores = pre * norms if cfg["sparsity_include_decoder_norm"] else pre
        if cfg["act_fn"] == "jumprelu":
            scores = scores * (scores > w[LOG].exp())
        elif cfg["act_fn"] == "topk":
            scores = best(scores.relu(), cfg["top_k"])
        elif cfg["act_fn"] == "batchtopk":
            scores = best(scores.relu().view(1, -1), cfg["top_k"] * len(x)).view_as(scores)
        else:
            scores = scores.relu()
        f = scores / norms if cfg["sparsity_include_decoder_norm"] else scores
        return f if cfg["norm_activation"] == "token-wise" else f / factor(x, "in")

    def decode(f: Tensor, x: Tensor) -> Tensor:
        f = f if cfg["norm_activation"] == "token-wise" else f * factor(x, "in")
        return (f @ w["W_D"] + w["b_D"]) / factor(x, "out")

    return Statement(encode, decode), norms


def read(folder: Path) -> tuple[Statement, Tensor, dict[str, Any]]:
    cfg = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return *stated(cfg, load_file(folder / "sae_weights.safetensors")), cfg


def assert_theirs(sae: SAE, theirs: Statement, norms: Tensor, cfg: dict[str, Any], x: Tensor) -> None:
    """Where latents are ranked by decoder norms, our activations are measured in them: theirs times the norm."""
    f, expected = sae.encode(x).detach(), theirs.encode(x.double())
    assert int((expected != 0).sum()) > len(x), "nothing is on"
    unit = norms if sae.config.rescale_acts_by_decoder_norm else torch.ones_like(norms)
    if cfg["norm_activation"] == "dataset-wise" and sae.config.rescale_acts_by_decoder_norm:
        # Folding gives the decoder the scales, too.
        hooks = (cfg["hook_point_in"], cfg["hook_point_out"])
        unit = unit * (3.25 if hooks[1] != IN else 6.5) / 6.5
    torch.testing.assert_close(f.double(), expected * unit, **CLOSE)
    x_hat = theirs.decode(expected, x.double())
    torch.testing.assert_close(sae.decode(f, x).detach().double(), x_hat, **CLOSE)
    torch.testing.assert_close(sae(x).x_hat.detach().double(), x_hat, **CLOSE)


KINDS: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk, not by norm": dict(sparsity_include_decoder_norm=False),
    "batchtopk": dict(act_fn="batchtopk"),
    "relu": dict(act_fn="relu"),
    "jumprelu": dict(act_fn="jumprelu"),
    "jumprelu, not by norm": dict(act_fn="jumprelu", sparsity_include_decoder_norm=False),
    "folded": dict(act_fn="jumprelu", norm_activation="inference"),
    "each token for itself": dict(norm_activation="token-wise"),
    "transcoder": dict(act_fn="jumprelu", hook_point_out=OUT),
    "transcoder topk": dict(hook_point_out=OUT),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "layout", ["sae_weights.safetensors", "checkpoints/final.safetensors", "sae_weights.pt", "old"]
)
def test_theirs_and_back(name: str, layout: str, tmp_path: Path) -> None:
    cfg, x = config(**KINDS[name]), rows()
    tensors = drawn_tensors(cfg)
    if layout == "old":
        write(tmp_path / "a", cfg, earlier(tensors))
    else:
        write(tmp_path / "a", cfg, tensors, layout.replace("x.pt", "sae_weights.pt"))
    sae = saefast.load(tmp_path / "a")
    assert_theirs(sae, *stated(cfg, tensors), cfg, x)
    facts = sae.config.metadata
    assert (facts["format"], facts["hook_name"]) == ("llamascopium", IN)
    assert facts.get("hook_name_out") == (OUT if "transcoder" in name else None)

    saefast.save(sae, tmp_path / "again", format="llamascopium")
    assert_theirs(sae, *read(tmp_path / "again"), x)
    again = saefast.load(tmp_path / "again")
    torch.testing.assert_close(again.encode(x), sae.encode(x), **CLOSE)
    torch.testing.assert_close(again(x).x_hat, sae(x).x_hat, **CLOSE)
    assert again.config.metadata | {"source": ""} == facts | {"source": ""}
    assert again.config.rescale_acts_by_decoder_norm == sae.config.rescale_acts_by_decoder_norm


def test_without_a_decoder_bias_and_a_latent_that_decodes_to_nothing(tmp_path: Path) -> None:
    for act_fn in ("topk", "jumprelu"):
        cfg = config(use_decoder_bias=False, act_fn=act_fn)
        tensors = drawn_tensors(cfg)
        tensors["W_D"][5] = 0
        write(tmp_path / act_fn, cfg, {name: t for name, t in tensors.items() if name != "b_D"})
        sae = saefast.load(tmp_path / act_fn)
        assert not sae.b_dec.any()
        assert sae(rows()).x_hat.isfinite().all()


def ours(**changes: Any) -> SAE:
    sae = SAE(SAEConfig(**dict(d_in=D, n_latents=L, k=K) | changes), seed=0)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        if "threshold" in dict(sae.named_buffers()):
            sae.get_buffer("threshold").fill_(0.6)
    return sae


BY_NORM: dict[str, Any] = dict(rescale_acts_by_decoder_norm=True, unit_norm_decoder=False)
OURS: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk by norm": BY_NORM,
    "relu": dict(activation="relu"),
    "jumprelu": dict(activation="jumprelu", apply_b_dec_to_input=False),
    "batchtopk": dict(activation="batchtopk"),
    "batchtopk by norm": BY_NORM | dict(activation="batchtopk"),
    "constant norm": dict(input_norm="constant_norm"),
    "transcoder": dict(activation="jumprelu", d_out=D),
    "a size that is no multiple": dict(n_latents=47),
}


@pytest.mark.parametrize("name", OURS)
def test_ours(name: str, tmp_path: Path) -> None:
    sae, x = ours(**OURS[name]), rows()
    lost = saefast.save(sae, tmp_path, format="llamascopium")
    theirs, norms, cfg = read(tmp_path)
    assert int(cfg["d_model"] * cfg["expansion_factor"]) == sae.config.n_latents
    unit = norms if cfg["sparsity_include_decoder_norm"] else torch.ones_like(norms)
    assert cfg["sparsity_include_decoder_norm"] is (name == "topk by norm")
    expected = theirs.encode(x.double())
    torch.testing.assert_close(sae.encode(x).double(), expected * unit, **CLOSE)
    torch.testing.assert_close(sae(x).x_hat.double(), theirs.decode(expected, x.double()), **CLOSE)
    again = saefast.load(tmp_path)
    torch.testing.assert_close(again.encode(x), sae.encode(x), **CLOSE)
    torch.testing.assert_close(again(x).x_hat, sae(x).x_hat, **CLOSE)
    assert any("batchtopk" in line for line in lost) is ("batchtopk" in name)
    assert again.config.activation == ("jumprelu" if "batchtopk" in name else sae.config.activation)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(activation="gated"), "activation is 'gated', which llamascopium does not know"),
        (dict(input_norm="layer_norm"), "input_norm is 'layer_norm', and llamascopium has none but"),
        (dict(d_out=7), "d_out is 7 and d_in 16"),
        (dict(skip=True), "skip is True"),
        (dict(crosscode_widths=(8, 8)), "crosscode_widths"),
    ],
)
def test_what_it_cannot_hold_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        saefast.save(ours(**changes), tmp_path, format="llamascopium")


def test_sizes_of_any_ratio_survive_their_expansion_factor() -> None:
    from saefast.formats.llamascopium import _factor

    for d in (3, 7, 49, 768, 2304):
        for n in range(d, d + 2000):
            assert int(d * _factor(n, d)) == n


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": (dict(sae_type="clt"), "sae_type is 'clt': expected 'sae'"),
    "of another SAE": (dict(d_model=D + 1), "d_model is 17, but the tensors beside it have 16"),
    "glu": (dict(use_glu_encoder=True), "use_glu_encoder is set"),
    "another activation": (dict(act_fn="layertopk"), "act_fn is 'layertopk'"),
    "by batch": (dict(norm_activation="batch-wise"), "norm_activation is 'batch-wise'"),
    "a token's norm in a transcoder": (dict(norm_activation="token-wise", hook_point_out=OUT), "that is no transcoder"),
    "a hook without its norm": (
        dict(hook_point_in="blocks.9.x", hook_point_out="blocks.9.x"),
        "rows were scaled by it",
    ),
    "more latents than there are": (dict(top_k=L + 1), "k is 65 but n_latents only 64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_configs(name: str, tmp_path: Path) -> None:
    changes, said = BAD[name]
    write(tmp_path, config(**changes), drawn_tensors(config()))
    with pytest.raises(InputError, match=said):
        saefast.load(tmp_path)


def test_bad_tensors(tmp_path: Path) -> None:
    tensors = drawn_tensors(config())
    for changes, said in (
        ({"W_D": drawn(D, L)}, r"W_D has shape \(16, 64\): it is transposed"),
        ({f"dataset_average_activation_norm.{IN}": torch.tensor(0.0)}, "expected the mean norm of rows"),
        ({"b_D": torch.full((D,), torch.nan)}, "b_dec is not finite"),
    ):
        write(tmp_path, config(), tensors | changes)
        with pytest.raises(InputError, match=said):
            saefast.load(tmp_path)


# The package itself


def theirs_and_config(cfg: dict[str, Any]) -> Any:
    """A SparseAutoEncoder of the package with drawn weights."""
    models = pytest.importorskip("llamascopium.models.sae")
    made = models.SparseAutoEncoder(models.SAEConfig(**cfg, dtype=torch.float32, device="cpu"))
    tensors = drawn_tensors(cfg)
    made.load_full_state_dict(tensors)
    return made


def numbers(theirs: Any, cfg: dict[str, Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """Their activations, in their own units, and their reconstruction of rows as they are."""
    batch = dict.fromkeys(theirs.cfg.associated_hook_points, x)
    scaled, factors = theirs.normalize_activations(batch, return_scale_factor=True)
    f = theirs.encode(scaled[cfg["hook_point_in"]])
    x_hat = theirs.denormalize_activations({cfg["hook_point_out"]: theirs.decode(f)}, factors)[cfg["hook_point_out"]]
    return f, x_hat


@pytest.mark.peers
@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_the_package_writes_what_we_read(name: str, tmp_path: Path) -> None:
    cfg, x = config(**KINDS[name]), rows()
    theirs = theirs_and_config(cfg)
    theirs.save_pretrained(tmp_path)
    theirs.cfg.save_hyperparameters(tmp_path)
    sae = saefast.load(tmp_path)
    f, x_hat = numbers(theirs, cfg, x)
    torch.testing.assert_close(sae(x).x_hat, x_hat, **CLOSE)
    assert torch.equal(sae.encode(x) > 0, f > 0)


@pytest.mark.peers
@pytest.mark.parametrize("name", OURS)
@torch.no_grad()
def test_the_package_reads_what_we_write(name: str, tmp_path: Path) -> None:
    models = pytest.importorskip("llamascopium.models.sae")
    sae, x = ours(**OURS[name]), rows()
    saefast.save(sae, tmp_path, format="llamascopium")
    theirs = models.SparseAutoEncoder.from_pretrained(str(tmp_path))
    cfg = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    f, x_hat = numbers(theirs, cfg, x)
    unit = theirs.decoder_norm() if cfg["sparsity_include_decoder_norm"] else 1.0
    torch.testing.assert_close(sae.encode(x), f * unit, **CLOSE)
    torch.testing.assert_close(sae(x).x_hat, x_hat, **CLOSE)
