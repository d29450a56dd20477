"""Shard folders: activations on disk, every row with the sequence and position it came from.

    folder/index.json                  what model, text and hooks; rows per split; shards with their checksums
    folder/stats.safetensors           statistics of the training share, per hook (activation_stats.py)
    folder/tokens/00000.safetensors    of n sequences: ids (total,) int32, offsets (n + 1,) int64, doc (n,) int64
    folder/items/...                   in its place where rows are of images or sound: their names (item_names.py)
    folder/{hook}/00000.safetensors    acts (rows, d), seq (rows,) int32, pos (rows,) int16 [, scale (rows,) float32]

Files of the held-out share are called heldout-00000.safetensors. The row order is the same in every hook.

A harvest that several processes shared (version 2 of the index) lies in parts, each a shard folder of its own; the
index on top names all of their files:

    folder/parts/00003-0/...           hooks and tokens as above, sequences numbered from 0 within the part

An entry of a shard then has `part`, the folder its hooks are in, and `first_seq`, which is added to every seq in it.
"""

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from saefast.data.activation_stats import ActivationStats
from saefast.data.item_names import ITEMS, ItemNames, ItemsEntry, read_names, what_of
from saefast.data.shardfile import BLOCK, DTYPES, Entry, digest_file, map_tensor, read_header, verify_seal
from saefast.errors import InputError
from saefast.files import read_sealed_json, usable
from saefast.schema import Count, check
from saefast.typed import typed

FORMAT = "saefast-activations"
# What has no parts is written as version 1, which earlier saefast read too.
VERSION, VERSION_OF_ONE = 2, 1
STATS = "stats.safetensors"
ROWS_PER_SHARD = 1 << 20
SPLITS = ("train", "heldout")
ACT_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
}


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (n, d) and a float32 scale (n,) with rows ≈ codes * scale.

    scale = max|row| / 127 and codes are rounded to the nearest, so no element is off by more than
    max|row| / 254 · (1 + 1e-4); the last factor covers the rounding of the float32 arithmetic. A row of zeros stays
    zero. A row with NaN or inf gets scale NaN, so that what reads it back sees that it is bad.
    """
    x = rows.float()
    scale = x.abs().amax(1) / 127
    bad = ~torch.isfinite(scale)
    safe = torch.where(bad | (scale == 0), torch.ones_like(scale), scale)
    codes = torch.nan_to_num(x / safe[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return codes, torch.where(bad, torch.full_like(scale, float("nan")), scale)


def dequantise(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 rows (n, d) = codes * scale."""
    return codes.float() * scale[:, None]


def folder_of(hook: str) -> str:
    """The name of a hook's folder: module paths are fine as they are, slashes and a leading dot are not."""
    return hook.replace("/", "_").lstrip(".") or "_"


class HookEntry(TypedDict):
    """index.json: a hook; d is None as long as no row was written."""

    name: str
    hf_name: str
    d: Count | None


class PartEntry(TypedDict, total=False):
    """index.json of a harvest in parts: the part's folder, and what is added to the numbers of its sequences."""

    part: str
    first_seq: Count


class ShardEntry(PartEntry):
    """index.json: a shard, with digests by hook."""

    file: str
    rows: Count
    split: Literal["train", "heldout"]
    sha256: dict[str, str]
    crc32: dict[str, list[Count]]


class TokensEntry(TypedDict):
    """index.json: a file of tokens."""

    file: str
    first_seq: Count
    n_seq: Count
    sha256: str


class Versioned(TypedDict):
    """index.json of any version."""

    version: Count


class Index(Versioned):
    """index.json: what every reader needs."""

    dtype: Literal["bfloat16", "float16", "float32", "int8"]
    hooks: list[HookEntry]
    shards: list[ShardEntry]
    tokens: list[TokensEntry]
    splits: dict[str, Count]


class Identity(TypedDict, total=False):
    """index.json: digests of the model and of its tokenizer (harvest/identity.py); None where it has none to take."""

    dtype: str | None
    weights: dict[str, str] | None
    tokenizer: str | None


