"""Tensors of ours made of those in a source: all shapes are checked before memory is taken, then each is read."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.formats.format import Described, Made, Piece, rows_of, wide
from saefast.formats.source import Source
from saefast.models.config import DTYPES, SAEConfig
from saefast.placement import require_memory

Shapes = Mapping[str, tuple[int, ...]]


def pieces(given: Made) -> Sequence[Piece]:
    """What a tensor is made of; () where it is a number."""
    if isinstance(given, Piece):
        return (given,)
    return () if isinstance(given, int | float) else given


def made(
    source: Source, described: Described, config: SAEConfig, place: torch.device, *, map: bool, verify: bool
) -> dict[str, Tensor]:
    """Parameters and buffers of an SAE, by name, on their device.

    Args:
        config: the one in `described`, with the dtype that parameters get.
        map, verify: see `saefast.formats.load`.

    Raises:
        InputError: a tensor is not there, of another shape or not finite, or cannot be mapped; not enough memory.
    """
    architecture, dtype = config.architecture(), DTYPES[config.dtype]
    shapes = architecture.shapes()
    _check(source, described, shapes)
    # From here on sizes are those of the files. The rest would be made in those that a config may claim.
    own = {name: tuple(parameter.shape) for name, parameter in architecture.parameters().items()}
    kept = architecture.buffers()
    _check(source, described, own)
    held = {name: tuple(buffer.shape) for name, buffer in kept.items() if name in described.tensors}
    _check(source, described, held)
    assert described.tensors.keys() <= shapes.keys() | own.keys() | kept.keys()
    found = {name: buffer.to(place) for name, buffer in kept.items()}
    everything = {**shapes, **own}
    if not map:
        needed = sum(math.prod(shape) for shape in everything.values()) * dtype.itemsize
        require_memory(place, needed, f"the SAE in {source.path}")
    for name, shape in everything.items():
        given = described.tensors[name]
        if map and len(shape) == 2:
            found[name] = _mapped(source, name, given, dtype, place)
            _check_finite(found[name], source, name, verify)
        else:
            found[name] = _filled(source, name, given, torch.empty(shape, dtype=dtype, device=place), verify)
    for name in held:
        found[name] = _filled(source, name, described.tensors[name], torch.empty_like(found[name]), False)
    return found


def _check(source: Source, described: Described, shapes: Shapes) -> None:
    """Raises InputError where one of these tensors is not in the files, or not of its shape."""
    for name, shape in shapes.items():
        parts = pieces(described.tensors[name])
        assert parts or len(shape) < 2, f"{name} is a matrix, and comes from a file"
        for piece in parts:
            ours = torch.empty(shape, dtype=torch.uint8, device="meta")[piece.into].shape
            _check_one(source, piece, tuple(ours))


def _check_one(source: Source, piece: Piece, ours: tuple[int, ...]) -> None:
    file, entries = source.folder / piece.file, source.entries(piece.file)
    turned = tuple(reversed(ours))
    wanted = piece.shape if piece.shape is not None else turned if piece.transpose else ours
    if piece.key not in entries:
        near = ", ".join(f"{key} {entry.shape}" for key, entry in list(entries.items())[:12]) or "no tensors"
        raise InputError(f"{file} lacks the tensor {piece.key!a} of shape {wanted}; it holds {near}")
    shape, dtype = entries[piece.key]
    if not dtype.is_floating_point and piece.also is None:
        raise InputError(f"{file}: {piece.key} is of {dtype}: expected weights in one of {', '.join(DTYPES)}")
    if shape == wanted:
        return
    if len(shape) == 2 and shape == tuple(reversed(wanted)):
        raise InputError(f"{file}: {piece.key} has shape {shape}: it is transposed, expected {wanted}")
    raise InputError(f"{file}: {piece.key} has shape {shape}, expected {wanted} by the other tensors and the config")


def _mapped(source: Source, name: str, given: Made, dtype: torch.dtype, place: torch.device) -> Tensor:
    """A matrix as it lies in the file. Raises InputError where it lies there in another form."""
    parts = pieces(given)
    piece = parts[0]
    value = source.values(piece.file, piece.key)
    plain = piece._replace(file="", key="", shape=None) == Piece("", "")
    reason = ""
    if place.type != "cpu":
        reason = f"device is {place}, and a file is mapped into the memory of the CPU"
    elif len(parts) > 1 or not plain or not value.is_contiguous() or value.data_ptr() % value.element_size():
        reason = f"{name} is not in {source.folder / piece.file} with a latent in a row, as it is used"
    elif value.dtype != dtype:
        reason = f"{name} is of {value.dtype} in {source.folder / piece.file}, and {dtype} was asked for"
    if reason:
        raise InputError(f"map is True, but {reason}: leave map out, or write the SAE once with `saefast convert`")
    return value


def _filled(source: Source, name: str, given: Made, target: Tensor, verify: bool) -> Tensor:
    """The target, filled from the files some rows at a time."""
    parts = pieces(given)
    if isinstance(given, int | float):
        return target.fill_(given)
    if any(piece.into for piece in parts):
        target.zero_()
    for piece in parts:
        _copy(source, piece, target[piece.into])
    _check_finite(target, source, name, verify)
    return target


def _copy(source: Source, piece: Piece, target: Tensor) -> None:
    value = source.values(piece.file, piece.key)
    value = value.T if piece.transpose else value
    by_rows = value.dim() > 1
    if piece.also is not None and not by_rows:
        value = piece.also(wide(value))
    if target.dim() == 0:
        target.copy_(value if isinstance(piece.scale, float) and piece.scale == 1.0 else wide(value) * piece.scale)
        return
    for rows in rows_of(target):
        part = value[rows]
        if piece.also is not None and by_rows:
            part = piece.also(wide(part))
        if isinstance(piece.scale, Tensor):
            part = wide(part) * wide(piece.scale[rows]).reshape(-1, *[1] * (part.dim() - 1))
        elif piece.scale != 1.0:
            part = wide(part) * piece.scale
        target[rows].copy_(part)


def _check_finite(target: Tensor, source: Source, name: str, verify: bool) -> None:
    """Raises InputError for NaN or inf among weights, unless nobody asked."""
    for rows in rows_of(target) if verify and target.dim() else ():
        # One pass, and no memory: NaN is the least and the largest of whatever holds it.
        if not torch.stack(target[rows].aminmax()).isfinite().all():
            finite = target[rows].isfinite()
            row = rows.start + int((~finite.reshape(len(finite), -1)).any(1).nonzero()[0])
            raise InputError(f"{source.path}: {name} is not finite (NaN or inf) in row {row}, as {target.dtype}")
