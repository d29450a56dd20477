"""Items: what a model reads where that is not text (an image, a stretch of sound, any arguments of a forward pass)."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saefast.errors import InputError
from saefast.harvest.documents import Fingerprint

# So many of the items that could not be read are named.
SKIPPED = 1000


class Part(NamedTuple):
    """Items that go through the model together.

    numbers: which of their group; inputs: the arguments of the model's forward by name, a row of each per item; keep:
    which positions (items, T) to keep, bool; None keeps all that a mask among the inputs does not leave out.
    """

    numbers: list[int]
    inputs: dict[str, Tensor]
    keep: Tensor | None = None


class Loaded(NamedTuple):
    """A group with its contents.

    digests: of each item's content, by which it is held out; keys: of each, by which it is known again when a harvest
    goes on; skipped: what could not be read, and why. An item that is in no part has no rows.
    """

    parts: Iterable[Part]
    digests: list[str]
    keys: list[str]
    skipped: list[str]


@dataclass
class Group:
    """Consecutive items that are harvested in one piece, not loaded yet; size: about how much there is to read."""

    names: list[str]
    size: int
    load: Callable[[], Loaded]


class Items(ABC):
    """Items in the same order each time.

    kind: what they are; name: where they come from; input: the model's argument that they are. skipped, n_skipped:
    those that could not be read, the first SKIPPED of them, and how many. first: digests of the first few contents,
    known once a group was given.
    """

    kind: str
    name: str
    input: str

    def __init__(self) -> None:
        self.skipped: list[str] = []
        self.n_skipped = 0
        self.first: list[str] = []

    @abstractmethod
    def groups(self, start: "Start", size: int) -> Iterator[Group]:
        """Groups of about `size` items, from `start` on. Raises InputError where the items before it are others."""

    def skip(self, lines: list[str]) -> None:
        """Notes items that could not be read, and why."""
        self.n_skipped += len(lines)
        self.skipped += lines[: max(SKIPPED - len(self.skipped), 0)]

    def require_again(self, why: str) -> None:
        """Raises InputError for items that cannot be read twice."""
        return

    def total(self) -> int | None:
        """How much there is to read, as Group.size counts; None where it is not known."""
        return None


@dataclass
class Start:
    """Where to begin: after `skip` items, which `fingerprint` is then to have seen and then is `expected`; the first
    group has `first` items where that is given, and after `limit` more there are no more."""

    skip: int
    fingerprint: Fingerprint
    expected: str
    first: int | None = None
    limit: int | None = None

    def reached(self, name: str, why: str = "") -> None:
        """Raises InputError where the items skipped are not those of before."""
        if self.skip and (self.fingerprint.count != self.skip or self.fingerprint.value != self.expected):
            raise InputError(
                f"{name} is not what the harvest began with (its first {self.skip} items differ{why}):"
                " harvest into another folder"
            )


class GivenItems(Items):
    """Batches of inputs from an iterable, or from a function that returns one; see `harvest`."""

    kind, name = "inputs", "the given items"

    def __init__(self, given: Any, main_input: str) -> None:
        super().__init__()
        self._given, self.input = given, main_input
        if not callable(given) and (isinstance(given, Mapping | Tensor | str) or not isinstance(given, Iterable)):
            raise InputError(
                f"items is a {type(given).__name__}: expected an iterable of mappings, as {{{main_input!r}: tensor}}"
            )

    def groups(self, start: Start, size: int) -> Iterator[Group]:
        batches = iter(self._given() if callable(self._given) else self._given)
        seen = 0
        for batch in batches:
            part, names = self._read(batch, seen)
            n = len(part.numbers)
            self.first = self.first or _digests(part, self.input)
            if seen < start.skip:
                self._skip(part, start)
            elif start.limit is not None and seen - start.skip >= start.limit:
                return
            else:
                if seen == start.skip:
                    self._begin(start, n)
                yield Group(names, n, lambda part=part: self._load(part))  # type: ignore[misc]
            seen += n
        if seen <= start.skip:
            self._ended(start, seen)

    def require_again(self, why: str) -> None:
        if isinstance(self._given, Iterator):
            raise InputError(
                f"{why} reads the first items twice, and items is an iterator: give a list, a DataLoader, or a function"
                " that returns an iterator"
            )

    def _skip(self, part: Part, start: Start) -> None:
        for digest in _digests(part, self.input):
            start.fingerprint.add(digest)

    def _begin(self, start: Start, n: int) -> None:
        start.reached(self.name)
        if start.first is not None and start.first != n:
            raise InputError(
                f"{self.name} come in batches of another size than those that the harvest began with ({n} items where"
                f" there were {start.first}): give batches of that size"
            )

    def _ended(self, start: Start, seen: int) -> None:
        if not start.skip:
            raise InputError(f"{self.name} are none: the iterable is empty, or an iterator that was used up before")
        if seen < start.skip or start.first is not None:
            raise InputError(
                f"{self.name} end after {seen} items, before the place to go on from ({start.skip}): give the same"
                " items from their beginning, for example by a function that returns an iterator"
            )
        start.reached(self.name)

    def _load(self, part: Part) -> Loaded:
        digests = _digests(part, self.input)
        return Loaded([part], digests, digests, [])

    def _read(self, batch: Any, first: int) -> tuple[Part, list[str]]:
        """A batch as it was given -> what to run, and names."""
        place = f"items: the batch after {first} items"
        keep = None
        if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[0], Mapping):
            batch, keep = batch
        if isinstance(batch, Tensor):
            batch = {self.input: batch}
        if not isinstance(batch, Mapping):
            raise InputError(
                f"{place} is a {type(batch).__name__}: expected a mapping such as {{{self.input!r}: tensor}}, alone or"
                " as (mapping, mask of the positions to keep)"
            )
        names = batch.get("names")
        inputs = {str(name): value for name, value in batch.items() if name != "names"}
        for name, value in inputs.items():
            if not isinstance(value, Tensor):
                raise InputError(f"{place}: {name} is a {type(value).__name__}, expected a tensor of the forward pass")
        main = inputs.get(self.input, next(iter(inputs.values()), None))
        if main is None or main.dim() < 2 or not len(main):
            seen = "no tensor" if main is None else f"shape {tuple(main.shape)}"
            raise InputError(f"{place} has {seen} for {self.input}: expected one with a row per item")
        return _part(inputs, keep, len(main), place), _named(names, first, len(main), place)


def _part(inputs: dict[str, Tensor], keep: Any, n: int, place: str) -> Part:
    if keep is not None:
        if not isinstance(keep, Tensor) or keep.dim() != 2 or len(keep) != n or keep.is_floating_point():
            seen = f"shape {tuple(keep.shape)} and {keep.dtype}" if isinstance(keep, Tensor) else type(keep).__name__
            raise InputError(f"{place}: the mask is {seen}, expected ({n}, positions) of bool")
        keep = keep.bool()
    return Part(list(range(n)), inputs, keep)


def _named(names: Any, first: int, n: int, place: str) -> list[str]:
    if names is None:
        return [str(number) for number in range(first, first + n)]
    if isinstance(names, str) or len(names) != n or not all(isinstance(name, str) for name in names):
        raise InputError(f"{place}: names is {names!a:.60}, expected {n} strings")
    return list(names)


def _digests(part: Part, main_input: str) -> list[str]:
    """A digest of each item's tensors; those without a row per item are in every one."""
    n = len(part.numbers)
    hashes = [hashlib.blake2b(digest_size=16) for _ in range(n)]
    for name in sorted(part.inputs):
        value = part.inputs[name].detach().cpu().contiguous()
        per_item = value.dim() > 0 and len(value) == n
        for i, digest in enumerate(hashes):
            own = value[i] if per_item else value
            digest.update(f"{name} {own.dtype} {tuple(own.shape)} ".encode())
            digest.update(own.reshape(-1).view(torch.uint8).numpy().data)
    return [digest.hexdigest() for digest in hashes]


