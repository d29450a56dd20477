"""Checkpoints of a training run: whole folders that appear in one rename, checked before they are used.

    RUN/checkpoints/step_00001000/sae.safetensors      the SAE as it stands, ready for `saefast.load`
                                  config.json          its config
                                  engine.safetensors   every tensor of the training state
                                  state.json           every number of it, sizes and digests of the other files, and
                                                       last of all its own digest

The state is any nesting of dicts and lists over tensors, numbers, strings, booleans and None; tensors go to one file,
the rest to the other, and floats come back as the same bits. A digest covers every byte of the four files. The SAE in a
checkpoint can be used, but it is not the one that the run would return there: rows that had no gradient may still
have to be settled, which the engine's `finish` does.

Older versions are refused: version 1 had no digest over state.json, so its numbers cannot be checked; version 2 named
two biases where later ones hold all that depends on the scale of inputs; version 3 did not say which rows are left out
and which latents never fired, nor held the curve that tells a plateau.
"""

import hashlib
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from saefast.data.shardfile import Column, map_tensor, read_header, write_file
from saefast.errors import InputError
from saefast.files import SEAL, read_sealed_json, sync, write_sealed_json
from saefast.models.sae import CONFIG, SAE, WEIGHTS
from saefast.schema import Count, check

ENGINE, STATE = "engine.safetensors", "state.json"
FORMAT, VERSION = "saefast checkpoint", 4
FILES = (WEIGHTS, CONFIG, ENGINE)
_TENSOR = "__tensor__"


class Fingerprint(TypedDict):
    """Size and digest of a file."""

    bytes: Count
    sha256: str


class Head(TypedDict):
    """state.json."""

    format: str
    version: Count
    step: Count
    files: dict[str, Fingerprint]
    state: dict[str, Any]
    sha256: str


def save(folder: Path, step: int, sae: SAE, state: dict[str, Any], keep: int = 2) -> Path:
    """Writes checkpoint `step` into `folder`, then removes all but the newest `keep`.

    Every file is on the disk before the folder gets its name; a kill or an error at any moment leaves the older
    checkpoints as they were, and an error leaves no temporary file either.

    Raises:
        OSError: a full disk, a folder that cannot be written.
    """
    target = folder / f"step_{step:08d}"
    temporary = folder / f".{target.name}.tmp"
    remove_leftovers(folder)
    temporary.mkdir(parents=True)
    try:
        sae.save_files(temporary)
        tensors: dict[str, Tensor] = {}
        numbers = _pack(state, "", tensors)
        written = write_file(temporary / ENGINE, {name: Column.of(tensor) for name, tensor in tensors.items()})
        files = {name: _fingerprint(temporary / name) for name in (WEIGHTS, CONFIG)}
        files[ENGINE] = Fingerprint(bytes=(temporary / ENGINE).stat().st_size, sha256=written.sha256)
        head = {"format": FORMAT, "version": VERSION, "step": step}
        write_sealed_json(temporary / STATE, head | {"files": files, "state": numbers})
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


def load(path: Path, kind: Any = dict[str, Any]) -> dict[str, Any]:
    """The state given to `save`, tensors on the CPU. The SAE beside it is read by `saefast.load(path)`.

    Args:
        path: the checkpoint's folder.
        kind: what the state must hold, as `saefast.schema.check` takes it.

    Raises:
        InputError: a file is missing, cut short, damaged or of another kind; the message names it.
    """
    head = verify(path)
    try:
        # Clones, because the mapped file is one that pruning deletes.
        entries = read_header(path / ENGINE)
        tensors = {name: map_tensor(path / ENGINE, entry).clone() for name, entry in entries.items()}
        state = _unpack(head["state"], tensors)
    except (OSError, KeyError, TypeError) as error:
        raise InputError(
            f"{path / ENGINE} cannot be read ({error}): remove {path} to resume from an older one"
        ) from None
    checked: dict[str, Any] = check(state, kind, path)
    return checked


def newest(folder: Path, kind: Any = dict[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole and its state, or None where there is none. Warns of each one it skips.

    Raises:
        InputError: there are checkpoints, and none can be used.
    """
    found = list(reversed(list_steps(folder)))
    for path in found:
        try:
            return path, load(path, kind)
        except InputError as error:
            warnings.warn(f"skipping a damaged checkpoint: {error}", RuntimeWarning, stacklevel=4)
            reason = error
    if found:
        raise InputError(
            f"{folder} holds {len(found)} checkpoints, all damaged (of the oldest: {reason}): train again into another "
            "folder"
        )
    return None


def latest(folder: Path) -> Path | None:
    """The folder of the newest checkpoint that is whole; see `newest`."""
    found = newest(folder)
    return None if found is None else found[0]


def verify(path: Path) -> Head:
    """The content of state.json, after checking its digest, and size and digest of every other file.

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
        try:
            found = _fingerprint(file)
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror or error}; remove {path}") from None
        if found != expected:
            raise InputError(f"{file} is damaged: its digest is not the one written; remove {path}")
    return head


def _head(path: Path) -> Head:
    file = path / STATE
    found = read_sealed_json(file)
    version = found.get("version") if isinstance(found, dict) and found.get("format") == FORMAT else None
    if version != VERSION:
        raise InputError(
            f"{file} is no checkpoint of this version of saefast: it is of version {version!r}, expected {VERSION}; "
            "go on with the saefast that wrote it, or train again into another folder"
        )
    if SEAL not in found:
        raise InputError(f"{file} is damaged: it has lost its digest; remove {path}")
    head: Head = check(found, Head, file)
    if sorted(head["files"]) != sorted(FILES) or head["step"] != step_of(path):
        raise InputError(f"{file} is of step {head['step']} with the files {', '.join(head['files'])}: remove {path}")
    return head


def list_steps(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, damaged ones included."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if re.fullmatch(r"step_[0-9]{8,18}", path.name)), key=step_of)


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


def _fingerprint(path: Path) -> Fingerprint:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1 << 24):
            digest.update(data)
    return Fingerprint(bytes=path.stat().st_size, sha256=digest.hexdigest())
