"""Sequences cut into contexts: sentences as people write them, contexts end to end, near-duplicates known as such."""

import re
import sqlite3
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harvest.test_token_text import byte_level, metaspace, word_piece
from hypothesis import given, settings
from hypothesis import strategies as st

from saefast.harvest.token_text import Texts
from saefast.latents.contexts import Contexts, write_sequences
from saefast.latents.database import LatentsDB
from saefast.latents.near_duplicates import Words, leaders
from saefast.latents.schema import create, finish
from saefast.latents.sentences import LEAST, LONGEST, cut, sentence_ends

SENTENCES = {
    "prose": ["The bridge opened in 1932.", " It carries trains!", " Does it still?", " Yes…"],
    "abbreviations": [
        "Dr. Smith, i.e. the one from St. Ives, met J. R. Ewing at 5 p.m. on 3.5 acres.",
        " Then he left.",
    ],
    "names with dots": ["See numpy.linalg.norm or example.com for more.", " It is there."],
    "quotations": ['He said "Stop." and went on.', ' "Why?" she asked.', ' "Because!"', " (So it ended.)", " Fine."],
    "ellipsis": ["Well... that is it.", " And so on...", " The end."],
    "Chinese": ["桥是在1932年建成的。", "它现在还在吗？", "「在！」", "好。"],
    "Arabic": ["هل هذا جسر؟", " نعم۔", " شكرا"],
    "Hindi": ["यह एक पुल है।", " हाँ।"],
    "one case alone": ["the bridge was built by dr. smith.", " it is old."],
    "blank lines": ["A title\n\n", "A text about\nthe bridge\n\n", "Another one"],
    "wrapped lines": ["A sentence that somebody has written in lines of about 60\nletters, or characters. ", "Next."],
    "list": ["Things to buy:\n", "- a bridge\n", "- a boat\n", "- 3. of May\n", "Done"],
    "numbered": ["1. First thing\n", "2. Second thing\n", "3. Third"],
    "code": ["def f(x):\n", "    if x > 1.5:\n", "        return x.y\n\n", "print(f(2))"],
}


@pytest.mark.parametrize("kind", list(SENTENCES))
def test_texts_are_cut_at_the_ends_of_sentences(kind: str) -> None:
    wanted = SENTENCES[kind]
    text = "".join(wanted)
    ends = sorted({0, len(text), *(place for place, _ in sentence_ends(text))})
    found = [text[start:stop] for start, stop in pairwise(ends)]
    # A space between sentences may stand on either side.
    assert [part.strip() for part in found] == [part.strip() for part in wanted]


def tokens_of(text: str) -> list[str]:
    return re.findall(r" ?\w+|\n+ *|\s|[^\w\s]", text)


def parts_of(pieces: list[str], special: list[bool] | None = None) -> list[str]:
    stops = cut(pieces, special or [False] * len(pieces))
    return ["".join(pieces[start:stop]) for start, stop in pairwise([0, *stops])]


def test_short_sentences_are_joined_to_the_next() -> None:
    long = "This one has a good many words in it."
    assert parts_of(tokens_of(f"No. Yes. {long} {long} No.")) == [f"No. Yes. {long}", f" {long} No."]
    assert parts_of(tokens_of("No.")) == ["No."]
    # But not where the two would be too long together.
    longest = " ".join(["word"] * (LONGEST - 1)) + "."
    assert parts_of(tokens_of(f"Title.\n\n{longest}")) == ["Title.\n\n", longest]


def test_a_text_ends_before_a_mark_of_the_tokenizer() -> None:
    pieces = ["", "One", ".", "", "Two", " three", ".", ""]
    special = [not piece for piece in pieces]
    assert cut(pieces, special) == [3, 8]
    assert cut(pieces[:4], special[:4]) == [4]
    ended = [*tokens_of("A sentence that is long enough to be one."), ""]
    assert cut(ended, [not piece for piece in ended]) == [len(ended)]
    assert cut([""] * 3, [True] * 3) == [3]


def test_a_long_sentence_is_cut_at_a_sign() -> None:
    clause = " one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    parts = parts_of(tokens_of(f"{clause},{clause};{clause},{clause} end."))
    assert [part[-1] for part in parts] == [";", "."]
    lines = parts_of(tokens_of("\n".join(["    x = call(a, b, c)"] * 20)))
    assert all(part.rstrip(" ").endswith("\n") for part in lines[:-1])


PIECES = st.lists(
    st.tuples(
        st.sampled_from(["", " word", "a", ".", "\n", "\n\n", "。", "狐", ", ", "! ", "Dr", " -"]), st.booleans()
    ),
    max_size=300,
)


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(PIECES)
def test_any_sequence_is_cut_into_contexts_of_a_length(drawn: list[tuple[str, bool]]) -> None:
    pieces = [piece for piece, _ in drawn]
    special = [not piece and mark for piece, mark in drawn]
    stops = cut(pieces, special)
    lengths = np.diff([0, *stops])
    assert (stops[-1] if stops else 0) == len(pieces)
    assert all(0 < length <= LONGEST for length in lengths)
    # Short are only those that end a text, or stand before one that is as long as can be, or a long line.
    for place, length in enumerate(lengths[:-1]):
        stop = stops[place]
        assert length >= LEAST or special[stop] or lengths[place + 1] >= LEAST


