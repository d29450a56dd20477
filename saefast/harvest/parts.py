"""A harvest shared by any number of processes, on one machine or on several that share a folder: no coordinator.

The text is cut into parts, windows of consecutive documents, by the text alone. Each process walks along them, claims
one that nobody has (claims.py), harvests it into a shard folder of its own, and records that it is done:

    OUT/parts/settings.json      what all processes agree on: those that ask for anything else are refused
    OUT/parts/00003.0.claim      somebody works at part 3
    OUT/parts/00003-0/           its rows
    OUT/parts/00003.json         it is done, and in which folder; how many tokens it has
    OUT/index.json               at the end, by whoever finds every part done: one shard folder of them all

Processes may come and go. What was not recorded is harvested again from the part's beginning.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from saefast.data.parts import join_parts
from saefast.data.shard_writer import ShardWriter
from saefast.data.shards import IndexFacts, read_index
from saefast.errors import InputError
from saefast.files import SEAL, create_sealed_json, read_sealed_json, usable, write_sealed_json
from saefast.harvest.claims import Claim, Holder, latest, take
from saefast.harvest.config import HarvestConfig
from saefast.harvest.documents import Document, Fingerprint, Text
from saefast.harvest.harvester import Harvester
from saefast.harvest.identity import identity_of
from saefast.harvest.language_models import unwrapped
from saefast.harvest.reader import HarvestBatch, check_same
from saefast.harvest.sequences import Window, next_documents
from saefast.harvest.to_disk import Bar, HarvestReport, Writing, finished_report, report_of, settings_as_kept
from saefast.schema import Count
from saefast.typed import typed

PARTS, SETTINGS = "parts", "settings.json"
# A short text has small parts, so that many processes have work, and a long one not too many files.
_SMALL_PARTS, _WINDOWS = 64, 4
# Seconds between two looks at what others are doing, when nothing else is left to do.
_POLL = 1.0


class Part(NamedTuple):
    """Consecutive documents of a text, and fingerprints of it up to their beginning and their end."""

    number: int
    documents: list[Document]
    before: Fingerprint
    after: str


class Record(TypedDict):
    """parts/00003.json: a part that is done, and in which folder.

    seqs, tokens: harvested; docs: of the text, up to the last one harvested, and fingerprint of them; whole: that is
    the part's last one. before, after: fingerprints of the text up to the part's beginning and its end.
    """

    folder: str
    docs: Count
    seqs: Count
    tokens: Count
    fingerprint: str
    whole: bool
    before: str
    after: str


class Known(TypedDict):
    """parts/00003.tokens: how many tokens a part has, for those who must know how far max_tokens goes."""

    tokens: Count


@typed
def harvest_parts(
    out_dir: str | Path,
    config: HarvestConfig | None = None,
    *,
    model: Any = None,
    tokenizer: Any = None,
    text: Any = None,
    progress: bool | Callable[[int], object] = True,
    take_over_after: float = 300.0,
) -> HarvestReport:
    """Takes part in a harvest into out_dir that other processes, here or elsewhere, may be taking part in; see above.

    The rows, their numbers and the held-out share are those of `harvest`, however many processes there were: parts are
    taken in the text's order, and with max_tokens the document that reaches it is the last. Returns when all parts are
    done, after waiting for those that others are at. Ctrl-C gives up the part at hand and keeps those that are done.

    Args:
        out_dir, config, model, tokenizer, text: as `harvest` takes them. The text must be the same each time it is
            read, and in every process.
        progress: a line on the terminal, none, or a function that is given the number of tokens after each batch.
        take_over_after: seconds without a sign of life (there is one every 10) after which another machine's process
            counts as gone. One of this machine is known to be gone at once.

    Raises:
        InputError: as `harvest`; other settings or another text than the others have.
    """
    config = config or HarvestConfig()
    if config.images is not None or config.audio is not None:
        raise InputError("images and audio are harvested by one process so far: leave out --data-parallel")
    folder = usable(out_dir)
    if not take_over_after > 0:
        raise InputError(f"take_over_after is {take_over_after}, expected a positive number of seconds")
    model, tokenizer = unwrapped(model, tokenizer)
    finished = finished_report(folder, config, model, text, None)
    if finished:
        check_same(read_index(folder).get("identity"), {"weights": None, **identity_of(model, tokenizer)}, folder)
        return finished
    if (folder / "index.json").exists() and not (folder / PARTS).is_dir():
        raise InputError(f"{folder} was begun by one process alone: go on without --data-parallel, or choose another")
    harvester = Harvester(config, model=model, tokenizer=tokenizer, text=text, stored=True)
    started = time.perf_counter()
    try:
        with Bar(harvester, None, progress is True) as bar:
            told = progress if callable(progress) else None
            shared = _Shared(harvester, folder, settings_as_kept(config, model, text), take_over_after, bar, told)
            index = shared.whole()
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written: {error.strerror or error}; finished parts are kept, the same command goes on"
        ) from None
    report = report_of(folder, index)
    report.seconds, report.tokens = time.perf_counter() - started, shared.tokens
    report.skipped, report.n_skipped = harvester.skipped, harvester.n_skipped
    return report


def parts_of(text: Text, tokenizer: Any = None) -> Iterator[Part]:
    """The text's parts, in its order. tokenizer: writes chats out."""
    documents, fingerprint = text.documents(tokenizer), Fingerprint()
    for number in count():
        group: list[Document] = []
        for _ in range(1 if number < _SMALL_PARTS else _WINDOWS):
            group += next_documents(documents)
        if not group:
            return
        before = fingerprint.copy()
        for document in group:
            fingerprint.add(document)
        yield Part(number, group, before, fingerprint.value)


