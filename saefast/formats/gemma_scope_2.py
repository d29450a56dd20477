"""Gemma Scope 2 (Google DeepMind, Gemma 3): JumpReLU SAEs, transcoders with or without a skip, and across layers.

    params.safetensors, config.json: w_enc (d_in, n_latents)  w_dec (n_latents, d_out)  b_enc, threshold (n_latents,)
        b_dec (d_out,)  of transcoders perhaps affine_skip_connection (d_in, d_out)
    params_layer_{i}.safetensors for every layer, in a folder below "clt": the same of each layer, but
        w_dec (n_latents, layers, d_out), of which those of earlier layers are not used

Nothing is subtracted from inputs. A folder of layers is loaded as a cross-layer transcoder; one file of it as a
transcoder of that layer whose target is the outputs of all layers side by side.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from saefast.data.shardfile import Column, write_file
from saefast.errors import InputError
from saefast.files import write_json
from saefast.formats.format import Described, Format, Made, Piece, column, left_out, likely_k, log_threshold
from saefast.formats.restated import check_kind, own_facts, restated, sizes
from saefast.formats.source import Source
from saefast.formats.thresholds import thresholds
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

FILE, CONFIG, SKIP = "params.safetensors", "config.json", "affine_skip_connection"
_LAYER = re.compile(r"params_layer_(\d+)\.safetensors")
_TENSORS = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
_KEPT = {
    "d_in", "n_latents", "activation", "apply_b_dec_to_input", "unit_norm_decoder", "rescale_acts_by_decoder_norm",
    "d_out", "skip", "n_layers", "metadata",
}  # fmt: skip
# The place in a layer that a module's name tells of, by TransformerLens' name.
_PLACES = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "pre_feedforward_layernorm.output": "hook_mlp_in",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}
# The same by the folder's name, for folders without a config.
_FOLDERS = {
    "resid_post": ("output", None),
    "attn_out": ("self_attn.o_proj.input", None),
    "mlp_out": ("post_feedforward_layernorm.output", None),
    "transcoder": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "clt": ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
}


class GemmaScope2(Format):
    """See the module. Written are SAEs that decide by thresholds: jumprelu, relu (of threshold 0) and batchtopk."""

    name = "gemma_scope_2"
    about = "Gemma Scope 2: JumpReLU SAEs, transcoders and cross-layer transcoders of Gemma 3"
    layout = f"{FILE} with w_enc (d_in, n_latents), w_dec (n_latents, d_out), b_enc, b_dec and threshold; and {CONFIG}"
    signs = (FILE, CONFIG, "params_layer_0.safetensors", "w_enc", "w_dec", SKIP)

    def recognises(self, source: Source) -> bool:
        files = _files(source)
        return bool(files) and source.entries(files[0]).keys() >= _TENSORS

    def describe(self, source: Source) -> Described:
        files = _files(source)
        if not files:
            raise InputError(f"{source.path} holds no SAE of Gemma Scope 2: it needs {self.layout}")
        shapes = {name: entry.shape for name, entry in source.entries(files[0]).items()}
        F, d_in = sizes(source, files[0], "w_enc", "b_enc", self.layout, transpose=True)
        if _LAYER.fullmatch(files[0]) is None:
            return _describe_one(source, files[0], d_in, F)
        if len(shapes.get("w_dec", ())) != 3:
            raise InputError(
                f"{source.folder / files[0]}: w_dec has shape {shapes.get('w_dec')}, expected (n_latents, layers, "
                "d_out) of a cross-layer transcoder; crosscoders of Gemma Scope 2 are not read"
            )
        if source.alone is not None:
            return _describe_layer(source, files[0], d_in, F)
        return _describe_across(source, files, d_in, F)

    def write(self, sae: SAE, folder: Path) -> list[str]:
        target, config = "Gemma Scope 2", sae.config
        check_kind(sae, target, ("jumprelu", "relu", "batchtopk"), input_norm="none", crosscode_widths=None)
        if config.n_layers is not None:
            _write_across(sae, folder, target)
        else:
            _write_one(sae, folder, target)
        return left_out(config, _KEPT, target)


def _files(source: Source) -> list[str]:
    """The file of weights, or those of all layers in their order."""
    names = [source.alone] if source.alone is not None else list(source.files)
    if FILE in names:
        return [FILE]
    layers = sorted((int(match[1]), name) for name in names if (match := _LAYER.fullmatch(name)))
    return [name for _, name in layers]


def _describe_one(source: Source, file: str, d_in: int, n_latents: int) -> Described:
    cfg = source.json(CONFIG) if CONFIG in source.files else {}
    _check_kind_of(cfg, source)
    d_out = _width(source, file, d_in)
    facts = _facts(source, cfg, _layer_in_path(source))
    skip = SKIP in source.entries(file)
    transcodes = skip or d_in != d_out or "hook_name_out" in facts
    config = SAEConfig(
        d_in, n_latents, likely_k(n_latents, cfg.get("l0")), activation="jumprelu", apply_b_dec_to_input=False,
        unit_norm_decoder=False, d_out=d_out if transcodes else None, skip=skip, metadata=facts,
    )  # fmt: skip
    tensors: dict[str, Made] = {
        "W_enc": Piece(file, "w_enc", transpose=True),
        "W_dec": Piece(file, "w_dec"),
        "b_enc": Piece(file, "b_enc"),
        "b_dec": Piece(file, "b_dec"),
        "log_threshold": Piece(file, "threshold", also=log_threshold),
    }
    if skip:
        tensors["W_skip"] = Piece(file, SKIP, transpose=True)
    return Described(config, tensors)


def _describe_layer(source: Source, file: str, d_in: int, n_latents: int) -> Described:
    """One layer of a cross-layer transcoder."""
    cfg = source.json(CONFIG) if CONFIG in source.files else {}
    i = int(_LAYER.fullmatch(file)[1])  # type: ignore[index]
    M, d_out = source.entries(file)["w_dec"].shape[1:]
    _check_layers(source, file, i, M)
    facts = _facts(source, cfg, i)
    place = facts.pop("hook_name_out", None)
    if place is not None:
        facts["hook_names_out"] = [place.replace(f"blocks.{i}.", f"blocks.{m}.") for m in range(M)]
    skip, own = SKIP in source.entries(file), slice(i * d_out, (i + 1) * d_out)
    config = SAEConfig(
        d_in, n_latents, likely_k(n_latents, cfg.get("l0")), activation="jumprelu", apply_b_dec_to_input=False,
        unit_norm_decoder=False, d_out=M * d_out, skip=skip, metadata=facts,
    )  # fmt: skip
    tensors: dict[str, Made] = {
        "W_enc": Piece(file, "w_enc", transpose=True),
        "W_dec": _written(file, slice(0, n_latents), i, M, d_out, n_latents),
        "b_enc": Piece(file, "b_enc"),
        "b_dec": [Piece(file, "b_dec", into=(own,))],
        "log_threshold": Piece(file, "threshold", also=log_threshold),
    }
    if skip:
        tensors["W_skip"] = [Piece(file, SKIP, transpose=True, into=(own,))]
    return Described(config, tensors)


def _describe_across(source: Source, files: list[str], d_in: int, F: int) -> Described:
    M, d_out = source.entries(files[0])["w_dec"].shape[1:]
    if files != [f"params_layer_{i}.safetensors" for i in range(M)]:
        raise InputError(
            f"{source.path} holds {', '.join(files)}: expected one file for each of the {M} layers from 0 on"
        )
    if SKIP in source.entries(files[0]):
        raise InputError(
            f"{source.path} is a cross-layer transcoder with a skip ({SKIP}) in every layer, which saefast has not: "
            f"name one of its layers, such as {source.folder / files[0]}"
        )
    cfg = source.json(CONFIG) if CONFIG in source.files else {}
    config = SAEConfig(
        M * d_in, M * F, M * likely_k(F, cfg.get("l0")), activation="jumprelu", apply_b_dec_to_input=False,
        unit_norm_decoder=False, d_out=M * d_out if d_in != d_out else None, n_layers=M,
        metadata={name: value for name, value in cfg.items() if name != "l0"},
    )  # fmt: skip
    tensors: dict[str, Any] = {name: [] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "log_threshold")}
    for i, file in enumerate(files):
        rows, own = slice(i * F, (i + 1) * F), slice(i * d_out, (i + 1) * d_out)
        tensors["W_enc"].append(Piece(file, "w_enc", transpose=True, into=(rows,)))
        tensors["W_dec"].append(_written(file, rows, i, M, d_out, F))
        tensors["b_enc"].append(Piece(file, "b_enc", into=(rows,)))
        tensors["b_dec"].append(Piece(file, "b_dec", into=(own,)))
        tensors["log_threshold"].append(Piece(file, "threshold", also=log_threshold, into=(rows,)))
    return Described(config, tensors)


def _width(source: Source, file: str, d_in: int) -> int:
    """Of what is given out, by the bias."""
    b_dec = source.entries(file).get("b_dec")
    return b_dec.shape[0] if b_dec is not None and len(b_dec.shape) == 1 else d_in


def _written(file: str, rows: slice, i: int, M: int, d_out: int, F: int) -> Piece:
    """Decoder rows of layer i, which writes into its own output and those after it."""

    def onward(w_dec: Tensor) -> Tensor:
        return w_dec[:, i:].flatten(1)

    return Piece(file, "w_dec", also=onward, shape=(F, M, d_out), into=(rows, slice(i * d_out, M * d_out)))


def _check_layers(source: Source, file: str, i: int, M: int) -> None:
    if i >= M:
        raise InputError(f"{source.folder / file} is of layer {i}, and w_dec is of {M} layers: the file was renamed")


def _check_kind_of(cfg: dict[str, Any], source: Source) -> None:
    architecture = cfg.get("architecture", "jump_relu")
    if architecture != "jump_relu":
        raise InputError(f"{source.folder / CONFIG}: architecture is {architecture!a}: expected 'jump_relu'")


def _layer_in_path(source: Source) -> int | None:
    found = re.search(r"layer_(\d+)", source.folder.absolute().name)
    return int(found[1]) if found else None


def _facts(source: Source, cfg: dict[str, Any], layer: int | None) -> dict[str, Any]:
    """Their config as it is, with the places in the model in SAELens' words besides; without one what folders say."""
    places = [cfg.get("hf_hook_point_in"), cfg.get("hf_hook_point_out")]
    facts = dict(cfg)
    where = source.folder.absolute().parts[-9:]
    if not cfg and layer is not None:
        named = [pair for name, pair in _FOLDERS.items() if any(part.startswith(name) for part in where[-3:])]
        places = [f"model.layers.{layer}.{place}" if place else None for place in (named[0] if named else (None, None))]
        if model := re.search(r"gemma-scope-2-(\d+[bm])-(pt|it)", "/".join(where)):
            facts["model_name"] = f"google/gemma-3-{model[1]}-{model[2]}"
    inside, outside = places if places[0] != places[1] else (places[0], None)
    for suffix, place in (("", inside), ("_out", outside)):
        if isinstance(place, str):
            facts[f"hf_hook_name{suffix}"] = place
            match = re.fullmatch(r"model\.(?:language_model\.)?layers\.(\d+)\.(.+)", place)
            if match and match[2] in _PLACES:
                facts[f"hook_name{suffix}"] = f"blocks.{match[1]}.{_PLACES[match[2]]}"
    if facts.get("hook_name", "").endswith("hook_z"):
        facts["reshape_activations"] = "hook_z"
    return facts