def test_no_context_begins_inside_a_character_where_another_place_is_near() -> None:
    tokenizer = byte_level(258)
    ids = tokenizer("狐狸跳过懒狗" * 40, add_special_tokens=False)["input_ids"]
    pieces = Texts(tokenizer).run(ids)
    stops = cut(pieces, [False] * len(pieces))
    assert len(stops) > 10
    assert all(pieces[stop - 1] for stop in stops)


@pytest.mark.parametrize("piece", ["." * 16, " " * 16, "\n" * 16, " \n" * 8, "!*" * 8, "。" * 16, "-" * 16, "(", '."'])
def test_a_long_run_of_anything_is_gone_through_once(piece: str) -> None:
    """Where each of 300,000 signs looked at all that follow it, this would not end."""
    pieces = [" Begin", *[piece] * 20_000, " end"]
    stops = cut(pieces, [False] * len(pieces))
    assert stops[-1] == len(pieces)
    assert max(np.diff([0, *stops])) <= LONGEST


def test_what_differs_in_a_word_or_a_number_is_a_near_duplicate() -> None:
    families = [
        [
            "Licensed under the Apache License, Version 2.0; you may not use this file",
            "licensed under the  MIT License, version 1.1; you may not use this file",
            "Licensed under the Apache License, Version 3; you may not\nuse this file",
        ],
        ["Construct a button widget with the parent MASTER.", "Construct a label widget with the parent MASTER."],
        ["桥是在1932年建成的一座很长的桥", "桥是在1850年建成的一座很高的桥"],
        ["Return 1", "return 2\n"],
    ]
    others = ["The river floods in spring.", "Trains cross it every day of the year.", "", "Return the parent widget."]
    texts = [text for family in families for text in family] + others
    family = np.array([i for i, members in enumerate(families) for _ in members] + [4, 5, 6, 7])
    found = leaders_of(texts)
    assert np.array_equal(found, [int(np.flatnonzero(family == number)[0]) for number in family])


def leaders_of(texts: list[str]) -> np.ndarray:
    words = Words()
    numbers = [words.of(text) for text in texts]
    return leaders(
        np.array([number for text in numbers for number in text], np.uint64), np.cumsum([0, *map(len, numbers)])
    )


