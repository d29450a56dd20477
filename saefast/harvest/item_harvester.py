"""A model that reads something else than token ids, items for it and the modules to listen to, made into rows."""

import contextlib
import hashlib
import inspect
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from saefast.data.shard_writer import ShardWriter
from saefast.errors import InputError
from saefast.harvest.audio_folder import AudioFolder
from saefast.harvest.capture import ModuleRunner
from saefast.harvest.config import HarvestConfig
from saefast.harvest.documents import Fingerprint
from saefast.harvest.harvester import Harvester
from saefast.harvest.image_folder import ImageFolder
from saefast.harvest.items import GivenItems, Group, Items, Part, Start
from saefast.harvest.kept import DROPPED, NORM_TOKENS, Overflow, finite_rows, norms_of, ordinary_norms
from saefast.harvest.language_models import load_processor, unwrapped
from saefast.harvest.positions import MOST_POSITIONS, in_front, shaper, unmasked
from saefast.harvest.reader import HarvestBatch, Reader
from saefast.harvest.sequences import Window
from saefast.harvest.workers import in_order

_PROCESSORS = {"images": "AutoImageProcessor", "audio": "AutoFeatureExtractor"}
# Items that are run together for the median norm, whatever batch_items is.
_NORM_ITEMS = 16


@dataclass
class ItemWindow(Window):
    """Items that were harvested in one piece: their names in the place of tokens; `docs` and `ids` are empty.

    tokens: how many positions all of them have together.
    """

    names: list[str]

    @property
    def n_seq(self) -> int:
        return len(self.names)

    @property
    def positions(self) -> int:
        return self.tokens

    def order(self) -> list[int]:
        """The held-out items first, as they come."""
        return sorted(range(self.n_seq), key=lambda i: not self.held[i])


class _Rows(NamedTuple):
    """Rows of some items: per hook (n, d), the number of each row's item in its group and its position (n,) int64;
    dropped (items, len(DROPPED)); positions (items,): how many each has; overflow as in HarvestBatch, with the item."""

    rows: dict[str, Tensor]
    owner: np.ndarray
    pos: np.ndarray
    dropped: np.ndarray
    positions: np.ndarray
    overflow: tuple[Overflow, int, int] | None = None


class _Made(NamedTuple):
    """A group that has been run."""

    group: Group
    rows: _Rows
    digests: list[str]
    keys: list[str]
    skipped: list[str]


