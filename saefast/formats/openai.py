"""OpenAI's SAEs of GPT-2 small (github.com/openai/sparse_autoencoder): one state dict a layer, by torch.save.

    encoder.weight (n_latents, d)  decoder.weight (d, n_latents)  latent_bias (n_latents,)  pre_bias (d,)
    stats_last_nonzero, latents_activation_frequency, latents_mean_square (n_latents,)
    activation: "TopK", with activation_state_dict {k, postact_fn}; "ReLU", which older files leave out

pre_bias is subtracted from what is encoded, and added to what is decoded. Rows go through a layer norm first where the
activation is TopK, and only there: that is how their code tells. Tied weights lie under decoder.linear.weight.
"""

import re
from pathlib import Path
from typing import Any

import torch

from saefast.errors import InputError
from saefast.formats.format import Described, Format, Made, Piece, left_out, likely_k
from saefast.formats.restated import check_kind, check_same_width, restated, sizes
from saefast.formats.source import Source
from saefast.formats.torchfile import write_pt
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

FILE = "autoencoder.pt"
_SIGNS = {"pre_bias", "latent_bias", "encoder.weight"}
_TIED = "decoder.linear.weight"
_KEPT = {
    "d_in", "n_latents", "k", "activation", "apply_b_dec_to_input", "unit_norm_decoder",
    "rescale_acts_by_decoder_norm", "input_norm",
}  # fmt: skip
# Where in a block the names of their folders are, in TransformerLens' words; v5 are those with TopK.
_PLACES = {
    "mlp_post_act": "mlp.hook_post",
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
}


class OpenAI(Format):
    """See the module. Written are topk with the layer norm, and relu without; jumprelu and the others there are not."""

    name = "openai"
    about = "OpenAI's SAEs of GPT-2: a state dict with pre_bias and latent_bias, TopK or ReLU"
    layout = "one .pt file with encoder.weight (n_latents, d), decoder.weight (d, n_latents), latent_bias and pre_bias"
    signs = ("pre_bias", "latent_bias", "encoder.weight", "decoder.weight", "activation")

    def recognises(self, source: Source) -> bool:
        files = _files(source)
        try:
            return bool(files) and source.entries(files[0]).keys() >= _SIGNS
        except InputError:
            # Beside other files it may be anything: a run's state, an optimizer.
            if len(source.files) > len(files):
                return False
            raise

    def describe(self, source: Source) -> Described:
        files = _files(source)
        if len(files) != 1:
            some = f", such as {source.folder / files[0]}" if files else ""
            raise InputError(f"{source.path} holds {len(files)} .pt files, one for each SAE: name one of them{some}")
        file = files[0]
        n_latents, d = sizes(source, file, "encoder.weight", "latent_bias", self.layout)
        tied = _TIED in source.entries(file)
        tensors: dict[str, Made] = {
            "W_enc": Piece(file, "encoder.weight"),
            "W_dec": Piece(file, _TIED if tied else "decoder.weight", transpose=not tied),
            "b_enc": Piece(file, "latent_bias"),
            "b_dec": Piece(file, "pre_bias"),
        }
        return Described(_config(source, file, n_latents, d), tensors)

    def write(self, sae: SAE, folder: Path) -> list[str]:
        config, target = sae.config, "OpenAI's format"
        check_kind(sae, target, ("topk", "relu"), skip=False, crosscode_widths=None, n_layers=None)
        check_same_width(sae, target)
        wanted = "layer_norm" if config.activation == "topk" else "none"
        if config.input_norm != wanted:
            raise InputError(
                f"input_norm is {config.input_norm!r} and activation {config.activation!r}: OpenAI's code normalises "
                f"rows where the activation is TopK, and only there; {target} can hold input_norm={wanted!r}"
            )
        write_pt(folder / FILE, _state(sae))
        return left_out(config, _KEPT, target)


def _files(source: Source) -> list[str]:
    names = [source.alone] if source.alone is not None else [name for name in source.files if "/" not in name]
    return [name for name in names if name.endswith((".pt", ".pth"))]


def _config(source: Source, file: str, n_latents: int, d: int) -> SAEConfig:
    activation = source.other(file, "activation") or "ReLU"
    settings = source.other(file, "activation_state_dict")
    settings = settings if isinstance(settings, dict) else {}
    where = f"{source.folder / file}: "
    if activation not in ("TopK", "ReLU"):
        raise InputError(f"{where}activation is {activation!a}: expected 'TopK' or 'ReLU'")
    if activation == "ReLU":
        return SAEConfig(
            d, n_latents, likely_k(n_latents), activation="relu", unit_norm_decoder=False, metadata=_facts(source, file)
        )
    if (after := settings.get("postact_fn", "ReLU")) != "ReLU":
        raise InputError(f"{where}postact_fn is {after!a}, by which activations may be negative: expected 'ReLU''")
    if not isinstance(settings.get("k"), int):
        raise InputError(f"{where}activation_state_dict has no k: expected the latents of a token of its TopK")
    return SAEConfig(
        d, n_latents, settings["k"], input_norm="layer_norm", unit_norm_decoder=False, metadata=_facts(source, file)
    )


def _facts(source: Source, file: str) -> dict[str, Any]:
    """What the names of the file and its folders say."""
    where = (source.folder / file).absolute().as_posix()
    found = re.search(r"(mlp_post_act|resid_(?:delta|post)_(?:attn|mlp))(?:_v\w+)?/autoencoders/(\d+)\.pt$", where)
    if found is None:
        return {}
    return {"model_name": "gpt2", "hook_name": f"blocks.{found[2]}.{_PLACES[found[1]]}"}


def _state(sae: SAE) -> dict[str, Any]:
    """The state dict, with counters as a new autoencoder of theirs has them."""
    stated, L = restated(sae, centred=True), sae.config.n_latents
    found: dict[str, Any] = {
        "pre_bias": sae.b_dec,
        "latent_bias": stated.b_enc,
        "stats_last_nonzero": torch.zeros(L, dtype=torch.int64, device="cpu"),
        "latents_activation_frequency": torch.ones(L, dtype=torch.float32, device="cpu"),
        "latents_mean_square": torch.zeros(L, dtype=torch.float32, device="cpu"),
        "encoder.weight": stated.W_enc(sae),
        "decoder.weight": stated.W_dec(sae).T,
        "activation": "ReLU" if sae.config.activation == "relu" else "TopK",
    }
    if sae.config.activation == "topk":
        found["activation_state_dict"] = {"k": sae.config.k, "postact_fn": "ReLU"}
    return found