def test_near_duplicates_have_half_of_their_pairs_of_words_in_common() -> None:
    """Against the shares themselves, which the minima estimate: 60 of them, so within 0.2 (three standard errors)."""
    rng = np.random.default_rng(0)
    bases = [rng.integers(0, 50, 12) for _ in range(40)]
    texts = []
    for base in bases:
        for _ in range(6):
            other = base.copy()
            other[rng.integers(0, 12, rng.integers(0, 4))] = 50 + rng.integers(0, 1000)
            texts.append(" ".join("abcdefghijklmnopqrstuvwxyz"[w % 26] * (1 + w // 26) for w in other))
    found = leaders_of(texts)
    pairs = [set(pairwise(["^", *text.split(), "$"])) for text in texts]
    joined = 0
    for i, leader in enumerate(found.tolist()):
        assert found[leader] == leader <= i
        share = len(pairs[i] & pairs[leader]) / len(pairs[i] | pairs[leader])
        assert share > 0.3
        joined += i != leader
        # A leader that nearly says the same, and comes before, would have been taken.
        for other in {j for j in found[:i].tolist() if found[i] == i}:
            assert len(pairs[i] & pairs[other]) / len(pairs[i] | pairs[other]) < 0.7
    assert joined > 80


class Text:
    """A source of texts, as far as contexts ask: sequence s has the number 100 + s."""

    def __init__(self, tokenizer: Any, texts: list[str]) -> None:
        self.folder = SimpleNamespace(kind="text")
        self.ids = [tokenizer(text)["input_ids"] for text in texts]

    def tokens(self, number: int) -> torch.Tensor:
        return torch.tensor(self.ids[number - 100], dtype=torch.int32)


def spool_of(lengths: list[int], first: int = 100) -> Any:
    """Every second position is a row, of the last sequence first."""
    places = [(s, p) for s, n in reversed(list(enumerate(lengths))) for p in range(1, n, 2)]
    sequence, position = np.array(places).reshape(-1, 2).T
    return SimpleNamespace(
        sequence=sequence.astype(np.int32),
        position=position.astype(np.uint16),
        source_sequences=first + np.arange(len(lengths)),
    )


TEXTS = [
    "The fox jumps over the lazy dog. Don't you think so?\n\n" * 6,
    "naïve – 狐 🦊 a\0b \x1b[31m שלום <script>alert(1)</script>",
    "x",
    "The fox jumps over the lazy cat. Don't you think so?",
]


def written(tmp_path: Path, source: Any, spool: Any, texts: Texts | None) -> tuple[LatentsDB, Contexts, list[int]]:
    db, told = create(tmp_path / "latents.db"), []
    db.execute("INSERT INTO meta VALUES ('n_latents', '1')")
    contexts = write_sequences(db, spool, source, texts, told.append)
    finish(db)
    return LatentsDB(tmp_path / "latents.db"), contexts, told


@pytest.mark.parametrize("made", [byte_level, metaspace, word_piece])
def test_contexts_of_a_sequence_are_all_of_it(tmp_path: Path, made: Any) -> None:
    tokenizer = made()
    source = Text(tokenizer, TEXTS)
    lengths = [len(ids) for ids in source.ids]
    spool = spool_of(lengths)
    db, contexts, told = written(tmp_path, source, spool, Texts(tokenizer))
    assert sum(told) == len(spool.sequence)
    begins = 0
    for sequence, ids in enumerate(source.ids):
        row, parts = db.sequence(sequence), db.contexts_of(sequence)
        assert (row.source_sequence, row.n, row.name) == (100 + sequence, len(ids), None)
        assert row.tokens.tolist() == ids
        assert [c.start for c in parts] == [0, *(c.stop for c in parts[:-1])]
        assert parts[-1].stop == len(ids)
        assert [piece for c in parts for piece in c.pieces] == Texts(tokenizer).run(ids)
        assert [c.context for c in parts] == list(range(begins, begins + len(parts)))
        begins += len(parts)
    assert begins == len(contexts)
    assert len(db.contexts_of(0)) >= 3


def test_contexts_of_positions(tmp_path: Path) -> None:
    tokenizer = byte_level()
    source = Text(tokenizer, TEXTS)
    spool = spool_of([len(ids) for ids in source.ids])
    db, contexts, _ = written(tmp_path, source, spool, Texts(tokenizer))
    found = contexts.of(spool.sequence, spool.position)
    for context, sequence, position in zip(
        found.tolist(), spool.sequence.tolist(), spool.position.tolist(), strict=True
    ):
        c = db.context(context)
        assert c.sequence == sequence
        assert c.start <= position < c.stop
    # The same sentence again, and one that differs in a word, in another sequence.
    fox = [row[0] for row in db.query("SELECT context FROM contexts WHERE text LIKE '%The fox jumps%'")]
    assert len(fox) > 3
    assert len(set(contexts.fingerprint[fox].tolist())) == 1
    of_sequence = [set(contexts.fingerprint[contexts.sequence == s].tolist()) for s in range(4)]
    assert of_sequence[0] == of_sequence[3]
    assert len(of_sequence[0]) == 2
    assert not of_sequence[0] & of_sequence[1] | of_sequence[1] & of_sequence[2]


def test_a_text_without_a_tokenizer_has_contexts_without_text(tmp_path: Path) -> None:
    source = Text(byte_level(), TEXTS)
    db, _, _ = written(tmp_path, source, spool_of([len(ids) for ids in source.ids]), None)
    parts = db.contexts_of(0)
    assert len(parts) > 1
    assert all(piece == "" for c in parts for piece in c.pieces)
    assert max(c.stop - c.start for c in parts) <= LONGEST
    assert sum(len(c.pieces) for c in parts) == len(source.ids[0])


def test_an_image_is_one_context(tmp_path: Path) -> None:
    names = {7: "cat.png", 8: "sub/k\udce4se.png"}
    source = SimpleNamespace(folder=SimpleNamespace(kind="images", item=names.__getitem__))
    db, contexts, _ = written(tmp_path, source, spool_of([10, 6], first=7), None)
    assert [db.sequence(s).name for s in (0, 1)] == ["cat.png", "sub/k�se.png"]
    assert [db.sequence(s).n for s in (0, 1)] == [10, 6]
    assert db.sequence(0).tokens.size == 0
    assert db.contexts_of(0)[0].pieces == [""] * 10
    assert contexts.of(np.array([1, 0]), np.array([5, 9])).tolist() == [1, 0]
    assert len(set(contexts.fingerprint.tolist())) == 2


def test_rows_without_a_folder_have_sequences_without_names(tmp_path: Path) -> None:
    db, _, _ = written(tmp_path, SimpleNamespace(folder=None), spool_of([4, 4], first=0), None)
    assert db.sequence(1).name is None
    assert isinstance(db.query("SELECT 1"), list)


def test_nothing_is_written_of_no_rows(tmp_path: Path) -> None:
    db = create(tmp_path / "latents.db")
    empty = SimpleNamespace(
        sequence=np.zeros(0, np.int32), position=np.zeros(0, np.uint16), source_sequences=np.zeros(0, np.int64)
    )
    contexts = write_sequences(db, empty, SimpleNamespace(folder=None), None)
    assert len(contexts) == 0
    assert db.execute("SELECT count(*) FROM sequences").fetchone() == (0,)
    assert isinstance(db, sqlite3.Connection)
