"""Harvesting anew for a run that trained live and kept no rows: its model reads its text once more."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saefast.data.provenance import DATA, Live, Recorded, recorded_data
from saefast.data.shards import Identity
from saefast.data.source import Names, X, by_tensor, side_by_side
from saefast.errors import InputError
from saefast.harvest.config import HOW_IT_RUNS, HarvestConfig, in_dtype
from saefast.harvest.language_models import load_tokenizer
from saefast.harvest.reader import check_same, given_model_name, load_for
from saefast.harvest.text import open_texts
from saefast.harvest.to_disk import harvest

# Where, in the run's folder, and how many tokens: held-out rows for `saefast eval`, others as well for the tokens that
# `saefast features` looks at.
FOLDER, TOKENS = "activations", 1 << 18
# Of a harvest's settings: those that do not determine the rows, but for the dtype they are kept in, and the text, which
# is said elsewhere.
_NOT_KEPT = {*HOW_IT_RUNS, "text"} - {"dtype"}


def describe_live(
    config: HarvestConfig, texts: tuple[str, ...], hook: str | Names, identity: Identity | None = None
) -> dict[str, Any]:
    """SAEConfig.metadata of a run that trains while the model reads: all it takes to harvest the rows again.

    hook: the one trained on, or those of live_source, by tensor. identity: of the model and tokenizer, as live sources
    have it. Paths are made absolute, names of models and data sets stay.
    """
    kept = {name: value for name, value in dataclasses.asdict(config).items() if name not in _NOT_KEPT}
    kept |= {"model": _place(config.model), "text": [_place(text) for text in texts]}
    data: dict[str, Any] = {"path": FOLDER, "heldout": config.heldout, "live": kept}
    data |= {"hook": hook} if isinstance(hook, str) else {"hooks": by_tensor(hook)}
    data |= {"identity": identity} if identity is not None else {}
    hooks = side_by_side({X: hook} if isinstance(hook, str) else hook)
    first = ",".join(hooks.get(X, next(iter(hooks.values()))))
    names = ", ".join(texts) or "stdlib docstrings"
    return {DATA: data, "model_name": config.model, "dataset_path": names, "hook_name": first}


def harvest_again(run: Path, kept: Recorded, progress: bool = False, model: Any = None, tokenizer: Any = None) -> None:
    """Harvests into the run's folder what `describe_live` says, at most TOKENS tokens; nothing is done twice.

    The documents that were held out are held out again: a hash of their text decides.

    Args:
        model, tokenizer: those of the run, or where they load from, instead of the names that it knows.

    Raises:
        InputError: the model or the text is gone, the model is not the one that the run trained on, or the folder holds
            another harvest.
    """
    live = kept["live"]
    known = {field.name for field in dataclasses.fields(HarvestConfig)}
    if unknown := sorted(set(live) - known):
        raise InputError(f"{run} was harvested with {', '.join(unknown)}, which this version of saefast does not know")
    settings: dict[str, Any] = {name: value for name, value in live.items() if name != "text"}
    texts = live["text"]
    # JSON has lists for tuples.
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    named = [hook for several in side_by_side(kept.get("hooks", {})).values() for hook in several]
    hooks = tuple(dict.fromkeys(named)) or (str(kept.get("hook")),)
    config = HarvestConfig(hooks=hooks, text=texts[0] if len(texts) == 1 else None, max_tokens=TOKENS, **settings)
    config = in_dtype(config, (kept.get("identity") or {}).get("dtype"))
    text = open_texts(texts, config.text_column, config.seed) if len(texts) > 1 else None
    if isinstance(model, str | Path):
        tokenizer = model if tokenizer is None else tokenizer
        model = load_for(config, model)
    if model is not None and tokenizer is None:
        tokenizer = getattr(model, "tokenizer", None) or config.model
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer(tokenizer)
    given = {"model": model, "tokenizer": tokenizer, "text": text, "identity": kept.get("identity")}
    if "identity" not in kept and not (run / kept["path"] / "index.json").is_file():
        name = live["model"] if model is None else given_model_name(model)
        warnings.warn(
            f"{run} keeps no digest of the model that it trained on: that {name} is that one is not checked",
            RuntimeWarning,
            stacklevel=2,
        )
    harvest(run / kept["path"], config, progress=progress, **given)


def as_begun(config: HarvestConfig, run: Path, metadata: Mapping[str, Any]) -> HarvestConfig:
    """The config of a run that goes on training live, with the dtype that its model ran in before for "auto"."""
    kept = recorded_data(dict(metadata), run)
    return config if kept is None else in_dtype(config, kept.get("identity", {}).get("dtype"))


def check_resumed(run: Path, metadata: Mapping[str, Any], identity: Identity) -> None:
    """Raises InputError where a run's metadata says that it trained live on another model or tokenizer."""
    kept = recorded_data(dict(metadata), run)
    if kept is not None and "live" in kept:
        check_same(kept.get("identity"), identity, run)


def what_is_missing(run: Path, kept: Recorded | None) -> Live | None:
    """What has to be harvested before the run's rows can be read; None where they are there."""
    if kept is None or "live" not in kept or (run / kept["path"] / "index.json").is_file():
        return None
    return kept["live"]


def _place(name: str) -> str:
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name
