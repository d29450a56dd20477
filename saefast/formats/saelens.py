"""SAELens: `cfg.json` and `sae_weights.safetensors`, as version 6 writes them, and those of before it on load.

    W_enc (d_in, d_sae)  W_dec (d_sae, d_out)  b_enc (d_sae,)  b_dec (d_out,)
    jumprelu: threshold (d_sae,)     gated: b_gate, r_mag, b_mag (d_sae,) in place of b_enc
    transcoders with a skip: W_skip (d_out, d_in)      sparsity.safetensors: log10(density + 1e-10) (d_sae,)

Facts of a config that have no field of ours go to the metadata under SAELens' names, and from there back. Since version
6 a config without `sae_lens_version` is taken there for an old one and loses its metadata, so that is always written.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saefast.data.shardfile import Column, write_file
from saefast.errors import InputError
from saefast.files import write_json
from saefast.formats.format import Described, Format, Made, Piece, column, left_out, likely_k, log_threshold
from saefast.formats.restated import both_signs
from saefast.formats.source import Source
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
# Whose reader our files were tried on; anything from 6 on will do for it.
_VERSION = "6.54.12"
# What SAELens adds to a share before its logarithm is taken.
_LEAST = 1e-10


class _Kind(NamedTuple):
    """What an architecture of SAELens is in ours."""

    activation: str
    transcodes: bool = False
    skip: bool = False
    signed: bool = False
    """Latents act with their sign, and are chosen by absolute value: each becomes two of ours."""


_KINDS = {
    "standard": _Kind("relu"),
    "gated": _Kind("gated"),
    "topk": _Kind("topk"),
    "abstopk": _Kind("topk", signed=True),
    "jumprelu": _Kind("jumprelu"),
    "transcoder": _Kind("relu", True),
    "skip_transcoder": _Kind("relu", True, True),
    "jumprelu_transcoder": _Kind("jumprelu", True),
    "jumprelu_skip_transcoder": _Kind("jumprelu", True, True),
    # What checkpoints of training hold; finished ones are saved as jumprelu.
    "batchtopk": _Kind("batchtopk"),
    "matryoshka_batchtopk": _Kind("batchtopk"),
}
_NOT_OURS = {
    "temporal": "predicts a token's code from the tokens before it",
    "matching_pursuit": "chooses one latent after the other, each from what those before it left over",
}
# SAEConfig.input_norm by normalize_activations. The factor of the second is in the weights, or nowhere, as in SAELens.
_INPUTS = {
    "none": "none",
    "expected_average_only_in": "none",
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "constant_norm",
}
# Fields that SAELens has no place for, and that are kept in its metadata under this name.
_OURS = "saefast"
_KEPT = ("unit_norm_decoder", "matryoshka", "hierarchical", "jumprelu_bandwidth", "jumprelu_ste_to_input")
_SAID = {
    "d_in", "n_latents", "activation", "apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "d_out", "skip",
    "input_norm", "metadata",
}  # fmt: skip
# Entries of cfg.json that are said in other words of ours, or say nothing of the SAE itself.
_READ = {
    "architecture", "d_in", "d_sae", "d_out", "k", "dtype", "device", "apply_b_dec_to_input", "normalize_activations",
    "rescale_acts_by_decoder_norm", "metadata", "activation_fn", "activation_fn_str", "activation_fn_kwargs",
    "matryoshka_widths", "finetuning_scaling_factor",
}  # fmt: skip
_OLD_NAMES = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}


class SAELens(Format):
    """Architectures that load: `_KINDS`. Those that are written: all but batchtopk, which become jumprelu."""

    name = "saelens"
    about = "SAELens 6, and its older configs: cfg.json and sae_weights.safetensors"
    layout = f"{CONFIG} with d_in and d_sae, and {WEIGHTS} with W_enc, W_dec, b_enc, b_dec"
    signs = (CONFIG, WEIGHTS, "W_enc", "W_dec", "b_enc", "b_dec", "threshold", "b_gate", "W_skip")

    def recognises(self, source: Source) -> bool:
        if not {CONFIG, WEIGHTS} <= set(source.files):
            return False
        return bool({"W_enc", "W_dec"} & source.entries(WEIGHTS).keys())

    def describe(self, source: Source) -> Described:
        cfg = _today(source.json(CONFIG), source)
        kind = _kind(cfg)
        config = _config(cfg, kind, source)
        tensors: dict[str, Made] = {
            "W_enc": Piece(WEIGHTS, "W_enc", transpose=True),
            "W_dec": Piece(WEIGHTS, "W_dec", scale=_fine_tuned(source)),
            "b_enc": Piece(WEIGHTS, "b_gate" if kind.activation == "gated" else "b_enc"),
            "b_dec": Piece(WEIGHTS, "b_dec"),
        }
        if kind.activation == "gated":
            tensors |= {name: Piece(WEIGHTS, name) for name in ("r_mag", "b_mag")}
        if kind.activation == "jumprelu":
            tensors["log_threshold"] = Piece(WEIGHTS, "threshold", also=log_threshold)
        if kind.activation == "batchtopk":
            # 0 is where it begins, before there was a batch.
            unset = source.number(WEIGHTS, "topk_threshold") <= 0
            tensors["threshold"] = -1.0 if unset else Piece(WEIGHTS, "topk_threshold")
        if kind.skip:
            tensors["W_skip"] = Piece(WEIGHTS, "W_skip")
        if kind.signed:
            for name in ("W_enc", "b_enc", "W_dec"):
                piece = tensors[name]
                assert isinstance(piece, Piece)
                tensors[name] = both_signs(piece, config.n_latents // 2)
        return Described(config, tensors)

    def density(self, source: Source) -> Tensor | None:
        if SPARSITY not in source.files or "sparsity" not in source.entries(SPARSITY):
            return None
        if _kind(_today(source.json(CONFIG), source)).signed:
            return None  # of a latent for each sign it says nothing
        return (10.0 ** source.values(SPARSITY, "sparsity").float() - _LEAST).clamp(0, 1)

    def write(self, sae: SAE, folder: Path) -> list[str]:
        config = sae.config_as_is()
        architecture = _named(config)
        write_file(folder / WEIGHTS, _columns(sae, architecture), {"format": "pt"})
        write_json(folder / CONFIG, _cfg(config, architecture))
        lost = left_out(config, _SAID | set(_KEPT) | {"k"}, "SAELens")
        if config.activation == "batchtopk":
            lost.append("activation 'batchtopk' is written as 'jumprelu' with one threshold, as SAELens does itself")
        return lost

    def write_density(self, density: Tensor, folder: Path) -> list[str]:
        write_file(folder / SPARSITY, {"sparsity": Column.of((density.float() + _LEAST).log10())}, {"format": "pt"})
        return []


def _today(cfg: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """A cfg.json of any version in the terms of version 6: its own entries, and all other facts under "metadata"."""
    found = {_OLD_NAMES.get(key, key): value for key, value in cfg.items()}
    if "metadata" not in found:
        found["metadata"] = {key: value for key, value in found.items() if key not in _READ}
    function = found.get("activation_fn") or found.get("activation_fn_str") or "relu"
    options = found.get("activation_fn_kwargs") or {}
    if function == "topk" and isinstance(options, dict) and "k" in options:
        found |= {"architecture": "topk", "k": options["k"]}
    elif function != "relu":
        raise InputError(f"{source.folder / CONFIG}: activation_fn is {function!a}: expected relu, or topk with a k")
    if isinstance(found.get("normalize_activations"), bool) or found.get("normalize_activations") is None:
        found["normalize_activations"] = "expected_average_only_in" if found.get("normalize_activations") else "none"
    return {"architecture": "standard"} | found


def _kind(cfg: Mapping[str, Any]) -> _Kind:
    name = cfg["architecture"] if isinstance(cfg["architecture"], str) else None
    if name in _NOT_OURS:
        raise InputError(f"architecture is {name!r}, which {_NOT_OURS[name]}: saefast has no such SAE")
    if name is None or name not in _KINDS:
        raise InputError(f"architecture is {cfg['architecture']!a}: expected one of {', '.join(_KINDS)}")
    return _KINDS[name]


def _input_norm(cfg: Mapping[str, Any]) -> str:
    """SAEConfig.input_norm. Raises InputError where inputs go through something else before they are encoded."""
    how = cfg["normalize_activations"]
    if not isinstance(how, str) or how not in _INPUTS:
        raise InputError(
            f"normalize_activations is {how!a}, which changes inputs in a way that saefast has not: expected one of "
            f"{', '.join(_INPUTS)}"
        )
    return _INPUTS[how]


def _config(cfg: Mapping[str, Any], kind: _Kind, source: Source) -> SAEConfig:
    """SAEConfig checks the types of what is passed on."""
    facts = cfg["metadata"]
    if not isinstance(facts, dict):
        raise InputError(f"{source.folder / CONFIG}: metadata is {facts!a}: expected an object")
    shape = source.entries(WEIGHTS)["W_enc"].shape if "W_enc" in source.entries(WEIGHTS) else (None, None)
    d_in, n_latents = cfg.get("d_in", shape[0]), cfg.get("d_sae", shape[-1])
    if kind.signed and isinstance(n_latents, int):
        n_latents *= 2
    found = cfg.get("k") if kind.activation in ("topk", "batchtopk") else None
    ours: dict[str, Any] = facts[_OURS] if isinstance(facts.get(_OURS), dict) else {}
    if found is None and isinstance(n_latents, int):
        found = likely_k(n_latents, ours.get("k"), facts.get("l0"))
    beside = {name: cfg[name] for name in ("reshape_activations",) if cfg.get(name, "none") != "none"}
    values: dict[str, Any] = dict(
        d_in=d_in,
        n_latents=n_latents,
        k=round(found) if isinstance(found, float) and found == found else found,
        activation=kind.activation,
        apply_b_dec_to_input=cfg.get("apply_b_dec_to_input", True),
        unit_norm_decoder=False,
        rescale_acts_by_decoder_norm=cfg.get("rescale_acts_by_decoder_norm", False),
        input_norm=_input_norm(cfg),
        metadata={key: value for key, value in facts.items() if key != _OURS} | beside,
    )
    if kind.activation not in ("topk", "batchtopk"):
        values["rescale_acts_by_decoder_norm"] = False
    if kind.transcodes:
        values |= {"d_out": cfg.get("d_out"), "skip": kind.skip}
    if cfg["architecture"] == "matryoshka_batchtopk":
        values["matryoshka"] = tuple(cfg.get("matryoshka_widths") or (n_latents,))
    return SAEConfig(**values | {name: ours[name] for name in _KEPT if name in ours})


def _fine_tuned(source: Source) -> float | Tensor:
    """What old versions multiplied activations by before they were decoded, where a run had fine-tuned it."""
    if "scaling_factor" not in source.entries(WEIGHTS):
        return 1.0
    return source.values(WEIGHTS, "scaling_factor")


def _named(config: SAEConfig) -> str:
    """SAELens' architecture for an SAE of ours. Raises InputError where there is none."""
    if config.crosscode_widths is not None or config.n_layers is not None:
        what = "a crosscoder" if config.crosscode_widths is not None else "a cross-layer transcoder"
        raise InputError(f"format is 'saelens', which has no {what[2:]}s: choose another")
    activation = "jumprelu" if config.activation == "batchtopk" else config.activation
    kind = _Kind(activation, config.architecture().has_target, config.skip)
    for name, one in _KINDS.items():
        if one == kind:
            return name
    what = f"activation {config.activation!r}" + (" in a transcoder" if kind.transcodes else "")
    raise InputError(
        f"format is 'saelens', which has no {what}: `saefast calibrate` makes thresholds of a choice among latents, "
        "which SAELens has; or choose another format"
    )