class IndexFacts(TypedDict, total=False):
    """index.json: what the writer goes on from, and what a harvest says of itself."""

    n_rows: Count
    rows_per_shard: Count
    settings: dict[str, Any]
    shuffle: dict[str, Any]
    cursor: dict[str, Any] | None
    complete: bool
    end: str | None
    dropped: dict[str, Count]
    hook_patterns: list[str]
    model: str | None
    revision: str | None
    text: str | None
    ctx_len: Count | None
    forward: str | None
    # Of harvests of anything but text: what its items are, where they were, which argument of the model they are.
    kind: Literal["text", "images", "audio", "inputs"]
    data: str
    input: str
    items: list[ItemsEntry]
    identity: Identity
    median_norms: dict[str, float]
    special_ids: list[Count]
    excluded_ids: list[Count]


@dataclass(frozen=True)
class ShardInfo:
    """An entry of the index: file name inside each hook's folder, rows, split, and per hook sha256 and block crc32.

    part: the folder that the hooks' folders are in, "" where the index lies beside them; first_seq: of the part.
    """

    file: str
    rows: int
    split: str
    sha256: dict[str, str]
    crc32: dict[str, list[int]]
    part: str = ""
    first_seq: int = 0


@dataclass(frozen=True)
class Shard:
    """A mapped shard: acts (rows, d) as stored, scale (rows,) for int8, seq (rows,) int32, pos (rows,) int16."""

    path: Path
    acts: Tensor
    scale: Tensor | None
    seq: Tensor
    pos: Tensor


@dataclass(frozen=True)
class BadShard:
    """A shard that cannot be used: which file, at which byte (None: the whole file), and why, in one line."""

    file: Path
    offset: int | None
    reason: str


