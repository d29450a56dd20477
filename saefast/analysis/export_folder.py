"""The folder that an export is written to: whole or not at all, and never over files that are no such export."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

from saefast.errors import InputError
from saefast.files import read_json, sync, usable, write_json
from saefast.latents.database import LatentsDB

# Says that a folder is an export, and of what: such a folder may be replaced.
MANIFEST = "saefast-export.json"


@contextlib.contextmanager
def whole_folder(out: str | Path, kind: str, db: LatentsDB) -> Iterator[Path]:
    """Yields an empty folder beside `out`; on a clean exit it takes the place of `out`, with a MANIFEST in it.

    After an exception `out` is what it was before, and nothing else is left.

    Args:
        kind: what is exported; a folder that holds another kind is not replaced.
        db: what it is an export of, for the manifest.

    Raises:
        InputError: `out` is a file, or a folder with anything but an export of this kind, or cannot be written.
    """
    # A link stays one: what it leads to is written.
    out = usable(out).resolve()
    check_place(out, kind)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from None
    try:
        yield temporary
        # Of the SAE what tells it from others; a path of this machine is nobody's business.
        sae = {name: db.meta["sae"].get(name) for name in ("digest", "model", "hook", "architecture")}
        written = datetime.now(timezone.utc).isoformat("T", "seconds")
        write_json(temporary / MANIFEST, {"export": kind, "sae": sae, "written": written})
        # mkdtemp makes private folders; this one gets the permissions of any other new one.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        _take_the_place(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_place(out: Path, kind: str) -> None:
    """Raises InputError for a place that cannot be written, or is neither free nor an earlier export of this kind."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: expected a folder to write {kind} to")
    above = next((folder for folder in out.parents if folder.is_dir()), out)
    try:
        tempfile.TemporaryDirectory(dir=above).cleanup()
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from None
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / MANIFEST).is_file():
        raise InputError(f"{out} is not empty and no export of saefast: name another folder for {kind}")
    found = read_json(out / MANIFEST, dict).get("export")
    if found != kind:
        raise InputError(f"{out} holds an export of the kind {found!a}: name another folder for {kind}")


def _take_the_place(temporary: Path, out: Path) -> None:
    """Renames one folder to the other; what was there goes once the new one stands."""
    former = temporary.with_suffix(".old")
    if out.is_dir():
        os.rename(out, former)
    try:
        os.rename(temporary, out)
    except OSError:
        if former.is_dir():
            os.rename(former, out)
        raise
    sync(out.parent)
    shutil.rmtree(former, ignore_errors=True)
