"""Which latents fire on a word or phrase, from latents.db alone: "which latents fire on 'bridge'?".

Needs no torch, and takes a time that does not grow with the rows: of a word that is everywhere a sample is looked at.
"""

import re
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from saefast.latents.database import Context, LatentsDB
from saefast.latents.near_duplicates import Words, leaders
from saefast.latents.occurrences import Occurrence, Occurrences, fts_query, occurrences, pattern
from saefast.readable import visible

# Characters of a query that are looked at.
LONGEST_QUERY = 200
# Contexts with the word that are shown.
SHOWN = 20
# Entries of codes read at most (10 bytes each), in the sequences of the contexts found.
MOST_ENTRIES = 1 << 21
# Latents of those that fire there whose facts are looked up.
_MOST_LATENTS = 1000
# Tokens that are the word or hold it, and latents that have them among their own, at most.
_MOST_TOKENS, _MOST_OF_TOKENS = 20, 500


class Hit(NamedTuple):
    """A latent that belongs to a query.

    Attributes:
        score: F1 of share and covered, the latter less what its density makes likely; 0 to 1.
        share: of its activation, on all rows, that is on the words; an estimate where a sample was looked at.
        covered: share of the words' occurrences that it fires on. n: occurrences, of those looked at, that it fires on.
        why: "number" where the query is its number, "label" where its label has the words, "context" where it fires on
            them, "token" where they are one of its own tokens.
    """

    latent: int
    score: float
    share: float
    covered: float
    n: int
    why: str


class Match(NamedTuple):
    """A context with the words. spans: places in it, first and after the last; latent: the hit that fires there most,
    None where none does; act: its activation there."""

    context: Context
    spans: list[tuple[int, int]]
    latent: int | None
    act: float


class Found(NamedTuple):
    """What a search found.

    Attributes:
        query: as it was understood.
        hits: numbers and labels first, then the best score.
        matches: contexts with the words, those in which the best latents fire most; near-duplicates are left out.
        n_contexts: contexts with the words, estimated where sampled is true: then a part of them was looked at.
        how: a sentence for people that says all this.
    """

    query: str
    hits: list[Hit]
    matches: list[Match]
    n_contexts: int
    sampled: bool
    how: str


def search(db: LatentsDB, text: str, limit: int = 50) -> Found:
    """Which latents fire on a word or phrase, in any letters' case; at most `limit` of them.

    Never raises for any text: signs of query languages mean themselves, control characters are spaces, and of a long
    text the first LONGEST_QUERY characters count.
    """
    query = understood(text)
    if not query:
        return Found("", [], [], 0, False, "Nothing to look for.")
    words = query.split()
    places = occurrences(db, words)
    firing = _Firing(db, places)
    named = [*_of_number(db, query), *_of_labels(db, words)]
    hits = _best(named, firing.hits(), _of_tokens(db, words, places.whole))[:limit]
    sampled = firing.n_contexts < places.n_contexts
    how = _told(query, places, firing.n_contexts, cut=len(text.strip()) > LONGEST_QUERY)
    return Found(query, hits, firing.matches([hit for hit in hits if hit.n]), places.n_contexts, sampled, how)


def understood(text: str) -> str:
    """A query as it is looked for: one line of characters that can be looked for."""
    text = re.sub("[\ud800-\udfff\0-\x1f\x7f-\x9f]", " ", text[: 4 * LONGEST_QUERY])
    return " ".join(text.split())[:LONGEST_QUERY].strip()


def _told(query: str, places: Occurrences, n_looked: int, cut: bool) -> str:
    shown = f"“{visible(query)}”" + (" (the beginning of what was asked)" if cut else "")
    if not places.found:
        return f"No context holds {shown}."
    n = places.n_contexts
    where = "hold" if places.whole else "hold, inside of words,"
    counted = "1 context holds" if n == 1 and places.whole else f"{n:,} contexts {where}"
    about = "About " if places.n_read < places.n_candidates else ""
    sample = f" A sample of {n_looked:,} was looked at." if n_looked < n else ""
    return f"{about}{counted} {shown}.{sample}"


