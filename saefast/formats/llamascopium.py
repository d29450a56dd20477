"""llamascopium (OpenMOSS; earlier Language-Model-SAEs): `config.json` and `sae_weights.safetensors`.

    W_E (d, n_latents)  b_E (n_latents,)  W_D (n_latents, d)  b_D (d,)
    jumprelu: activation_function.log_jumprelu_threshold (n_latents,)
    dataset_average_activation_norm.{hook} (): the mean norm of rows, which were scaled to √d in training
    before version 1: encoder.weight (n_latents, d)  decoder.weight (d, n_latents)  their biases  log_jumprelu_threshold

Nothing is subtracted from inputs. Scales are folded into weights, so that activations are in units of the rows as they
are, and thresholds with them, which their own folding leaves as they were. Where decoder norms take part in the choice
(sparsity_include_decoder_norm), activations of topk and batchtopk are measured in them here, times the norm; those of
jumprelu are as they are there, with thresholds that are divided by it.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from saefast.data.shardfile import Column, write_file
from saefast.errors import InputError
from saefast.files import write_json
from saefast.formats.format import Described, Format, Made, Piece, column, left_out, likely_k, log_threshold, wide
from saefast.formats.norms import column_norms, row_norms
from saefast.formats.restated import (
    Restated,
    check_kind,
    check_same_width,
    own_facts,
    product,
    require_agreement,
    restated,
    sizes,
)
from saefast.formats.source import Source
from saefast.formats.thresholds import thresholds
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

CONFIG = "config.json"
# In the order in which their code looks for them, but for those that torch.distributed wrote.
_FILES = (
    "sae_weights.safetensors", "sae_weights.pt", "checkpoints/pruned.safetensors", "checkpoints/pruned.pt",
    "checkpoints/final.safetensors", "checkpoints/final.pt",
)  # fmt: skip
_KEPT = {
    "d_in", "n_latents", "k", "activation", "apply_b_dec_to_input", "unit_norm_decoder",
    "rescale_acts_by_decoder_norm", "d_out", "metadata", "input_norm", "jumprelu_bandwidth",
}  # fmt: skip
# Entries of config.json that are said in other words of ours.
_READ = {
    "sae_type", "d_model", "expansion_factor", "use_decoder_bias", "act_fn", "norm_activation", "top_k",
    "sparsity_include_decoder_norm", "jumprelu_threshold_window", "use_glu_encoder", "hook_point_in", "hook_point_out",
    "apply_decoder_bias_to_pre_encoder", "force_unit_decoder_norm",
}  # fmt: skip
_ACTIVATIONS = ("relu", "jumprelu", "topk", "batchtopk")
_LOG = "log_jumprelu_threshold"


class _Names(NamedTuple):
    """Where in a file the tensors are; earlier: both matrices lie the other way round."""

    file: str
    W_E: str
    W_D: str
    b_E: str
    b_D: str
    earlier: bool

    @property
    def prefix(self) -> str:
        """Of all names: .pt files hold the tensors in a dictionary of their own."""
        return self.W_E.removesuffix("encoder.weight" if self.earlier else "W_E")


class Llamascopium(Format):
    """See the module. Written are relu, jumprelu, topk and batchtopk, which becomes jumprelu if it has a threshold."""

    name = "llamascopium"
    about = "llamascopium (OpenMOSS), Language-Model-SAEs and Llama Scope R1 Distill: SAEs and transcoders"
    layout = f"{CONFIG} with act_fn, and {_FILES[0]} with W_E (d, n_latents), b_E, W_D (n_latents, d) and b_D"
    signs = (CONFIG, "sae_weights.safetensors", "W_E", "W_D", "b_E", "b_D")

    def recognises(self, source: Source) -> bool:
        return CONFIG in source.files and _names(source) is not None

    def describe(self, source: Source) -> Described:
        names = _names(source)
        if names is None or CONFIG not in source.files:
            raise InputError(f"{source.path} holds no SAE of llamascopium: it needs {self.layout}")
        cfg = source.json(CONFIG)
        config = _config(cfg, source, names)
        inward, outward = _scales(cfg, source, names, config.d_in)
        file, turned = names.file, names.earlier
        tensors: dict[str, Made] = {
            "W_enc": Piece(file, names.W_E, transpose=not turned),
            "W_dec": Piece(file, names.W_D, transpose=turned, scale=inward / outward),
            "b_enc": Piece(file, names.b_E, scale=1 / inward),
            "b_dec": Piece(file, names.b_D, scale=1 / outward) if cfg.get("use_decoder_bias", True) else 0.0,
        }
        if config.activation == "jumprelu":
            shift: Tensor | float = math.log(inward)
            if cfg.get("sparsity_include_decoder_norm", True):
                norms = column_norms if turned else row_norms
                shift = shift + norms(source, file, names.W_D, config.n_latents).log()
            tensors["log_threshold"] = Piece(file, _log_name(source, names), also=lambda log: log - shift)
        return Described(config, tensors)

    def write(self, sae: SAE, folder: Path) -> list[str]:
        target, config = "llamascopium", sae.config
        check_kind(sae, target, _ACTIVATIONS, skip=False, crosscode_widths=None, n_layers=None)
        check_same_width(sae, target)
        if config.input_norm == "layer_norm":
            raise InputError(
                "input_norm is 'layer_norm', and llamascopium has none but 'constant_norm': choose another"
            )
        served = _served(sae)
        # Decoder norms may rank latents there, but what is compared with a threshold here is told by itself.
        stated = restated(sae, centred=False) if served != config.activation else _kept_apart(sae)
        columns = {
            "W_E": column(sae.W_enc, transpose=True, scale=stated.enc_scale),
            "b_E": Column.of(stated.b_enc),
            "W_D": column(sae.W_dec, scale=stated.dec_scale),
            "b_D": column(sae.b_dec),
        }
        if served == "jumprelu":
            kept = sae.own().get("log_threshold")
            log = log_threshold(thresholds(sae, target)) if kept is None else kept
            columns[f"activation_function.{_LOG}"] = Column.of(log)
        write_file(folder / _FILES[0], columns, {"format": "pt"})
        write_json(folder / CONFIG, _cfg(sae, served))
        lost = left_out(config, _KEPT, target)
        if served != config.activation:
            lost.append("activation 'batchtopk' is written as 'jumprelu' of one threshold: theirs takes a batch's best")
        return lost


def _kept_apart(sae: SAE) -> Restated:
    """The SAE for inputs from which nothing is subtracted, with decoder norms left where they are."""
    b_enc = sae.b_enc.detach()
    if sae.config.apply_b_dec_to_input:
        b_enc = (wide(b_enc) - product(sae.W_enc.detach(), sae.b_dec.detach())).to(b_enc.dtype)
    return Restated(b_enc, {}, 1.0, 1.0)


def _served(sae: SAE) -> str:
    """Their act_fn."""
    if sae.config.activation == "batchtopk" and float(sae.get_buffer("threshold")) >= 0:
        return "jumprelu"
    return str(sae.config.activation)


def _names(source: Source) -> _Names | None:
    """Where the tensors are; None where there are none of these names."""
    for file in _FILES if source.alone is None else ():
        if file not in source.files:
            continue
        found, prefix = source.entries(file), "sae/" if file.endswith(".pt") else ""
        if {f"{prefix}W_E", f"{prefix}W_D"} <= found.keys():
            return _Names(file, f"{prefix}W_E", f"{prefix}W_D", f"{prefix}b_E", f"{prefix}b_D", False)
        if {f"{prefix}encoder.weight", f"{prefix}decoder.weight", f"{prefix}encoder.bias"} <= found.keys():
            encoder, decoder = f"{prefix}encoder", f"{prefix}decoder"
            weights = f"{encoder}.weight", f"{decoder}.weight"
            return _Names(file, *weights, f"{encoder}.bias", f"{decoder}.bias", True)
    return None


def _log_name(source: Source, names: _Names) -> str:
    """Thresholds were a parameter of the SAE's own at first."""
    old = f"{names.prefix}{_LOG}"
    return old if old in source.entries(names.file) else f"{names.prefix}activation_function.{_LOG}"


