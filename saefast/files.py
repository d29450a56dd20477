"""Files that are either whole or not there: write beside the target, flush to disk, rename. JSON that is checked.

A sealed JSON file ends with its own digest, the sha256 of every byte before it, and is still plain JSON:

    {
      ...
      "sha256": "5e8f..."
    }
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saefast.errors import InputError
from saefast.schema import check

SEAL = "sha256"
_SEALED = re.compile(rb'(.*),\n  "sha256": "([0-9a-f]{64})"\n}\n', re.DOTALL)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the target's folder; on a clean exit it is flushed and renamed to `path`.

    After an exception, or a kill at any moment, `path` is what it was before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        sync(temporary)
        # mkstemp makes files private; a saved SAE gets the permissions of any other new file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Flushes a file or folder to the disk, so that a rename never gets there before the bytes that it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_sealed_json(path: str | Path, value: dict[str, Any]) -> None:
    """Writes a JSON object with its digest as the last entry; a digest that `value` has already is replaced."""
    body = json.dumps({key: item for key, item in value.items() if key != SEAL}, indent=2).removesuffix("\n}")
    seal = hashlib.sha256(body.encode()).hexdigest()
    with replacing(path) as temporary:
        temporary.write_text(f'{body},\n  "{SEAL}": "{seal}"\n}}\n', encoding="utf-8")


def create_sealed_json(path: Path, value: dict[str, Any]) -> bool:
    """Writes the file whole, unless there is one: then that stays what it is. False if there was one."""
    # Made beside it first, since a link, unlike a new file, is there at once with all its content.
    own = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    write_sealed_json(own, value)
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    except OSError:
        # A file system without links: two that begin at once may then differ.
        if path.exists():
            return False
        os.replace(own, path)
    finally:
        own.unlink(missing_ok=True)
    return True


def read_json(path: str | Path, kind: Any = Any) -> Any:
    """A JSON file, checked against a declaration (see `saefast.schema`).

    Raises:
        InputError: a file that is missing, cannot be read, is not JSON or not of the kind declared.
    """
    return check(parse_json(_read(path), path), kind, path)


def read_sealed_json(path: str | Path, kind: Any = Any) -> Any:
    """As `read_json`; where the file carries a digest, it must be that of its bytes.

    Raises:
        InputError: as `read_json`, or any byte differs from what was written.
    """
    data = _read(path)
    value = parse_json(data, path)
    if isinstance(value, dict) and SEAL in value:
        sealed = _SEALED.fullmatch(data)
        if sealed is None or hashlib.sha256(sealed[1]).hexdigest().encode() != sealed[2]:
            raise InputError(f"{path} is damaged: its digest is not the one written; it was altered after that")
    return check(value, kind, path)


def parse_json(data: bytes | str, path: object) -> Any:
    """The value that JSON text stands for. Raises InputError naming `path` for text that is not JSON."""
    try:
        return json.loads(data)
    except RecursionError:
        raise InputError(f"{path} is nested too deeply to be read: it was damaged, or is of another program") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, and numbers of thousands of digits
        reason = str(error).split(";")[0]
        raise InputError(f"{path} is not valid JSON ({reason}): it was cut short or edited; restore it") from None


def _read(path: str | Path) -> bytes:
    try:
        return no_pipe(usable(path)).read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def no_pipe(path: Path) -> Path:
    """The path, to be opened. Raises InputError for a pipe or a device: reading one may wait for ever."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise InputError(f"{path} cannot be read: it is a pipe or a device, expected a file")
    return path


def usable(path: str | Path) -> Path:
    """A path that a person gave, with ~ for their home; nothing has to exist there.

    Raises:
        InputError: one that no file can have: empty, with a NUL character, too long, a loop of links ...
    """
    text = os.fspath(path)
    reason = "" if text else "it is empty"
    try:
        found = Path(text).expanduser()
        found.stat()
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass  # opening it gives the better message
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~name of a user who is not there
        reason = getattr(error, "strerror", None) or str(error)
    if reason:
        raise InputError(f"{text!a} is no path of a file or folder ({reason}): name another")
    return found
