"""Gemma Scope (Lieberum et al. 2024, arXiv 2408.05147): JumpReLU SAEs and transcoders of Gemma 2, one params.npz each.

    W_enc (d_in, n_latents)  W_dec (n_latents, d_out)  b_enc, threshold (n_latents,)  b_dec (d_out,)

Names are in lower case in some. Nothing is subtracted from inputs. What the SAE is of stands in the names of folders
alone: google/gemma-scope-2b-pt-res, layer_20/width_16k/average_l0_71. SAEs of embeddings were trained on those of the
table, which the model multiplies by √d_in: W_enc is divided and W_dec multiplied by that, as in SAELens, so that they
take what the model's hook gives. Those of attention are of its heads' outputs side by side, before they are mixed.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from saefast.data.shardfile import Column
from saefast.formats.format import Described, Format, Made, Piece, column, left_out, likely_k, log_threshold
from saefast.formats.npzfile import write_npz
from saefast.formats.restated import check_kind, restated, sizes
from saefast.formats.source import Source
from saefast.formats.thresholds import thresholds
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

FILE = "params.npz"
_TENSORS = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}
# Of an early release: what activations are multiplied by before they are decoded.
_FINE_TUNED = "scaling_factor"
_KEPT = {
    "d_in", "n_latents", "activation", "apply_b_dec_to_input", "unit_norm_decoder", "rescale_acts_by_decoder_norm",
    "d_out",
}  # fmt: skip
_REPOSITORY = re.compile(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)")
_HOOKS = {
    "res": "blocks.{}.hook_resid_post",
    "mlp": "blocks.{}.hook_mlp_out",
    "att": "blocks.{}.attn.hook_z",
    "transcoders": "blocks.{}.ln2.hook_normalized",
}


class GemmaScope(Format):
    """See the module. Written are SAEs that decide by thresholds: jumprelu, relu (of threshold 0) and batchtopk."""

    name = "gemma_scope"
    about = "Gemma Scope: JumpReLU SAEs and transcoders of Gemma 2"
    layout = f"{FILE} with W_enc (d_in, n_latents), W_dec (n_latents, d_out), b_enc, b_dec and threshold"
    signs = (FILE, "W_enc", "W_dec", "b_enc", "b_dec", "threshold")

    def recognises(self, source: Source) -> bool:
        file = _file(source)
        return file is not None and {name.lower() for name in source.entries(file)} >= _TENSORS

    def describe(self, source: Source) -> Described:
        file = _file(source) or FILE
        names = {name.lower(): name for name in source.entries(file)}
        config = _config(source, file, names)
        inside = _is_of_embeddings(source)
        size = config.d_in**0.5 if inside else 1.0
        tensors: dict[str, Made] = {
            "W_enc": Piece(file, names.get("w_enc", "W_enc"), transpose=True, scale=1 / size),
            "W_dec": Piece(file, names.get("w_dec", "W_dec"), scale=_decoded(source, file, names, size)),
            "b_enc": Piece(file, names.get("b_enc", "b_enc")),
            "b_dec": Piece(file, names.get("b_dec", "b_dec")),
            "log_threshold": Piece(file, names.get("threshold", "threshold"), also=log_threshold),
        }
        return Described(config, tensors)

    def write(self, sae: SAE, folder: Path) -> list[str]:
        target = "Gemma Scope"
        plain: dict[str, Any] = dict(input_norm="none", skip=False, crosscode_widths=None, n_layers=None)
        check_kind(sae, target, ("jumprelu", "relu", "batchtopk"), **plain)
        stated = restated(sae, centred=False)
        columns = {
            "W_enc": column(sae.W_enc, transpose=True, scale=stated.enc_scale),
            "W_dec": column(sae.W_dec, scale=stated.dec_scale),
            "b_enc": column(stated.b_enc),
            "b_dec": column(sae.b_dec),
            "threshold": Column.of(thresholds(sae, target)),
        }
        write_npz(folder / FILE, columns)
        return left_out(sae.config, _KEPT, target)


def _file(source: Source) -> str | None:
    if source.alone is not None:
        return source.alone if source.alone.endswith(".npz") else None
    return FILE if FILE in source.files else None


def _config(source: Source, file: str, names: dict[str, str]) -> SAEConfig:
    W_enc, b_enc = names.get("w_enc", "W_enc"), names.get("b_enc", "b_enc")
    n_latents, d_in = sizes(source, file, W_enc, b_enc, GemmaScope.layout, transpose=True)
    b_dec = source.entries(file).get(names.get("b_dec", "b_dec"))
    d_out = b_dec.shape[0] if b_dec is not None and len(b_dec.shape) == 1 else d_in
    facts = _facts(source)
    transcodes = d_in != d_out or "hook_name_out" in facts
    return SAEConfig(
        d_in, n_latents, likely_k(n_latents, facts.get("l0")), activation="jumprelu", apply_b_dec_to_input=False,
        unit_norm_decoder=False, d_out=d_out if transcodes else None, metadata=facts,
    )  # fmt: skip


def _decoded(source: Source, file: str, names: dict[str, str], size: float) -> float | Tensor:
    """What decoder rows are multiplied by."""
    if _FINE_TUNED not in names:
        return size
    return source.values(file, names[_FINE_TUNED]).reshape(-1) * size


def _where(source: Source) -> str:
    """The names of folders that tell what an SAE is of; a cache of the hub has "--" where ids have "/"."""
    return "/".join(source.folder.absolute().parts[-9:])


def _is_of_embeddings(source: Source) -> bool:
    return re.search(r"/embedding/width_[^/]+(/[^/]+)?$", source.folder.absolute().as_posix()) is not None


def _facts(source: Source) -> dict[str, Any]:
    """What the names of folders say, in SAELens' words."""
    facts: dict[str, Any] = {}
    where = _where(source)
    repository, layer = _REPOSITORY.search(where), re.search(r"layer_(\d+)", where)
    if l0 := re.search(r"average_l0_(\d+)", where):
        facts["l0"] = int(l0[1])
    if repository is None:
        return facts
    size, tuned, site = repository.groups()
    facts |= {
        "model_name": f"gemma-2-{size}" + ("-it" if tuned == "it" else ""),
        "prepend_bos": True,
        "context_size": 1024,
    }
    if _is_of_embeddings(source):
        facts["hook_name"] = "hook_embed"
    elif layer:
        facts["hook_name"] = _HOOKS[site].format(layer[1])
        if site == "att":
            facts["reshape_activations"] = "hook_z"
        if site == "transcoders":
            facts["hook_name_out"] = f"blocks.{layer[1]}.hook_mlp_out"
    return facts
