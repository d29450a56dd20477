"""Recorded codes on disk: the sparse codes of several SAEs, row by row of the same tokens, and how they are read.

    folder/index.json                which SAEs at which hooks, and the shards that there are, with digests
    folder/tokens/00000.safetensors  ids (rows,) int32 (-1 where a model read no ids), seq, pos (rows,) int32
    folder/{hook}/00000.safetensors  row_ptr (rows + 1,) int64, idx (entries,) int32, acts (entries,): CSR

Row i of a shard is the same token in all of its files. Latents ascend in a row, so that (acts, idx, row_ptr) is what
scipy.sparse.csr_matrix and torch.sparse_csr_tensor take. What the index does not name does not exist.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor

from saefast.data.shardfile import Entry, map_tensor, read_header, read_metadata, verify_seal
from saefast.data.shards import folder_of
from saefast.errors import InputError
from saefast.files import SEAL, read_sealed_json, usable
from saefast.ops.code import Code
from saefast.schema import Count, check
from saefast.typed import typed

FORMAT, VERSION = "saefast-codes", 1
INDEX, TOKENS = "index.json", "tokens"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


class SAEEntry(TypedDict):
    """index.json: an SAE. folder: where its codes are. reads: the places that it takes."""

    hook: str
    folder: str
    reads: list[str]
    n_latents: Count
    d_in: Count


class ShardEntry(TypedDict):
    """index.json: a shard. entries: by hook. sha256: of its files, by hook and "tokens"."""

    file: str
    rows: Count
    entries: dict[str, Count]
    sha256: dict[str, str]


class Index(TypedDict):
    """index.json. complete: the recording ended, and was not cut off."""

    format: Literal["saefast-codes"]
    version: Count
    complete: bool
    model: str
    dtype: Literal["float32", "float16", "bfloat16", "float64"]
    saes: list[SAEEntry]
    shards: list[ShardEntry]
    rows: Count
    sequences: Count


class Rows(NamedTuple):
    """Some rows: n tokens and their codes."""

    ids: Tensor
    """(n,) int32 token ids, -1 where the model read none."""
    seq: Tensor
    """(n,) int32 the sequence of each, numbered as the model read them."""
    pos: Tensor
    """(n,) int32 tokens of its sequence before it."""
    codes: dict[str, Code]
    """By hook, CSR; see `saefast.ops.code.padded` for (n, K)."""


def read_index(folder: Path) -> Index:
    """The index of a folder. Raises InputError where it is none, damaged, or of a version that is not known."""
    file = folder / INDEX
    if not file.is_file():
        raise InputError(f"{folder} holds no {INDEX}: expected a folder written by saefast.record")
    found: dict[str, Any] = read_sealed_json(file, dict[str, Any])
    if found.get("format") != FORMAT:
        raise InputError(f"{file} is of format {str(found.get('format'))[:40]!a}: expected {FORMAT!r}")
    if found.get("version") != VERSION:
        raise InputError(f"{file} is of version {str(found.get('version'))[:20]}: this saefast reads version {VERSION}")
    index: Index = check(found, Index, file)
    hooks = [sae["hook"] for sae in index["saes"]]
    folders = [TOKENS, *(sae["folder"] for sae in index["saes"])]
    for shard in index["shards"]:
        if shard["entries"].keys() != set(hooks) or shard["sha256"].keys() != {TOKENS, *hooks}:
            raise InputError(f"{file}: shard {shard['file']} is not of the hooks {', '.join(hooks)}; it was edited")
        if Path(shard["file"]).name != shard["file"]:
            raise InputError(f"{file}: shard {shard['file']!a} is no name of a file; it was edited")
    if any(folder_of(name) != name or name in ("..", ".") for name in folders) or len(set(folders)) < len(folders):
        raise InputError(f"{file}: its folders are {', '.join(folders)}: expected one for each hook; it was edited")
    if sum(shard["rows"] for shard in index["shards"]) != index["rows"]:
        raise InputError(f"{file}: its shards do not add up to {index['rows']} rows; it was edited")
    return index


class RecordedCodes:
    """A folder that `saefast.record` wrote, mapped: nothing is read before it is needed.

    Attributes:
        hooks: the names of the SAEs' hooks. n_latents: of each. complete: the recording was not cut off.

    Raises:
        InputError: the folder is none, a file is missing, cut short, or not the one that the index names.
    """

    @typed
    def __init__(self, folder: str | Path) -> None:
        self.folder = usable(folder)
        self.index = read_index(self.folder)
        self.hooks = tuple(sae["hook"] for sae in self.index["saes"])
        self.n_latents = {sae["hook"]: sae["n_latents"] for sae in self.index["saes"]}
        self.complete = self.index["complete"]
        self._folders = {sae["hook"]: sae["folder"] for sae in self.index["saes"]} | {TOKENS: TOKENS}
        for shard in self.index["shards"]:
            for name in self._folders:
                self._entries(shard, name)

    def __len__(self) -> int:
        """Rows."""
        return self.index["rows"]

    def shards(self) -> Iterator[Rows]:
        """All rows, shard by shard, each as it lies in its file. Raises InputError where that is damaged."""
        for shard in self.index["shards"]:
            yield self._rows(shard, 0, shard["rows"])

    def batches(self, batch_size: int) -> Iterator[Rows]:
        """All rows in order, up to batch_size at a time: a batch is of one shard."""
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!a}: expected a number of rows, at least 1")
        for shard in self.index["shards"]:
            for start in range(0, shard["rows"], batch_size):
                yield self._rows(shard, start, min(start + batch_size, shard["rows"]))

    def verify(self) -> None:
        """Reads every byte. Raises InputError for the first file that is not as it was written."""
        for shard in self.index["shards"]:
            for name in self._folders:
                verify_seal(self._file(shard, name), set())
            self._rows(shard, 0, shard["rows"])

    def _file(self, shard: ShardEntry, name: str) -> Path:
        return self.folder / self._folders[name] / shard["file"]

    def _entries(self, shard: ShardEntry, name: str) -> Mapping[str, Entry]:
        """The tensors of a file, of the sizes that the index says."""
        file = self._file(shard, name)
        found, n = read_header(file), shard["rows"]
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]]
        if name == TOKENS:
            expected = dict.fromkeys(("ids", "seq", "pos"), (torch.int32, (n,)))
        else:
            m = shard["entries"][name]
            acts = DTYPES[self.index["dtype"]], (m,)
            expected = {"row_ptr": (torch.int64, (n + 1,)), "idx": (torch.int32, (m,)), "acts": acts}
        seen = {column: (entry.dtype, entry.shape) for column, entry in found.items() if not column.startswith("_pad_")}
        if seen != expected or read_metadata(file).get(SEAL) != shard["sha256"][name]:
            raise InputError(f"{file} is not the file that {INDEX} names: it was damaged or exchanged; record it again")
        return found

    def _rows(self, shard: ShardEntry, start: int, stop: int) -> Rows:
        file, entries = self._file(shard, TOKENS), self._entries(shard, TOKENS)
        ids, seq, pos = (map_tensor(file, entries[name])[start:stop] for name in ("ids", "seq", "pos"))
        return Rows(ids, seq, pos, {hook: self._code(shard, hook, start, stop) for hook in self.hooks})

    def _code(self, shard: ShardEntry, hook: str, start: int, stop: int) -> Code:
        file, entries = self._file(shard, hook), self._entries(shard, hook)
        row_ptr, idx, acts = (map_tensor(file, entries[name]) for name in ("row_ptr", "idx", "acts"))
        row_ptr = row_ptr[start : stop + 1]
        first, last = int(row_ptr[0]), int(row_ptr[-1])
        ascending = bool((row_ptr.diff() >= 0).all()) and 0 <= first <= last <= len(idx)
        ends = (start > 0 or first == 0) and (stop < shard["rows"] or last == len(idx))
        if not ascending or not ends:
            raise InputError(f"{file} is damaged: its row_ptr does not ascend from 0 to {len(idx)}; record it again")
        idx, acts = idx[first:last], acts[first:last]
        if len(idx) and not 0 <= int(idx.min()) <= int(idx.max()) < self.n_latents[hook]:
            raise InputError(f"{file} is damaged: it has latents beyond {self.n_latents[hook] - 1}; record it again")
        return Code(acts, idx, (row_ptr - first).int())