class ItemHarvester(Reader):
    """A model and items for it, ready to be run: a folder of images or audio that config names, or `items` as `harvest`
    takes them. `model` overrides the name in config; a folder's contents go through `processor`, the model's own.

    Raises InputError for anything that does not load, an unknown hook, settings that are text's alone, a model that
    does not read such items, and hooks in a decoder.
    """

    runner: ModuleRunner

    def __init__(
        self,
        config: HarvestConfig,
        *,
        model: Any = None,
        processor: Any = None,
        items: Any = None,
        stored: bool = False,
    ) -> None:
        kind = "items" if items is not None else "images" if config.images is not None else "audio"
        check_items(config, items)
        model, _ = unwrapped(model, None)
        if processor is None and kind in _PROCESSORS:
            if model is not None:
                raise InputError(f"processor is missing: pass the one that belongs to the model, to read {kind} with")
            processor = load_processor(config.model, _PROCESSORS[kind], revision=config.revision)
        super().__init__(config, model, stored)
        if not isinstance(self.runner, ModuleRunner):
            raise InputError(f"model is a {type(self.model).__name__}, expected a torch module to run {kind} through")
        self.processor = processor
        self.items = _items(config, processor, items, str(getattr(self.model, "main_input_name", "the model's input")))
        self.kind = self.items.kind
        self._takes = inspect.signature(self.model.forward).parameters
        self._takes_any = any(p.kind == p.VAR_KEYWORD for p in self._takes.values())
        if kind in _PROCESSORS and self.items.input not in self._takes:
            reads = getattr(self.model, "main_input_name", "other arguments")
            raise InputError(f"{type(self.model).__name__} reads {reads}, not the {self.items.input} of {kind}")
        paths = {hook["name"]: hook["hf_name"] for hook in self.runner.hooks}
        _refuse_decoder(self.model, paths)
        self._shaped = shaper(self.model, config.feature_maps)

    @property
    def name(self) -> str:
        """Where the items come from."""
        return self.items.name

    @property
    def skipped(self) -> list[str]:
        """Items that could not be read, and why: the first thousand."""
        return self.items.skipped

    @property
    def n_skipped(self) -> int:
        """How many."""
        return self.items.n_skipped

    def size(self) -> int | None:
        """How much there is, as Window.chars counts; None where it is not known."""
        return None if self.config.max_items is not None else self.items.total()

    def tokens(self, window: Window) -> int:
        """How many positions a window's items have."""
        return window.tokens

    def keep(self, window: Window, writer: ShardWriter) -> None:
        """Leaves with the writer the names of a window's items."""
        assert isinstance(window, ItemWindow)
        writer.add_items(window.first_seq, window.names)

    def facts(self) -> dict[str, Any]:
        """What the index says about where the rows came from."""
        made_by = {} if self.processor is None else {"processor": type(self.processor).__name__}
        return {
            **self.model_facts(),
            "kind": self.kind,
            "data": self.items.name,
            "input": self.items.input,
            **made_by,
        }

    def batches(self, cursor: dict[str, Any] | None = None) -> Generator[HarvestBatch]:
        """Rows of all items, or from where `cursor` says."""
        cursor = cursor or {"docs": 0, "done": 0, "fingerprint": ""}
        fingerprint, first, known = Fingerprint(), cursor["docs"], cursor["done"]
        limit = self.config.max_items
        start = Start(
            first,
            fingerprint,
            cursor["fingerprint"],
            cursor.get("window_docs") if known else None,
            None if limit is None else limit - first,
        )
        self.items.skipped, self.items.n_skipped = [], 0
        with self.runner.attached():
            if self.config.max_norm_multiple is not None and not self._median_norms:
                self._median_norms = self._first_norms()
            groups = self.items.groups(start, self.config.batch_items)
            for made in in_order(self._run, groups, self.runner.workers):
                self.items.skip(made.skipped)
                window = self._window(made, first, fingerprint)
                for batch in _shares(made, window, known):
                    self._say_overflow(batch)
                    yield batch
                first, known = first + window.n_seq, 0

    def _window(self, made: _Made, first: int, fingerprint: Fingerprint) -> ItemWindow:
        before = fingerprint.value
        for key in made.keys:
            fingerprint.add(key)
        return ItemWindow(
            first_doc=first,
            n_docs=len(made.keys),
            first_seq=first,
            before=before,
            after=fingerprint.value,
            chars=made.group.size,
            tokens=int(made.rows.positions.sum()),
            ids=[],
            docs=[],
            held=self._held(made.digests),
            names=made.group.names,
        )

    def _held(self, digests: list[str]) -> list[bool]:
        """Which items are held out: a hash of their content says so, so that copies are never on both sides."""
        share, first = self.config.heldout, set(self.items.first)
        hashes = {digest: self._hash(digest) for digest in {*digests, *first}}
        least = min(first, key=lambda digest: hashes[digest], default=None)
        # Few items would otherwise often have no held-out share at all.
        forced = least if share > 0 and len(first) > 1 and not any(hashes[one] < share for one in first) else None
        return [hashes[digest] < share or digest == forced for digest in digests]

    def _hash(self, digest: str) -> float:
        key = self.config.seed.to_bytes(8, "little", signed=True)
        found = hashlib.blake2b(digest.encode(), digest_size=8, key=key).digest()
        return int.from_bytes(found, "little") / 2.0**64

    def _run(self, group: Group) -> _Made:
        loaded = group.load()
        n = len(group.names)
        parts = [self._kept(self._part_rows(part, n, group.names)) for part in loaded.parts]
        return _Made(group, _joined(parts, n), loaded.digests, loaded.keys, loaded.skipped)

    def _part_rows(self, part: Part, n: int, names: list[str]) -> _Rows:
        """All rows of a part but those of positions that its masks, or the settings, leave out."""
        hidden = self._hidden(part, names)
        hook, values = next(iter(hidden.items()))
        shape = (len(part.numbers), int(values.shape[1]))
        for other, found in hidden.items():
            if found.shape[:2] != shape:
                raise InputError(
                    f"hook {other!r} gives shape {tuple(found.shape)} for {shape[0]} items, hook {hook!r}"
                    f" {tuple(values.shape)}: rows have to be of the same positions; give each a folder of its own"
                )
        if shape[1] > MOST_POSITIONS:
            raise InputError(f"{names[part.numbers[0]]} has {shape[1]} positions, at most {MOST_POSITIONS} are stored")
        given = unmasked(self.model, part.inputs, hook, shape) if part.keep is None else _mask(part.keep, hook, shape)
        kept = given.numpy().copy()
        if not self.config.keep_special_tokens:
            kept[:, : in_front(self.model, part.inputs, shape[1])] = False
        places = torch.from_numpy(np.flatnonzero(kept))
        rows = {name: v.flatten(0, 1).index_select(0, places.to(v.device)) for name, v in hidden.items()}
        numbers = np.asarray(part.numbers)
        owner, pos = np.divmod(places.numpy(), shape[1])
        dropped, positions = np.zeros((n, len(DROPPED)), np.int64), np.zeros(n, np.int64)
        dropped[numbers, DROPPED.index("padding")] = (~given.numpy()).sum(1)
        dropped[numbers, DROPPED.index("special")] = (given.numpy() & ~kept).sum(1)
        positions[numbers] = shape[1]
        return _Rows(rows, numbers[owner], pos, dropped, positions)

    def _hidden(self, part: Part, names: list[str]) -> dict[str, Tensor]:
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        inputs = {name: v.to(dtype) if v.is_floating_point() else v for name, v in part.inputs.items()}
        if not self._takes_any and (unknown := [name for name in inputs if name not in self._takes]):
            raise InputError(
                f"{type(self.model).__name__} takes no {unknown[0]}: expected {', '.join(list(self._takes)[:6])}"
            )
        with _explained(self.model, inputs, names[part.numbers[0]], self.runner):
            return self.runner.run_inputs(inputs, self._shaped)

    def _kept(self, found: _Rows) -> _Rows:
        """The rows that are finite and, where that is asked for, of an ordinary norm."""
        good, overflow = finite_rows(found.rows, self._stored)
        places = {"not_finite": ~good}
        if self._median_norms:
            usual = ordinary_norms(found.rows, self.limits())
            places["outlier_norm"] = good & ~usual
            good &= usual
        if bool(good.all()):
            return found
        for reason, where in places.items():
            found.dropped[:, DROPPED.index(reason)] += np.bincount(
                found.owner[where.numpy()], minlength=len(found.dropped)
            )
        at = None if overflow is None else (overflow, int(found.owner[overflow.row]), int(found.pos[overflow.row]))
        rows = {name: values[good.to(values.device)] for name, values in found.rows.items()}
        return found._replace(rows=rows, owner=found.owner[good.numpy()], pos=found.pos[good.numpy()], overflow=at)

    def _first_norms(self) -> dict[str, float]:
        """The median norm at each hook of the first NORM_TOKENS rows or a little more.

        Of the same items, whatever batch_items, max_items and earlier calls are.
        """
        self.items.require_again("max_norm_multiple")
        norms: dict[str, list[Tensor]] = {}
        n_rows = 0
        for group in self.items.groups(Start(0, Fingerprint(), ""), _NORM_ITEMS):
            for part in group.load().parts:
                rows = self._part_rows(part, len(group.names), group.names).rows
                finite, _ = finite_rows(rows, self._stored)
                for hook, values in rows.items():
                    norms.setdefault(hook, []).append(norms_of(values).cpu()[finite])
                n_rows += int(finite.sum())
            if n_rows >= NORM_TOKENS:
                break
        if not n_rows:
            raise InputError(f"max_norm_multiple: {self.name} has no row to take the median norm of")
        return {hook: float(torch.cat(parts).median()) for hook, parts in norms.items()}


