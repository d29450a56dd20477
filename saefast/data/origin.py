"""Where a run's rows came from, as its config says it: what `saefast eval` opens again."""

from pathlib import Path
from typing import Any

from saefast.data.buffer import ShardBuffer
from saefast.data.rows_source import RowsSource
from saefast.data.shards import ShardFolder
from saefast.data.source import Source

# In SAEConfig.metadata: open_source's arguments.
DATA = "data"


def describe_data(
    path: Path, folder: Path, source: Source, *, hook: str | None, key: str | None, heldout: float
) -> dict[str, Any]:
    """SAEConfig.metadata of a run in `folder` on the data at `path`: where the rows are, and what they are.

    The names are SAELens' (model_name, hook_name, context_size ...). Data inside the run's folder is named relative
    to it, so that the folder can be moved.
    """
    absolute, base = path.expanduser().resolve(), folder.expanduser().resolve()
    place = absolute.relative_to(base) if absolute.is_relative_to(base) else absolute
    metadata: dict[str, Any] = {DATA: {"path": str(place), "hook": hook, "key": key, "heldout": heldout}}
    if isinstance(source, RowsSource | ShardBuffer) and source.folder is not None:
        metadata[DATA]["shuffle"] = "buffer" if isinstance(source, ShardBuffer) else "mapped"
        metadata |= _shard_facts(source.folder, hook)
    return metadata


def _shard_facts(folder: ShardFolder, hook: str | None) -> dict[str, Any]:
    index, name = folder.index, folder.hook(hook)
    entry = next(entry for entry in index["hooks"] if entry["name"] == name)
    facts = {
        "model_name": index.get("model"),
        "hook_name": name,
        "hf_hook_name": entry.get("hf_name"),
        "context_size": index.get("ctx_len"),
        "dataset_path": index.get("text"),
        "exclude_special_tokens": not index.get("keep_special_tokens", False),
    }
    return {key: value for key, value in facts.items() if value is not None}
