"""Llama Scope (He et al. 2024, arXiv 2410.20526): SAEs and transcoders of Llama 3.1 8B, JumpReLU of one threshold.

    hyperparams.json, checkpoints/final.safetensors: encoder.weight (n_latents, d)  decoder.weight (d, n_latents)
        encoder.bias (n_latents,)  decoder.bias (d,)

They were trained on rows scaled to a mean norm of √d, in and out by numbers of their own, and are loaded as their
authors' code loads them: scales are folded into weights and decoder rows brought to unit norm, so that activations are
in units of the rows as they are; jump_relu_threshold is one for these. SAELens' numbers are √d / the mean norm times as
large, and for transcoders it takes the scale of inputs for that of outputs.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saefast.data.shardfile import write_file
from saefast.errors import InputError
from saefast.files import write_json
from saefast.formats.format import Described, Format, Made, Piece, column, left_out, likely_k, log_threshold
from saefast.formats.norms import column_norms
from saefast.formats.restated import check_kind, check_same_width, own_facts, require_agreement, restated, sizes
from saefast.formats.source import Source
from saefast.formats.thresholds import thresholds
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

CONFIG, FILE = "hyperparams.json", "checkpoints/final.safetensors"
_KEPT = {
    "d_in", "n_latents", "k", "activation", "apply_b_dec_to_input", "unit_norm_decoder",
    "rescale_acts_by_decoder_norm", "d_out", "metadata",
}  # fmt: skip
# Entries of hyperparams.json that are said in other words of ours.
_READ = {
    "d_model", "d_sae", "act_fn", "top_k", "jump_relu_threshold", "norm_activation", "dataset_average_activation_norm",
    "use_decoder_bias", "apply_decoder_bias_to_pre_encoder", "sparsity_include_decoder_norm", "use_glu_encoder",
}  # fmt: skip


class _Scales(NamedTuple):
    """What rows were multiplied by in training, those that are encoded and those that are to come out."""

    inputs: float
    outputs: float


class LlamaScope(Format):
    """See the module. Written are topk, relu, and what decides by one threshold for all latents."""

    name = "llama_scope"
    about = "Llama Scope: SAEs and transcoders of Llama 3.1 8B"
    layout = f"{CONFIG}, and {FILE} with encoder.weight (n_latents, d), decoder.weight (d, n_latents) and their biases"
    signs = (CONFIG, "final.safetensors", "encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")

    def recognises(self, source: Source) -> bool:
        return {CONFIG, FILE} <= set(source.files) and "encoder.weight" in source.entries(FILE)

    def describe(self, source: Source) -> Described:
        cfg = source.json(CONFIG)
        config = _config(cfg, source)
        scales = _scales(cfg, source, config.d_in)
        units: Tensor | float = 1.0
        if cfg.get("sparsity_include_decoder_norm", True):
            units = column_norms(source, FILE, "decoder.weight", config.n_latents)
        inward, outward = scales
        tensors: dict[str, Made] = {
            "W_enc": Piece(FILE, "encoder.weight", scale=units * (inward / outward) if _is_tensor(units) else 1.0),
            "W_dec": Piece(
                FILE, "decoder.weight", transpose=True, scale=1 / units if _is_tensor(units) else inward / outward
            ),
            "b_enc": Piece(FILE, "encoder.bias", scale=units / outward if _is_tensor(units) else 1 / inward),
            "b_dec": Piece(FILE, "decoder.bias", scale=1 / outward) if cfg.get("use_decoder_bias", True) else 0.0,
        }
        if config.activation == "jumprelu":
            limit = float(cfg["jump_relu_threshold"])

            def filled(bias: Tensor) -> Tensor:
                return log_threshold(torch.full_like(bias, limit))

            tensors["log_threshold"] = Piece(FILE, "encoder.bias", also=filled)
        return Described(config, tensors)

    def write(self, sae: SAE, folder: Path) -> list[str]:
        target, config = "Llama Scope", sae.config
        plain: dict[str, Any] = dict(input_norm="none", skip=False, crosscode_widths=None, n_layers=None)
        check_kind(sae, target, ("topk", "relu", "jumprelu", "batchtopk"), **plain)
        check_same_width(sae, target)
        stated, limit = restated(sae, centred=False), _one_threshold(sae, target)
        columns = {
            "encoder.weight": column(sae.W_enc, scale=stated.enc_scale),
            "encoder.bias": column(stated.b_enc),
            "decoder.weight": column(sae.W_dec, transpose=True, scale=stated.dec_scale),
            "decoder.bias": column(sae.b_dec),
        }
        write_file(folder / FILE, columns, {"format": "pt"})
        write_json(folder / CONFIG, _cfg(sae, limit))
        return left_out(config, _KEPT, target)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _config(cfg: dict[str, Any], source: Source) -> SAEConfig:
    """Raises InputError for what their code did with rows and saefast does not."""
    n_latents, d = sizes(source, FILE, "encoder.weight", "encoder.bias", LlamaScope.layout)
    require_agreement(source.folder / CONFIG, cfg, {"d_model": d, "d_sae": n_latents})
    inside, outside = cfg.get("hook_point_in"), cfg.get("hook_point_out")
    transcodes, centred = inside != outside, bool(cfg.get("apply_decoder_bias_to_pre_encoder", False))
    where = source.folder / CONFIG
    if cfg.get("use_glu_encoder"):
        raise InputError(f"{where}: use_glu_encoder is set, which saefast has not")
    if centred and transcodes:
        raise InputError(f"{where}: apply_decoder_bias_to_pre_encoder is set in a transcoder, which saefast has not")
    activation = _activation(cfg, source)
    facts = {name: value for name, value in cfg.items() if name not in _READ}
    facts["hook_name"] = inside
    if transcodes:
        facts["hook_name_out"] = outside
    k = cfg.get("top_k")
    return SAEConfig(
        d, n_latents, k if activation == "topk" and k is not None else likely_k(n_latents, k), activation=activation,
        apply_b_dec_to_input=centred, unit_norm_decoder=False, input_norm=_input_norm(cfg, source, transcodes),
        d_out=d if transcodes else None, metadata=facts,
    )  # fmt: skip


def _activation(cfg: dict[str, Any], source: Source) -> str:
    """Of inference: a topk with a threshold is served by it."""
    name, limit = cfg.get("act_fn"), cfg.get("jump_relu_threshold")
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not math.isfinite(limit):
        limit = None
    if name == "jumprelu" and limit is None:
        raise InputError(f"{source.folder / CONFIG}: act_fn is 'jumprelu' without a number for jump_relu_threshold")
    if name == "jumprelu" or (name == "topk" and limit is not None and limit > 0):
        return "jumprelu"
    if name in ("topk", "relu"):
        return str(name)
    raise InputError(f"{source.folder / CONFIG}: act_fn is {name!a}: expected 'jumprelu', 'topk' or 'relu'")


def _input_norm(cfg: dict[str, Any], source: Source, transcodes: bool) -> Any:
    how = cfg.get("norm_activation", "dataset-wise")
    if how in ("dataset-wise", "inference", "none"):
        return "none"
    if how == "token-wise" and not transcodes:
        return "constant_norm"
    raise InputError(
        f"{source.folder / CONFIG}: norm_activation is {how!a}: expected 'dataset-wise' or 'inference', or "
        "'token-wise' in an SAE that is no transcoder"
    )


def _scales(cfg: dict[str, Any], source: Source, d: int) -> _Scales:
    if cfg.get("norm_activation", "dataset-wise") != "dataset-wise":
        return _Scales(1.0, 1.0)
    norms = cfg.get("dataset_average_activation_norm")
    found = [norms.get(side) if isinstance(norms, dict) else None for side in ("in", "out")]
    for norm in found:
        if isinstance(norm, bool) or not isinstance(norm, int | float) or not 0 < norm < math.inf:
            raise InputError(
                f"{source.folder / CONFIG}: dataset_average_activation_norm is {norms!a}: expected the mean norms of "
                "rows that go 'in' and come 'out', more than 0"
            )
    return _Scales(math.sqrt(d) / found[0], math.sqrt(d) / found[1])  # type: ignore[operator]


def _one_threshold(sae: SAE, target: str) -> float:
    """The threshold of all latents; 0 where they are not chosen by one."""
    if sae.config.activation in ("topk", "relu"):
        return 0.0
    limits = thresholds(sae, target)
    low, high = (float(bound) for bound in limits.aminmax())
    if high > low * (1 + 1e-5):
        raise InputError(
            f"thresholds of latents differ ({low:.4g} to {high:.4g}), and {target} has one for all of them: choose the "
            "format 'llamascopium', or another"
        )
    return float(limits[0])


def _cfg(sae: SAE, limit: float) -> dict[str, Any]:
    config = sae.config
    facts = own_facts(config)
    hook = facts.pop("hook_name", None)
    outside = facts.pop("hook_name_out", f"{hook or ''} (out)" if sae.architecture.has_target else hook)
    norm = math.sqrt(config.d_in)
    return facts | {
        "hook_point_in": hook,
        "hook_point_out": outside,
        "d_model": config.d_in,
        "d_sae": config.n_latents,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "use_glu_encoder": False,
        "act_fn": config.activation if config.activation in ("topk", "relu") else "jumprelu",
        "jump_relu_threshold": limit,
        "top_k": config.k,
        "sparsity_include_decoder_norm": False,
        # As rows are. A reader that scales nevertheless does so by 1.
        "norm_activation": "inference",
        "dataset_average_activation_norm": {"in": norm, "out": norm},
    }