class _Firing:
    """The entries of codes that lie on the occurrences of a query."""

    def __init__(self, db: LatentsDB, places: Occurrences) -> None:
        self._db = db
        self._kept = _affordable(db, places.found)
        self.n_contexts = len(self._kept)
        self._n = sum(len(each.spans) for each in self._kept)
        # How many times the sample is what all contexts hold.
        self._scale = places.n_contexts / max(self.n_contexts, 1)
        self._latents, self._spans, self._acts = _entries(db, self._kept)

    def hits(self) -> list[Hit]:
        """Latents that fire on the occurrences more than by chance."""
        latents, place = np.unique(self._latents, return_inverse=True)
        sums = np.bincount(place, self._acts, len(latents))
        # Each occurrence once, however many tokens it has.
        pairs = np.unique(place.astype(np.int64) * max(self._n, 1) + self._spans)
        n = np.bincount(pairs // max(self._n, 1), minlength=len(latents))
        likely = np.lexsort((-sums, -n))[:_MOST_LATENTS]
        facts = _facts(self._db, latents[likely])
        share = np.minimum(sums[likely] * self._scale / np.maximum(facts[:, 1], 1e-30), 1)
        covered = n[likely] / max(self._n, 1)
        score = f1(share, covered, facts[:, 0])
        columns = (latents[likely], score, share, covered, n[likely])
        lines = zip(*(column.tolist() for column in columns), strict=True)
        return [Hit(latent, value, s, c, count, "context") for latent, value, s, c, count in lines if value > 0]

    def matches(self, hits: list[Hit]) -> list[Match]:
        """The contexts looked at in which the first of the hits fire most, relative to the most they ever do."""
        best = hits[:10]
        most = dict(_most(self._db, [hit.latent for hit in best]))
        weight = {hit.latent: hit.score / max(most.get(hit.latent, 0.0), 1e-30) for hit in best}
        owner = np.repeat(np.arange(len(self._kept)), [len(each.spans) for each in self._kept])
        top: dict[int, tuple[float, int, float]] = {}
        here = np.isin(self._latents, list(weight))
        columns = (owner[self._spans[here]], self._latents[here], self._acts[here])
        for i, latent, act in zip(*(column.tolist() for column in columns), strict=True):
            top[i] = max(top.get(i, (0.0, latent, act)), (act * weight[latent], latent, act))
        order = sorted(range(len(self._kept)), key=lambda i: -top[i][0] if i in top else 0.0)
        chosen = _different([self._kept[i].text for i in order[: 4 * SHOWN]])[:SHOWN]
        return [self._match(self._kept[order[place]], top.get(order[place])) for place in chosen]

    def _match(self, each: Occurrence, top: tuple[float, int, float] | None) -> Match:
        ends = [0, *each.lengths.cumsum().tolist()]
        pieces = [each.text[first:last] for first, last in pairwise(ends)]
        context = Context(each.context, each.sequence, each.start, each.start + len(pieces), pieces)
        return Match(context, each.spans, top[1] if top else None, top[2] if top else 0.0)


def f1(share: np.ndarray, covered: np.ndarray, density: np.ndarray) -> np.ndarray:
    """How well latents and words belong together: the harmonic mean of the share of a latent's activation that is on
    the words and the share of the words that it fires on, less what one that fires anywhere would.

    A latent of density d fires on a share d of anything, so that (covered - d) / (1 - d) is what it has beyond chance.
    """
    beyond = np.clip((covered - density) / np.maximum(1 - density, 1e-9), 0, 1)
    return 2 * share * beyond / np.maximum(share + beyond, 1e-30)


def _affordable(db: LatentsDB, found: list[Occurrence]) -> list[Occurrence]:
    """The first contexts whose sequences have MOST_ENTRIES together, and all others in those sequences."""
    sequences = list(dict.fromkeys(each.sequence for each in found))
    marks = ", ".join("?" * len(sequences))
    sizes = dict(db.query(f"SELECT sequence, length(latents) / 4 FROM codes WHERE sequence IN ({marks})", sequences))
    total, kept = 0, set[int]()
    for sequence in sequences:
        total += int(sizes.get(sequence, 0))
        if kept and total > MOST_ENTRIES:
            break
        kept.add(sequence)
    return [each for each in found if each.sequence in kept]


def _entries(db: LatentsDB, kept: list[Occurrence]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries on the spans of contexts: latents (n,) int32, numbers of spans (n,) int64, acts (n,) float32."""
    of_sequence: dict[int, list[tuple[int, int, int]]] = {}
    number = 0
    for each in kept:
        for first, stop in each.spans:
            of_sequence.setdefault(each.sequence, []).append((each.start + first, each.start + stop, number))
            number += 1
    latents, spans, acts = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    span_at = np.full(1 << 16, -1, np.int64)
    for sequence, places in of_sequence.items():
        codes = db.codes(sequence)
        for first, stop, number in places:
            span_at[first:stop] = number
        here = span_at[codes.positions]
        at = np.flatnonzero(here >= 0)
        latents.append(codes.latents[at])
        spans.append(here[at])
        acts.append(codes.acts[at])
        for first, stop, _ in places:
            span_at[first:stop] = -1
    return np.concatenate(latents), np.concatenate(spans), np.concatenate(acts)


def _facts(db: LatentsDB, latents: np.ndarray) -> np.ndarray:
    """(n, 2) float64: density and the sum of all activations, of some latents."""
    marks = ", ".join("?" * len(latents))
    rows = db.query(
        f"SELECT latent, density, n_fired * mean_act FROM latents WHERE latent IN ({marks})", latents.tolist()
    )
    facts = {latent: (density, total) for latent, density, total in rows}
    return np.array([facts.get(latent, (1.0, 0.0)) for latent in latents.tolist()], np.float64).reshape(-1, 2)


def _most(db: LatentsDB, latents: list[int]) -> list[tuple[int, float]]:
    marks = ", ".join("?" * len(latents))
    return [
        (row[0], row[1]) for row in db.query(f"SELECT latent, max_act FROM latents WHERE latent IN ({marks})", latents)
    ]


def _different(texts: list[str]) -> list[int]:
    """The places of texts that are no near-duplicates of one before."""
    words = Words()
    numbers = [words.of(text) for text in texts]
    first = np.cumsum([0, *map(len, numbers)])
    leader = leaders(np.array([number for text in numbers for number in text], np.uint64), first)
    return np.flatnonzero(leader == np.arange(len(texts))).tolist()


def _of_number(db: LatentsDB, query: str) -> list[Hit]:
    number = re.fullmatch(r"#?([0-9]{1,9})", query)
    latent = int(number[1]) if number else -1
    return [Hit(latent, 0.0, 0.0, 0.0, 0, "number")] if 0 <= latent < db.n_latents else []


def _of_labels(db: LatentsDB, words: list[str]) -> list[Hit]:
    rows = db.query("SELECT latent, text FROM labels ORDER BY latent")
    wanted = pattern(words, whole=False)
    return [Hit(latent, 0.0, 0.0, 0.0, 0, "label") for latent, text in rows if wanted.search(text)]


def _of_tokens(db: LatentsDB, words: list[str], whole: bool) -> list[Hit]:
    """Latents that have the word among the tokens with most of their activation, which counts all rows."""
    tokens = _tokens(db, words[0], whole) if len(words) == 1 else {}
    total = sum(tokens.values())
    if not total:
        return []
    marks = ", ".join("?" * len(tokens))
    rows = db.query(
        "SELECT latent, density, sum(share), sum(covered * n) FROM latent_tokens JOIN tokens USING (token) "
        f"JOIN latents USING (latent) WHERE token IN ({marks}) GROUP BY latent ORDER BY 3 DESC LIMIT {_MOST_OF_TOKENS}",
        list(tokens),
    )
    latents = [int(row[0]) for row in rows]
    density, share, fired = np.array([row[1:] for row in rows], np.float64).reshape(-1, 3).T
    covered = np.minimum(fired / total, 1)
    columns = (f1(np.minimum(share, 1), covered, density), np.minimum(share, 1), covered, fired.round().astype(int))
    lines = zip(latents, *(column.tolist() for column in columns), strict=True)
    return [Hit(latent, value, s, c, count, "token") for latent, value, s, c, count in lines if value > 0]


def _tokens(db: LatentsDB, word: str, whole: bool) -> dict[int, int]:
    """Tokens that are a word, or that hold it where whole is false, and how often each occurs."""
    if asked := fts_query([word]):
        rows = db.query(
            "SELECT token, t.text, n FROM token_search JOIN tokens t ON t.token = token_search.rowid "
            "WHERE token_search MATCH ? AND n > 0",
            (asked,),
        )
    else:
        rows = db.query("SELECT token, text, n FROM tokens WHERE n > 0 AND lower(text) = ?", (word.lower(),))
    folded = word.casefold()
    kept = [row for row in rows if (row[1].casefold() == folded if whole else folded in row[1].casefold())]
    return {token: n for token, _, n in sorted(kept, key=lambda row: -row[2])[:_MOST_TOKENS]}


def _best(first: list[Hit], *others: list[Hit]) -> list[Hit]:
    """Each latent once: those that come first whatever they score, then the best score, the less latent of equals."""
    best: dict[int, Hit] = {}
    for hit in sorted((hit for hits in others for hit in hits), key=lambda hit: (-hit.score, hit.latent)):
        best.setdefault(hit.latent, hit)
    named: dict[int, Hit] = {}
    for hit in first:
        named.setdefault(hit.latent, best.pop(hit.latent, hit)._replace(why=hit.why))
    return [*named.values(), *best.values()]