def tokens_done(folder: Path) -> int:
    """How many tokens are in the parts that are done."""
    records = [read_sealed_json(path, Record) for path in (folder / PARTS).glob("[0-9]*.json")]
    return sum(int(record["tokens"]) for record in records)


class _Shared:
    """One process's share in a harvest: walks along the parts until all are done."""

    def __init__(
        self,
        harvester: Harvester,
        folder: Path,
        settings: dict[str, Any],
        patience: float,
        bar: Bar,
        told: Callable[[int], object] | None,
    ) -> None:
        self._harvester, self._folder, self._parts = harvester, folder, folder / PARTS
        self._settings, self._patience, self._bar, self._told = settings, patience, bar, told
        self._limit = harvester.config.max_tokens
        self._n_parts = 0
        self.tokens = 0
        self._parts.mkdir(parents=True, exist_ok=True)
        _agree(self._parts / SETTINGS, harvester, settings)

    def whole(self) -> dict[str, Any]:
        """Harvests what nobody else does, and joins it all; the index."""
        while True:
            waiting = self._walk()
            while waiting and not self._can_be_taken(waiting):
                time.sleep(_POLL)
                waiting = {part for part in waiting if not self._record(part)}
            if not waiting and self._all_done():
                return self._join()

    def _walk(self) -> set[int]:
        """Goes along the text and harvests every part that is free; those that others are at."""
        waiting: set[int] = set()
        left = self._limit
        for part in parts_of(self._harvester.text, self._harvester.tokenizer):
            if left is not None and left <= 0:
                break
            self._n_parts = part.number + 1
            record = self._done(part, left) or self._take(part, left)
            if record is None:
                waiting.add(part.number)
            if left is not None:
                left -= self._count(part) if record is None else record["tokens"]
        return waiting

    def _done(self, part: Part, left: int | None) -> Record | None:
        """The record of a part that is done, as far as the limit asks."""
        record = self._record(part.number)
        if record and (record["before"], record["after"]) != (part.before.value, part.after):
            raise InputError(
                f"text {self._harvester.name!r} is not what the harvest began with (part {part.number} differs):"
                " harvest into another folder"
            )
        enough = record and (record["whole"] or (left is not None and record["tokens"] >= left))
        return record if enough else None

    def _take(self, part: Part, left: int | None) -> Record | None:
        """Harvests a part, if nobody has it."""
        claim = take(self._parts, part.number, self._patience)
        if isinstance(claim, Holder):
            return None
        try:
            # Another may have finished it since we looked; what was made before its claim ended is seen now.
            return self._done(part, left) or self._harvest(part, claim, left)
        finally:
            claim.release()

    def _harvest(self, part: Part, claim: Claim, left: int | None) -> Record | None:
        """None if another process took the part over."""
        folder = self._parts / f"{part.number:05d}-{claim.generation}"
        shutil.rmtree(folder, ignore_errors=True)
        try:
            windows = self._windows(part, left)
            self._write(folder, windows, left)
            if claim.lost:
                shutil.rmtree(folder, ignore_errors=True)
                return None
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        record = self._record_of(part, folder.name, windows)
        write_sealed_json(self._parts / f"{part.number:05d}.json", dict(record))
        return record

    def _windows(self, part: Part, left: int | None) -> list[Window]:
        windows = list(self._harvester.sequencer.windows(iter(part.documents), part.before.copy(), max_tokens=left))
        if left is not None and sum(window.n_docs for window in windows) == len(part.documents):
            self._publish(part.number, self._tokens_of(windows))
        return windows

    def _write(self, folder: Path, windows: list[Window], left: int | None) -> None:
        harvester, config = self._harvester, self._harvester.config
        with ShardWriter(
            folder,
            harvester.runner.hooks,
            config.dtype,
            settings=self._settings,
            rows_per_shard=config.rows_per_shard,
            shuffle_seed=config.seed,
        ) as writer:
            writing = Writing(harvester, writer, left, often=False)
            writing.take(harvester.rows_of(iter(windows)), self._seen)
            writing.commit(complete=True)
            self.tokens += writing.tokens

    def _seen(self, batch: HarvestBatch) -> None:
        self._bar.update(batch)
        if self._told:
            self._told(batch.tokens)

    def _record_of(self, part: Part, folder: str, windows: list[Window]) -> Record:
        last = windows[-1]
        return Record(
            folder=folder,
            docs=last.first_doc + last.n_docs,
            seqs=sum(window.n_seq for window in windows),
            tokens=self._tokens_of(windows),
            fingerprint=last.after,
            whole=last.after == part.after,
            before=part.before.value,
            after=part.after,
        )

    def _tokens_of(self, windows: list[Window]) -> int:
        return sum(map(self._harvester.tokens, windows))

    def _count(self, part: Part) -> int:
        """Tokens of a part that another process is at: it says so soon, and who cannot wait for that counts them."""
        path = self._parts / f"{part.number:05d}.tokens"
        if path.exists():
            known: Known = read_sealed_json(path, Known)
            return known["tokens"]
        tokens = self._tokens_of(list(self._harvester.sequencer.windows(iter(part.documents), part.before.copy())))
        self._publish(part.number, tokens)
        return tokens

    def _publish(self, number: int, tokens: int) -> None:
        write_sealed_json(self._parts / f"{number:05d}.tokens", dict(Known(tokens=tokens)))

    def _record(self, number: int) -> Record | None:
        path = self._parts / f"{number:05d}.json"
        if not path.exists():
            return None
        record: Record = read_sealed_json(path, Record)
        # A folder that somebody deleted is harvested again.
        return record if (self._parts / record["folder"] / "index.json").exists() else None

    def _can_be_taken(self, numbers: set[int]) -> bool:
        """Whether one of the parts that others were at is left by them. Shows whom we wait for."""
        for number in sorted(numbers):
            holder = latest(self._parts, number, self._patience)
            if (holder is None or holder.dead) and not self._record(number):
                return True
            if holder is not None:
                self._bar.waits(f"part {number} of {holder.name}, {holder.age:.0f} s ago")
        return False

    def _all_done(self) -> bool:
        """Whether the parts' records reach the end of the text, or the limit; others may have had a lower one."""
        records = [self._record(number) for number in range(self._n_parts)]
        found = [record for record in records if record]
        reached = self._limit is not None and sum(record["tokens"] for record in found) >= self._limit
        cut = [record for record in found if not record["whole"]]
        return len(found) == len(records) and (not cut or (reached and cut == found[-1:]))

    def _join(self) -> dict[str, Any]:
        records = [record for number in range(self._n_parts) if (record := self._record(number))]
        tokens = sum(record["tokens"] for record in records)
        if (self._folder / "index.json").exists():
            index = read_index(self._folder)
            # Another process was told to go further.
            if (index.get("cursor") or {}).get("tokens", 0) >= tokens:
                return index
        last = records[-1]
        cursor = {
            "docs": last["docs"],
            "seqs": sum(record["seqs"] for record in records),
            "fingerprint": last["fingerprint"],
            "tokens": tokens,
            "done": 0,
        }
        end = "text" if self._limit is None or tokens < self._limit else "max_tokens"
        index = join_parts(self._folder, [f"{PARTS}/{record['folder']}" for record in records], cursor=cursor, end=end)
        self._clear()
        return index

    def _clear(self) -> None:
        """Removes what is of no more use: claims, counts, and folders of processes that were killed."""
        for path in list(self._parts.iterdir()):
            number = path.name.replace("-", ".").split(".")[0]
            record = self._record(int(number)) if number.isdecimal() else None
            if record is None or path.name in (record["folder"], f"{number}.json"):
                continue
            holder = latest(self._parts, int(number), self._patience)
            if path.is_dir() and (holder is None or holder.dead):
                shutil.rmtree(path, ignore_errors=True)
            elif not path.is_dir() and (holder is None or holder.dead):
                path.unlink(missing_ok=True)


def _agree(path: Path, harvester: Harvester, settings: dict[str, Any]) -> None:
    """Writes the settings that all share, or takes them over where they are the same."""
    if not path.exists():
        harvester.find_norms()
        if create_sealed_json(path, _agreed(harvester, settings)):
            return
    theirs, ours = read_sealed_json(path, IndexFacts), _agreed(harvester, settings)
    for name in [name for name in dict.fromkeys([*ours, *theirs]) if name not in (SEAL, "identity", "median_norms")]:
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"{path.parent.parent} is being harvested with {name} = {theirs.get(name)!r}, now {ours.get(name)!r} is"
                " asked for: choose another folder, or delete it"
            )
    # Digests are compared, and the usual norm is theirs: another processor's would differ in its last digits.
    harvester.go_on({**theirs, "cursor": {"docs": 0}}, path.parent.parent)


def _agreed(harvester: Harvester, settings: dict[str, Any]) -> dict[str, Any]:
    config = harvester.config
    how = {name: getattr(config, name) for name in ("dtype", "rows_per_shard", "batch_tokens")}
    agreed: dict[str, Any] = {**settings, **how, **harvester.facts(), "hooks": harvester.runner.hooks}
    return dict(json.loads(json.dumps(agreed)))
