"""circuit-tracer's transcoders, one file a layer or across layers (decoderesearch/circuit-tracer, PyPI 0.5).

Per layer: `layer_{i}.safetensors` with W_enc and W_dec (n_latents, d_model) both, and `config.yaml` for all layers. One
with `activation_function.threshold` is JumpReLU, any other ReLU, but that the config may say "activation: topk", which
their code reads since April 2026, and 0.5.0 does not. Across layers: `W_enc_{i}.safetensors` and
`W_dec_{i}.safetensors` for every layer, decoder rows (n_latents, layers from i on, d_model). Nothing is subtracted from
inputs. Their JumpReLU lets a negative pre-activation pass where its threshold is lower, and their TopK one that is
among the k best: ours lets none.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from saefast.data.shardfile import Column, write_file
from saefast.errors import InputError
from saefast.files import no_pipe, replacing
from saefast.formats.format import Described, Format, Piece, column, left_out, likely_k, log_threshold, rows_of, wide
from saefast.formats.restated import check_kind, check_same_width, own_facts, restated, sizes
from saefast.formats.source import Source
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

CONFIG = "config.yaml"
THRESHOLD = "activation_function.threshold"
_LAYER, _ENCODER = re.compile(r"layer_(\d+)\.safetensors"), re.compile(r"W_enc_(\d+)\.safetensors")
_MATRICES = {"W_enc", "W_dec", "b_enc", "b_dec"}
_OPTIONAL = {THRESHOLD, "W_skip", "k"}
_SET, _ACROSS = "transcoder_set", "cross_layer_transcoder"
# A layer in the name of a hook or of a module.
_NUMBER = re.compile(r"\b(?:blocks|layers|layer|h)\.(\d+)\b")
_HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
_KEPT = {
    "d_in", "n_latents", "activation", "apply_b_dec_to_input", "unit_norm_decoder", "rescale_acts_by_decoder_norm",
    "d_out", "skip", "n_layers", "metadata",
}  # fmt: skip
_LARGEST_YAML, _DEEPEST = 1 << 20, 16
_TOPK = (
    "activation 'topk' stands in config.yaml, where circuit-tracer up to 0.5.0 does not look: it lets every positive "
    "latent pass; saefast.as_jumprelu(sae, rows) makes one that all versions read"
)


class CircuitTracer(Format):
    """A transcoder of one layer, or one across layers."""

    name = "circuit_tracer"
    about = "circuit-tracer: transcoders of single layers, and across layers"
    layout = (
        f"layer_0.safetensors with W_enc and W_dec (n_latents, d_model), b_enc and b_dec, or W_enc_0.safetensors and "
        f"W_dec_0.safetensors for every layer; and {CONFIG}"
    )
    signs = (
        CONFIG,
        "layer_0.safetensors",
        "W_enc_0.safetensors",
        "W_dec_0.safetensors",
        "W_enc_0",
        THRESHOLD,
        "W_skip",
    )

    def recognises(self, source: Source) -> bool:
        if _across(source):
            return True
        files = _files(source, _LAYER)
        return bool(files) and {"W_enc", "W_dec"} <= source.entries(files[0]).keys()

    def describe(self, source: Source) -> Described:
        if count := _across(source):
            return _describe_across(source, count)
        files = _files(source, _LAYER)
        if not files:
            raise InputError(f"{source.path} holds no transcoder: it needs {self.layout}")
        if len(files) > 1:
            raise InputError(
                f"{source.path} holds transcoders of {len(files)} layers, one file each: name one of them, such as "
                f"{source.folder / files[0]}"
            )
        return _describe_layer(source, files[0])

    def write(self, sae: SAE, folder: Path) -> list[str]:
        target = "circuit-tracer"
        if sae.config.n_layers is not None:
            check_kind(sae, target, ("relu", "jumprelu"))
            check_same_width(sae, target)
            _write_across(sae, folder)
        else:
            check_kind(sae, target, ("topk", "batchtopk", "relu", "jumprelu"), input_norm="none")
            check_same_width(sae, target)
            _write_layer(sae, folder)
        if sae.config.activation != "topk":
            return left_out(sae.config, _KEPT, target) + _guessed(sae.config)
        return [*left_out(sae.config, _KEPT | {"k"}, target), _TOPK, *_guessed(sae.config)]


def _files(source: Source, pattern: re.Pattern[str]) -> list[str]:
    """Files of that name, layers ascending; of a source that is a file, that one alone."""
    names = [source.alone] if source.alone is not None else list(source.files)
    found = [(int(match[1]), name) for name in names if (match := pattern.fullmatch(name))]
    return [name for _, name in sorted(found)]


def _across(source: Source) -> int:
    """The number of layers of a cross-layer transcoder; 0 where there is none."""
    found = [] if source.alone is not None else _files(source, _ENCODER)
    if found and found != [f"W_enc_{i}.safetensors" for i in range(len(found))]:
        raise InputError(f"{source.path} holds {', '.join(found)}: expected one for every layer from 0 on")
    return len(found)


def _describe_layer(source: Source, file: str) -> Described:
    entries, settings = source.entries(file), _settings(source)
    if unknown := sorted(entries.keys() - _MATRICES - _OPTIONAL):
        raise InputError(f"{source.folder / file} has the tensors {', '.join(unknown)}, which no transcoder has")
    n_latents, d_in = sizes(source, file, "W_enc", "b_enc", CircuitTracer.layout)
    activation = _activation(source, settings, THRESHOLD in entries)
    k = _number(source, file, settings) if activation == "topk" else likely_k(n_latents)
    skip = "W_skip" in entries
    config = SAEConfig(
        d_in, n_latents, k, activation=activation, d_out=entries["b_dec"].shape[0] if "b_dec" in entries else d_in,
        skip=skip, unit_norm_decoder=False, metadata=_metadata(settings, int(_LAYER.fullmatch(file)[1])),  # type: ignore[index]
    )  # fmt: skip
    tensors: dict[str, Any] = {name: Piece(file, name) for name in _MATRICES | ({"W_skip"} if skip else set())}
    if activation == "jumprelu":
        _refuse_negative(source, file, THRESHOLD)
        tensors["log_threshold"] = Piece(file, THRESHOLD, also=log_threshold)
    return Described(config, tensors)


def _describe_across(source: Source, M: int) -> Described:
    F, d = sizes(source, "W_enc_0.safetensors", "W_enc_0", "b_enc_0", CircuitTracer.layout)
    thresholds, settings = "threshold_0" in source.entries("W_enc_0.safetensors"), _settings(source)
    across: dict[str, Any] = {"n_layers": M} if M > 1 else {"d_out": d}
    config = SAEConfig(
        M * d, M * F, M * likely_k(F), activation="jumprelu" if thresholds else "relu", unit_norm_decoder=False,
        metadata=_metadata(settings, None), **across,
    )  # fmt: skip
    tensors: dict[str, Any] = {name: [] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    for i in range(M):
        file, rows = f"W_enc_{i}.safetensors", slice(i * F, (i + 1) * F)
        tensors["W_enc"].append(Piece(file, f"W_enc_{i}", into=(rows,)))
        tensors["b_enc"].append(Piece(file, f"b_enc_{i}", into=(rows,)))
        tensors["b_dec"].append(Piece(file, f"b_dec_{i}", into=(slice(i * d, (i + 1) * d),)))
        written = Piece(
            f"W_dec_{i}.safetensors", f"W_dec_{i}", also=_flat, shape=(F, M - i, d), into=(rows, slice(i * d, M * d))
        )
        tensors["W_dec"].append(written)
        if thresholds:
            _refuse_negative(source, file, f"threshold_{i}")
            limit = Piece(file, f"threshold_{i}", also=log_threshold, into=(rows,))
            tensors.setdefault("log_threshold", []).append(limit)
    return Described(config, tensors)


def _flat(rows: Tensor) -> Tensor:
    return rows.flatten(1)


def _activation(source: Source, settings: dict[str, Any], thresholds: bool) -> str:
    said = settings.get("activation")
    if said not in (None, "relu", "topk", "jump_relu", "jumprelu"):
        raise InputError(f"{source.folder / CONFIG}: activation is {said!r}, expected relu, topk or none")
    if said in ("relu", "topk"):
        if thresholds:
            raise InputError(f"{source.folder}: {CONFIG} says activation {said}, but the file has {THRESHOLD}")
        return str(said)
    return "jumprelu" if thresholds else "relu"


def _number(source: Source, file: str, settings: dict[str, Any]) -> int:
    """k of a topk transcoder, which stands in the config, or in the file where their own code has saved it."""
    said = settings.get("k", int(source.number(file, "k")) if "k" in source.entries(file) else None)
    if not isinstance(said, int) or isinstance(said, bool):
        raise InputError(f"{source.folder / CONFIG}: activation is topk and k {said!r}: expected a number")
    return said


def _refuse_negative(source: Source, file: str, key: str) -> None:
    lowest = float(source.values(file, key).min()) if key in source.entries(file) else 0.0
    if lowest < 0:
        raise InputError(
            f"{source.folder / file}: {key} goes down to {lowest:.4g}; circuit-tracer lets negative activations pass "
            "then, and saefast has none"
        )


def _settings(source: Source) -> dict[str, Any]:
    """config.yaml, {} where there is none."""
    file = source.folder / CONFIG
    if CONFIG not in source.files:
        return {}
    return read_yaml(file)


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file of settings.

    Raises:
        InputError: PyYAML is not installed; damaged, or no settings.
    """
    try:
        import yaml
    except ImportError:
        raise InputError(f"{file} is YAML, and PyYAML is not installed: pip install pyyaml") from None
    try:
        if no_pipe(file).stat().st_size > _LARGEST_YAML:
            raise InputError(f"{file} is larger than a config is: expected some kilobytes of YAML")
        text = file.read_text(encoding="utf-8")
        _require_plain(file, yaml.parse(text, Loader=yaml.SafeLoader), yaml)
        found = yaml.safe_load(text)
        # As JSON: dates and the like have no place in metadata.
        plain = {str(key): json.loads(json.dumps(value, default=str)) for key, value in dict(found or {}).items()}
    except InputError:
        raise
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"{file} cannot be read as YAML settings ({reason}): it was cut short or edited") from None
    return plain


