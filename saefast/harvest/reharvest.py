"""Harvesting anew for a run that trained live and kept no rows: its model reads its text once more."""

import dataclasses
from pathlib import Path
from typing import Any

from saefast.data.provenance import DATA, Live, Recorded
from saefast.errors import InputError
from saefast.harvest.harvester import HarvestConfig
from saefast.harvest.text import open_texts
from saefast.harvest.to_disk import harvest

# Where, in the run's folder, and how many tokens: held-out rows for `saefast eval`, others as well for the tokens that
# `saefast features` looks at.
FOLDER, TOKENS = "activations", 1 << 18
# Settings of a harvest that do not determine the rows, or that are said elsewhere.
_NOT_KEPT = {"hooks", "text", "max_tokens", "batch_tokens", "rows_per_shard", "commit_seconds", "device"}


def describe_live(config: HarvestConfig, texts: tuple[str, ...], hook: str) -> dict[str, Any]:
    """SAEConfig.metadata of a run that trains on `hook` while the model reads: all it takes to harvest the rows again.

    Paths are made absolute, names of models and data sets stay.
    """
    kept = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_KEPT}
    kept |= {"model": _place(config.model), "text": [_place(text) for text in texts]}
    data = {"path": FOLDER, "hook": hook, "heldout": config.heldout, "live": kept}
    names = ", ".join(texts) or "stdlib docstrings"
    return {DATA: data, "model_name": config.model, "dataset_path": names, "hook_name": hook}


def harvest_again(run: Path, kept: Recorded, progress: bool = False) -> None:
    """Harvests into the run's folder what `describe_live` says, at most TOKENS tokens; nothing is done twice.

    The documents that were held out are held out again: a hash of their text decides.

    Raises:
        InputError: the model or the text is gone, or the folder holds another harvest.
    """
    live = kept["live"]
    known = {field.name for field in dataclasses.fields(HarvestConfig)}
    if unknown := sorted(set(live) - known):
        raise InputError(f"{run} was harvested with {', '.join(unknown)}, which this version of saefast does not know")
    settings: dict[str, Any] = {name: value for name, value in live.items() if name != "text"}
    texts = live["text"]
    config = HarvestConfig(
        hooks=(str(kept["hook"]),), text=texts[0] if len(texts) == 1 else None, max_tokens=TOKENS, **settings
    )
    text = open_texts(texts, config.text_column, config.seed) if len(texts) > 1 else None
    harvest(run / kept["path"], config, text=text, progress=progress)


def what_is_missing(run: Path, kept: Recorded | None) -> Live | None:
    """What has to be harvested before the run's rows can be read; None where they are there."""
    if kept is None or "live" not in kept or (run / kept["path"] / "index.json").is_file():
        return None
    return kept["live"]


def _place(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name
