"""The most telling latents of an SAE: chosen by a stated score, with their tokens and strongest contexts as text."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saefast.analysis.features import LatentStats
from saefast.analysis.token_text import Texts, same_word
from saefast.data.mapped_source import MappedSource
from saefast.data.shards import SPLITS, ShardFolder, dequantise
from saefast.models.sae import SAE

# A token belongs to a latent when at least this share of the latent's activation falls on it.
OWN_TOKEN = 0.04
# Tokens looked at per latent: no more can hold OWN_TOKEN each and still be worth listing.
MOST_TOKENS = 8
# A latent is a candidate when it fires at least so often, on at most this share of the rows.
LEAST_FIRED, MOST_DENSE = 50, 0.01
# Two latents say the same when the means of their tokens in the model's input embedding are as alike as this.
ALIKE = 0.4
BEFORE, AFTER = 14, 8

SCORE = (
    "The score is F1 · √cosine · log₂(1 + words). F1 says how well 'the token is one of these' predicts that a latent "
    "fires (precision in activation, recall in occurrences); the cosine how alike these tokens are in the model's own "
    "input embedding; words how many different words of three letters or more they are. A token counts as a latent's "
    f"own from {OWN_TOKEN:.0%} of its activation on. Passed over are latents firing on more than {MOST_DENSE:.0%} of "
    f"the tokens or less than {LEAST_FIRED} times, unless too few others are left, and those that share a token with a "
    f"better one or whose mean token is like its (cosine above {ALIKE:.1f})."
)


@dataclass
class TokenShare:
    """A token in a latent's eyes. text: as shown. share: activation on it / all activation of the latent.

    covered: occurrences of it on which the latent fires / all its occurrences.
    """

    token: int
    text: str
    share: float
    covered: float


@dataclass
class Snippet:
    """Tokens around one firing. texts: their text, spaces included; acts: the latent's activation on each.

    peak: place of the firing.
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


@dataclass
class OwnTokens:
    """Per latent, the MOST_TOKENS tokens with the most activation: ids, share, covered and own, each (L, MOST_TOKENS).

    own: which of them hold OWN_TOKEN of the latent's activation. f1: (L,), see SCORE.
    """

    ids: Tensor
    share: Tensor
    covered: Tensor
    own: Tensor
    f1: Tensor


def own_tokens(stats: LatentStats) -> OwnTokens:
    """From the table of pairs (latent, token) that `features.collect` made."""
    assert stats.pairs is not None
    assert stats.token_counts is not None
    pairs, L = stats.pairs, len(stats.sparsity.counts)
    order = pairs.sums.argsort(descending=True, stable=True)
    order = order[pairs.latents[order].argsort(stable=True)]
    latents = pairs.latents[order]
    rank = torch.arange(len(latents), device="cpu") - torch.searchsorted(latents, latents)
    first = rank < MOST_TOKENS
    place, order = (latents[first], rank[first]), order[first]
    ids = torch.zeros(L, MOST_TOKENS, dtype=torch.int64, device="cpu")
    sums, hits = (torch.zeros(L, MOST_TOKENS, dtype=torch.float64, device="cpu") for _ in range(2))
    ids[place], sums[place] = pairs.tokens[order], pairs.sums[order]
    hits[place] = pairs.counts[order].double()
    total = torch.zeros(L, dtype=torch.float64, device="cpu").index_add_(0, pairs.latents, pairs.sums)
    share = sums / total.clamp_min(1e-30)[:, None]
    seen = stats.token_counts.double()[ids].clamp_min(1)
    own = share >= OWN_TOKEN
    precision = (share * own).sum(1)
    recall = (hits * own).sum(1) / (seen * own).sum(1).clamp_min(1)
    f1 = 2 * precision * recall / (precision + recall).clamp_min(1e-30)
    return OwnTokens(ids, share, hits / seen, own, f1)


def cohesion(tokens: OwnTokens, embedding: Tensor, counts: Tensor) -> Tensor:
    """(L,) mean cosine between a latent's own tokens in the model's input embedding (V, d), weighted by activation.

    The mean token of the text is taken off first; 0 where a latent has one token or none.
    """
    vectors, weight = _vectors(tokens, embedding, counts), tokens.share * tokens.own
    apart = 1 - torch.eye(MOST_TOKENS, dtype=torch.float64, device="cpu")
    both = weight[:, :, None] * weight[:, None, :] * apart
    cosine = (vectors @ vectors.transpose(1, 2) * both).sum((1, 2)) / both.sum((1, 2)).clamp_min(1e-30)
    return cosine.clamp(0, 1)