def _require_plain(file: Path, events: Iterable[Any], yaml: Any) -> None:
    """Raises InputError for YAML that takes for ever: names that stand for names, and brackets in brackets."""
    depth = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            raise InputError(f"{file} has YAML aliases: write out what they stand for")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise InputError(f"{file} is nested {depth} deep: expected lines such as 'model_kind: {_SET}'")


def _metadata(settings: dict[str, Any], layer: int | None) -> dict[str, Any]:
    prefix = "" if layer is None else f"blocks.{layer}."
    takes, gives = (settings.get(name) for name in _HOOKS)
    facts = {
        "model_name": settings.get("model_name"), "hook_name": takes and f"{prefix}{takes}",
        "hook_name_out": gives and f"{prefix}{gives}", "layer": layer,
        "settings": {name: value for name, value in settings.items() if name not in ("metadata", "transcoders")},
    }  # fmt: skip
    ours = settings.get("metadata")
    found = {name: value for name, value in facts.items() if value not in (None, {})}
    return found | (ours if isinstance(ours, dict) else {})


def _layer(config: SAEConfig) -> int:
    """The layer that a transcoder is of, by its metadata; 0 where it says none."""
    said = config.metadata.get("layer", config.metadata.get("hook_layer"))
    if isinstance(said, int) and not isinstance(said, bool) and said >= 0:
        return said
    names = (str(config.metadata.get(name, "")) for name in ("hook_name", "hf_hook_name"))
    return next((int(match[1]) for name in names if (match := _NUMBER.search(name))), 0)


