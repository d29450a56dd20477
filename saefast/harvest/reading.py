"""Token sequences to run a language model on once more: those of a harvest, or of a text as a harvest cuts it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saefast.data.shards import ShardFolder
from saefast.errors import InputError
from saefast.files import usable
from saefast.harvest.documents import Fingerprint
from saefast.harvest.harvester import Harvester
from saefast.harvest.kept import TokenChoice, multiple_of, norms_of
from saefast.harvest.sequences import batches_of, pad


class Reading(NamedTuple):
    """Sequences of token ids, (length,) int32 each, and which of their tokens have rows.

    choice: by what a token is and where it stands. limits: by hook the largest norm of a row that is kept; a hook that
    is not there has none. name: where they come from.
    """

    sequences: Sequence[np.ndarray]
    choice: TokenChoice
    limits: Mapping[str, float]
    name: str

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.sequences))

    @property
    def digest(self) -> str:
        """Of all ids, and of which tokens are kept: another text, or another way to cut it, has another."""
        found = hashlib.blake2b(repr((self.choice, sorted(self.limits.items()))).encode(), digest_size=16)
        for ids in self.sequences:
            found.update(len(ids).to_bytes(8, "little") + np.ascontiguousarray(ids, dtype="<i4").tobytes())
        return found.hexdigest()

    def batches(self, batch_tokens: int, seed: int) -> Iterator["ReadBatch"]:
        """Batches without end, all sequences once in each pass, in an order of its own.

        A batch has sequences of about one length, which leaves little padding: at most batch_tokens with it, or one
        sequence that is longer.
        """
        epoch = 0
        while True:
            draws = np.random.default_rng((seed, epoch))
            lengths = np.array([len(ids) for ids in self.sequences])
            # Those of one length are mixed anew in each pass.
            order = np.lexsort((draws.random(len(lengths)), -lengths))
            ranges = list(batches_of(lengths[order].tolist(), batch_tokens, equal=False))
            for number in draws.permutation(len(ranges)).tolist():
                yield self._batch(order[slice(*ranges[number])].tolist())
            epoch += 1

    def _batch(self, numbers: list[int]) -> "ReadBatch":
        ids, mask = pad([self.sequences[i].tolist() for i in numbers], 0)
        _, kept = self.choice(ids, mask)
        return ReadBatch(*map(torch.from_numpy, (ids, mask, kept)))

    def ordinary(self, rows: Mapping[str, Tensor]) -> Tensor | None:
        """Which of rows (n, d) at some hooks no norm leaves out, (n,) bool; None where that is all."""
        near = [norms_of(rows[hook]) <= limit for hook, limit in self.limits.items() if hook in rows]
        return torch.stack(near).all(0) if near else None


class ReadBatch(NamedTuple):
    """ids (B, T) int64; mask (B, T) bool, True where a token stands; kept (B, T) bool, where one has a row."""

    ids: Tensor
    mask: Tensor
    kept: Tensor

    def to(self, device: torch.device) -> "ReadBatch":
        return ReadBatch(*(tensor.to(device) for tensor in self))


def harvested(folder: ShardFolder, hooks: Sequence[str], n_tokens: int) -> Reading:
    """The sequences that a harvest has training rows of, in its order, up to the one that brings them to n_tokens.

    hooks: of the folder, whose limits hold.

    Raises InputError for a harvest of something else than text, or one with nothing to train on.
    """
    folder.require_text()
    index = folder.index
    if "special_ids" not in index:
        raise InputError(f"{folder.path} was harvested before its special tokens were kept: harvest it anew")
    names = {hook: folder.hook(hook) for hook in hooks}
    first = next(iter(names.values()))
    numbers = [folder.open(info, first).seq for info in folder.shards("train", first)]
    found: list[np.ndarray] = []
    for seq in torch.cat([seq for seq in numbers if seq is not None]).unique().tolist() if numbers else []:
        found.append(folder.tokens(seq).numpy())
        n_tokens -= len(found[-1])
        if n_tokens <= 0:
            break
    multiple, medians = index.get("max_norm_multiple"), index.get("median_norms", {})
    limits = {
        hook: multiple_of(multiple) * medians[name] for hook, name in names.items() if multiple and name in medians
    }
    return _checked(Reading(found, TokenChoice.from_index(index), limits, str(folder.path)))


def cut(harvester: Harvester, n_tokens: int) -> Reading:
    """A text as the harvester would train on it: tokenised, cut, without what is held out; up to n_tokens.

    Raises InputError for a text that holds nothing to train on.
    """
    found: list[np.ndarray] = []
    left = n_tokens
    for window in harvester.sequencer.windows(harvester.text.documents(harvester.tokenizer), Fingerprint()):
        for ids, held in zip(window.ids, window.held, strict=True):
            if not held and left > 0:
                found.append(np.array(ids, dtype=np.int32))
                left -= len(ids)
        if left <= 0:
            break
    harvester.find_norms()
    return _checked(Reading(found, harvester.choice, harvester.limits(), harvester.name))


def _checked(reading: Reading) -> Reading:
    """Raises InputError where no batch could have a row."""
    if not any(reading._batch([i]).kept.any() for i in range(len(reading.sequences))):
        raise InputError(f"{reading.name} holds no token to train on: all are held out or left out; give more text")
    return reading


def folder_of(text: Any) -> ShardFolder | None:
    """The harvest that a text is the path of; None where it is something else."""
    if isinstance(text, ShardFolder):
        return text
    path = usable(text) if isinstance(text, str | Path) else None
    return ShardFolder(path) if path is not None and (path / "index.json").is_file() else None
