"""Checkpoints of BatchTopK's repository, `sae.pt` and `config.json` (bartbussmann/BatchTopK, arXiv 2412.06410).

A state_dict of plain matrices, the encoder (d_in, n_latents), beside the run's settings with whatever is no number as
text. The class follows from the setting "sae_type". topk and batchtopk never add b_enc, though files have one;
jumprelu does not subtract b_dec; with "input_unit_norm" every token is brought to mean 0 and standard deviation 1.
batchtopk has no threshold: a batch's best are taken at inference, too. Files of the later matryoshka_sae repository,
which keeps one, are another format (`saefast.formats.matryoshka_sae`).
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from saefast.errors import InputError
from saefast.files import write_json
from saefast.formats.format import Described, Format, Piece, left_out, likely_k
from saefast.formats.restated import check_kind, check_same_width, own_facts, require_agreement, restated, sizes
from saefast.formats.source import Source
from saefast.formats.torchfile import write_pt
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.schema import check

CONFIG, WEIGHTS = "config.json", "sae.pt"
LOG_THRESHOLD, THRESHOLD = "jumprelu.log_threshold", "threshold"
_NAMES = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
# "sae_type" without its hyphens, as scripts of both repositories write it, and what that is here.
ACTIVATIONS = {"vanilla": "relu", "topk": "topk", "batchtopk": "batchtopk", "jumprelu": "jumprelu"}
_WITHOUT_B_ENC = ("topk", "batchtopk")
KEPT = {
    "d_in", "n_latents", "k", "activation", "apply_b_dec_to_input", "unit_norm_decoder", "rescale_acts_by_decoder_norm",
    "input_norm", "metadata",
}  # fmt: skip
# What a class of theirs reads when it is made, at the value that the repository begins with.
_SETTINGS: dict[str, Any] = {
    "seed": 49, "l1_coeff": 0, "n_batches_to_dead": 5, "top_k_aux": 512, "aux_penalty": 1 / 32, "bandwidth": 0.001,
    "device": "cpu",
}  # fmt: skip


class BatchTopKRepo(Format):
    """VanillaSAE, TopKSAE, BatchTopKSAE and JumpReLUSAE."""

    name = "batchtopk"
    about = "the BatchTopK paper's repository: ReLU, TopK, BatchTopK and JumpReLU SAEs"
    layout = f"{WEIGHTS} with W_enc (d_in, n_latents), W_dec, b_enc and b_dec, and {CONFIG} with act_size and dict_size"
    signs = (WEIGHTS, CONFIG, "W_enc", "W_dec", "b_enc", "b_dec", LOG_THRESHOLD)
    types = ACTIVATIONS
    """The values of "sae_type", without hyphens, and what each is here."""

    def recognises(self, source: Source) -> bool:
        file = state_file(source)
        return file is not None and set(source.entries(file)) - {LOG_THRESHOLD} == set(_NAMES)

    def describe(self, source: Source) -> Described:
        file = state_file(source)
        if file is None:
            raise InputError(f"{source.path} holds no {WEIGHTS} and {CONFIG} of this kind: it needs {self.layout}")
        settings = source.json(CONFIG)
        n_latents, d_in = sizes(source, file, "W_enc", "b_enc", self.layout, transpose=True)
        kind = self._type(source, settings)
        # Nested dictionaries are as large as their groups.
        stated = {"act_size": d_in} | ({"dict_size": n_latents} if kind in ACTIVATIONS else {})
        require_agreement(source.folder / CONFIG, settings, stated)
        activation = self.types[kind]
        config = SAEConfig(
            d_in, n_latents, self._k(source, settings, activation, n_latents), activation=activation,
            apply_b_dec_to_input=activation != "jumprelu", metadata=metadata_of(settings),
            input_norm="layer_norm" if settings.get("input_unit_norm", False) else "none",
            **self.more(source, file, kind, settings),
        )  # fmt: skip
        tensors: dict[str, Any] = {name: Piece(file, name, transpose=name == "W_enc") for name in _NAMES}
        if activation in _WITHOUT_B_ENC:
            tensors["b_enc"] = 0.0
        if activation == "jumprelu":
            tensors["log_threshold"] = Piece(file, LOG_THRESHOLD)
        if activation == "batchtopk":
            tensors["threshold"] = self.threshold(source, file)
        return Described(config, tensors)

    def more(self, source: Source, file: str, kind: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Further fields of the SAEConfig."""
        return {}

    def threshold(self, source: Source, file: str) -> float:
        """What batchtopk serves by; -1 where the batch decides."""
        return -1.0

    def write(self, sae: SAE, folder: Path) -> list[str]:
        check_kind(sae, self.name, tuple(self.types.values()), skip=False, n_layers=None)
        check_same_width(sae, self.name)
        if sae.config.input_norm == "constant_norm":
            raise InputError(f"input_norm is 'constant_norm', which {self.name} cannot say: it has 'layer_norm' alone")
        activation = sae.config.activation
        said = restated(sae, activation != "jumprelu")
        if activation in _WITHOUT_B_ENC and bool((said.b_enc != 0).any()):
            raise InputError(
                f"b_enc is not 0, and {activation} in {self.name}'s code adds none: write another format, such as "
                "'dictionary_learning'"
            )
        tensors = {
            "b_dec": sae.b_dec, "b_enc": said.b_enc, "W_enc": said.W_enc(sae).T, "W_dec": said.W_dec(sae),
        } | self.own_tensors(sae, said.own)  # fmt: skip
        write_pt(folder / WEIGHTS, tensors)
        write_json(folder / CONFIG, self.settings(sae))
        return left_out(sae.config, self.kept(sae.config), self.name) + self.lost(sae)

    def own_tensors(self, sae: SAE, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors besides the four."""
        return {LOG_THRESHOLD: own["log_threshold"]} if sae.config.activation == "jumprelu" else {}

    def kept(self, config: SAEConfig) -> set[str]:
        return KEPT

    def lost(self, sae: SAE) -> list[str]:
        """What has no place besides fields of the config."""
        if sae.config.activation != "batchtopk" or (threshold := float(sae.get_buffer("threshold"))) < 0:
            return []
        return [f"threshold = {threshold:.4g} is left out: {self.name} takes the best of a batch"]

    def settings(self, sae: SAE) -> dict[str, Any]:
        """Their config.json: what their classes read, and what ours knows besides."""
        config, facts = sae.config, own_facts(sae.config)
        theirs = facts.pop("settings", {})
        hook = facts.get("hook_name")
        about = {
            "sae_type": next(kind for kind, activation in self.types.items() if activation == config.activation),
            "act_size": config.d_in, "dict_size": config.n_latents, "top_k": config.k,
            "input_unit_norm": config.input_norm == "layer_norm", "dtype": f"torch.{config.dtype}",
            "model_name": facts.get("model_name"), "hook_point": hook,
        }  # fmt: skip
        if config.activation not in _WITHOUT_B_ENC:
            del about["top_k"]
        before = _SETTINGS | {"top_k": config.k, "name": hook or "saefast"}
        return before | (theirs if isinstance(theirs, dict) else {}) | about | ({"metadata": facts} if facts else {})

    def _type(self, source: Source, settings: dict[str, Any]) -> str:
        said = settings.get("sae_type")
        kind = str(said).lower().replace("-", "").replace("_", "")
        if kind not in self.types:
            raise InputError(f"{source.folder / CONFIG}: sae_type is {said!r}, expected one of {', '.join(self.types)}")
        thresholds = LOG_THRESHOLD in source.entries(str(state_file(source)))
        if thresholds is not (self.types[kind] == "jumprelu"):
            has = "has" if thresholds else "lacks"
            raise InputError(f"{source.folder}: sae_type is {said!r}, but the file {has} {LOG_THRESHOLD}: one is wrong")
        return kind

    def _k(self, source: Source, settings: dict[str, Any], activation: str, n_latents: int) -> int:
        if activation not in _WITHOUT_B_ENC:
            return likely_k(n_latents)
        found: int = check(settings.get("top_k"), int, f"{source.folder / CONFIG}: top_k")
        return found


def state_file(source: Source) -> str | None:
    """The .pt file of a source whose config is that of such a run; None elsewhere."""
    file = WEIGHTS if source.alone is None else source.alone
    if file not in source.files or not file.endswith(".pt") or CONFIG not in source.files:
        return None
    return file if {"act_size", "dict_size"} <= source.json(CONFIG).keys() else None


def metadata_of(settings: dict[str, Any]) -> dict[str, Any]:
    ours = settings.get("metadata")
    theirs = {name: value for name, value in settings.items() if name != "metadata"}
    facts = {"settings": theirs, "model_name": settings.get("model_name"), "hook_name": settings.get("hook_point")}
    found = {name: value for name, value in facts.items() if value is not None}
    return found | (ours if isinstance(ours, dict) else {})