@dataclass
class ShardFolder:
    """Reads a shard folder. Opening it reads index.json only; shards are mapped when asked for.

    skip_bad_shards leaves out shards that cannot be used instead of raising; they are listed in `skipped`.
    verify=True also compares every shard's checksums when its hook is first used (reads every byte once).
    Raises InputError for a folder that is no shard folder, or of a newer version.
    """

    path: Path
    skip_bad_shards: bool = False
    verify_on_open: bool = False
    skipped: list[BadShard] = field(default_factory=list)
    index: dict[str, Any] = field(init=False)

    @typed
    def __init__(self, path: str | Path, *, skip_bad_shards: bool = False, verify: bool = False) -> None:
        self.path, self.skip_bad_shards, self.verify_on_open = usable(path), skip_bad_shards, verify
        self.skipped = []
        self.index = read_index(self.path)
        self._usable: dict[str, list[ShardInfo]] = {}
        self._tokens: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._names = ItemNames(self.path, self.index.get(ITEMS, []))

    @property
    def kind(self) -> str:
        """What the rows are of: "text", or "images", "audio", "inputs" (whatever else a model was given)."""
        return str(self.index.get("kind", "text"))

    @property
    def hooks(self) -> list[str]:
        return [hook["name"] for hook in self.index["hooks"]]

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the stored rows; torch.int8 means codes with a scale per row."""
        return ACT_DTYPES[self.index["dtype"]]

    @property
    def keeps_special_tokens(self) -> bool:
        """Whether the harvest kept the activations of special tokens; not known of a folder that no harvest made."""
        return bool(self.index.get("settings", {}).get("keep_special_tokens"))

    def hook(self, name: str | None = None) -> str:
        """The full name of a hook: `name` may be the user's name or the module path; None where there is one hook."""
        if name is None and len(self.hooks) == 1:
            return self.hooks[0]
        for hook in self.index["hooks"]:
            if name in (hook["name"], hook["hf_name"]):
                return str(hook["name"])
        wanted = "hook is not given" if name is None else f"hook {name!r} is not in it"
        raise InputError(f"{self.path}: {wanted}; it holds {', '.join(self.hooks)}")

    def d(self, hook: str | None = None) -> int:
        name = self.hook(hook)
        found = next(entry["d"] for entry in self.index["hooks"] if entry["name"] == name)
        if found is None:
            raise InputError(f"{self.path}: hook {name} has no rows yet: run the harvest again, it goes on")
        return int(found)

    def shards(self, split: str = "train", hook: str | None = None) -> list[ShardInfo]:
        """Usable shards of a split, in the order they were written. A bad one raises, or is skipped on request."""
        name = self.hook(hook)
        if name not in self._usable:
            self._usable[name] = self._check(name)
        return [info for info in self._usable[name] if info.split == split]

    def shards_of_all(self, split: str, hooks: Collection[str]) -> list[ShardInfo]:
        """The shards of a split that are usable in every one of the hooks."""
        found = {name: self.shards(split, name) for name in hooks}
        usable = set.intersection(*({(info.part, info.file) for info in infos} for infos in found.values()))
        return [info for info in next(iter(found.values())) if (info.part, info.file) in usable]

    def n_rows(self, split: str = "train", hook: str | None = None) -> int:
        return sum(info.rows for info in self.shards(split, hook))

    def open(self, info: ShardInfo, hook: str | None = None) -> Shard:
        """Maps a shard; nothing is copied but the sequence numbers of one in a part."""
        name = self.hook(hook)
        path = self._file(info, name)
        entries = self._expected(path, info, name)
        tensors = {key: map_tensor(path, entry) for key, entry in entries.items()}
        seq = tensors["seq"] + info.first_seq if info.first_seq else tensors["seq"]
        return Shard(path, tensors["acts"], tensors.get("scale"), seq, tensors["pos"])

    def entries(self, info: ShardInfo, hook: str) -> tuple[Path, dict[str, Entry]]:
        """A shard's file and where each of its tensors lies in it, checked against the index. Raises InputError."""
        path = self._file(info, hook)
        return path, self._expected(path, info, hook)

    def verify(self) -> list[BadShard]:
        """Reads every shard of every hook, and the tokens, and compares them with the index; the bad ones."""
        found = [bad for bad in map(self._token_problem, self.index["tokens"]) if bad]
        found += [bad for part in self.index.get(ITEMS, []) if (bad := self._part_problem(part, read_names))]
        for hook in self.hooks:
            problems = (self._problem(info, hook, checksums=True) for info in _infos(self.index))
            found += [bad for bad in problems if bad]
        return found

    def stats(self, hook: str | None = None) -> ActivationStats:
        """Statistics of the training share of a hook.

        Raises:
            InputError: the file is missing, or any byte of it is not the one written (files of before there were
                digests are taken as they are).
        """
        name, path = self.hook(hook), self.path / STATS
        verify_seal(path, set())
        tensors = {key: map_tensor(path, entry) for key, entry in read_header(path).items()}
        try:
            found = ActivationStats.from_tensors(name, tensors)
        except (KeyError, ValueError, RuntimeError) as problem:
            raise InputError(f"{path} lacks {problem}: run the harvest again to rebuild it") from None
        if found.sum.shape != (self.d(name),):
            raise InputError(f"{path}: statistics of width {tuple(found.sum.shape)}, the rows have {self.d(name)}")
        return found

    @property
    def n_sequences(self) -> int:
        """Of text; of images or sound the number of items."""
        return sum(int(part["n_seq"]) for part in [*self.index["tokens"], *self.index.get(ITEMS, [])])

    def item(self, seq: int) -> str:
        """The name of the item that the rows of this `seq` are of (item_names.py). Raises InputError for text."""
        if self.kind == "text":
            raise InputError(f"{self.path} holds rows of text, which have tokens and no items")
        return self._names[seq]

    def require_text(self) -> None:
        """Raises InputError, in one line, where rows are of anything but text and so have no tokens."""
        if self.kind != "text":
            raise InputError(f"{self.path} holds {what_of(self.kind)}, not of text: they have no tokens")

    def tokens(self, seq: int) -> Tensor:
        """Token ids (length,) int32 of a sequence, special tokens included, so that ids[pos] belongs to a row's pos."""
        ids, offsets, _, first = self._token_part(seq)
        return ids[int(offsets[seq - first]) : int(offsets[seq - first + 1])]

    def token_ids(self, seq: Tensor, pos: Tensor) -> Tensor:
        """The token id (n,) int32 of each of many rows, by their sequences and positions (n,) int."""
        self.require_text()
        seq, pos = seq.long(), pos.long()
        out = torch.full(seq.shape, -1, dtype=torch.int32, device="cpu")
        for part in self.index["tokens"]:
            inside = (seq >= part["first_seq"]) & (seq < part["first_seq"] + part["n_seq"])
            if inside.any():
                ids, offsets, _, first = self._token_part(int(part["first_seq"]))
                here, place = seq[inside] - first, pos[inside]
                if bool(((place < 0) | (place >= offsets[here + 1] - offsets[here])).any()):
                    raise InputError(f"{self.path}: a row's position is outside its sequence: the shard is damaged")
                out[inside] = ids[offsets[here] + place]
        return out

    def document(self, seq: int) -> int:
        """Number of the document, in the order of the text, that a sequence was cut from."""
        _, _, doc, first = self._token_part(seq)
        return int(doc[seq - first])

    def context(self, seq: int, pos: int, before: int = 16, after: int = 8) -> tuple[Tensor, int]:
        """Token ids around a row, and the place of the row's own token in them."""
        ids = self.tokens(seq)
        start = max(pos - before, 0)
        return ids[start : pos + after + 1], pos - start

    def _token_part(self, seq: int) -> tuple[Tensor, Tensor, Tensor, int]:
        self.require_text()
        firsts = [int(part["first_seq"]) for part in self.index["tokens"]]
        if not 0 <= seq < self.n_sequences:
            raise InputError(f"sequence {seq} is not in {self.path}, which has {self.n_sequences}")
        number = bisect_right(firsts, seq) - 1
        if number not in self._tokens:
            part = self.index["tokens"][number]
            self._tokens[number] = _open_tokens(self.path / part["file"], part["n_seq"])
        return (*self._tokens[number], firsts[number])

    def _check(self, hook: str) -> list[ShardInfo]:
        usable = []
        for info in _infos(self.index):
            bad = self._problem(info, hook, checksums=self.verify_on_open)
            if bad is None:
                usable.append(info)
            elif self.skip_bad_shards:
                self.skipped.append(bad)
            else:
                raise InputError(f"{bad.reason}; harvest it again, or leave it out with skip_bad_shards")
        return usable

    def _file(self, info: ShardInfo, hook: str) -> Path:
        return self.path / info.part / folder_of(hook) / info.file

    def _expected(self, path: Path, info: ShardInfo, hook: str) -> dict[str, Entry]:
        """Header entries of a shard, checked against the index. Raises InputError."""
        entries = read_header(path)
        wanted = {
            "acts": (self.dtype, (info.rows, self.d(hook))),
            "seq": (torch.int32, (info.rows,)),
            "pos": (torch.int16, (info.rows,)),
        }
        if self.dtype == torch.int8:
            wanted["scale"] = (torch.float32, (info.rows,))
        for name, (dtype, shape) in wanted.items():
            entry = entries.get(name)
            if entry is None:
                raise InputError(f"{path} has no tensor {name}")
            if (entry.dtype, entry.shape) != (dtype, shape):
                raise InputError(
                    f"{path}: {name} at byte {entry.start} is {entry.dtype} {entry.shape},"
                    f" the index says {dtype} {shape}"
                )
        return {name: entries[name] for name in wanted}

    def _token_problem(self, part: dict[str, Any]) -> BadShard | None:
        return self._part_problem(part, _open_tokens)

    def _part_problem(self, part: dict[str, Any], opened: Callable[[Path, int], object]) -> BadShard | None:
        path = self.path / part["file"]
        try:
            opened(path, part["n_seq"])
            if digest_file(path).sha256 == part["sha256"]:
                return None
        except InputError as error:
            return BadShard(path, None, str(error))
        return BadShard(path, None, f"{path} is damaged: it differs from the checksum in the index")

    def _problem(self, info: ShardInfo, hook: str, checksums: bool) -> BadShard | None:
        path = self._file(info, hook)
        try:
            self._expected(path, info, hook)
            digest = digest_file(path) if checksums else None
        except InputError as error:
            size = path.stat().st_size if path.exists() else None
            truncated = "truncated" in str(error)
            return BadShard(path, size if truncated else 0 if path.exists() else None, str(error))
        except OSError as error:
            return BadShard(path, None, f"{path} cannot be read: {error.strerror or error}")
        if digest is None or digest.sha256 == info.sha256[hook]:
            return None
        pairs = zip(digest.blocks, info.crc32[hook], strict=False)
        block = next((i for i, (seen, kept) in enumerate(pairs) if seen != kept), len(info.crc32[hook]))
        end = min((block + 1) * BLOCK, path.stat().st_size)
        reason = f"{path} is damaged: bytes {block * BLOCK} to {end} differ from the checksum in the index"
        return BadShard(path, block * BLOCK, reason)


