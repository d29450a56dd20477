"""Harvest into a shard folder: `harvest` begins one, or goes on with one that was stopped or killed."""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from saefast.data.item_names import unit_of
from saefast.data.shard_writer import ShardWriter, clear_finished
from saefast.data.shards import read_index
from saefast.errors import InputError
from saefast.files import usable
from saefast.harvest.config import HOW_IT_RUNS, HarvestConfig, in_dtype
from saefast.harvest.harvester import Harvester
from saefast.harvest.identity import identity_of
from saefast.harvest.item_harvester import ItemHarvester, harvester_for, reads_items, settings_of
from saefast.harvest.kept import DROPPED
from saefast.harvest.language_models import unwrapped
from saefast.harvest.reader import HarvestBatch, check_same, given_model_name
from saefast.harvest.sequences import Window
from saefast.schema import Count, check
from saefast.typed import typed

__all__ = ["HarvestBatch", "HarvestConfig", "HarvestReport", "Harvester", "harvest", "harvest_batches"]
# Settings that came later: written where they are not the default, so that folders begun without them can go on.
_LATER = {"exclude_tokens": (), "drop_first": 0}


@dataclass
class HarvestReport:
    """What lies in the folder, and how this call went.

    kind: what the rows are of, "text", "images", "audio" or "inputs"; of the last three, sequences and documents are
    items, and tokens positions. rows, heldout_rows: of the two shares; sequences, documents: harvested; dropped: tokens
    left out, by reason; complete: the end of the text, or max_tokens, is reached. seconds and tokens (run through the
    model): of this call; skipped, n_skipped: files and lines that could not be read, the first thousand, and how many.
    """

    folder: Path
    rows: int
    heldout_rows: int
    sequences: int
    documents: int
    dropped: dict[str, int]
    complete: bool
    seconds: float = 0.0
    tokens: int = 0
    skipped: list[str] = field(default_factory=list)
    n_skipped: int = 0
    kind: str = "text"

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@typed
def harvest(
    out_dir: str | Path,
    config: HarvestConfig | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    text: Any = None,
    items: Any = None,
    processor: Any = None,
    progress: bool = True,
    identity: Mapping[str, Any] | None = None,
) -> HarvestReport:
    """Harvests into out_dir, going on where an earlier call with the same settings stopped.

    model, tokenizer, text: objects to use instead of the names in config (a model with its hooks, any iterable of
    strings). items: what a model reads that takes no token ids (ViT, Whisper ...): an iterable, or a function that
    returns one, of mappings of tensors as the model's forward takes them, a row of each per item
    ({"pixel_values": (B, C, H, W)}); of pairs of such a mapping and a mask (B, T) of the positions to keep; "names", a
    list of strings, may lie beside the tensors. processor: of a model object that reads config's images or audio.

    The folder keeps digests of model and tokenizer, and goes on with those alone, whatever they are called;
    only where nothing is left to do, a model that config names is not loaded, and so not looked at. identity: what
    another folder's index.json or a run keeps of the model and tokenizer that these have to be.

    Ctrl-C makes a shard of what is there before it is raised again; a kill loses what came after the last
    shard. Raises InputError for bad input, other settings than the folder was begun with, and a full disk; shards that
    were finished stay.
    """
    config = config or HarvestConfig()
    folder = usable(out_dir)
    model, tokenizer = unwrapped(model, tokenizer)
    # Where digests say which model it is, its name is no setting.
    named = model if identity is None else None
    finished = finished_report(folder, config, named, text, items)
    if finished:
        kept = read_index(folder).get("identity") or {}
        for expected in (identity, identity_of(model, tokenizer)):
            check_same(kept, expected or {}, folder)
        clear_finished(folder)
        return finished
    if (folder / "parts").is_dir():
        raise InputError(f"{folder} is harvested in parts: go on with --data-parallel, or choose another folder")
    begun = in_dtype(config, _begun_in(folder))
    harvester = harvester_for(
        begun, model=model, tokenizer=tokenizer, text=text, items=items, processor=processor, stored=True
    )
    check_same(identity, harvester.identity, folder)
    started = time.perf_counter()
    try:
        with ShardWriter(
            folder,
            harvester.runner.hooks,
            config.dtype,
            settings=settings_as_kept(config, named, text, items),
            rows_per_shard=config.rows_per_shard,
            shuffle_seed=config.seed,
        ) as writer:
            harvester.go_on(writer.index, folder)
            writing = Writing(harvester, writer, config.max_tokens)
            writing.whole(progress)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written: {error.strerror or error}; finished shards are kept, the same command goes on"
        ) from None
    report = report_of(folder, read_index(folder))
    report.seconds, report.tokens = time.perf_counter() - started, writing.tokens
    report.skipped, report.n_skipped = harvester.skipped, harvester.n_skipped
    return report


