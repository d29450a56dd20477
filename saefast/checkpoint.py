"""Checkpoints of a training run: whole folders that appear in one rename, checked before they are believed.

    RUN/checkpoints/step_00001000/sae.safetensors      the SAE as it stands, ready for `saefast.load`
                                  config.json          its config
                                  engine.safetensors   every tensor of the training state
                                  state.json           every number of it, and sizes and digests of the other files

The state is any nesting of dicts and lists over tensors, numbers, strings, booleans and None; tensors go to one file,
the rest to the other, and floats come back as the same bits. The SAE in a checkpoint can be used, but it is not the one
that the run would return there: the engine may still owe sleeping rows some updates, which only its `finish` settles.
"""

import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from saefast.data.shardfile import Column, write_file
from saefast.errors import InputError
from saefast.files import read_json, sync, write_json
from saefast.sae import CONFIG, SAE, WEIGHTS

ENGINE, STATE = "engine.safetensors", "state.json"
FORMAT, VERSION = "saefast checkpoint", 1
_TENSOR = "__tensor__"
# Rows that leave the GPU in one go while a checkpoint is written: the host never holds a second copy of the state.
_PIECE_BYTES = 1 << 28


def save(folder: Path, step: int, sae: SAE, state: dict[str, Any], keep: int = 2) -> Path:
    """Writes checkpoint `step` into `folder`, then removes all but the newest `keep`.

    Every file is on the disk before the folder gets its name; a kill or an error at any moment leaves the older
    checkpoints as they were, and an error leaves no temporary file either.

    Raises:
        OSError, SafetensorError: a full disk, a folder that cannot be written.
    """
    target = folder / f"step_{step:08d}"
    temporary = folder / f".{target.name}.tmp"
    remove_leftovers(folder)
    temporary.mkdir(parents=True)
    try:
        sae.save(temporary)
        tensors: dict[str, Tensor] = {}
        numbers = _pack(state, "", tensors)
        written = write_file(temporary / ENGINE, {name: _column(tensor) for name, tensor in tensors.items()})
        files = {name: _fingerprint(temporary / name) for name in (WEIGHTS, CONFIG)}
        files[ENGINE] = {"bytes": (temporary / ENGINE).stat().st_size, "sha256": written.sha256}
        head = {"format": FORMAT, "version": VERSION, "step": step}
        write_json(temporary / STATE, head | {"files": files, "state": numbers})
        sync(temporary)
        if target.exists():  # only a damaged one can be in the way: a run never saves a step twice
            shutil.rmtree(target)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(folder)
    prune(folder, step, keep)
    return target


def load(path: Path, *, verified: bool = False) -> dict[str, Any]:
    """The state given to `save`, tensors on the CPU. The SAE beside it is read by `saefast.load(path)`.

    Args:
        path: the checkpoint's folder.
        verified: `verify` or `latest` has just looked at every byte, so the digests are not computed again.

    Raises:
        InputError: a file is missing, cut short or damaged; the message names it.
    """
    head = _head(path) if verified else verify(path)
    tensors = {}
    try:
        with safe_open(path / ENGINE, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                # A clone, because what safetensors returns may be a mapping of the file, which pruning deletes.
                tensors[name] = opened.get_tensor(name).clone()
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path / ENGINE} cannot be read ({error}): remove {path} to resume from an older one"
        ) from None
    state: dict[str, Any] = _unpack(head["state"], tensors)
    return state


def latest(folder: Path) -> Path | None:
    """The newest checkpoint that is whole, or None where there is none at all. Warns of each damaged one it skips.

    Raises:
        InputError: there are checkpoints, all damaged.
    """
    found = list(reversed(list_steps(folder)))
    for path in found:
        try:
            verify(path)
        except InputError as error:
            warnings.warn(f"skipping a damaged checkpoint: {error}", RuntimeWarning, stacklevel=4)
        else:
            return path
    if found:
        raise InputError(f"{folder} holds {len(found)} checkpoints, all damaged: train again into another folder")
    return None


def verify(path: Path) -> dict[str, Any]:
    """The content of state.json, after checking size and digest of every other file against it.

    Raises:
        InputError: naming the file that is missing, cut short, damaged or of another format.
    """
    head = _head(path)
    for name, expected in head["files"].items():
        file = path / name
        if not file.is_file():
            raise InputError(f"{file} is missing: the checkpoint is damaged; remove {path}")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise InputError(f"{file} is truncated: {size} bytes of {expected['bytes']}; remove {path}")
        if _fingerprint(file) != expected:
            raise InputError(f"{file} is damaged: its digest is not the one written; remove {path}")
    return head


def _head(path: Path) -> dict[str, Any]:
    head = read_json(path / STATE)
    if not isinstance(head, dict) or head.get("format") != FORMAT or head.get("version") != VERSION:
        raise InputError(f"{path / STATE} is no checkpoint of this version of saefast: expected {FORMAT} {VERSION}")
    return head


def list_steps(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, damaged ones included."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if re.fullmatch(r"step_\d{8,}", path.name)), key=step_of)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def prune(folder: Path, step: int, keep: int) -> None:
    """Of the checkpoints up to `step`, which is whole, removes all but the newest `keep`.

    Later ones were skipped as damaged when the run went on; they are no reason to remove a good one.
    """
    for path in [path for path in list_steps(folder) if step_of(path) <= step][:-keep]:
        # A half-removed checkpoint never carries a checkpoint's name.
        doomed = folder / f".{path.name}.tmp"
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Removes what a killed run left of checkpoints half written or half removed."""
    if folder.is_dir():
        for path in folder.glob(".step_*.tmp"):
            shutil.rmtree(path, ignore_errors=True)


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value with every tensor replaced by a reference; the tensors are collected under their path."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _pack(item, f"{name}.{key}" if name else key, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"the training state holds a {type(value).__name__} at {name!r}, which no checkpoint can store")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _unpack(item, tensors) for key, item in value.items()}
    return [_unpack(item, tensors) for item in value] if isinstance(value, list) else value


def _column(tensor: Tensor) -> Column:
    return Column(tensor.dtype, tuple(tensor.shape), _pieces(tensor))


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.reshape(-1)
    for piece in flat.split(max(_PIECE_BYTES // tensor.element_size(), 1)):
        yield piece.cpu()


def _fingerprint(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 24):
            digest.update(data)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