def _columns(sae: SAE, architecture: str) -> dict[str, Column]:
    """What goes into the file of weights, by SAELens' names."""
    config = sae.config
    folded: float | Tensor = 1.0
    if config.activation == "batchtopk":
        if float(sae.get_buffer("threshold")) < 0:
            raise InputError(
                "the SAE is a batchtopk without a threshold yet, which is what SAELens serves it by: train it to its "
                "end, or let `saefast calibrate` find one"
            )
        folded = sae._units().detach() if config.rescale_acts_by_decoder_norm else 1.0
    found = {
        "W_enc": column(sae.W_enc, transpose=True, scale=folded),
        "W_dec": column(sae.W_dec, scale=1 / folded),
        "b_dec": column(sae.b_dec),
        "b_gate" if config.activation == "gated" else "b_enc": column(sae.b_enc, scale=folded),
    }
    own = {name: value.detach() for name, value in sae.own().items()}
    found |= {name: column(own[name]) for name in ("r_mag", "b_mag", "W_skip") if name in own}
    if config.activation == "batchtopk":
        found["threshold"] = Column.of(torch.full_like(sae.b_enc.detach(), float(sae.get_buffer("threshold"))))
    elif "log_threshold" in own:
        found["threshold"] = Column.of(own["log_threshold"].double().exp().to(sae.dtype))
    return found


