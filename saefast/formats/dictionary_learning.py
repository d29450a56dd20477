"""dictionary_learning's `ae.pt` and `config.json` (saprmarks/dictionary_learning; PyPI dictionary-learning 0.1).

The file is a state_dict, and the config says in {"trainer": {"dict_class": ...}} of which class. Names of tensors tell
it too, but for AutoEncoderTopK and BatchTopKSAE, which have the same. Their own loader (`load_dictionary`) is what the
numbers here are held to: it gives AutoEncoder's decoder unit rows, so that activations are measured in its norms, and
JumpReluAutoEncoder never subtracts b_dec.
"""

import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.files import write_json
from saefast.formats.format import Described, Format, Piece, left_out, likely_k, log_threshold, rows_of, wide
from saefast.formats.restated import (
    Restated,
    check_kind,
    check_same_width,
    own_facts,
    require_agreement,
    restated,
    sizes,
)
from saefast.formats.source import Source
from saefast.formats.torchfile import write_pt
from saefast.models.batchtopk import UNSET
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.schema import check

CONFIG, WEIGHTS = "config.json", "ae.pt"
_LINEAR = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "decoder.weight"}
_PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_KEPT = {
    "d_in", "n_latents", "activation", "apply_b_dec_to_input", "unit_norm_decoder", "rescale_acts_by_decoder_norm",
    "metadata",
}  # fmt: skip


class Kind(NamedTuple):
    """One of their classes: what it computes, and what its tensors are called."""

    activation: str
    names: dict[str, str]
    """Ours -> theirs. An encoder of theirs is (n_latents, d_in) where it is an nn.Linear, else (d_in, n_latents)."""
    centred: bool = True
    optional: tuple[str, ...] = ()
    """Tensors that older files lack."""


_COUNTED = ("k", "threshold")
KINDS: dict[str, Kind] = {
    "AutoEncoder": Kind("relu", _LINEAR | {"b_dec": "bias"}),
    "AutoEncoderNew": Kind("relu", _LINEAR | {"b_dec": "decoder.bias"}, centred=False),
    "GatedAutoEncoder": Kind(
        "gated",
        {"W_enc": "encoder.weight", "W_dec": "decoder.weight", "b_dec": "decoder_bias", "b_enc": "gate_bias"}
        | {"b_mag": "mag_bias", "r_mag": "r_mag"},
    ),
    "JumpReluAutoEncoder": Kind("jumprelu", _PLAIN | {"log_threshold": "threshold"}, centred=False),
    "AutoEncoderTopK": Kind("topk", _LINEAR | {"b_dec": "b_dec"}, optional=_COUNTED),
    "BatchTopKSAE": Kind("batchtopk", _LINEAR | {"b_dec": "b_dec"}, optional=_COUNTED),
    "MatryoshkaBatchTopKSAE": Kind("batchtopk", _PLAIN, optional=(*_COUNTED, "group_sizes")),
}


class DictionaryLearning(Format):
    """All classes of dictionary_learning.dictionary and .trainers but IdentityDict, which has no weights."""

    name = "dictionary_learning"
    about = "dictionary_learning: ReLU, gated, JumpReLU, TopK, BatchTopK and Matryoshka SAEs"
    layout = f'{WEIGHTS} with the tensors of one of its classes, and {CONFIG} with {{"trainer": {{"dict_class": ...}}}}'
    signs = (
        WEIGHTS,
        "encoder.weight",
        "encoder.bias",
        "decoder.weight",
        "b_dec",
        "bias",
        "decoder.bias",
        "group_sizes",
    )

    def recognises(self, source: Source) -> bool:
        file = _file(source)
        return file is not None and bool(_candidates(source, file))

    def describe(self, source: Source) -> Described:
        file = _file(source)
        if file is None:
            raise InputError(f"{source.path} holds no {WEIGHTS}: it needs {self.layout}")
        trainer = _trainer(source)
        name = _class(source, file, trainer)
        kind, entries = KINDS[name], source.entries(file)
        encoder = kind.names["W_enc"]
        n_latents, d_in = sizes(
            source, file, encoder, kind.names["b_enc"], self.layout, transpose=_turned("W_enc", encoder)
        )
        require_agreement(source.folder / CONFIG, trainer, {"activation_dim": d_in, "dict_size": n_latents})
        nested: dict[str, Any] = (
            {"matryoshka": _groups(source, file, n_latents)} if name == "MatryoshkaBatchTopKSAE" else {}
        )
        config = SAEConfig(
            d_in, n_latents, _k(source, file, kind, trainer, n_latents), activation=kind.activation,
            apply_b_dec_to_input=kind.centred, metadata=_metadata(name, trainer),
            unit_norm_decoder=name != "AutoEncoderNew", **nested,
        )  # fmt: skip
        tensors: dict[str, Any] = {
            ours: Piece(file, theirs, transpose=_turned(ours, theirs)) for ours, theirs in kind.names.items()
        }
        if kind.activation == "jumprelu":
            tensors["log_threshold"] = tensors["log_threshold"]._replace(also=log_threshold)
        if name == "AutoEncoder":
            _measure_in_norms(source, tensors)
        if kind.activation == "batchtopk":
            tensors["threshold"] = _threshold(source, file)
        elif "threshold" in entries and kind.activation == "topk":
            config.metadata["threshold"] = source.number(file, "threshold")
        return Described(config, tensors)

    def write(self, sae: SAE, folder: Path) -> list[str]:
        activations = tuple(dict.fromkeys(kind.activation for kind in KINDS.values()))
        check_kind(sae, self.name, activations, skip=False, input_norm="none", n_layers=None)
        check_same_width(sae, self.name)
        name = _class_for(sae)
        kind, kept = KINDS[name], set(_KEPT)
        said = restated(sae, kind.centred)
        write_pt(folder / WEIGHTS, _tensors(sae, name, said))
        if kind.activation in ("topk", "batchtopk"):
            kept.add("k")
        if name == "MatryoshkaBatchTopKSAE":
            kept.add("matryoshka")
        write_json(folder / CONFIG, _config(sae.config, name))
        return left_out(sae.config, kept, self.name)


