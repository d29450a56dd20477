"""The table that `saefast features` shows: latents with their tokens and strongest contexts, read from latents.db."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from saefast.harvest.token_text import same_word
from saefast.latents.database import Example, LatentsDB


@dataclass
class TokenShare:
    """One of a latent's own tokens.

    Attributes:
        token: its id. text: as shown.
        share: activation on it / all activation of the latent.
        covered: occurrences of it on which the latent fires / all its occurrences.
    """

    token: int
    text: str
    share: float
    covered: float


@dataclass
class Snippet:
    """Tokens around one firing.

    Attributes:
        texts: their text, spaces included. acts: the latent's activation on each.
        peak: place of the firing among them.
    """

    texts: list[str]
    acts: list[float]
    peak: int

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return iter(zip(self.texts, self.acts, strict=True))


@dataclass
class Feature:
    """A latent to show: n_fired rows of all, its strongest activation, its own tokens, its strongest contexts."""

    latent: int
    score: float
    density: float
    n_fired: int
    max_act: float
    tokens: list[TokenShare]
    snippets: list[Snippet]

    @property
    def title(self) -> str:
        """The latent's tokens, one of each word."""
        words: list[str] = []
        for token in self.tokens:
            if not any(same_word(token.text, word) for word in words):
                words.append(token.text)
        return " · ".join(words[:5])


@dataclass
class FeatureTable:
    """features, best first, and what they were chosen from and how, in a few sentences."""

    features: list[Feature]
    about: str


def make_table(db: LatentsDB, latents: Sequence[int], contexts: int = 6) -> FeatureTable:
    """Some latents with their own tokens and at most so many of their strongest contexts."""
    features = []
    for latent in db.latents(latents):
        shares = [TokenShare(t.token, t.text, t.share, t.covered) for t in db.tokens_of(latent.latent) if t.own]
        snippets = [_snippet(example) for example in db.examples(latent.latent, 0)[:contexts]]
        facts = latent.latent, latent.score or 0.0, latent.density, latent.n_fired, latent.max_act
        features.append(Feature(*facts, shares, snippets))
    return FeatureTable(features, _about(db, len(features)))


def _about(db: LatentsDB, n: int) -> str:
    rows = db.meta["rows"]
    score = "" if db.meta["score"] is None else f" {db.meta['score']}"
    return (
        f"{n} of {db.n_latents:,} latents (L0 = {db.meta['l0']:.1f}), judged on {rows['rows']:,} rows of "
        f"{rows['source']}, held-out ones first. A percentage is the share of a latent's activation that falls on a "
        f"token. Contexts are the strongest, with repeats left out.{score}"
    )


def _snippet(example: Example) -> Snippet:
    return Snippet(example.context.pieces, example.acts.tolist(), example.peak)
