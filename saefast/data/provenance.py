"""What a run's config says of its data: written when the run begins, read when `saefast eval` opens the data again."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from saefast.data.mapped_source import MappedSource
from saefast.data.shard_buffer import ShardBuffer
from saefast.data.shards import Identity, ShardFolder
from saefast.data.source import TARGET, Names, Source, X, by_tensor
from saefast.errors import InputError
from saefast.files import usable
from saefast.schema import check

# In SAEConfig.metadata: open_source's arguments.
DATA = "data"


class Place(TypedDict):
    """Where the rows are."""

    path: str


class Live(TypedDict):
    """What a run that trained live read, and with which model; beside it HarvestConfig's other fields."""

    model: str
    text: list[str]
    heldout: float
    seed: int


class Choice(TypedDict, total=False):
    """Which of the tensors at a place: arguments of open_source."""

    hook: str | None
    key: str | None
    # Where the run trained on several tensors: the hook, or the key, of each.
    hooks: dict[str, str | list[str]]
    keys: dict[str, str | list[str]]


class Recorded(Place, Choice, total=False):
    """What a run's config says of its data."""

    heldout: float
    # Further folders, whose columns follow those of the first.
    beside: list[str]
    shuffle: Literal["auto", "buffer", "mapped"]
    live: Live
    # Of the model that a live run trained on, and of its tokenizer.
    identity: Identity


def recorded_data(metadata: dict[str, Any], run: Path) -> Recorded | None:
    """What `describe_data` wrote into the metadata of the run in a folder; None where it says nothing of its data.

    Raises:
        InputError: it is not what `describe_data` writes.
    """
    kept = metadata.get(DATA)
    if kept is None:
        return None
    found: Recorded = check(kept, Recorded, f"{run}: its config's {DATA}")
    if not 0 <= found.get("heldout", 0) < 1:
        raise InputError(f"{run}: its config's {DATA}.heldout is {found['heldout']}, expected a share below 1: edited?")
    return found


def describe_data(
    path: Path | Sequence[Path],
    folder: Path,
    source: Source,
    *,
    hook: str | None,
    key: str | None,
    heldout: float,
    hooks: Names | None = None,
    keys: Names | None = None,
) -> dict[str, Any]:
    """SAEConfig.metadata of a run in `folder` on the data at `path`: where the rows are, and what they are.

    The names are SAELens' (model_name, hook_name, context_size ...). Data inside the run's folder is named relative
    to it, so that the folder can be moved.
    """
    # Not Path.resolve, which raises RuntimeError for a loop of links.
    paths, base = [path] if isinstance(path, Path) else list(path), Path(os.path.realpath(usable(folder)))
    absolute = [Path(os.path.realpath(usable(place))) for place in paths]
    places = [str(place.relative_to(base) if place.is_relative_to(base) else place) for place in absolute]
    metadata: dict[str, Any] = {DATA: {"path": places[0], "hook": hook, "key": key, "heldout": heldout}}
    metadata[DATA] |= {"beside": places[1:]} if places[1:] else {}
    metadata[DATA] |= {name: by_tensor(given) for name, given in (("hooks", hooks), ("keys", keys)) if given}
    if isinstance(source, MappedSource | ShardBuffer) and source.folder is not None:
        metadata[DATA]["shuffle"] = "buffer" if isinstance(source, ShardBuffer) else "mapped"
    return metadata | facts_of(source)


def facts_of(source: Source) -> dict[str, Any]:
    """What the rows of a source are, in SAELens' names; nothing of rows that are not from a shard folder."""
    if not isinstance(source, MappedSource | ShardBuffer) or source.folder is None:
        return {}
    facts = _shard_facts(source.folder, source.hooks)
    others = source.others if isinstance(source, MappedSource) else ()
    if others:
        facts["model_name"] = ",".join(str(one.index.get("model")) for one in (source.folder, *others))
    return facts


def _shard_facts(folder: ShardFolder, hooks: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    index, names = folder.index, hooks.get(X, next(iter(hooks.values())))
    entries = {entry["name"]: entry for entry in index["hooks"]}
    paths = [entries.get(name, {}).get("hf_name") for name in names]
    facts = {
        "model_name": index.get("model"),
        "hook_name": ",".join(names),
        "hf_hook_name": ",".join(paths) if all(paths) else None,
        "hook_name_out": ",".join(hooks[TARGET]) if TARGET in hooks else None,
        "context_size": index.get("ctx_len"),
        "dataset_path": index.get("text") or index.get("data"),
        "exclude_special_tokens": not folder.keeps_special_tokens,
    }
    return {key: value for key, value in facts.items() if value is not None}