def _cfg(config: SAEConfig, architecture: str) -> dict[str, Any]:
    """cfg.json, as SAELens' config classes of version 6 have it."""
    facts = {key: value for key, value in config.metadata.items() if key not in ("format", "source")}
    reshape = facts.pop("reshape_activations", "none")
    major = str(facts.get("sae_lens_version", "0")).partition(".")[0]
    facts["sae_lens_version"] = facts["sae_lens_version"] if major.isdigit() and int(major) >= 6 else _VERSION
    facts[_OURS] = {name: getattr(config, name) for name in (*_KEPT, "k")}
    found: dict[str, Any] = dict(
        architecture=architecture,
        d_in=config.d_in,
        d_sae=config.n_latents,
        dtype=config.dtype,
        device="cpu",
        apply_b_dec_to_input=config.apply_b_dec_to_input,
        normalize_activations={ours: theirs for theirs, ours in _INPUTS.items() if theirs[0] != "e"}[config.input_norm],
        reshape_activations=reshape,
        metadata=facts,
    )
    if architecture == "topk":
        found |= dict(k=config.k, rescale_acts_by_decoder_norm=config.rescale_acts_by_decoder_norm)
    if "transcoder" in architecture:
        found["d_out"] = config.d_in if config.d_out is None else config.d_out
    return found