def _vectors(tokens: OwnTokens, embedding: Tensor, counts: Tensor) -> Tensor:
    """(L, n, d) unit vectors of each latent's tokens, after the mean token of the text was taken off."""
    centre = (counts.double()[:, None] * embedding[: len(counts)].double()).sum(0) / counts.sum().clamp_min(1)
    vectors = embedding[tokens.ids].double() - centre
    return vectors / vectors.norm(dim=2, keepdim=True).clamp_min(1e-12)


def _centroids(tokens: OwnTokens, embedding: Tensor, counts: Tensor) -> Tensor:
    """(L, d) direction of the mean of each latent's own tokens, weighted by activation."""
    weight = tokens.share * tokens.own
    means = (weight[:, :, None] * _vectors(tokens, embedding, counts)).sum(1)
    return means / means.norm(dim=1, keepdim=True).clamp_min(1e-12)


def choose(stats: LatentStats, texts: Texts, n: int = 10, embedding: Tensor | None = None) -> list[tuple[int, float]]:
    """The n most telling latents and their scores, best first; see SCORE. Without an embedding the cosine counts as 1.

    Where too few latents have three tokens of their own and are neither rare nor dense, the others follow, by F1.
    """
    tokens = own_tokens(stats)
    fired, density = stats.sparsity.counts, stats.sparsity.density()
    enough = min(LEAST_FIRED, max(stats.sparsity.n_rows // 1000, 1))
    candidate = (fired >= enough) & (density <= MOST_DENSE) & tokens.own.any(1)
    many = candidate & (tokens.own.sum(1) >= 3)
    assert stats.token_counts is not None
    score = tokens.f1 if embedding is None else tokens.f1 * cohesion(tokens, embedding, stats.token_counts).sqrt()
    words = torch.ones_like(score)
    for latent in many.nonzero()[:, 0].tolist():
        words[latent] = 1 + texts.n_words(tokens.ids[latent][tokens.own[latent]].tolist())
    score = score * words.log2()
    ranked = [i for i in score.argsort(descending=True).tolist() if many[i]]
    by_f1 = tokens.f1.argsort(descending=True).tolist()
    ranked += [i for i in by_f1 if candidate[i] and not many[i]]
    ranked += [i for i in by_f1 if not candidate[i] and fired[i] and tokens.own[i].any()]
    centroids = None if embedding is None else _centroids(tokens, embedding, stats.token_counts)
    return [(latent, float(score[latent])) for latent in _different(ranked, tokens, centroids, n)]


def _different(ranked: list[int], tokens: OwnTokens, centroids: Tensor | None, n: int) -> list[int]:
    """The first n that neither share a token with one before nor, where centroids (L, d) are known, mean the same."""
    chosen: list[int] = []
    taken: set[int] = set()
    for latent in ranked:
        own = set(tokens.ids[latent][tokens.own[latent]].tolist())
        alike = centroids is not None and bool((centroids[chosen] @ centroids[latent] > ALIKE).any())
        if not alike and not own & taken:
            taken |= own
            chosen.append(latent)
        if len(chosen) == n:
            break
    return chosen


def make_table(
    sae: SAE,
    source: MappedSource,
    stats: LatentStats,
    tokenizer: Any,
    embedding: Tensor | None,
    n: int = 10,
    contexts: int = 6,
) -> FeatureTable:
    """The n most telling latents with their tokens and strongest contexts, from what `features.collect` gathered.

    Args:
        source: the harvest that the stats are of.
        embedding: (V, d) the model's input embedding, for SCORE's cosine; None leaves it out.
    """
    assert source.folder is not None
    texts, tokens = Texts(tokenizer), own_tokens(stats)
    chosen = choose(stats, texts, n, embedding)
    places = {latent: _places(stats, latent, source.folder, contexts) for latent, _ in chosen}
    acts = _acts_around(sae, source, places)
    features = []
    for latent, score in chosen:
        n_fired, strongest = int(stats.sparsity.counts[latent]), float(stats.sparsity.max_act[latent])
        snippets = [_snippet(source.folder, texts, acts, (latent, seq, pos)) for seq, pos in places[latent]]
        density, shares = n_fired / stats.sparsity.n_rows, _shares(tokens, texts, latent)
        features.append(Feature(latent, score, density, n_fired, strongest, shares, snippets))
    return FeatureTable(features, _about(sae, source, stats, len(features), embedding is not None))


def _shares(tokens: OwnTokens, texts: Texts, latent: int) -> list[TokenShare]:
    columns = (column[latent].tolist() for column in (tokens.ids, tokens.share, tokens.covered, tokens.own))
    return [
        TokenShare(token, texts.token(token), share, covered)
        for token, share, covered, own in zip(*columns, strict=True)
        if own
    ]


def _about(sae: SAE, source: MappedSource, stats: LatentStats, n: int, cosine: bool) -> str:
    score = SCORE if cosine else SCORE + " Here the cosine is left out."
    return (
        f"The {n} most telling of {sae.config.n_latents:,} latents (k = {sae.config.k}), judged on "
        f"{stats.sparsity.n_rows:,} rows of {source.source_name}, held-out ones first. A percentage is the share of a "
        f"latent's activation that falls on a token. Contexts are the strongest, with repeats left out. {score}"
    )


def _places(stats: LatentStats, latent: int, folder: ShardFolder, n: int) -> list[tuple[int, int]]:
    """(sequence, position) of up to n strong firings: each token once while there are others, no context twice."""
    seen: set[tuple[int, ...]] = set()
    by_token: dict[int, int] = {}
    kept = []
    for order, place in enumerate(p for p in stats.top.places[latent].tolist() if p >= 0):
        seq, pos = place >> 16, place & 0xFFFF
        ids, middle = folder.context(seq, pos, 4, 4)
        context, token = tuple(ids.tolist()), int(ids[middle])
        if context not in seen:
            seen.add(context)
            by_token[token] = by_token.get(token, -1) + 1
            kept.append((by_token[token], order, (seq, pos)))
    return [where for _, _, where in sorted(kept)[:n]]


Place = tuple[int, int, int]  # latent, sequence, position


@torch.no_grad()
def _acts_around(sae: SAE, source: MappedSource, places: dict[int, list[tuple[int, int]]]) -> dict[Place, float]:
    """Activations of the chosen latents all over the sequences they are shown in."""
    assert source.folder is not None
    shown: dict[int, set[int]] = {}
    for latent, where in places.items():
        for number, _ in where:
            shown.setdefault(number, set()).add(latent)
    found: dict[Place, float] = {}
    sequences = torch.tensor(sorted(shown), dtype=torch.int32, device="cpu")
    for x, seq, pos in _rows_of(source.folder, source.hook, sequences):
        acts, idx = (t.cpu() for t in sae.encode_sparse(x.to(sae.device, sae.dtype)))
        wanted = torch.isin(idx, torch.tensor(list(places), dtype=idx.dtype, device="cpu")) & (acts > 0)
        for row, column in wanted.nonzero().tolist():
            latent, sequence = int(idx[row, column]), int(seq[row])
            if latent in shown[sequence]:
                found[latent, sequence, int(pos[row])] = float(acts[row, column])
    return found


def _rows_of(folder: ShardFolder, hook: str | None, seqs: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """All rows of some sequences: x, seq, pos of each shard that has any."""
    for split in SPLITS:
        for info in folder.shards(split, hook):
            shard = folder.open(info, hook)
            rows = torch.isin(shard.seq, seqs).nonzero()[:, 0]
            if len(rows):
                x = shard.acts[rows]
                yield (x if shard.scale is None else dequantise(x, shard.scale[rows])), shard.seq[rows], shard.pos[rows]


def _snippet(folder: ShardFolder, texts: Texts, acts: dict[Place, float], where: Place) -> Snippet:
    latent, seq, pos = where
    ids, peak = folder.context(seq, pos, BEFORE, AFTER)
    values = [acts.get((latent, seq, pos - peak + i), 0.0) for i in range(len(ids))]
    pieces = texts.run(ids.tolist())
    for i in range(len(ids)):
        # A character of several tokens is shown once, with the strongest of their activations.
        if texts.continues(ids.tolist(), pieces, i):
            values[i + 1] = max(values[i : i + 2])
            peak = i + 1 if peak == i else peak
    return Snippet(pieces, values, peak)