class Ref(NamedTuple):
    """An item of a folder: its name, the file's size in bytes shared out among its items, and what `load` needs."""

    name: str
    size: int
    place: Any


class FileItems(Items):
    """Items in files: what images and audio have in common.

    A subclass lists them (`refs`), says what a file's content is (`digest`) and makes inputs of an item (`read`).
    """

    # How many contents are looked at to see that something is held out.
    FIRST = 32

    @abstractmethod
    def refs(self) -> Iterator[Ref]:
        """The items in their order."""

    @abstractmethod
    def digest(self, ref: Ref) -> str:
        """Of the content of the item's file. Raises OSError."""

    @abstractmethod
    def read(self, ref: Ref) -> tuple[dict[str, Tensor], Tensor | None]:
        """inputs of one item, a row of each, and which positions to keep (1, T). Raises Unreadable."""

    def groups(self, start: Start, size: int) -> Iterator[Group]:
        self.first = [self._digest(ref) for ref in islice(self.refs(), self.FIRST)]
        refs = iter(self.refs())
        for ref in islice(refs, start.skip):
            start.fingerprint.add(_key(ref))
        start.reached(self.name)
        if start.limit is not None:
            refs = islice(refs, start.limit)
        n = start.first or size
        while group := list(islice(refs, n)):
            yield Group([ref.name for ref in group], sum(ref.size for ref in group), lambda g=group: self._load(g))  # type: ignore[misc]
            n = size

    def _load(self, group: list[Ref]) -> Loaded:
        skipped: list[str] = []
        digests = [self._digest(ref) for ref in group]
        return Loaded(self._parts(group, skipped), digests, [_key(ref) for ref in group], skipped)

    def _parts(self, group: list[Ref], skipped: list[str]) -> Iterator[Part]:
        """Neighbours whose inputs have the same shapes are run together: nothing is padded beside others."""
        waiting: list[tuple[int, dict[str, Tensor], Tensor | None]] = []
        for number, ref in enumerate(group):
            try:
                inputs, keep = self.read(ref)
            except Unreadable as error:
                skipped.append(f"{ref.name} {error}")
                continue
            if waiting and _shapes(waiting[0][1], waiting[0][2]) != _shapes(inputs, keep):
                yield _together(waiting)
                waiting = []
            waiting.append((number, inputs, keep))
        if waiting:
            yield _together(waiting)

    def _digest(self, ref: Ref) -> str:
        try:
            return self.digest(ref)
        except OSError:  # read says so
            return ""


class Unreadable(Exception):
    """An item that is left out, and why."""


def _key(ref: Ref) -> str:
    return f"{ref.name}\0{ref.size}"


def _shapes(inputs: dict[str, Tensor], keep: Tensor | None) -> dict[str, Any]:
    return {name: value.shape for name, value in inputs.items()} | {"keep": None if keep is None else keep.shape}


def _together(items: list[tuple[int, dict[str, Tensor], Tensor | None]]) -> Part:
    numbers = [number for number, _, _ in items]
    inputs = {name: torch.cat([one[name] for _, one, _ in items]) for name in items[0][1]}
    masks = [keep for _, _, keep in items if keep is not None]
    return Part(numbers, inputs, torch.cat(masks) if masks else None)