def _guessed(config: SAEConfig) -> list[str]:
    """What the config.yaml says without being sure of it."""
    lost, facts = [], _hooks(config)
    if missing := [name for name in _HOOKS if name not in facts]:
        guess = ", ".join(f"{name}: {_HOOKS[name]}" for name in missing)
        lost.append(f"the metadata names no hook that circuit-tracer knows: {CONFIG} says {guess}; see that it is so")
    return lost


def _hooks(config: SAEConfig) -> dict[str, str]:
    """Their two hooks, relative to a block, as far as they are known."""
    settings = config.metadata.get("settings")
    found = {name: settings[name] for name in _HOOKS if isinstance(settings, dict) and name in settings}
    for name, key in zip(_HOOKS, ("hook_name", "hook_name_out"), strict=True):
        match = re.fullmatch(r"blocks\.\d+\.(.*hook_\w+)", str(config.metadata.get(key, "")))
        if match and name not in found:
            found[name] = match[1]
    return found


def _write_settings(config: SAEConfig, folder: Path, kind: str) -> None:
    facts = own_facts(config)
    theirs = facts.pop("settings", {})
    about = (theirs if isinstance(theirs, dict) else {}) | {"model_kind": kind} | _HOOKS | _hooks(config)
    about |= {"model_name": facts.get("model_name"), "scan": about.get("scan")}
    for name in ("activation", "k"):
        about.pop(name, None)
    if config.activation == "topk":
        about |= {"activation": "topk", "k": config.k}
    if kind == _ACROSS and facts:
        about["metadata"] = facts
    file = folder / CONFIG
    if file.is_file():
        _require_alike(file, read_yaml(file), about)
    lines = (f"{name}: {json.dumps(value, ensure_ascii=False)}\n" for name, value in about.items())
    with replacing(file) as temporary:
        # JSON is YAML.
        temporary.write_text("".join(lines), encoding="utf-8")