def _file(source: Source) -> str | None:
    if source.alone is not None:
        return source.alone if source.alone.endswith(".pt") else None
    return WEIGHTS if WEIGHTS in source.files else None


def _turned(ours: str, theirs: str) -> bool:
    """Whether a matrix of theirs has a latent in a column."""
    return (ours == "W_enc" and theirs == "W_enc") or (ours == "W_dec" and theirs == "decoder.weight")


def _trainer(source: Source) -> dict[str, Any]:
    """What the config says of training; {} where there is no config of theirs."""
    if CONFIG not in source.files:
        return {}
    found = source.json(CONFIG).get("trainer")
    return found if isinstance(found, dict) else {}


def _candidates(source: Source, file: str) -> list[str]:
    """The classes whose tensors a file has, no more and no less."""
    found = {name: entry.shape for name, entry in source.entries(file).items()}
    names = []
    for name, kind in KINDS.items():
        needed = set(kind.names.values())
        of_latents = kind.activation != "jumprelu" or len(found.get("threshold", ())) == 1
        grouped = name != "MatryoshkaBatchTopKSAE" or "group_sizes" in found
        if needed <= set(found) and not set(found) - needed - set(kind.optional) and of_latents and grouped:
            names.append(name)
    return names


def _class(source: Source, file: str, trainer: dict[str, Any]) -> str:
    fit, said = _candidates(source, file), trainer.get("dict_class")
    where = f"{source.folder / file}"
    if not fit:
        raise InputError(
            f"{where} has the tensors {', '.join(source.entries(file)) or 'none'}, which no class of "
            f"dictionary_learning has: expected those of one of {', '.join(KINDS)}"
        )
    if said is not None and said not in fit:
        raise InputError(
            f"{where} has the tensors of {' or '.join(fit)}, but {source.folder / CONFIG} says dict_class {said!r}: "
            "one of them is of another SAE"
        )
    if said is None and len(fit) > 1:
        raise InputError(
            f"{where} has the tensors of {' and of '.join(fit)}: put its {CONFIG} beside it, whose dict_class tells"
        )
    return str(said or fit[0])


def _k(source: Source, file: str, kind: Kind, trainer: dict[str, Any], n_latents: int) -> int:
    if kind.activation not in ("topk", "batchtopk"):
        return likely_k(n_latents, trainer.get("target_l0"))
    said = trainer.get("k")
    if "k" not in source.entries(file):
        if said is None:
            raise InputError(f"{source.folder / file} has no k, and no {CONFIG} beside it says one: add it to that")
        found: int = check(said, int, f"{source.folder / CONFIG}: trainer: k")
        return found
    held = int(source.number(file, "k"))
    if said is not None and said != held:
        # Their trainer anneals it, so that a checkpoint has another.
        message = f"{source.folder / file} was trained to serve k = {held}, its {CONFIG} says {said}: {held} is served"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return held


