"""load, save: an SAE from files of any format, and into them. Weights are in memory once."""

import contextlib
import dataclasses
import difflib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saefast import ambient
from saefast.errors import InputError
from saefast.files import usable
from saefast.formats import hub
from saefast.formats.format import Described, Format
from saefast.formats.making import made, pieces
from saefast.formats.own import Own
from saefast.formats.registry import formats
from saefast.formats.source import Source
from saefast.models.config import DTYPES, SAEConfig
from saefast.models.sae import SAE, require_real
from saefast.placement import pick_device
from saefast.typed import typed

AUTO = "auto"


@typed
@ambient.plainly(grad=True)
def load(
    path: str | Path,
    device: torch.device | str = "cpu",
    *,
    format: str = AUTO,
    dtype: torch.dtype | str | None = None,
    map: bool = False,
    verify: bool = True,
) -> SAE:
    """An SAE from a folder or file of any format in `saefast.formats.formats`, or from the Hugging Face hub.

    Args:
        path: the folder or file; or "hub:owner/name/folder", with "@revision" behind it where that is not "main".
        device: where the weights go.
        format: its name; "auto" tells it from the names of files and tensors.
        dtype: of the weights; None is the file's, but float32 for JumpReLU of fewer bits, whose thresholds are kept as
            logarithms and would be less exact.
        map: the matrices are views of the file, on the CPU: a page is read when it is first needed, and takes no memory
            of its own until it is written to. Nothing written reaches the file, but what changes the file changes the
            SAE. Formats that keep a latent in a row can be mapped ("saefast" among them).
        verify: see that the file is as it was written, where it has a digest, and that all weights are finite. It
            reads all of the file.

    Raises:
        InputError: nothing there, files that are damaged, of no format that is known or of several, that lack a tensor
            or have one of another shape, weights that are not finite, an SAE that saefast cannot be, not enough memory.
    """
    place, kind = pick_device(str(device)), _dtype(dtype)
    source, chosen, fetched = _found(path, format)
    if verify:
        chosen.check(source)
    try:
        described = chosen.describe(source)
        config = _about(described.config, chosen, path, fetched)
    except InputError as error:
        # Messages of configs do not know which file their values are from.
        raise InputError(str(error) if str(source.path) in str(error) else f"{source.path}: {error}") from None
    config = dataclasses.replace(config, dtype=_dtype_of(source, described, chosen, kind))
    tensors = made(source, described, config, place, map=map, verify=verify)
    sae = SAE(config, device="meta")
    sae.load_state_dict(tensors, assign=True)
    return sae.requires_grad_(True)


@typed
@ambient.plainly(grad=False)
def save(sae: SAE, path: str | Path, format: str = Own.name, density: Tensor | None = None) -> list[str]:
    """Writes an SAE into a folder in a format of `saefast.formats.formats`.

    Args:
        path: the folder, which is made; one with other files in it is refused, unless they are of this format.
        format: its name.
        density: (n_latents,) the share of tokens on which each latent fires, for formats that keep that.

    Returns:
        What the format has no place for, a sentence each.

    Raises:
        InputError: a format that there is not, that is read alone, or that cannot hold such an SAE; a folder that is
            not empty or cannot be written.
    """
    chosen, folder = named(format), usable(path)
    sae.config_as_is()
    if density is not None:
        _check_density(density, sae.config.n_latents)
    new = not os.path.exists(folder)
    try:
        if not isinstance(chosen, Own):
            _require_free(folder, chosen)
            folder.mkdir(parents=True, exist_ok=True)
        lost = chosen.write(sae, folder)
        return lost if density is None else lost + chosen.write_density(density, folder)
    except OSError as error:
        raise InputError(f"cannot write {folder} ({error.strerror or error}): choose another folder") from error
    finally:
        # What was refused leaves no empty folder behind.
        with contextlib.suppress(OSError):
            if new:
                folder.rmdir()


@typed
@ambient.plainly(grad=False)
def density(path: str | Path, *, format: str = AUTO) -> Tensor | None:
    """(n_latents,) float32, the share of tokens on which each latent fires, where the files of an SAE say so.

    Those of SAELens may, and a run's folder does once `saefast eval` has been there. Arguments and errors as `load`.
    """
    source, chosen, _ = _found(path, format)
    return chosen.density(source)


def _found(path: str | Path, format: str) -> tuple[Source, Format, hub.Fetched | None]:
    """What there is at a path or hub id, of which format it is, and where it came from if that is the hub."""
    fetched = hub.fetched(str(path))
    source = Source(path if fetched is None else fetched.path)
    return source, _recognised(source) if format == AUTO else named(format), fetched