def harvester_for(
    config: HarvestConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    text: Any = None,
    items: Any = None,
    processor: Any = None,
    stored: bool = False,
) -> Harvester | ItemHarvester:
    """A harvester of text, or of items where config or `items` say so. Raises InputError for both."""
    if not reads_items(config, items):
        for name, default in _ITEM_FIELDS.items():
            if getattr(config, name) != default:
                raise InputError(
                    f"{name} is {getattr(config, name)!r}, but text is harvested: it is for images and audio"
                )
        return Harvester(config, model=model, tokenizer=tokenizer, text=text, stored=stored)
    if text is not None:
        raise InputError(
            "text and items or images or audio are given: harvest one of them, the other into a folder of its own"
        )
    return ItemHarvester(config, model=model, processor=processor, items=items, stored=stored)


def reads_items(config: HarvestConfig, items: Any) -> bool:
    """Whether anything but text is to be harvested."""
    return items is not None or config.images is not None or config.audio is not None


# Settings that text has no use for, with their defaults; and those that items share with text.
_ITEM_FIELDS: dict[str, Any] = {
    name: HarvestConfig.__dataclass_fields__[name].default
    for name in ("images", "audio", "audio_seconds", "feature_maps", "batch_items", "max_items")
}
_SHARED: tuple[str, ...] = (
    "model",
    "revision",
    "hooks",
    "dtype",
    "forward",
    "heldout",
    "keep_special_tokens",
    "max_norm_multiple",
)
_SHARED += ("seed", "rows_per_shard", "commit_seconds", "device")


def settings_of(kept: Mapping[str, Any], items: bool) -> dict[str, Any]:
    """Of a config's fields those that mean something for items, or for text."""
    if items:
        return {name: value for name, value in kept.items() if name in _SHARED or name in _ITEM_FIELDS}
    return {name: value for name, value in kept.items() if name not in _ITEM_FIELDS}