def harvest_batches(
    config: HarvestConfig | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    text: Any = None,
    items: Any = None,
    processor: Any = None,
) -> Iterator[HarvestBatch]:
    """The rows of a harvest as they are made, nothing written: for training while harvesting.

    Each batch has rows (per hook (n, d), on the model's device and in its dtype), seq, pos and split; batches whose
    split is "heldout" are not to be trained on. Neighbouring rows are of one sequence: shuffle them through a buffer.
    """
    harvester = harvester_for(
        config or HarvestConfig(), model=model, tokenizer=tokenizer, text=text, items=items, processor=processor
    )
    return harvester.batches()


class Cursor(TypedDict):
    """How far a harvest has come, as far as its report tells."""

    docs: Count
    seqs: Count
    done: Count


class Finished(TypedDict):
    """What the report on a harvest needs of index.json."""

    cursor: Cursor
    dropped: dict[str, Count]
    complete: bool


class Writing:
    """One call of harvest: feeds batches to the writer, commits, and keeps the cursor.

    limit: tokens after which a text that goes on counts as harvested. often: whether to commit every commit_seconds.
    """

    def __init__(
        self,
        harvester: Harvester | ItemHarvester,
        writer: ShardWriter,
        limit: int | None = None,
        often: bool = True,
    ) -> None:
        self._harvester, self._writer = harvester, writer
        self._limit, self._seconds = limit, harvester.config.commit_seconds if often else float("inf")
        self._cursor = writer.cursor
        dropped = writer.index.get("dropped", {})
        self._dropped = np.array([dropped.get(name, 0) for name in DROPPED], dtype=np.int64)
        self._window: Window | None = None
        self._window_tokens = 0
        self.tokens = 0
        self._committed_at = time.monotonic()
        # While rows are handed over, the cursor does not yet count all that the writer holds.
        self._feeding = False

    def whole(self, progress: bool) -> None:
        writer = self._writer
        try:
            with Bar(self._harvester, self._cursor, progress) as bar:
                self.take(self._harvester.batches(self._cursor), bar.update)
            if not writer.waiting and not writer.index["n_rows"]:
                harvester, n = self._harvester, self._harvester.n_skipped
                why = f"; {harvester.skipped[0]} ({n} skipped)" if n else ""
                unit = unit_of(harvester.kind)
                raise InputError(f"{harvester.name}: no row was kept, {self._dropped.sum()} {unit} dropped{why}")
            self.commit(complete=True)
        except KeyboardInterrupt:
            if writer.waiting and not self._feeding:
                self.commit()
            raise

    def take(self, batches: Iterable[HarvestBatch], seen: Callable[[HarvestBatch], None]) -> None:
        """Hands batches to the writer, and each to `seen` after that."""
        for batch in batches:
            self._enter(batch.window)
            self._feed(batch)
            self.tokens += batch.tokens
            seen(batch)
        self._leave()

    def _enter(self, window: Window) -> None:
        """At a window's first batch: its tokens are kept, and the cursor moves to its beginning."""
        if window is self._window:
            return
        self._leave()
        self._window = window
        self._window_tokens = self._harvester.tokens(window)
        before = self._cursor["tokens"] if self._cursor else 0
        self._cursor = {
            "docs": window.first_doc,
            "seqs": window.first_seq,
            "fingerprint": window.before,
            "window_docs": window.n_docs,
            "tokens": before,
            "done": 0,
        }
        self._harvester.keep(window, self._writer)

    def _leave(self) -> None:
        """After a window's last batch: the cursor moves to its end."""
        if self._window is None or self._cursor is None:
            return
        window = self._window
        self._cursor = {
            "docs": window.first_doc + window.n_docs,
            "seqs": window.first_seq + window.n_seq,
            "fingerprint": window.after,
            "tokens": self._cursor["tokens"] + self._window_tokens,
            "done": 0,
        }
        self._window = None

    def _feed(self, batch: HarvestBatch) -> None:
        """Gives a batch to the writer; where a shard becomes full it is cut between two sequences."""
        self._feeding = True
        ends = np.concatenate([[0], np.cumsum(batch.counts)])
        first, n = 0, len(batch.counts)
        while first < n:
            room = self._writer.room(batch.split)
            last = int(np.searchsorted(ends, ends[first] + room, side="right")) - 1
            if last == first and self._writer.waiting:
                self.commit()
                continue
            last = max(last, first + 1)
            part = slice(int(ends[first]), int(ends[last]))
            rows = {name: values[part] for name, values in batch.rows.items()}
            # Of images that could not be read there is not even the width.
            if rows:
                self._writer.add(batch.split, rows, batch.seq[part], batch.pos[part])
            self._dropped += batch.dropped[first:last].sum(0)
            first = last
            if self._cursor is not None:
                self._cursor["done"] = batch.done - (n - last)
        if time.monotonic() - self._committed_at > self._seconds:
            self.commit()
        self._feeding = False

    def commit(self, complete: bool = False) -> None:
        harvester, cursor = self._harvester, dict(self._cursor or {})
        dropped = dict(zip(DROPPED, self._dropped.tolist(), strict=True))
        self._writer.commit(
            cursor, complete, end=self._end(cursor) if complete else None, dropped=dropped, **harvester.facts()
        )
        self._committed_at = time.monotonic()

    def _end(self, cursor: dict[str, Any]) -> str:
        if self._limit is not None and cursor.get("tokens", 0) >= self._limit:
            return "max_tokens"
        items = self._harvester.config.max_items
        return "max_items" if items is not None and cursor.get("docs", 0) >= items else "text"


