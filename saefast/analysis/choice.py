"""Which latents of an SAE are worth showing: the tokens that are a latent's own, and the score that ranks by them.

SCORE says in words what is computed here. Memory is O(L · MOST_TOKENS): vectors of tokens are made for a few latents at
a time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from saefast.analysis.features import LatentStats, strongest
from saefast.harvest.token_text import Texts

# A token belongs to a latent when at least this share of the latent's activation falls on it.
OWN_TOKEN = 0.04
# Tokens looked at per latent: no more can hold OWN_TOKEN each and still be worth listing.
MOST_TOKENS = 8
# A latent is a candidate when it fires at least so often, on at most this share of the rows.
LEAST_FIRED, MOST_DENSE = 50, 0.01
# Two latents say the same when the means of their tokens in the model's input embedding are as alike as this.
ALIKE = 0.4
# Numbers in the token vectors made at a time: 2 MB in float64, so that they stay in a cache.
_AT_A_TIME = 1 << 18

SCORE = (
    "The score is F1 · √cosine · log₂(1 + words). F1 says how well 'the token is one of these' predicts that a latent "
    "fires (precision in activation, recall in occurrences); the cosine how alike these tokens are in the model's own "
    "input embedding; words how many different words of three letters or more they are. A token counts as a latent's "
    f"own from {OWN_TOKEN:.0%} of its activation on. Passed over are latents firing on more than {MOST_DENSE:.0%} of "
    f"the tokens or less than {LEAST_FIRED} times, unless too few others are left, and those that share a token with a "
    f"better one or whose mean token is like its (cosine above {ALIKE:.1f})."
)


@dataclass
class OwnTokens:
    """Per latent, the MOST_TOKENS tokens with the most activation: ids, share, covered and own, each (L, MOST_TOKENS).

    Attributes:
        ids: int64.
        share: float64 activation on the token / all activation of the latent.
        covered: float64 occurrences of the token on which the latent fires / all its occurrences.
        own: bool, whether the token holds OWN_TOKEN of the latent's activation.
        f1: (L,) float64, see SCORE.
    """

    ids: Tensor
    share: Tensor
    covered: Tensor
    own: Tensor
    f1: Tensor

    def of(self, latent: int) -> list[int]:
        """The ids of a latent's own tokens, the one with the most activation first."""
        return list(self.ids[latent][self.own[latent]].tolist())


def own_tokens(stats: LatentStats) -> OwnTokens:
    """From the table of pairs (latent, token) that `features.collect` made."""
    assert stats.pairs is not None
    assert stats.token_counts is not None
    pairs, L = stats.pairs, len(stats.sparsity.counts)
    chosen, rank = strongest(pairs.sums, pairs.latents, MOST_TOKENS)
    place = pairs.latents[chosen], rank
    ids = torch.zeros(L, MOST_TOKENS, dtype=torch.int64, device="cpu")
    sums, hits = (torch.zeros(L, MOST_TOKENS, dtype=torch.float64, device="cpu") for _ in range(2))
    ids[place], sums[place] = pairs.tokens[chosen], pairs.sums[chosen]
    hits[place] = pairs.counts[chosen].double()
    share = sums / pairs.totals.clamp_min(1e-30)[:, None]
    seen = stats.token_counts[ids].double().clamp_min(1)
    own = share >= OWN_TOKEN
    precision = (share * own).sum(1)
    recall = (hits * own).sum(1) / (seen * own).sum(1).clamp_min(1)
    f1 = 2 * precision * recall / (precision + recall).clamp_min(1e-30)
    return OwnTokens(ids, share, hits / seen, own, f1)


