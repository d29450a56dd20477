"""Examples of a latent as other people's dashboards take them: tokens that are text, a number for each, and their bin.

Numbers are float32 in the fewest digits that stand for them, so that nothing is rounded.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from saefast.errors import InputError
from saefast.latents.database import Example, Latent, LatentsDB, LogitWeight
from saefast.latents.schema import BINS, INTERVALS

# Tokens that Neuronpedia's server takes of one text, and features in one call (app/api/feature/upload-batch).
MOST_TOKENS = 1024
BATCH = 128


class Bin(NamedTuple):
    """Where examples were drawn from: activations from low to high, and the share of all rows that lies there.

    The strongest have low = share = -1, as SAEDashboard writes them.
    """

    low: float
    high: float
    share: float


class Excerpt(NamedTuple):
    """A text: its tokens, none of them empty, the latent's activation on each, and the place of the strongest."""

    tokens: list[str]
    values: list[float]
    peak: int
    part: int


class Lowered(NamedTuple):
    """Tokens with the weights that a latent has on them: raised most, and lowered most."""

    raised: list[LogitWeight]
    lowered: list[LogitWeight]


def require_text(db: LatentsDB, kind: str) -> None:
    """Raises InputError where rows are of no text."""
    if db.meta["kind"] != "text":
        raise InputError(f"{db.path} is of {db.meta['unit']}: {kind} shows text alone")
    if not db.query("SELECT 1 FROM contexts WHERE text != '' LIMIT 1"):
        raise InputError(f"{db.path} holds no text: {kind} needs a harvest whose tokenizer is known")


def dataset(db: LatentsDB) -> str:
    """What the rows are of, as their harvest says; "" where it does not."""
    return str(db.meta["rows"].get("data") or "")


def number(value: float) -> float:
    """A float32 in its fewest digits, as JSON then shows it."""
    return float(str(np.float32(value))) if value else 0.0


def batches(latents: Sequence[int]) -> Iterator[Sequence[int]]:
    """BATCH of them at a time."""
    for start in range(0, len(latents), BATCH):
        yield latents[start : start + BATCH]


def excerpts(db: LatentsDB, latent: int) -> list[Excerpt]:
    """All examples of a latent that have text, the strongest first and then by interval."""
    found = (excerpt(example) for example in db.examples(latent))
    return [one for one in found if one is not None]


def excerpt(example: Example) -> Excerpt | None:
    """An example as tokens; None where it has no text.

    Tokens that together make one character are one here, with the strongest of their activations. Of more than
    MOST_TOKENS those around the strongest are kept.
    """
    tokens: list[str] = []
    values: list[float] = []
    waiting, peak = 0.0, 0
    for place, (piece, act) in enumerate(zip(example.context.pieces, example.acts.tolist(), strict=True)):
        if place == example.peak:
            peak = len(tokens)
        waiting = max(waiting, act)
        if piece:
            # PostgreSQL, where Neuronpedia keeps them, takes no NUL.
            tokens.append(piece.replace("\0", "\ufffd"))
            values.append(waiting)
            waiting = 0.0
    if not tokens:
        return None
    values[-1] = max(values[-1], waiting)
    peak = min(peak, len(tokens) - 1)
    start = min(max(peak - MOST_TOKENS // 2, 0), max(len(tokens) - MOST_TOKENS, 0))
    kept = slice(start, start + MOST_TOKENS)
    return Excerpt(tokens[kept], [number(value) for value in values[kept]], peak - start, example.part)


def bins(db: LatentsDB, latent: Latent) -> list[Bin]:
    """The bin of each part of a latent's examples. The lowest counts the rows that the latent does not fire on, too."""
    counts = db.histogram(latent.latent).reshape(INTERVALS, BINS // INTERVALS).sum(1)[::-1].astype(np.int64)
    n_rows = int(db.meta["n_rows"])
    counts[-1] += n_rows - latent.n_fired
    found = [Bin(-1.0, number(latent.max_act), -1.0)]
    for part, count in enumerate(counts.tolist()):
        high, low = ((INTERVALS - part - below) / INTERVALS * latent.max_act for below in (0, 1))
        found.append(Bin(number(low), number(high), count / n_rows))
    return found


def histogram(db: LatentsDB, latent: Latent) -> tuple[list[float], list[int]]:
    """Middles and heights of the bars; nothing of a latent that never fired."""
    if latent.dead:
        return [], []
    middles = (np.arange(BINS) + 0.5) / BINS * latent.max_act
    return [number(middle) for middle in middles], db.histogram(latent.latent).tolist()


def logits(db: LatentsDB, latent: int) -> Lowered:
    """Empty where the model has no unembedding: what stands there instead are no logits."""
    if db.meta["logits"]["what"] != "logit":
        return Lowered([], [])
    named = ([one for one in side if one.text] for side in db.logit_weights(latent))
    return Lowered(*named)


def as_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise InputError(f"latents.db holds a number that JSON cannot say ({error}): make it anew") from None