def _open_tokens(path: Path, n_seq: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids (total,) int32, offsets (n_seq + 1,) int64 and doc (n_seq,) int64 of a tokens file. Raises InputError."""
    entries = read_header(path)
    wanted = {"ids": torch.int32, "offsets": torch.int64, "doc": torch.int64}
    if any(name not in entries or entries[name].dtype != dtype for name, dtype in wanted.items()):
        raise InputError(f"{path} holds {', '.join(entries)}: expected ids int32, offsets int64 and doc int64")
    ids, offsets, doc = (map_tensor(path, entries[name]) for name in wanted)
    shapes = [tuple(tensor.shape) for tensor in (ids, offsets, doc)]
    if shapes[1:] != [(n_seq + 1,), (n_seq,)] or len(shapes[0]) != 1:
        raise InputError(f"{path} holds ids, offsets and doc of shapes {shapes}; the index says {n_seq} sequences")
    if offsets[0] != 0 or offsets[-1] != len(ids) or bool((offsets.diff() < 0).any()):
        raise InputError(f"{path} is damaged: its offsets do not rise from 0 to its {len(ids)} ids")
    return ids, offsets, doc


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a shard folder, checked for format, version, digest and every field. Raises InputError."""
    path = folder / "index.json"
    if not path.is_file():
        raise InputError(f"{folder} is no shard folder: it has no index.json")
    index = read_sealed_json(path)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise InputError(f"{path} is not the index of a shard folder (format {FORMAT!r} expected)")
    version = check(index, Versioned, path)["version"]
    if version > VERSION:
        raise InputError(f"{path} has version {version}, this saefast reads up to {VERSION}: upgrade")
    checked: dict[str, Any] = check(check(index, Index, path), IndexFacts, path)
    check_index(path, checked)
    return checked


def check_index(path: Path, index: dict[str, Any]) -> None:
    """Checks what types cannot say: files stay inside the folder, every hook has its digests, sequences follow on."""
    names = [hook["name"] for hook in index["hooks"]]
    if not names or len({"tokens", *map(folder_of, names)}) <= len(names):
        raise InputError(f"{path}: hooks are {', '.join(names) or 'none'}; expected at least one, a folder for each")
    for entry in [*index["shards"], *index["tokens"], *index.get(ITEMS, [])]:
        for name in (entry["file"], entry.get("part", "")):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise InputError(f"{path}: the file {name!r} is outside the folder")
    for shard in index["shards"]:
        if not shard["sha256"].keys() & shard["crc32"].keys() >= set(names):
            raise InputError(f"{path}: {shard['file']} lacks checksums of one of the hooks {', '.join(names)}")
    _check_sequences(path, index)


def _check_sequences(path: Path, index: dict[str, Any]) -> None:
    items, expected = index.get(ITEMS, []), 0
    if items and index["tokens"]:
        raise InputError(f"{path} names tokens and items: rows are of text or of something else, never of both")
    for part in [*index["tokens"], *items]:
        if part["first_seq"] != expected:
            raise InputError(f"{path}: {part['file']} begins at sequence {part['first_seq']}, expected {expected}")
        expected += part["n_seq"]
    for shard in index["shards"]:
        if shard.get("first_seq", 0) > min(expected, 2**31 - 1):
            raise InputError(f"{path}: {shard['file']} begins at sequence {shard['first_seq']} of {expected}")


def _infos(index: dict[str, Any]) -> Iterator[ShardInfo]:
    for shard in index["shards"]:
        where = shard.get("part", ""), shard.get("first_seq", 0)
        yield ShardInfo(shard["file"], shard["rows"], shard["split"], shard["sha256"], shard["crc32"], *where)


__all__ = ["DTYPES", "ShardFolder", "ShardInfo", "dequantise", "quantise", "read_index"]