def _threshold(source: Source, file: str) -> float:
    found = source.number(file, "threshold") if "threshold" in source.entries(file) else UNSET
    if found < 0:
        warnings.warn(
            f"{source.folder / file} has no threshold yet: a batch's k · B best are served, where dictionary_learning "
            "lets every positive latent pass; train on, or calibrate it (saefast.as_jumprelu)",
            RuntimeWarning,
            stacklevel=2,
        )
        return UNSET
    return found


def _groups(source: Source, file: str, n_latents: int) -> tuple[int, ...]:
    sizes = source.values(file, "group_sizes").tolist()
    ends, end = [], 0
    for size in sizes if isinstance(sizes, list) else [sizes]:
        end += int(size)
        ends.append(end)
    if end != n_latents:
        raise InputError(f"{source.folder / file}: group_sizes are {sizes}, expected sizes that add up to {n_latents}")
    return tuple(ends)


def _metadata(name: str, trainer: dict[str, Any]) -> dict[str, Any]:
    trainer = dict(trainer)
    facts = {"dict_class": name, "trainer": trainer, "model_name": trainer.get("lm_name")}
    # A module's path where it has one: the layer alone names no hook.
    facts |= {"hf_hook_name": trainer.get("submodule_name"), "hook_layer": trainer.get("layer")}
    ours = trainer.pop("metadata", None)
    facts = {key: value for key, value in facts.items() if value not in (None, {})}
    return facts | (ours if isinstance(ours, dict) else {})


def _measure_in_norms(source: Source, tensors: dict[str, Piece]) -> None:
    """As AutoEncoder.from_pretrained does where decoder rows are not at unit norm."""
    piece = tensors["W_dec"]
    W_dec = source.values(piece.file, piece.key).T
    norms = torch.cat([wide(W_dec[rows]).norm(dim=1) for rows in rows_of(W_dec)])
    if torch.allclose(norms, torch.ones_like(norms)) or not bool((norms > 0).all()):
        return
    for name, scale in (("W_enc", norms), ("b_enc", norms), ("W_dec", 1 / norms)):
        tensors[name] = tensors[name]._replace(scale=scale)


def _class_for(sae: SAE) -> str:
    config = sae.config
    match config.activation:
        case "relu":
            # Activations of AutoEncoder come back in units of norms: one with free rows is the other class.
            free = not torch.allclose(wide(sae.decoder_norms()), torch.ones((), dtype=torch.float32, device=sae.device))
            return "AutoEncoderNew" if free or not config.apply_b_dec_to_input else "AutoEncoder"
        case "batchtopk":
            return "MatryoshkaBatchTopKSAE" if config.matryoshka is not None else "BatchTopKSAE"
        case activation:
            return next(name for name, kind in KINDS.items() if kind.activation == activation)


def _tensors(sae: SAE, name: str, said: Restated) -> dict[str, Tensor]:
    """Their state_dict."""
    kind, found = KINDS[name], {}
    ours = {"W_enc": said.W_enc(sae), "W_dec": said.W_dec(sae), "b_enc": said.b_enc, "b_dec": sae.b_dec} | said.own
    for mine, theirs in kind.names.items():
        tensor = ours[mine].detach()
        tensor = wide(tensor).exp().to(tensor.dtype) if mine == "log_threshold" else tensor
        found[theirs] = tensor.T if _turned(mine, theirs) else tensor
    if kind.activation in ("topk", "batchtopk"):
        found["k"] = torch.tensor(sae.config.k, dtype=torch.int32, device="cpu")
        kept = sae.config.metadata.get("threshold", UNSET)
        threshold = sae.threshold if kind.activation == "batchtopk" else kept
        found["threshold"] = torch.as_tensor(threshold, dtype=torch.float32, device="cpu")
    if name == "MatryoshkaBatchTopKSAE":
        ends = sorted({0, *sae.config.matryoshka, sae.config.n_latents})
        found["group_sizes"] = torch.tensor(ends, dtype=torch.int64, device="cpu").diff()
    return found


def _config(config: SAEConfig, name: str) -> dict[str, Any]:
    facts = own_facts(config)
    trainer = facts.pop("trainer", {})
    facts.pop("dict_class", None)
    trainer = trainer if isinstance(trainer, dict) else {}
    about = {
        "dict_class": name, "activation_dim": config.d_in, "dict_size": config.n_latents,
        "layer": facts.get("hook_layer"), "lm_name": facts.get("model_name"),
        "submodule_name": facts.get("hf_hook_name"),
    }  # fmt: skip
    if config.activation in ("topk", "batchtopk"):
        about["k"] = config.k
    return {"trainer": trainer | about | ({"metadata": facts} if facts else {}), "buffer": {}}