def _require_alike(file: Path, there: dict[str, Any], about: dict[str, Any]) -> None:
    """Raises InputError where another layer in the folder is of another kind: one config speaks for all."""
    for name in ("model_kind", "activation", "k", *_HOOKS):
        if there.get(name) != about.get(name):
            raise InputError(
                f"{file} says {name} {there.get(name)!r}, this one has {about.get(name)!r}: all transcoders in a "
                "folder share it; write this one elsewhere"
            )


def _write_layer(sae: SAE, folder: Path) -> None:
    config, said = sae.config, restated(sae, centred=False)
    limit = _limit(sae, said.own)
    tensors = {
        "W_enc": column(sae.W_enc, scale=said.enc_scale), "W_dec": column(sae.W_dec, scale=said.dec_scale),
        "b_enc": column(said.b_enc), "b_dec": column(sae.b_dec),
    }  # fmt: skip
    if limit is not None:
        tensors[THRESHOLD] = column(limit)
    if config.skip:
        tensors["W_skip"] = column(said.own["W_skip"])
    _write_settings(config, folder, _SET)
    write_file(folder / f"layer_{_layer(config)}.safetensors", tensors)


def _limit(sae: SAE, own: dict[str, Tensor]) -> Tensor | None:
    """(n_latents,) thresholds, None where there are none."""
    if sae.config.activation == "jumprelu":
        return wide(own["log_threshold"]).exp().to(sae.dtype)
    if sae.config.activation != "batchtopk":
        return None
    if float(sae.get_buffer("threshold")) < 0:
        raise InputError(
            "the threshold of this batchtopk SAE is not set: train on, or make one with saefast.as_jumprelu(sae, rows)"
        )
    return sae.get_buffer("threshold").to(sae.dtype).expand(sae.config.n_latents).contiguous()


def _write_across(sae: SAE, folder: Path) -> None:
    M = sae.config.n_layers
    F, d = sae.config.n_latents // M, sae.d_out // M
    limit = _limit(sae, {name: value.detach() for name, value in sae.own().items()})
    _write_settings(sae.config, folder, _ACROSS)
    for i in range(M):
        rows = slice(i * F, (i + 1) * F)
        tensors = {
            f"W_enc_{i}": column(sae.W_enc[rows]), f"b_enc_{i}": column(sae.b_enc[rows]),
            f"b_dec_{i}": column(sae.b_dec[i * d : (i + 1) * d]),
        }  # fmt: skip
        if limit is not None:
            tensors[f"threshold_{i}"] = column(limit[rows])
        write_file(folder / f"W_enc_{i}.safetensors", tensors)
        written = sae.W_dec.detach()[rows, i * d :]
        decoder = Column(sae.dtype, (F, M - i, d), _rows(written))
        write_file(folder / f"W_dec_{i}.safetensors", {f"W_dec_{i}": decoder})


def _rows(tensor: Tensor) -> Iterator[Tensor]:
    """Some rows at a time of a tensor that does not lie in one piece."""
    for rows in rows_of(tensor):
        yield tensor[rows].contiguous().cpu()
