"""Format: how SAEs lie on disk in one library. A subclass says how to know it, how to read it and how to write it."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from saefast.data.shardfile import Column
from saefast.errors import InputError
from saefast.formats.source import Source
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

# A piece of a matrix that is copied at a time, so that no second copy of it is ever whole.
PIECE_BYTES = 1 << 24


class Piece(NamedTuple):
    """How a tensor of ours, or a part of it, is made of one of theirs. Its dtype and device are `load`'s affair.

    Attributes:
        file: name relative to the folder. key: of the tensor in it.
        transpose: theirs lies the other way round.
        also: what is done to it, after transposing, in float32 or float64: log, expand, ... A vector it sees as a
            whole, anything else some rows at a time.
        scale: what it is multiplied by, after that, some rows at a time: one number, or (n,) one for each row.
        shape: of theirs, where `also` changes it; None is ours, or its transpose.
        into: where it goes in ours, which is 0 elsewhere; () is everywhere.
    """

    file: str
    key: str
    transpose: bool = False
    also: Callable[[Tensor], Tensor] | None = None
    scale: float | Tensor = 1.0
    shape: tuple[int, ...] | None = None
    into: tuple[slice, ...] = ()


# What a tensor of ours is made of: a piece, several that fill parts of it, or the number that all of it is.
Made = Piece | Sequence[Piece] | float


class Described(NamedTuple):
    """What an SAE in a source is, before any weight is read.

    config: with facts that have no field of ours in its metadata, under their own names; its dtype is not looked at.
    tensors: of every parameter of ours, and of the buffers that they hold, by name: what it is made of. A buffer that
        is left out is as it begins.
    """

    config: SAEConfig
    tensors: Mapping[str, Made]


class Format:
    """One format.

    Attributes:
        name: what `saefast.load(format=...)` calls it.
        about: whose it is and what is in it, for people.
        layout: its files and their tensors, in a line that ends a sentence "it needs ...".
        signs: names of files and tensors by which a folder that is not quite of this format looks like it.
        writes: whether `write` is there; False where files are read alone.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    layout: ClassVar[str]
    signs: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[bool] = True

    def recognises(self, source: Source) -> bool:
        """Whether a source is of this format, by the names of files and tensors. No other format may say so too."""
        raise NotImplementedError

    def check(self, source: Source) -> None:
        """Raises InputError where a digest in the files says that they are damaged."""

    def describe(self, source: Source) -> Described:
        """Raises InputError where a source of this format cannot be an SAE of ours, and says why."""
        raise NotImplementedError

    def density(self, source: Source) -> Tensor | None:
        """(n_latents,) share of tokens on which each latent fires, where the files say so."""
        return None

    def write(self, sae: SAE, folder: Path) -> list[str]:
        """Writes files of this format into a folder that is there.

        Returns:
            What the format has no place for, a sentence each.

        Raises:
            InputError: the SAE cannot be said in this format at all.
        """
        raise InputError(f"format is {self.name!r}, which saefast reads and does not write: choose another")

    def write_density(self, density: Tensor, folder: Path) -> list[str]:
        """Adds how often each latent fires, a share of tokens (n_latents,), to what `write` left; returns as that."""
        return [f"how often latents fire is left out: {self.name} has no place for it"]


def column(tensor: Tensor, *, transpose: bool = False, scale: float | Tensor = 1.0) -> Column:
    """A tensor to be written (`saefast.data.shardfile.write_file`), in its own dtype and never twice in memory.

    Args:
        transpose: write (n, m) as (m, n).
        scale: what it is multiplied by first: a number, or (n,) one for each row of tensor.
    """
    tensor = tensor.detach()
    if not transpose and isinstance(scale, float) and scale == 1.0:
        return Column.of(tensor)
    shape = tuple(reversed(tensor.shape)) if transpose else tuple(tensor.shape)
    return Column(tensor.dtype, shape, _scaled_pieces(tensor, transpose, scale))


def _scaled_pieces(tensor: Tensor, transpose: bool, scale: float | Tensor) -> Iterator[Tensor]:
    turned = tensor.T if transpose else tensor
    for rows in rows_of(turned):
        piece = turned[rows]
        if isinstance(scale, Tensor):
            # Rows of tensor are the columns of what is written.
            by = scale if transpose else scale[rows].reshape(-1, *[1] * (tensor.dim() - 1))
            piece = (wide(piece) * wide(by)).to(tensor.dtype)
        elif scale != 1.0:
            piece = (wide(piece) * scale).to(tensor.dtype)
        yield piece.contiguous().cpu()


def rows_of(tensor: Tensor) -> Iterator[slice]:
    """Slices of the first dimension that are PIECE_BYTES each, or one row where that is more."""
    row = max(tensor[:1].numel(), 1) * max(tensor.element_size(), 4)
    step = max(PIECE_BYTES // row, 1)
    for begin in range(0, len(tensor), step):
        yield slice(begin, min(begin + step, len(tensor)))


def wide(tensor: Tensor) -> Tensor:
    """In float32, or float64 if it is in that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def left_out(config: SAEConfig, kept: set[str], target: str) -> list[str]:
    """A sentence for every field of a config that has been set and for which a format has no place.

    Args:
        kept: the fields that it has places for. target: what it is called.
    """
    lost = []
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.name not in kept | {"init", "dtype"} and value != default:
            lost.append(f"{field.name} = {_short(value)} is left out: {target} has no place for it")
    return lost


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def likely_k(n_latents: int, *found: Any) -> int:
    """SAEConfig.k of an SAE whose tokens have different numbers of latents: the first number that was found, or 32."""
    numbers = [n for n in found if isinstance(n, int | float) and not isinstance(n, bool) and 0 < n < 2**31]
    return max(1, min(round(numbers[0]) if numbers else 32, n_latents))


def log_threshold(threshold: Tensor) -> Tensor:
    """Logarithms of JumpReLU's thresholds. One of 0 or below lets all that is positive pass, as a tiny one does."""
    return threshold.clamp_min(torch.finfo(threshold.dtype).tiny).log()
