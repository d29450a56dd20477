"""An SAE said in another way: what other formats cannot say is folded into weights, so that the codes stay the same."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.formats.format import Piece, rows_of, wide
from saefast.formats.source import Source
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE


class Restated(NamedTuple):
    """The tensors of an SAE that measures activations in units of 1. The matrices are its own, to be scaled by rows."""

    b_enc: Tensor
    own: dict[str, Tensor]
    """The architecture's parameters besides the four."""
    enc_scale: Tensor | float
    """(n_latents,) or 1: what rows of W_enc are to be multiplied by."""
    dec_scale: Tensor | float

    def W_dec(self, sae: SAE) -> Tensor:
        """A copy only where there is something to scale."""
        return _scaled(sae.W_dec.detach(), self.dec_scale)

    def W_enc(self, sae: SAE) -> Tensor:
        return _scaled(sae.W_enc.detach(), self.enc_scale)


def restated(sae: SAE, centred: bool) -> Restated:
    """The SAE with decoder norms folded in, and with biases for x - b_dec or for x, whichever its own are for.

    Args:
        centred: b_dec is subtracted from what is encoded.
    """
    b_enc, own = sae.b_enc.detach(), {name: value.detach() for name, value in sae.own().items()}
    if centred is not sae.config.apply_b_dec_to_input:
        shift = product(sae.W_enc.detach(), sae.b_dec.detach()) * (1 if centred else -1)
        b_enc = (wide(b_enc) + shift).to(b_enc.dtype)
        if "b_mag" in own:
            magnitude = wide(own["r_mag"]).exp() * shift
            own["b_mag"] = (wide(own["b_mag"]) + magnitude).to(b_enc.dtype)
    if not sae.architecture.ranks_by_norm:
        return Restated(b_enc, own, 1.0, 1.0)
    units = wide(sae._units().detach())
    return Restated((wide(b_enc) * units).to(b_enc.dtype), own, units, 1 / units)


def sizes(source: Source, file: str, W_enc: str, b_enc: str, layout: str, transpose: bool = False) -> tuple[int, int]:
    """n_latents and d_in by the encoder of a file: a bias tells which of a matrix's sides is which.

    Args:
        W_enc: (n_latents, d_in), or (d_in, n_latents) with transpose. layout: what files of the format need.
    """
    entries = source.entries(file)
    shape = entries[W_enc].shape if W_enc in entries else ()
    if len(shape) != 2:
        raise InputError(f"{source.folder / file} has no matrix {W_enc}: it needs {layout}")
    n_latents, d_in = reversed(shape) if transpose else shape
    said = entries[b_enc].shape if b_enc in entries else ()
    # Where it lies the wrong way round, the seam says so of the matrix itself.
    return (d_in, n_latents) if said == (d_in,) else (n_latents, d_in)


def require_agreement(config: Path, said: dict[str, Any], found: dict[str, int]) -> None:
    """Raises InputError where sizes that a config states are not those of the tensors: it is of another SAE.

    Args:
        said: what the config holds. found: the sizes by its own names for them.
    """
    for name, size in found.items():
        if name in said and said[name] != size:
            message = f"{name} is {said[name]!a}, but the tensors beside it have {size}: one is of another SAE"
            raise InputError(f"{config}: {message}")


def uncentred(source: Source, file: str, W_enc: str, b_enc: str, b_dec: str, transpose: bool = False) -> Piece:
    """b_enc of what their files encode as x - b_dec, for encoding x itself.

    Args:
        W_enc: (n_latents, d_in), or (d_in, n_latents) with transpose.
    """

    def shifted(bias: Tensor) -> Tensor:
        W = source.values(file, W_enc)
        return bias - product(W.T if transpose else W, source.values(file, b_dec))

    return Piece(file, b_enc, also=shifted)


def both_signs(piece: Piece, n_latents: int) -> tuple[Piece, Piece]:
    """A tensor of latents that act with their sign: as it is, and below it for activations that are negative there.

    Of the two pre-activations of a latent one is positive, so that the k best of all of them are those with the largest
    absolute value, and what they decode to is the same.
    """
    first, second = slice(0, n_latents), slice(n_latents, 2 * n_latents)
    return piece._replace(into=(first,)), piece._replace(scale=-1 * piece.scale, into=(second,))


def product(W: Tensor, x: Tensor) -> Tensor:
    """W (n, d) x (d,) in float32 or finer, some rows at a time."""
    return torch.cat([wide(W[rows]) @ wide(x) for rows in rows_of(W)])


def check_kind(sae: SAE, target: str, activations: tuple[str, ...], **wanted: Any) -> None:
    """Raises InputError where an SAE is of a kind that a format does not know.

    Args:
        target: whose format it is. activations: those that it knows.
        wanted: fields of the config, and the only values that it knows of them.
    """
    config = sae.config
    if config.activation not in activations:
        hint = ""
        if config.activation in ("topk", "batchtopk", "groupmax") and "jumprelu" in activations:
            hint = "; saefast.as_jumprelu(sae, rows) makes one with thresholds of it"
        raise InputError(
            f"activation is {config.activation!r}, which {target} does not know: it has {', '.join(activations)}{hint}"
        )
    for name, value in wanted.items():
        if getattr(config, name) != value:
            raise InputError(f"{name} is {getattr(config, name)!r}, which {target} cannot say: expected {value!r}")


def check_same_width(sae: SAE, target: str) -> None:
    """Raises InputError for a transcoder between spaces of different widths."""
    if sae.d_out != sae.config.d_in:
        raise InputError(f"d_out is {sae.d_out} and d_in {sae.config.d_in}: {target} knows SAEs of one width alone")


def own_facts(config: SAEConfig) -> dict[str, Any]:
    """Facts in the metadata that are told by whoever reads a file, and so not written into one."""
    return {name: value for name, value in config.metadata.items() if name not in ("format", "source")}


def _scaled(W: Tensor, scale: Tensor | float) -> Tensor:
    if not isinstance(scale, Tensor):
        return W
    made = torch.empty_like(W, dtype=W.dtype, device=W.device)
    for rows in rows_of(W):
        made[rows] = wide(W[rows]) * scale[rows, None]
    return made