def _config(cfg: dict[str, Any], source: Source, names: _Names) -> SAEConfig:
    where = source.folder / CONFIG
    _check(cfg, where)
    n_latents, d = sizes(source, names.file, names.W_E, names.b_E, Llamascopium.layout, transpose=not names.earlier)
    require_agreement(where, cfg, {"d_model": d})
    inside, outside = cfg.get("hook_point_in"), cfg.get("hook_point_out")
    activation, k, transcodes = str(cfg["act_fn"]).lower(), cfg.get("top_k"), inside != outside
    centred = bool(cfg.get("apply_decoder_bias_to_pre_encoder", False))
    if centred and transcodes:
        raise InputError(f"{where}: apply_decoder_bias_to_pre_encoder is set in a transcoder, which saefast has not")
    ranked = activation in ("topk", "batchtopk")
    facts = {name: value for name, value in cfg.items() if name not in _READ} | {"hook_name": inside}
    facts |= {"hook_name_out": outside} if transcodes else {}
    return SAEConfig(
        d, n_latents, k if ranked and k is not None else likely_k(n_latents, k), activation=activation,
        apply_b_dec_to_input=centred, unit_norm_decoder=False, d_out=d if transcodes else None,
        rescale_acts_by_decoder_norm=ranked and bool(cfg.get("sparsity_include_decoder_norm", True)),
        input_norm=_input_norm(cfg, where, transcodes), metadata=facts,
    )  # fmt: skip


