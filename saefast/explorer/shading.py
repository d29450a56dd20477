"""Contexts as the page shows them: runs of text with the shade of a latent's activation, its value and its peak."""

from typing import NamedTuple

import numpy as np

from saefast.latents.characters import on_characters
from saefast.latents.database import Context, Example
from saefast.latents.numbers import act, shade


class Run(NamedTuple):
    """Text that is shown alike. css: its classes, "" where there is no activation. title: what a pointer shows."""

    text: str
    css: str
    title: str


def shaded(example: Example, most: float) -> list[Run]:
    """An example's text, shaded beside the largest activation. Positions of no activation lie together in one run."""
    example = on_characters(example)
    pieces = example.context.pieces
    runs: list[Run] = []
    still: list[str] = []
    for place, (piece, value) in enumerate(zip(pieces, example.acts.tolist(), strict=True)):
        if value > 0 or place == example.peak:
            # The space before a word belongs to its token, and looks like a blot where it is shaded.
            bare = piece.lstrip(" ") or piece
            runs.extend(_plain([*still, piece[: len(piece) - len(bare)]]))
            css = shade(value, most) + (" peak" if place == example.peak else "")
            runs.append(Run(bare, css, act(value)))
            still = []
        else:
            still.append(piece)
    return [*runs, *_plain(still)]


def marked_spans(context: Context, spans: list[tuple[int, int]]) -> list[Run]:
    """A context with the places of a search in it marked. spans: as search.Match has them."""
    runs: list[Run] = []
    done = 0
    for first, last in sorted(spans):
        first = max(first, done)
        if last <= first:
            continue
        found = "".join(context.pieces[first:last])
        bare = found.lstrip(" ") or found
        runs.extend(_plain([*context.pieces[done:first], found[: len(found) - len(bare)]]))
        runs.append(Run(bare, "found", ""))
        done = last
    return [*runs, *_plain(context.pieces[done:])]


def _plain(pieces: list[str]) -> list[Run]:
    text = "".join(pieces)
    return [Run(text, "", "")] if text else []


def shares(counts: np.ndarray, parts: int) -> list[float]:
    """Shares of firings in intervals of equal width, the highest first, from a histogram of bins of equal width."""
    total = int(counts.sum())
    each = counts.reshape(parts, -1).sum(1)[::-1]
    return [float(n) / total if total else 0.0 for n in each.tolist()]