class Directions:
    """What tokens mean to a model: their directions in its input embedding, seen from the mean token of the text.

    Args:
        embedding: (V, d) the model's input embedding.
        counts: (V',) int64 occurrences of each token in the text, V' <= V.
    """

    def __init__(self, embedding: Tensor, counts: Tensor) -> None:
        self.embedding = embedding.detach()
        self.at_a_time = max(1, _AT_A_TIME // (MOST_TOKENS * embedding.shape[1]))
        centre = torch.zeros(embedding.shape[1], dtype=torch.float64, device=embedding.device)
        step = self.at_a_time * MOST_TOKENS
        for share, vectors in zip(counts.split(step), self.embedding[: len(counts)].split(step), strict=True):
            centre += share.double() @ vectors.double()
        self.centre = centre / counts.sum().clamp_min(1)

    def vectors(self, ids: Tensor) -> Tensor:
        """Token ids (n, m) -> their vectors (n, m, d) float64, from the mean token on."""
        return self.embedding[ids].double().sub_(self.centre)

    def cohesion(self, tokens: OwnTokens, latents: Tensor) -> Tensor:
        """(n,) float64 mean cosine between the own tokens of each of some latents (n,), weighted by activation.

        0 where a latent has one token or none.
        """
        apart = 1 - torch.eye(MOST_TOKENS, dtype=torch.float64, device="cpu")
        found = torch.zeros(len(latents), dtype=torch.float64, device="cpu")
        for part, out in zip(latents.split(self.at_a_time), found.split(self.at_a_time), strict=True):
            weight = tokens.share[part] * tokens.own[part]
            both = weight[:, :, None] * weight[:, None, :] * apart
            vectors = self.vectors(tokens.ids[part])
            products = vectors @ vectors.transpose(1, 2)
            norms = products.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-12)
            cosines = products / norms[:, :, None] / norms[:, None, :]
            out.copy_((cosines * both).sum((1, 2)) / both.sum((1, 2)).clamp_min(1e-30))
        return found.clamp(0, 1)

    def mean(self, tokens: OwnTokens, latent: int) -> Tensor:
        """(d,) float64 direction of the mean of a latent's own tokens, weighted by activation; of unit length."""
        vectors, weight = self.vectors(tokens.ids[latent][None])[0], tokens.share[latent] * tokens.own[latent]
        mean = weight @ torch.nn.functional.normalize(vectors, dim=1)
        return torch.nn.functional.normalize(mean, dim=0)


def choose(
    stats: LatentStats, tokens: OwnTokens, texts: Texts, n: int = 10, embedding: Tensor | None = None
) -> list[tuple[int, float]]:
    """The n most telling latents and their scores, best first; see SCORE. Without an embedding the cosine counts as 1.

    Where too few latents have three tokens of their own and are neither rare nor dense, the others follow, by F1.
    """
    assert stats.token_counts is not None
    directions = None if embedding is None else Directions(embedding, stats.token_counts)
    fired, density = stats.sparsity.counts, stats.sparsity.density()
    enough = min(LEAST_FIRED, max(stats.sparsity.n_rows // 1000, 1))
    candidate = (fired >= enough) & (density <= MOST_DENSE) & tokens.own.any(1)
    many = candidate & (tokens.own.sum(1) >= 3)
    score = torch.zeros_like(tokens.f1)
    score[many] = _score(tokens, many.nonzero()[:, 0], texts, directions)
    others = [candidate & ~many, ~candidate & (fired > 0) & tokens.own.any(1)]
    ranked = [_best_first(score, many), *(_best_first(tokens.f1, group) for group in others)]
    return [(latent, float(score[latent])) for latent in _different(torch.cat(ranked), tokens, directions, n)]


def _score(tokens: OwnTokens, latents: Tensor, texts: Texts, directions: Directions | None) -> Tensor:
    """(n,) float64 SCORE of some latents (n,)."""
    lines = zip(tokens.ids[latents].tolist(), tokens.own[latents].tolist(), strict=True)
    words = [texts.n_words([token for token, own in zip(*line, strict=True) if own]) for line in lines]
    score = tokens.f1[latents] * (1 + torch.tensor(words, dtype=torch.float64, device="cpu")).log2()
    return score if directions is None else score * directions.cohesion(tokens, latents).sqrt()


def _best_first(score: Tensor, mask: Tensor) -> Tensor:
    """The latents of a mask (L,), by score (L,), the best first."""
    order = score.argsort(descending=True, stable=True)
    return order[mask[order]]


def _different(ranked: Tensor, tokens: OwnTokens, directions: Directions | None, n: int) -> list[int]:
    """The first n that neither share a token with one before nor, where directions are known, mean the same."""
    chosen: list[int] = []
    taken: set[int] = set()
    means: list[Tensor] = []
    for latent in ranked.tolist():
        own = set(tokens.of(latent))
        if own & taken:
            continue
        if directions is not None:
            mean = directions.mean(tokens, latent)
            if any(float(mean @ other) > ALIKE for other in means):
                continue
            means.append(mean)
        taken |= own
        chosen.append(latent)
        if len(chosen) == n:
            break
    return chosen
