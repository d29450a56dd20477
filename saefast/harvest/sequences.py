"""Documents to token sequences: cut to the context length, held out by document, sorted by length."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from saefast.errors import InputError
from saefast.harvest.documents import Document, Fingerprint, digest, weight

# Characters tokenised together. Within such a window sequences are sorted by length, which leaves little padding.
WINDOW_CHARS = 1 << 20


@dataclass
class Window:
    """Sequences of some consecutive documents. Lists run over sequences, numbered from first_seq.

    first_doc, n_docs: the documents; before, after: fingerprints of the text up to and with them; chars: their length;
    tokens: those of the documents, without what is put before and after sequences. ids: token ids, special tokens
    included; docs: the document of each; held: whether it is held out.
    """

    first_doc: int
    n_docs: int
    first_seq: int
    before: str
    after: str
    chars: int
    tokens: int
    ids: list[list[int]]
    docs: list[int]
    held: list[bool]

    @property
    def n_seq(self) -> int:
        return len(self.ids)

    @property
    def positions(self) -> int:
        """Places that rows may be of: all tokens."""
        return sum(map(len, self.ids))

    def order(self) -> list[int]:
        """The order sequences are run in: the held-out ones first, each share from long to short."""
        return sorted(range(len(self.ids)), key=lambda i: (not self.held[i], -len(self.ids[i]), i))


class Sequencer:
    """Tokenises documents and cuts them into sequences of at most ctx_len tokens, special tokens included.

    prepend_bos: None does as the tokenizer does; True puts the BOS token before every sequence, False leaves out what
    the tokenizer puts there. share, seed: a document is held out when a hash of its text says so, so that two copies of
    a document are never on both sides. vocabulary: how many token ids the model knows; None where it does not say.

    Documents that are token ids already are cut, and nothing is put before or after them.
    """

    def __init__(
        self,
        tokenizer: Any,
        ctx_len: int,
        *,
        prepend_bos: bool | None = None,
        share: float = 0.05,
        seed: int = 0,
        vocabulary: int | None = None,
    ) -> None:
        self.tokenizer, self.ctx_len, self.share, self.seed = tokenizer, ctx_len, share, seed
        self.vocabulary = vocabulary
        self.prefix, self.suffix = _affixes(tokenizer)
        bos = tokenizer.bos_token_id
        if prepend_bos and (not self.prefix or self.prefix[0] not in (bos, tokenizer.cls_token_id)):
            if bos is None:
                raise InputError("prepend_bos is True, but this tokenizer has no BOS token")
            self.prefix = [bos, *self.prefix]
        if prepend_bos is False:
            self.prefix = []
        self.body = ctx_len - len(self.prefix) - len(self.suffix)
        if self.body < 1:
            raise InputError(f"ctx_len is {ctx_len}, expected more than the {ctx_len - self.body} special tokens")
        self.special = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)

    def windows(
        self,
        documents: Iterator[Document],
        fingerprint: Fingerprint,
        first_seq: int = 0,
        first_size: int | None = None,
        max_tokens: int | None = None,
    ) -> Iterator[Window]:
        """Windows over the rest of `documents`, of which `fingerprint` has seen those before.

        first_size: how many documents the first window has (a resumed harvest must cut it as before). max_tokens:
        the last window ends with the document that brings the tokens to this many.
        """
        left = max_tokens
        while left is None or left > 0:
            group = next_documents(documents, first_size)
            if not group:
                return
            window = self._window(group, fingerprint, first_seq, None if first_size else left)
            if left is not None:
                left -= window.tokens
            first_size = None
            first_seq += len(window.ids)
            yield window

    def _window(self, group: list[Document], fingerprint: Fingerprint, first_seq: int, left: int | None) -> Window:
        first_doc, before = fingerprint.count, fingerprint.value
        encoded = self._encoded(group)
        if left is not None:
            # The document that reaches the limit is the last one.
            reached = np.searchsorted(np.cumsum([len(ids) for ids in encoded]), left)
            group, encoded = group[: reached + 1], encoded[: reached + 1]
        hashes = [self._hash(document) for document in group]
        held = [h < self.share for h in hashes]
        if first_doc == 0 and self.share > 0 and len(group) > 1 and not any(held):
            # A short text would otherwise often have no held-out share at all.
            held[hashes.index(min(hashes))] = True
        for document in group:
            fingerprint.add(document)
        chars, tokens = sum(map(weight, group)), sum(map(len, encoded))
        out = Window(first_doc, len(group), first_seq, before, fingerprint.value, chars, tokens, [], [], [])
        for number, (document, ids) in enumerate(zip(group, encoded, strict=True)):
            for sequence in self._cut(document, ids):
                out.ids.append(sequence)
                out.docs.append(first_doc + number)
                out.held.append(held[number])
        return out

    def _encoded(self, group: list[Document]) -> list[list[int]]:
        """The token ids of each document: the tokenizer's for strings, and those that were given."""
        texts = [document for document in group if isinstance(document, str)]
        tokenised: Iterator[list[int]] = iter(())
        if texts:
            tokenised = iter(
                self.tokenizer(
                    texts,
                    add_special_tokens=False,
                    return_attention_mask=False,
                    return_token_type_ids=False,
                    verbose=False,
                )["input_ids"]
            )
        encoded = [next(tokenised) if isinstance(document, str) else document.tolist() for document in group]
        for document, ids in zip(group, encoded, strict=True):
            self._check_known(document, ids)
        return encoded

    def _check_known(self, document: Document, ids: list[int]) -> None:
        """Raises InputError for ids that the model has no embedding of."""
        n = self.vocabulary if self.vocabulary is not None or isinstance(document, str) else len(self.tokenizer)
        if n is None or not ids or (min(ids) >= 0 and max(ids) < n):
            return
        strange = next(token for token in ids if not 0 <= token < n)
        whose = "the tokenizer gives" if isinstance(document, str) else "the text holds"
        raise InputError(
            f"{whose} token id {strange}, but the model's vocabulary ends at {n - 1}: take the tokenizer that belongs"
            " to the model"
        )

    def _cut(self, document: Document, ids: list[int]) -> Iterator[list[int]]:
        """Sequences of a document: what was tokenised before is as it should be, text gets its special tokens."""
        if isinstance(document, str):
            for start in range(0, len(ids), self.body):
                yield [*self.prefix, *ids[start : start + self.body], *self.suffix]
        else:
            for start in range(0, len(ids), self.ctx_len):
                yield ids[start : start + self.ctx_len]

    def _hash(self, document: Document) -> float:
        key = self.seed.to_bytes(8, "little", signed=True)
        return int.from_bytes(digest(document, 8, key), "little") / 2.0**64