def check_items(config: HarvestConfig, items: Any) -> None:
    """Raises InputError for settings that items cannot have."""
    given = [name for name in ("images", "audio") if getattr(config, name) is not None]
    given += ["items"] if items is not None else []
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} are given: harvest one of them, the other into a folder of its own")
    for name, field in HarvestConfig.__dataclass_fields__.items():
        if name not in _SHARED and name not in _ITEM_FIELDS and getattr(config, name) != field.default:
            instead = {"max_tokens": "; give max_items", "batch_tokens": "; give batch_items"}.get(name, "")
            raise InputError(f"{name} is {getattr(config, name)!r}, but {given[0]} are no text: leave it out{instead}")
    for name in ("batch_items", "max_items"):
        value = getattr(config, name)
        if value is not None and not 1 <= value < 2**63:
            raise InputError(f"{name} is {value}, expected at least 1")
    if config.audio_seconds is not None and not 0 < config.audio_seconds < float("inf"):
        raise InputError(f"audio_seconds is {config.audio_seconds}, expected a positive number")


def _items(config: HarvestConfig, processor: Any, items: Any, main_input: str) -> Items:
    if items is not None:
        return GivenItems(items, main_input)
    if config.images is not None:
        return ImageFolder(config.images, processor)
    return AudioFolder(str(config.audio), processor, config.audio_seconds)


def _refuse_decoder(model: Any, paths: Mapping[str, str]) -> None:
    """Raises InputError for hooks outside the encoder of an encoder-decoder model: a decoder reads tokens."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False) or not hasattr(model, "get_encoder"):
        return
    inside = {id(module) for module in model.get_encoder().modules()}
    for name, path in paths.items():
        for part in path.split("+"):
            module = part.partition("@")[0].partition(":")[0]
            if id(model.get_submodule(module)) not in inside:
                raise InputError(
                    f"hook {name!r} is outside the encoder of this {type(model).__name__}, whose decoder reads token"
                    " ids: name a module of the encoder, as in encoder.layers.0"
                )


def _mask(keep: Tensor, hook: str, shape: tuple[int, int]) -> Tensor:
    if keep.shape != shape:
        raise InputError(f"the mask of positions has shape {tuple(keep.shape)}, hook {hook!r} gives {shape} positions")
    return keep.cpu()


@contextlib.contextmanager
def _explained(model: nn.Module, inputs: Mapping[str, Tensor], first: str, runner: ModuleRunner) -> Iterator[None]:
    """Any error that a model raises on inputs as one line, with that error as its cause."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        given = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
        hooks = ", ".join(hook["hf_name"] for hook in runner.hooks)
        hint = "; lower batch_items" if isinstance(error, torch.OutOfMemoryError) else ""
        raise InputError(
            f"the model ({type(model).__name__}) failed on {given} (the first is {first}) before it came to {hooks}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{hint}"
        ) from error


def _joined(parts: list[_Rows], n: int) -> _Rows:
    if not parts:
        return _Rows(
            {},
            np.zeros(0, np.int64),
            np.zeros(0, np.int64),
            np.zeros((n, len(DROPPED)), np.int64),
            np.zeros(n, np.int64),
        )
    rows = {name: torch.cat([part.rows[name] for part in parts]) for name in parts[0].rows}
    owner, pos = (np.concatenate([getattr(part, name) for part in parts]) for name in ("owner", "pos"))
    dropped, positions = (np.sum([getattr(part, name) for part in parts], 0) for name in ("dropped", "positions"))
    return _Rows(rows, owner, pos, dropped, positions, next((p.overflow for p in parts if p.overflow), None))


def _shares(made: _Made, window: ItemWindow, known: int) -> Iterator[HarvestBatch]:
    """The group's rows, the held-out ones first, without those of the first `known` items in that order."""
    order, rows, held = window.order(), made.rows, np.asarray(window.held)
    for split, first, last in (("heldout", 0, int(held.sum())), ("train", int(held.sum()), len(order))):
        numbers = order[max(first, known) : last]
        if not numbers:
            continue
        picked = np.flatnonzero(np.isin(rows.owner, numbers))
        yield _batch(made, window, split, numbers, picked, last)


def _batch(
    made: _Made, window: ItemWindow, split: str, numbers: list[int], picked: np.ndarray, done: int
) -> HarvestBatch:
    rows, index = made.rows, torch.from_numpy(picked)
    owner = rows.owner[picked]
    overflow = None
    if rows.overflow is not None:
        found, item, pos = rows.overflow
        overflow = (found, f"{window.names[item]}, position {pos}")
    return HarvestBatch(
        {name: values.index_select(0, index.to(values.device)) for name, values in rows.rows.items()},
        torch.from_numpy(owner + window.first_seq),
        torch.from_numpy(rows.pos[picked]),
        split,
        np.bincount(owner, minlength=window.n_seq)[numbers],
        rows.dropped[numbers],
        window,
        done,
        int(rows.positions[numbers].sum()),
        overflow,
    )
