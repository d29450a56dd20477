"""sparsify's folders, `cfg.json` and `sae.safetensors` (EleutherAI; PyPI eai-sparsify 1.3).

A hook of a run has a folder of its own, named after the module (`layers.10.mlp`). W_dec has a latent in a row, as here.
b_dec is subtracted from inputs but for transcoders. Before August 2024 an SAE could be "signed": its latents are the k
with the largest absolute value, and act with their sign. Here such a latent is two, one for each sign.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saefast.data.shardfile import write_file
from saefast.files import write_json
from saefast.formats.format import Described, Format, Piece, column, left_out
from saefast.formats.restated import (
    both_signs,
    check_kind,
    check_same_width,
    own_facts,
    require_agreement,
    restated,
    sizes,
    uncentred,
)
from saefast.formats.source import Source
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.schema import check

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
_OURS = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}
_KEPT = {
    "d_in", "n_latents", "k", "activation", "apply_b_dec_to_input", "unit_norm_decoder", "rescale_acts_by_decoder_norm",
    "d_out", "skip", "metadata",
}  # fmt: skip


class Sparsify(Format):
    """SparseCoder.save_to_disk: topk and groupmax, transcoders, and a skip connection."""

    name = "sparsify"
    about = "sparsify (EleutherAI): SAEs and transcoders, with a skip connection or without"
    layout = f"{CONFIG} and {WEIGHTS} with encoder.weight (n_latents, d_in), encoder.bias, W_dec and b_dec"
    signs = (CONFIG, WEIGHTS, "encoder.weight", "encoder.bias", "W_dec", "b_dec", "W_skip")

    def recognises(self, source: Source) -> bool:
        return {CONFIG, WEIGHTS} <= set(source.files) and "encoder.weight" in source.entries(WEIGHTS)

    def describe(self, source: Source) -> Described:
        cfg = source.json(CONFIG)
        n_latents, d_in = sizes(source, WEIGHTS, "encoder.weight", "encoder.bias", self.layout)
        stated = {"d_in": d_in} | ({"num_latents": n_latents} if cfg.get("num_latents") else {})
        require_agreement(source.folder / CONFIG, cfg, stated)
        signed, skip, transcode = (_flag(source, cfg, key) for key in ("signed", "skip_connection", "transcode"))
        config = SAEConfig(
            d_in, n_latents * (2 if signed else 1), check(cfg.get("k", 32), int, f"{source.folder / CONFIG}: k"),
            activation=check(cfg.get("activation", "topk"), str, f"{source.folder / CONFIG}: activation"),
            apply_b_dec_to_input=not transcode, d_out=d_in if transcode or skip else None, skip=skip,
            unit_norm_decoder=_flag(source, cfg, "normalize_decoder", True) and not transcode, metadata=_metadata(cfg),
        )  # fmt: skip
        tensors: dict[str, Piece | Sequence[Piece] | float] = {
            ours: Piece(WEIGHTS, theirs) for ours, theirs in _OURS.items()
        }
        if skip:
            tensors["W_skip"] = Piece(WEIGHTS, "W_skip")
            if not transcode:
                tensors["b_enc"] = uncentred(source, WEIGHTS, "encoder.weight", "encoder.bias", "b_dec")
        if signed:
            tensors |= {
                name: both_signs(Piece(WEIGHTS, _OURS[name]), n_latents) for name in ("W_enc", "b_enc", "W_dec")
            }
        return Described(config, tensors)

    def write(self, sae: SAE, folder: Path) -> list[str]:
        check_kind(sae, "sparsify", ("topk", "groupmax"), input_norm="none", n_layers=None)
        check_same_width(sae, "sparsify")
        config, said = sae.config, restated(sae, sae.config.apply_b_dec_to_input)
        tensors = {
            "encoder.weight": column(sae.W_enc, scale=said.enc_scale), "encoder.bias": column(said.b_enc),
            "W_dec": column(sae.W_dec, scale=said.dec_scale), "b_dec": column(sae.b_dec),
        }  # fmt: skip
        if config.skip:
            tensors["W_skip"] = column(said.own["W_skip"])
        write_file(folder / WEIGHTS, tensors)
        cfg: dict[str, Any] = {
            "activation": config.activation, "expansion_factor": max(config.n_latents // config.d_in, 1),
            "normalize_decoder": config.unit_norm_decoder or config.rescale_acts_by_decoder_norm,
            "num_latents": config.n_latents, "k": config.k, "multi_topk": False, "skip_connection": config.skip,
            "transcode": not config.apply_b_dec_to_input, "d_in": config.d_in,
        }  # fmt: skip
        theirs = own_facts(config)
        # sparsify leaves out keys that it does not know.
        cfg |= {
            name: theirs.pop(name) for name in ("multi_topk", "expansion_factor", "normalize_decoder") if name in theirs
        }
        write_json(folder / CONFIG, cfg | ({"metadata": theirs} if theirs else {}))
        return left_out(config, _KEPT, self.name)


def _flag(source: Source, cfg: dict[str, Any], key: str, default: bool = False) -> bool:
    found: bool = check(cfg.get(key, default), bool, f"{source.folder / CONFIG}: {key}")
    return found


def _metadata(cfg: dict[str, Any]) -> dict[str, Any]:
    """What the config says besides, under its own names; and what we left in it."""
    known = ("multi_topk", "expansion_factor", "signed", "normalize_decoder")
    ours = cfg.get("metadata")
    return {name: cfg[name] for name in known if name in cfg} | (ours if isinstance(ours, dict) else {})
