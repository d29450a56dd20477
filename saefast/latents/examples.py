"""Examples of what latents fire on: their strongest contexts, and some of each interval of activation."""

from typing import NamedTuple

import numpy as np
import torch

from saefast.latents.contexts import Contexts
from saefast.latents.near_duplicates import mixed
from saefast.latents.schema import INTERVALS, PER_INTERVAL, TOP
from saefast.latents.spool import Entries, Spool


class Examples(NamedTuple):
    """Rows of the table `examples`, ordered by latent, part and rank; each column (rows,)."""

    latent: np.ndarray
    """int64"""
    part: np.ndarray
    """int64: 0 for the strongest, then 1 to INTERVALS, the highest activations first"""
    rank: np.ndarray
    """int64: in the part, by activation descending"""
    context: np.ndarray
    """int64"""
    position: np.ndarray
    """int64: of the strongest firing in the context, in its sequence"""
    act: np.ndarray
    """float32"""


def examples(entries: Entries, first_latent: int, spool: Spool, contexts: Contexts, max_act: np.ndarray) -> Examples:
    """The examples of a range of latents.

    Of contexts that are near-duplicates the one in which a latent fires most stands for all. The TOP strongest are
    shown. The others are in INTERVALS intervals of equal width, part p holding the activations in
    (max · (1 - p / INTERVALS), max · (1 - (p - 1) / INTERVALS)], and PER_INTERVAL of each are drawn: those with the
    least hash of latent and context, which is the same in any range and batch. So no context is shown twice, nor beside
    a near-duplicate.

    Args:
        entries: of the latents from first_latent on.
        max_act: (latents of the range,) the largest activation of each.
    """
    entry, latent = _strongest_of_each(entries, spool, contexts)
    act = entries.acts[entry]
    order = _ordered((latent << 32) - act.view(np.int32))
    entry, latent, act = entry[order], latent[order], act[order]
    top = _places(latent) < TOP
    part = np.where(top, 0, _intervals(act, np.asarray(max_act, np.float64)[latent]))
    context = contexts.of(spool.sequence[entries.row[entry]], spool.position[entries.row[entry]])
    shown = np.flatnonzero(top | _drawn(latent + first_latent, part, context))
    latent, part, row = latent[shown] + first_latent, part[shown], entries.row[entry[shown]]
    rank = _places(latent * (INTERVALS + 1) + part)
    return Examples(latent, part, rank, context[shown], spool.position[row].astype(np.int64), act[shown])


def _strongest_of_each(entries: Entries, spool: Spool, contexts: Contexts) -> tuple[np.ndarray, np.ndarray]:
    """For each latent and fingerprint of contexts the entry that is strongest, the first of equals; and its latent.

    Both int64, ordered by latent and fingerprint.
    """
    fingerprints = contexts.fingerprint[contexts.of(spool.sequence, spool.position)]
    key = entries.latent() * (len(contexts) + 1) + fingerprints[entries.row]
    order = _ordered(key)
    key, acts = key[order], entries.acts[order]
    starts = _starts(key)
    if not len(starts):
        return starts, starts
    counts = np.diff(np.r_[starts, len(key)])
    is_best = np.flatnonzero(acts == np.repeat(np.maximum.reduceat(acts, starts), counts))
    best = is_best[_starts(key[is_best])]
    return order[best], key[best] // (len(contexts) + 1)


def _ordered(key: np.ndarray) -> np.ndarray:
    """int64 places of keys (n,) int64 in ascending order, equal ones as they come."""
    return np.asarray(torch.from_numpy(key).sort(stable=True).indices.numpy())


def _starts(key: np.ndarray) -> np.ndarray:
    """Where each group of equal keys begins; keys (n,) are such that equal ones lie together."""
    return np.flatnonzero(np.r_[True, key[1:] != key[:-1]][: len(key)])


def _places(key: np.ndarray) -> np.ndarray:
    """The place of each in its group of equal keys, from 0."""
    starts = _starts(key)
    return np.arange(len(key)) - np.repeat(starts, np.diff(np.r_[starts, len(key)]))


def _intervals(act: np.ndarray, most: np.ndarray) -> np.ndarray:
    """int64: 1 for activations in the highest interval of those from 0 to the most, INTERVALS for the lowest."""
    place = np.ceil(act.astype(np.float64) * INTERVALS / most)
    return np.clip(INTERVALS + 1 - place, 1, INTERVALS).astype(np.int64)


def _drawn(latent: np.ndarray, part: np.ndarray, context: np.ndarray) -> np.ndarray:
    """(n,) bool: which of those in parts above 0 are drawn."""
    drawn = np.zeros(len(latent), bool)
    rest = np.flatnonzero(part)
    latent, part, context = latent[rest], part[rest], context[rest]
    lot = mixed(mixed(latent.astype(np.uint64)) ^ context.astype(np.uint64))
    # 40 bits of it, which leaves room for a range of a million latents; equal ones are drawn by activation.
    group = (latent - latent[:1]) * INTERVALS + part
    order = _ordered((group << 40) + (lot >> np.uint64(24)).astype(np.int64))
    drawn[rest[order[_places(group[order]) < PER_INTERVAL]]] = True
    return drawn