def batches_of(lengths: list[int], batch_tokens: int, equal: bool) -> Iterator[tuple[int, int]]:
    """Ranges of sequences to run together, for lengths that fall: at most batch_tokens with padding.

    All of one length if `equal`; else a batch of an eighth of batch_tokens ends before padding exceeds 5 % of it.
    """
    start = 0
    while start < len(lengths):
        longest, tokens, stop = lengths[start], lengths[start], start + 1
        while stop < len(lengths):
            padded = longest * (stop + 1 - start)
            wasteful = tokens >= batch_tokens / 8 and padded > 1.05 * (tokens + lengths[stop])
            if padded > batch_tokens or wasteful or (equal and lengths[stop] != longest):
                break
            tokens += lengths[stop]
            stop += 1
        yield start, stop
        start = stop


def pad(ids: list[list[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (n, longest) int64 padded on the right, and a mask of the same shape: True for tokens."""
    lengths = np.array([len(sequence) for sequence in ids])
    mask = np.arange(lengths.max()) < lengths[:, None]
    out = np.full(mask.shape, pad_id, dtype=np.int64)
    out[mask] = np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in ids])
    return out, mask


def next_documents(documents: Iterator[Document], count: int | None = None) -> list[Document]:
    """The next `count` documents, or as many as make up a window; none at the end."""
    group: list[Document] = []
    size = 0
    while (size < WINDOW_CHARS) if count is None else (len(group) < count):
        document = next(documents, None)
        if document is None:
            break
        group.append(document)
        size += weight(document)
    return group


def _affixes(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens this tokenizer puts before and after a text."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a", add_special_tokens=True)["input_ids"])
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    return [], []
