"""SAEs on the Hugging Face hub, by the id "hub:owner/name/folder@revision". Needs huggingface_hub."""

import re
from pathlib import Path
from typing import NamedTuple

from saefast.errors import InputError

PREFIX = "hub:"
_PART = r"[A-Za-z0-9][\w.\-]*"
_ID = re.compile(rf"hub:(?P<repo>{_PART}/{_PART})(?:/(?P<inside>[^@]+?))?/?(?:@(?P<revision>[\w.\-/]+))?")
# Configs that lie beside a file of weights.
_CONFIGS = ("cfg.json", "config.json", "hyperparams.json", "config.yaml")


class Fetched(NamedTuple):
    """path: the folder or file in huggingface_hub's cache. name: the id with the exact revision in it."""

    path: Path
    name: str


def fetched(name: str) -> Fetched | None:
    """What a hub id names, fetched if it is not in the cache yet; None for a name that does not begin with "hub:".

    Raises:
        InputError: no such id, repository, revision or folder; no network and not in the cache; no huggingface_hub.
    """
    if not name.startswith(PREFIX):
        return None
    repo, inside, revision = _parts(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(f"path is {name!a}: pip install huggingface_hub to load from the hub") from None
    try:
        snapshot = Path(snapshot_download(repo, revision=revision, allow_patterns=_patterns(inside)))
    # Its errors are of many kinds: not found, gated, offline, interrupted, a server's.
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(
            f"path is {name!a}, which cannot be fetched ({reason}): check the id, or the network"
        ) from None
    path = snapshot / inside
    if not path.exists():
        raise InputError(f"path is {name!a}: {repo} holds no {inside} at revision {snapshot.name}")
    return Fetched(path, f"{PREFIX}{repo}{'/' if inside else ''}{inside}@{snapshot.name}")


def _parts(name: str) -> tuple[str, str, str | None]:
    found = _ID.fullmatch(name)
    inside = (found["inside"] or "") if found else ""
    if not found or (inside and {"", ".", ".."} & set(inside.split("/"))):
        raise InputError(f"path is {name!a}: expected hub:owner/name, hub:owner/name/folder or ...@revision")
    return found["repo"], inside, found["revision"]


def _patterns(inside: str) -> list[str] | None:
    """Of the files to fetch: those of a folder, or a file and the configs beside it. None is all."""
    if not inside:
        return None
    # The hub matches names as a shell does, with * for slashes too.
    plain, beside = _escaped(inside), _escaped(inside.rpartition("/")[0])
    return [plain, f"{plain}/*", *(f"{beside}/{name}" if beside else name for name in _CONFIGS)]


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