def _write_one(sae: SAE, folder: Path, target: str) -> None:
    stated = restated(sae, centred=False)
    columns = {
        "w_enc": column(sae.W_enc, transpose=True, scale=stated.enc_scale),
        "w_dec": column(sae.W_dec, scale=stated.dec_scale),
        "b_enc": column(stated.b_enc),
        "b_dec": column(sae.b_dec),
        "threshold": Column.of(thresholds(sae, target)),
    }
    if sae.config.skip:
        columns[SKIP] = column(sae.own()["W_skip"], transpose=True)
    write_file(folder / FILE, columns, {"format": "pt"})
    write_json(folder / CONFIG, _cfg(sae.config, "transcoder" if sae.architecture.has_target else "sae"))


def _write_across(sae: SAE, folder: Path, target: str) -> None:
    limits, M = thresholds(sae, target), int(sae.config.n_layers or 1)
    blocks = sae.architecture.blocks()
    b_decs = sae.b_dec.detach().chunk(M)
    for i, (latents, _, _) in enumerate(blocks):
        W_dec = sae.W_dec.detach()[latents]
        columns = {
            "w_enc": column(sae.W_enc.detach()[latents], transpose=True),
            "w_dec": Column.of(W_dec.view(len(W_dec), M, -1)),
            "b_enc": column(sae.b_enc.detach()[latents]),
            "b_dec": column(b_decs[i]),
            "threshold": Column.of(limits[latents]),
        }
        write_file(folder / f"params_layer_{i}.safetensors", columns, {"format": "pt"})
    write_json(folder / CONFIG, _cfg(sae.config, "clt"))


def _cfg(config: SAEConfig, kind: str) -> dict[str, Any]:
    """config.json as theirs have it; what else the metadata holds is kept beside that."""
    facts = own_facts(config)
    inside = facts.get("hf_hook_point_in", facts.get("hf_hook_name"))
    outside = facts.get("hf_hook_point_out", facts.get("hf_hook_name_out", inside))
    return facts | {
        "hf_hook_point_in": inside,
        "hf_hook_point_out": outside,
        "width": config.n_latents // (config.n_layers or 1),
        "model_name": facts.get("model_name"),
        "architecture": "jump_relu",
        "l0": facts.get("l0", config.k // (config.n_layers or 1)),
        "affine_connection": config.skip,
        "type": kind,
    }
