"""Qwen Scope (arXiv 2605.11887): TopK SAEs of Qwen 3 and 3.5, a file layer{n}.sae.pt for every layer.

    W_enc (n_latents, d)  W_dec (d, n_latents)  b_enc (n_latents,)  b_dec (d,)

Nothing is subtracted from inputs. How many latents a token has is in the repository's name alone, as in
Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50; saefast writes it into the file besides, as k.
"""

import re
from pathlib import Path
from typing import Any

from saefast.errors import InputError
from saefast.formats.format import Described, Format, Made, Piece, left_out
from saefast.formats.restated import check_kind, check_same_width, restated, sizes
from saefast.formats.source import Source
from saefast.formats.torchfile import write_pt
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

_FILE = re.compile(r"layer(\d+)\.sae\.pt")
_TENSORS = {"W_enc", "W_dec", "b_enc", "b_dec"}
_REPOSITORY = re.compile(r"SAE-Res-(Qwen[\w.\-]+?)-W(\d+)K-L0_(\d+)")
_KEPT = {
    "d_in", "n_latents", "k", "activation", "apply_b_dec_to_input", "unit_norm_decoder",
    "rescale_acts_by_decoder_norm",
}  # fmt: skip


class QwenScope(Format):
    """See the module."""

    name = "qwen_scope"
    about = "Qwen Scope: TopK SAEs of Qwen 3 and 3.5, one .sae.pt file a layer"
    layout = "layer{n}.sae.pt with W_enc (n_latents, d), W_dec (d, n_latents), b_enc and b_dec"
    signs = ("layer0.sae.pt", "W_enc", "W_dec", "b_enc", "b_dec")

    def recognises(self, source: Source) -> bool:
        files = _files(source)
        return bool(files) and source.entries(files[0]).keys() >= _TENSORS

    def describe(self, source: Source) -> Described:
        files = _files(source)
        if len(files) != 1:
            some = f", such as {source.folder / files[0]}" if files else ""
            raise InputError(f"{source.path} holds SAEs of {len(files)} layers, one file each: name one of them{some}")
        file = files[0]
        n_latents, d = sizes(source, file, "W_enc", "b_enc", self.layout)
        layer = _FILE.fullmatch(file)
        k, facts = _k_and_facts(source, file, layer[1] if layer else "0")
        config = SAEConfig(
            d, n_latents, k, apply_b_dec_to_input=False, unit_norm_decoder=False, metadata=facts
        )  # fmt: skip
        tensors: dict[str, Made] = {
            "W_enc": Piece(file, "W_enc"),
            "W_dec": Piece(file, "W_dec", transpose=True),
            "b_enc": Piece(file, "b_enc"),
            "b_dec": Piece(file, "b_dec"),
        }
        return Described(config, tensors)

    def write(self, sae: SAE, folder: Path) -> list[str]:
        target = "Qwen Scope"
        check_kind(sae, target, ("topk",), input_norm="none", skip=False, crosscode_widths=None, n_layers=None)
        check_same_width(sae, target)
        stated = restated(sae, centred=False)
        tensors: dict[str, Any] = {
            "W_enc": stated.W_enc(sae),
            "W_dec": stated.W_dec(sae).T,
            "b_enc": stated.b_enc,
            "b_dec": sae.b_dec,
            "k": sae.config.k,
        }
        layer = re.search(r"\b(?:blocks|layers)\.(\d+)\b", str(sae.config.metadata.get("hook_name")))
        write_pt(folder / f"layer{layer[1] if layer else 0}.sae.pt", tensors)
        return left_out(sae.config, _KEPT, target)


def _files(source: Source) -> list[str]:
    names = [source.alone] if source.alone is not None else list(source.files)
    return [name for name in names if _FILE.fullmatch(name)]


def _k_and_facts(source: Source, file: str, layer: str) -> tuple[int, dict[str, Any]]:
    """What the file, or else the names of folders, say. Raises InputError where neither says k."""
    where = "/".join(source.folder.absolute().parts[-9:])
    repository, k = _REPOSITORY.search(where), source.other(file, "k")
    facts: dict[str, Any] = {"hook_name": f"blocks.{layer}.hook_resid_post", "hf_hook_name": f"model.layers.{layer}"}
    if repository is not None:
        facts["model_name"] = f"Qwen/{repository[1]}"
        k = int(repository[3]) if k is None else k
    elif k is None and (found := re.search(r"L0_(\d+)", where)):
        k = int(found[1])
    if k is None:
        raise InputError(
            f"{source.folder / file} does not say how many latents a token has, nor does a folder above it: put it "
            "into one that is named after its repository, such as SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
        )
    if not isinstance(k, int):
        raise InputError(f"{source.folder / file}: k is {k!a}: expected a whole number")
    return k, facts
