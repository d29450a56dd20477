"""Examples of many latents at once, against what they are of one latent in words."""

from itertools import pairwise
from math import ceil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from saefast.latents.contexts import Contexts
from saefast.latents.examples import Examples, examples
from saefast.latents.near_duplicates import mixed
from saefast.latents.schema import INTERVALS, PER_INTERVAL, TOP
from saefast.latents.spool import Entries

# Latent 0 is dead, 1 fires on all rows, the others on fewer and fewer.
N_LATENTS, N_SEQUENCES, LENGTH, EACH = 30, 60, 40, 4


def made(seed: int, levels: int) -> tuple[Any, Contexts, np.ndarray]:
    """A spool's places, contexts of 4 positions of which every fifth is a near-duplicate of another, and the code
    (rows, N_LATENTS) with so many different activations that many or few are equal."""
    rng = np.random.default_rng(seed)
    sequence, position = (part.ravel() for part in np.mgrid[:N_SEQUENCES, :LENGTH])
    # Rows of a sequence need not lie together.
    order = rng.permutation(len(sequence))
    spool = SimpleNamespace(sequence=sequence[order].astype(np.int32), position=position[order].astype(np.uint16))
    starts = np.arange(0, N_SEQUENCES * LENGTH, EACH)
    numbers = np.arange(len(starts))
    fingerprint = np.where(rng.random(len(starts)) < 0.2, numbers % 7, numbers)
    contexts = Contexts((starts // LENGTH).astype(np.int32), (starts % LENGTH).astype(np.int32), fingerprint)
    acts = (rng.integers(1, levels + 1, (len(sequence), N_LATENTS)) / levels * 3).astype(np.float32)
    fires = rng.random(acts.shape) < 1 / np.arange(N_LATENTS).clip(1)
    acts[~fires] = 0
    acts[:, 0] = 0
    return spool, contexts, acts


def entries_of(acts: np.ndarray, start: int, stop: int) -> Entries:
    latent, row = np.nonzero(acts[:, start:stop].T)
    ptr = np.searchsorted(latent, np.arange(stop - start + 1)).astype(np.int64)
    return Entries(ptr, row.astype(np.int64), acts[row, latent + start])


def of_range(spool: Any, contexts: Contexts, acts: np.ndarray, start: int, stop: int) -> Examples:
    return examples(entries_of(acts, start, stop), start, spool, contexts, acts[:, start:stop].max(0))


def stated(spool: Any, contexts: Contexts, acts: np.ndarray, latent: int) -> list[tuple[int, int, int, int, float]]:
    """part, rank, context, position and act of a latent's examples, one step after the other."""
    best: dict[int, tuple[float, int, int]] = {}
    for row in range(len(acts)):
        place = int(spool.sequence[row]) * LENGTH + int(spool.position[row])
        context, act = place // EACH, float(acts[row, latent])
        kind = int(contexts.fingerprint[context])
        if act > 0 and (kind not in best or act > best[kind][0]):
            best[kind] = act, context, int(spool.position[row])
    ranked = [best[kind] for kind in sorted(best, key=lambda kind: (-best[kind][0], kind))]
    parts: list[list[tuple[float, int, int]]] = [ranked[:TOP], *([] for _ in range(INTERVALS))]
    most = max((float(act) for act in acts[:, latent]), default=0.0)
    for line in ranked[TOP:]:
        parts[INTERVALS + 1 - ceil(line[0] * INTERVALS / most)].append(line)
    for number in range(1, INTERVALS + 1):
        drawn = sorted(parts[number], key=lambda line: lot(latent, line[1]))[:PER_INTERVAL]
        parts[number] = [line for line in parts[number] if line in drawn]
    return [
        (number, rank, context, position, act)
        for number, part in enumerate(parts)
        for rank, (act, context, position) in enumerate(part)
    ]


def lot(latent: int, context: int) -> int:
    return int(mixed(mixed(np.uint64(latent)) ^ np.uint64(context)))


@pytest.mark.parametrize(("seed", "levels"), [(0, 5), (1, 60), (2, 1 << 20)])
def test_examples_are_what_they_are_of_each_latent(seed: int, levels: int) -> None:
    spool, contexts, acts = made(seed, levels)
    found = of_range(spool, contexts, acts, 0, N_LATENTS)
    for latent in range(N_LATENTS):
        mine = found.latent == latent
        lines = list(zip(*(column[mine].tolist() for column in found[1:]), strict=True))
        assert lines == stated(spool, contexts, acts, latent)
    assert {0, 3, INTERVALS - 1} <= set(found.part.tolist())


def test_examples_do_not_depend_on_the_range() -> None:
    spool, contexts, acts = made(3, 1 << 20)
    whole = of_range(spool, contexts, acts, 0, N_LATENTS)
    bounds = [0, 1, 8, 9, 25, N_LATENTS]
    parts = [of_range(spool, contexts, acts, *pair) for pair in pairwise(bounds)]
    for name, column in zip(Examples._fields, whole, strict=True):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), column)


def test_no_context_is_shown_twice_nor_beside_a_near_duplicate() -> None:
    spool, contexts, acts = made(4, 50)
    found = of_range(spool, contexts, acts, 0, N_LATENTS)
    kinds = found.latent * len(contexts) + contexts.fingerprint[found.context]
    assert len(np.unique(kinds)) == len(kinds) > 500
    # The activation shown is that of the position shown.
    row = {place: i for i, place in enumerate(zip(spool.sequence.tolist(), spool.position.tolist(), strict=True))}
    sequences = contexts.sequence[found.context].tolist()
    rows = [row[place] for place in zip(sequences, found.position.tolist(), strict=True)]
    assert np.array_equal(acts[rows, found.latent], found.act)
    # A key of the table.
    assert len(set(zip(found.latent.tolist(), found.part.tolist(), found.rank.tolist(), strict=True))) == len(found.act)


def test_latents_that_never_fire_have_none() -> None:
    spool, contexts, acts = made(5, 50)
    found = of_range(spool, contexts, acts, 0, 1)
    assert [len(column) for column in found] == [0] * 6