def named(name: str) -> Format:
    """The format of that name."""
    if name not in formats:
        near = difflib.get_close_matches(name, formats, n=1)
        hint = f"perhaps {near[0]}?" if near else f"choose from {', '.join(formats)}"
        raise InputError(f"format is {name!a}, which there is not: {hint}")
    return formats[name]


def _check_density(density: Tensor, n_latents: int) -> None:
    """Raises InputError for anything but (n_latents,) shares."""
    require_real("density", density)
    if tuple(density.shape) != (n_latents,) or density.device.type == "meta":
        raise InputError(
            f"density has shape {tuple(density.shape)} on {density.device}: expected ({n_latents},), a share of tokens "
            "for each latent"
        )
    if not bool(((density >= 0) & (density <= 1)).all()):
        raise InputError("density has values that are no shares: expected numbers from 0 to 1")


def _require_free(folder: Path, chosen: Format) -> None:
    """Raises InputError where a folder holds anything but an SAE of this format: there would be two SAEs in it."""
    try:
        free = not folder.exists() or not any(folder.iterdir()) or chosen.recognises(Source(folder))
    except InputError:
        free = False
    if not free:
        raise InputError(f"{folder} holds other files: an SAE of format {chosen.name!r} needs a folder of its own")


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        found: torch.dtype | None = dict(DTYPES).get(dtype)  # type: ignore[call-overload]
        if found is None:
            raise InputError(f"dtype is {dtype!a}: expected one of {', '.join(DTYPES)}")
        return found
    if dtype is not None and dtype not in DTYPES.values():
        raise InputError(f"dtype is {dtype}: expected one of {', '.join(DTYPES)}")
    return dtype


def _recognised(source: Source) -> Format:
    """The one format that a source is of."""
    found = [one for one in formats.values() if one.recognises(source)]
    if len(found) == 1:
        return found[0]
    if found:
        names = " and of ".join(one.name for one in found)
        raise InputError(f"{source.path} holds files of {names}: say which is meant with format, or name one file")
    raise InputError(_unknown(source))


def _unknown(source: Source) -> str:
    """What is there, and what comes nearest to it."""
    inner = _inner(source)
    if inner:
        more = f" and {len(inner) - 3} more" if len(inner) > 3 else ""
        return f"{source.path} is no SAE but holds some: name one of {', '.join(inner[:3])}{more}"
    seen = [*source.files[:8], *_keys(source)]
    shown = ", ".join(seen[:16]) + (", ..." if len(seen) > 16 or len(source.files) > 8 else "")
    if not seen:
        return f"{source.path} holds no files: expected an SAE in one of the formats {', '.join(formats)}"
    here = {Path(name).name for name in source.files} | set(_keys(source))
    near = max(formats.values(), key=lambda one: len(here & set(one.signs)))
    return (
        f"{source.path} is of no format that is known; it holds {shown}. The nearest is {near.name}, "
        f"which needs {near.layout}"
    )


def _keys(source: Source) -> list[str]:
    """Names of tensors in the first files that have any."""
    found: list[str] = []
    for name in [name for name in source.files if Path(name).suffix in (".safetensors", ".npz", ".pt", ".pth")][:3]:
        try:
            found += source.entries(name)
        except InputError:
            found.append(f"{name} (damaged)")
    return found


def _inner(source: Source) -> list[str]:
    """Folders inside a folder that are SAEs."""
    if source.alone is not None:
        return []
    found = []
    for folder in sorted({str(Path(name).parent) for name in source.files} - {"."})[:64]:
        inside = Source(source.folder / folder)
        try:
            if any(one.recognises(inside) for one in formats.values()):
                found.append(folder)
        except InputError:
            continue
    return found


def _about(config: SAEConfig, chosen: Format, path: str | Path, fetched: hub.Fetched | None) -> SAEConfig:
    """The config with where it is from in its metadata; what comes from a folder of ours stays as it is."""
    if isinstance(chosen, Own) and fetched is None:
        return config
    where = str(path) if fetched is None else fetched.name
    return dataclasses.replace(config, metadata=config.metadata | {"format": chosen.name, "source": where})


def _dtype_of(source: Source, described: Described, chosen: Format, asked: torch.dtype | None) -> Any:
    """The name of the dtype that the weights get; see `load`."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    if asked is not None:
        return names[asked]
    first = pieces(described.tensors["W_enc"])[0]
    entry = source.entries(first.file).get(first.key)
    found = names.get(entry.dtype, "float32") if entry else "float32"
    exact = isinstance(chosen, Own) or "log_threshold" not in described.tensors or found == "float64"
    return found if exact else "float32"
