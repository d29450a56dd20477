"""for_saebench: an SAE as SAEBench's and sae-probes' evaluations take one, without importing either.

They ask for dense codes (their interface; mind the size), a decoder with rows of norm 1, W_enc the other way round, and
a config with the fields of SAELens 3. Written against SAEBench 0.6.0 and sae-probes 0.4.2.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from saefast.errors import InputError
from saefast.models.sae import SAE
from saefast.typed import typed


@dataclass
class SAEBenchConfig:
    """What SAEBench reads of an SAE. It adds attributes of its own to the object; `to_dict` leaves those out.

    Attributes:
        model_name: what TransformerLens calls the model.
        hook_name: TransformerLens' name of the place, `blocks.4.hook_resid_post`.
        hook_layer: the block's number.
        architecture: how latents are chosen, in our words (`SAEConfig.activation`).
        training_tokens: -1 where it is not known.
    """

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    context_size: int | None = None
    hook_head_index: int | None = None
    architecture: str = ""
    apply_b_dec_to_input: bool = False
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = "relu"
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    dtype: str = "float32"
    device: str = "cpu"
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -1
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class SAEBenchSAE(nn.Module):
    """What `for_saebench` returns. Weights are the SAE's own; only rows of a decoder that are not of norm 1 are copied.

    Activations are in units of such rows: f' = f · ‖W_dec[i]‖, so that f' and the rows of norm 1 decode to the same.
    A row of zeros becomes a direction that its latent, always 0 then, never adds.
    """

    # They switch reshaping of attention heads off and on again: there is none here, rows come flat.
    hook_z_reshaping_mode = False

    def __init__(self, sae: SAE, cfg: SAEBenchConfig) -> None:
        super().__init__()
        self.sae, self.cfg = sae, cfg
        self._rescale()

    @torch.no_grad()
    def _rescale(self) -> None:
        """The decoder's norms and its rows of norm 1; None where they are 1 already."""
        norms = self.sae.decoder_norms()
        near = 1e-2 if self.sae.dtype.itemsize == 2 else 1e-5
        self.norms: Tensor | None = None
        self.decoder: Tensor | None = None
        if bool(((norms - 1).abs() <= near).all()):
            return
        self.norms = norms
        self.decoder = self.sae.W_dec / self._factors(norms)[:, None]
        self.decoder[norms == 0, 0] = 1

    @staticmethod
    def _factors(norms: Tensor) -> Tensor:
        """Norms, and 1 where they are 0: cosines of encoder rows are to stay defined."""
        return torch.where(norms > 0, norms, 1)

    def _in_units(self, W: Tensor) -> Tensor:
        return W if self.norms is None else (self._factors(self.norms) * W.T).T

    @property
    def W_enc(self) -> nn.Parameter:
        """(d_in, d_sae), in the units of `encode`."""
        return nn.Parameter(self._in_units(self.sae.W_enc.detach()).T, requires_grad=False)

    @property
    def b_enc(self) -> nn.Parameter:
        """(d_sae,), in the units of `encode`."""
        return nn.Parameter(self._in_units(self.sae.b_enc.detach()), requires_grad=False)

    @property
    def W_dec(self) -> nn.Parameter:
        """(d_sae, d_in), rows of norm 1."""
        held = self.sae.W_dec if self.decoder is None else self.decoder
        return nn.Parameter(held.detach(), requires_grad=False)

    @property
    def b_dec(self) -> nn.Parameter:
        return self.sae.b_dec

    @property
    def device(self) -> torch.device:
        return self.sae.device

    @property
    def dtype(self) -> torch.dtype:
        return self.sae.dtype

    def encode(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_sae) dense, in the SAE's dtype."""
        f = self.sae.encode(x)
        if self.norms is not None and not self.sae.architecture.ranks_by_norm:
            f = f * self.norms  # where it ranks by norm, activations are in those units already
        elif self.norms is not None:
            f = f * (self.norms > 0)
        return f.to(self.dtype)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """(..., d_sae) -> (..., d_in)."""
        if self.decoder is None and not self.sae.architecture.ranks_by_norm:
            return self.sae.decode(feature_acts)
        return feature_acts.to(self.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> its reconstruction, without a dense code."""
        x_hat: Tensor = self.sae(x).x_hat
        return x_hat

    def _apply(self, fn: Any, recurse: bool = True) -> "SAEBenchSAE":
        """What .to() and its like do."""
        super()._apply(fn, recurse)
        self._rescale()
        self.cfg.dtype, self.cfg.device = str(self.dtype).removeprefix("torch."), str(self.device)
        return self

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """Nothing to switch off."""

    def turn_on_forward_pass_hook_z_reshaping(self) -> None:
        """Nothing to switch on."""


@typed
def for_saebench(
    sae: SAE, model_name: str | None = None, hook_name: str | None = None, *, hook_layer: int | None = None,
    context_size: int | None = None,
) -> SAEBenchSAE:  # fmt: skip
    """An SAE for SAEBench's `selected_saes` and for sae-probes: [("my_sae", for_saebench(sae, "gpt2", ...))].

    Args:
        sae: one that reconstructs what it reads, from its code alone. It is not copied, nor changed until `.to()`.
        model_name: TransformerLens' name of the model; None is the one in the SAE's metadata.
        hook_name: TransformerLens' name of the place; None is the one in the SAE's metadata, of which `layers.4` and
            `model.layers.4` are the residual stream after block 4.
        hook_layer: the block's number; None is the first number in hook_name.
        context_size: tokens of a text that autointerp looks at; None is the one in the SAE's metadata.

    Raises:
        InputError: a transcoder or crosscoder, an SAE with a skip or an input norm; a name that is not known.
    """
    _check_kind(sae)
    config, about = sae.config, sae.config.metadata
    model = model_name or about.get("model_name")
    if not model:
        raise InputError("model_name is None, as in the SAE's metadata: say what TransformerLens calls the model")
    hook = _lens_name(hook_name or about.get("hook_name"))
    number = re.search(r"\d+", hook)
    if hook_layer is None and number is None:
        raise InputError(f"hook_name {hook!r} has no number of a block in it: give hook_layer")
    length = context_size or about.get("context_size")
    cfg = SAEBenchConfig(
        model_name=str(model), d_in=config.d_in, d_sae=config.n_latents, hook_name=hook,
        hook_layer=int(number[0]) if hook_layer is None and number is not None else int(hook_layer or 0),
        context_size=None if length is None else int(length), architecture=config.activation,
        apply_b_dec_to_input=config.apply_b_dec_to_input, prepend_bos=bool(about.get("prepend_bos", True)),
        dtype=str(sae.dtype).removeprefix("torch."), device=str(sae.device),
        dataset_path=str(about.get("dataset_path") or ""), neuronpedia_id=about.get("neuronpedia_id"),
    )  # fmt: skip
    return SAEBenchSAE(sae, cfg)


def _check_kind(sae: SAE) -> None:
    architecture = sae.architecture
    if architecture.has_target or sae.d_out != sae.config.d_in:
        raise InputError("sae is a transcoder: SAEBench puts what an SAE decodes to back where its input was from")
    if len(architecture.parts()) > 1:
        raise InputError("sae is a crosscoder: SAEBench knows no SAE of several places at once")
    row = torch.zeros(1, sae.config.d_in, dtype=sae.dtype, device=sae.device)
    with torch.no_grad():
        if architecture.row_norm(row) is not None or architecture.direct(row, sae.own()) is not None:
            raise InputError(
                "sae decodes with its input (a skip, or an input norm that is undone): SAEBench has the code alone"
            )


def _lens_name(hook: Any) -> str:
    """TransformerLens' name of a hook."""
    if not hook:
        raise InputError("hook_name is None, as in the SAE's metadata: give it, for example blocks.4.hook_resid_post")
    block = re.fullmatch(r"(?:\w+\.)*(?:layers|layer|h|blocks)\.(\d+)", str(hook))
    if block is not None:
        return f"blocks.{block[1]}.hook_resid_post"
    if "hook_" not in str(hook):
        raise InputError(
            f"hook_name is {str(hook)!r}: SAEBench takes TransformerLens' name of the place, for example "
            "blocks.4.hook_resid_post; give it"
        )
    return str(hook)