class Bar:
    """Progress on the terminal: tokens, tokens per second, time left. tqdm is imported only when it is shown."""

    def __init__(self, harvester: Harvester | ItemHarvester, cursor: dict[str, Any] | None, shown: bool) -> None:
        self._limit = harvester.config.max_tokens
        self._size = harvester.size() if shown and self._limit is None else None
        self._window: Window | None = None
        self._chars = self._tokens = 0
        self._bar: Any = None
        if shown:
            from tqdm.auto import tqdm

            before = cursor["tokens"] if cursor else 0
            total = None if self._limit is None else max(self._limit - before, 0)
            self._bar = tqdm(
                desc="harvest", unit=f" {unit_of(harvester.kind)}", unit_scale=True, total=total, dynamic_ncols=True
            )

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, batch: HarvestBatch) -> None:
        if self._bar is None:
            return
        if batch.window is not self._window:
            self._window = batch.window
            self._chars += batch.window.chars
            self._tokens += batch.window.positions
            if self._size:
                # The text's length in tokens, judged by what was tokenised so far.
                self._bar.total = round(self._tokens * max(self._size / self._chars, 1))
        self._bar.update(batch.tokens)

    def waits(self, what: str) -> None:
        """Says that nothing is left to do but wait for others."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"waiting for {what}")


def settings_as_kept(config: HarvestConfig, model: Any, text: Any, items: Any = None) -> dict[str, Any]:
    """What determines the rows, as JSON keeps it."""
    out = {key: value for key, value in asdict(config).items() if key not in HOW_IT_RUNS}
    out = settings_of(out, reads_items(config, items))
    out = {key: value for key, value in out.items() if key not in _LATER or value != _LATER[key]}
    if model is not None:
        out["model"] = given_model_name(model)
    if text is not None:
        out["text"] = getattr(text, "name", None) or (str(text) if isinstance(text, str | Path) else "given")
    if items is not None:
        out["items"] = "given"
    kept: dict[str, Any] = json.loads(json.dumps(out))
    return kept


def _enough(config: HarvestConfig, cursor: Mapping[str, Any]) -> bool:
    """Whether as much is harvested as max_tokens, or max_items, asks for."""
    wanted = ((config.max_tokens, "tokens"), (config.max_items, "docs"))
    return any(limit is not None and cursor.get(name, 0) >= limit for limit, name in wanted)


def _begun_in(folder: Path) -> str | None:
    """The dtype that the model ran in for the rows in a folder, None where there are none."""
    index = read_index(folder) if (folder / "index.json").is_file() else {}
    return index.get("forward") if index.get("cursor") else None


def finished_report(folder: Path, config: HarvestConfig, model: Any, text: Any, items: Any) -> HarvestReport | None:
    """The report on a folder in which nothing is left to do, before any model is loaded."""
    if not (folder / "index.json").is_file():
        return None
    index = read_index(folder)
    hooks = index.get("hook_patterns") or [hook["name"] for hook in index["hooks"]]
    cursor = index.get("cursor") or {}
    same = index.get("settings") == settings_as_kept(config, model, text, items) and hooks == list(config.hooks)
    enough = _enough(config, cursor)
    if not (index.get("complete") and same and index["dtype"] == config.dtype):
        return None
    return report_of(folder, index) if index.get("end") == "text" or enough else None


def report_of(folder: Path, index: dict[str, Any]) -> HarvestReport:
    done: Finished = check(index, Finished, folder / "index.json")
    cursor, splits = done["cursor"], index["splits"]
    return HarvestReport(
        folder,
        rows=splits["train"],
        heldout_rows=splits["heldout"],
        sequences=cursor["seqs"] + cursor["done"],
        documents=cursor["docs"],
        dropped=done["dropped"],
        complete=done["complete"],
        kind=index.get("kind", "text"),
    )
