"""Source: a path that holds an SAE of some format, looked at without taking memory for its tensors.

Names, shapes and dtypes are read from the heads of files, and are compared with the files' sizes. Values are views of
the mapped files wherever that is possible. Nothing but tensors, numbers and text is ever made of a pickle.
"""

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from saefast.data.shardfile import map_tensor, read_header, read_metadata
from saefast.errors import InputError
from saefast.files import no_pipe, read_json, usable
from saefast.formats.archives import Entry, Held, read_npz, read_pt
from saefast.schema import check

# What lies deeper in a folder, or comes after so many files, is not looked at.
_DEPTH, _MOST = 3, 2000
# A config is a few kilobytes; a header of a safetensors file may have as much.
_LARGEST_JSON = 64 << 20
_BESIDE = (".json", ".yaml", ".yml")


class Source:
    """A folder or file.

    Attributes:
        path: what was given.
        folder: the folder that it is or lies in.
        files: names relative to folder, sorted. Of a path that is a file: this file and the configs (JSON, YAML)
            beside it.
        alone: the name of the file where the path is one, else None.

    Raises:
        InputError: the path does not exist, cannot be read, or is a pipe or a device.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = usable(path)
        try:
            no_pipe(self.path)
            is_folder, is_file = self.path.is_dir(), self.path.is_file()
            self.folder = self.path if is_folder else self.path.parent
            self.alone = self.path.name if is_file else None
            if not is_folder and not is_file:
                raise InputError(f"{self.path} does not exist: expected a folder or file that holds an SAE")
            self.files = _beside(self.path) if is_file else _below(self.path)
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
        self._json: dict[str, Any] = {}
        self._held: dict[str, dict[str, Held]] = {}

    def json(self, name: str, kind: Any = dict[str, Any]) -> Any:
        """A JSON file, checked against a declaration (see `saefast.schema`); an object if none is given.

        Raises:
            InputError: missing, damaged, absurdly large or of another kind.
        """
        file = self.folder / name
        if file.is_file() and file.stat().st_size > _LARGEST_JSON:
            raise InputError(
                f"{file} has {file.stat().st_size:,} bytes: expected a config of at most {_LARGEST_JSON:,}"
            )
        if name not in self._json:
            self._json[name] = read_json(file)
        return check(self._json[name], kind, file)

    def facts(self, file: str) -> dict[str, str]:
        """The strings in the header of a safetensors file."""
        return read_metadata(self.folder / file)

    def entries(self, file: str) -> dict[str, Entry]:
        """Shapes and dtypes of the tensors in a .safetensors, .npz, .pt or .pth file, by name; no values are read.

        In a .pt file that nests dictionaries, names are joined by "/". What has a dtype that torch has not, and what is
        no plain dense tensor, is left out.

        Raises:
            InputError: missing, damaged, cut short, or tensors that are larger than their file; a .pt file that holds
                anything but tensors, numbers, text, lists and dictionaries.
        """
        return {name: held.entry for name, held in self._opened(file).items() if held.entry is not None}

    def values(self, file: str, key: str) -> Tensor:
        """A tensor, as a view of the mapped file: writing to it reaches no file. Compressed .npz files are unpacked.

        Raises:
            InputError: as `entries`, or there is no such tensor.
        """
        held = self._opened(file).get(key)
        if held is None or held.entry is None:
            names = ", ".join(self.entries(file)) or "none"
            raise InputError(f"{self.folder / file} lacks the tensor {key!a}; its tensors: {names}")
        return held.read()

    def number(self, file: str, key: str) -> float:
        """The only element of a tensor, or the number that a .pt file holds by that name."""
        found = self.other(file, key)
        if found is None and key in (entries := self.entries(file)) and entries[key].shape in ((), (1,)):
            found = self.values(file, key).item()
        if isinstance(found, bool) or not isinstance(found, int | float):
            raise InputError(f"{self.folder / file}: {key} is no single number")
        return found

    def other(self, file: str, key: str) -> Any:
        """What a .pt file holds by that name that is no tensor: a number, text, a list or dictionary; else None."""
        held = self._opened(file).get(key)
        return held.read() if held is not None and held.entry is None else None

    def _opened(self, file: str) -> dict[str, Held]:
        if file not in self._held:
            self._held[file] = _open(self.folder / file)
        return self._held[file]


def _open(path: Path) -> dict[str, Held]:
    no_pipe(usable(path))
    if not path.is_file():
        raise InputError(f"{path} does not exist")
    if path.suffix == ".npz":
        return read_npz(path)
    if path.suffix in (".pt", ".pth"):
        return read_pt(path)
    found = {}
    for name, entry in read_header(path).items():
        if not name.startswith("_pad_"):
            found[name] = Held(Entry(entry.shape, entry.dtype), lambda entry=entry: map_tensor(path, entry))  # type: ignore[misc]
    return found


def _beside(file: Path) -> tuple[str, ...]:
    """The file itself and the configs in its folder."""
    near = {p.name for p in file.parent.iterdir() if p.suffix in _BESIDE and p.is_file()}
    return tuple(sorted(near | {file.name}))


def _below(folder: Path) -> tuple[str, ...]:
    """Files in a folder and the folders in it, hidden ones left out; links to folders are not followed."""
    found: list[str] = []
    for here, folders, files in os.walk(folder):
        place = Path(here).relative_to(folder)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if len(place.parts) < _DEPTH else []
        found += [str(place / name) for name in sorted(files) if not name.startswith(".")]
        if len(found) >= _MOST:
            break
    return tuple(sorted(found[:_MOST]))