def _check(cfg: dict[str, Any], where: Path) -> None:
    """Raises InputError for kinds that saefast has not."""
    if cfg.get("sae_type", "sae") != "sae":
        raise InputError(f"{where}: sae_type is {cfg['sae_type']!a}: expected 'sae', which is read alone")
    if str(cfg.get("act_fn")).lower() not in _ACTIVATIONS:
        raise InputError(f"{where}: act_fn is {cfg.get('act_fn')!a}: expected one of {', '.join(_ACTIVATIONS)}")
    if cfg.get("use_glu_encoder"):
        raise InputError(f"{where}: use_glu_encoder is set, which saefast has not")


def _input_norm(cfg: dict[str, Any], where: Path, transcodes: bool) -> Any:
    how = cfg.get("norm_activation", "dataset-wise")
    if how in ("dataset-wise", "inference"):
        return "none"
    if how == "token-wise" and not transcodes:
        return "constant_norm"
    raise InputError(
        f"{where}: norm_activation is {how!a}: expected 'dataset-wise' or 'inference', or 'token-wise' in an SAE that "
        "is no transcoder"
    )


def _scales(cfg: dict[str, Any], source: Source, names: _Names, d: int) -> tuple[float, float]:
    """What rows that are encoded, and those that are to come out, were multiplied by in training."""
    if cfg.get("norm_activation", "dataset-wise") != "dataset-wise":
        return 1.0, 1.0
    found, size = [], math.sqrt(d)
    for side in ("in", "out"):
        key = f"{names.prefix}dataset_average_activation_norm.{cfg.get(f'hook_point_{side}')}"
        if key not in source.entries(names.file):
            raise InputError(
                f"{source.folder / names.file} lacks {key}: norm_activation is 'dataset-wise', so that rows were "
                "scaled by it; set norm_activation to 'inference' if the SAE is one for rows as they are"
            )
        norm = source.number(names.file, key)
        if not 0 < norm < math.inf:
            raise InputError(f"{source.folder / names.file}: {key} is {norm}: expected the mean norm of rows")
        found.append(size / norm)
    return found[0], found[1]


def _cfg(sae: SAE, served: str) -> dict[str, Any]:
    config, facts = sae.config, own_facts(sae.config)
    hook = facts.pop("hook_name", None) or ""
    outside = facts.pop("hook_name_out", f"{hook}.out" if sae.architecture.has_target else hook)
    window = config.jumprelu_bandwidth
    return facts | {
        "sae_type": "sae",
        "hook_point_in": hook,
        "hook_point_out": outside,
        "d_model": config.d_in,
        "expansion_factor": _factor(config.n_latents, config.d_in),
        "use_decoder_bias": True,
        "use_glu_encoder": False,
        "act_fn": served,
        "norm_activation": "token-wise" if config.input_norm == "constant_norm" else "inference",
        "sparsity_include_decoder_norm": config.rescale_acts_by_decoder_norm and served == config.activation,
        "top_k": config.k,
        "jumprelu_threshold_window": 2.0 if window is None else window,
    }


def _factor(n_latents: int, d: int) -> float:
    """n_latents / d, for whoever takes the whole part of d times it."""
    found = n_latents / d
    return found if int(d * found) == n_latents else math.nextafter(found, math.inf)
