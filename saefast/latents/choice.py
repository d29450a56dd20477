"""Which latents of an SAE are worth showing: the tokens that are a latent's own, and the score that ranks by them.

SCORE says in words what is computed here. Memory is O(L · MOST_TOKENS): vectors of tokens are made for a few latents at
a time.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saefast.latents.statistics import Pairs

# A token belongs to a latent when at least this share of the latent's activation falls on it.
OWN_TOKEN = 0.04
# Tokens looked at per latent: no more can hold OWN_TOKEN each and still be worth listing.
MOST_TOKENS = 8
# A latent is a candidate when it fires at least so often, on at most this share of the rows.
LEAST_FIRED, MOST_DENSE = 50, 0.01
# Two latents say the same when the means of their tokens in the model's input embedding are as alike as this.
ALIKE = 0.4
# Words in a latent's title.
IN_TITLE = 5
# Numbers in the token vectors made at a time: 2 MB in float64, so that they stay in a cache.
_AT_A_TIME = 1 << 18

SCORE = (
    "The score is F1 · √cosine · log₂(1 + words). F1 says how well 'the token is one of these' predicts that a latent "
    "fires (precision in activation, recall in occurrences); the cosine how alike these tokens are in the model's own "
    "input embedding, 1 for a single one; words how many different words of three letters or more they are. A token "
    f"counts as a latent's own from {OWN_TOKEN:.0%} of its activation on."
)
TELLING = (
    f"The most telling latents are those with the highest score among those with three tokens of their own; then those "
    f"with fewer. Passed over are latents firing on more than {MOST_DENSE:.0%} of the tokens or less than "
    f"{LEAST_FIRED} times, unless too few others are left, and those that share a token with a better one or whose "
    f"mean token is like its (cosine above {ALIKE:.1f})."
)


@dataclass
class OwnTokens:
    """Per latent, the MOST_TOKENS tokens with the most activation: ids, share, covered and own, each (L, MOST_TOKENS).

    Attributes:
        ids: int64.
        share: float64 activation on the token / all activation of the latent; 0 where it has no such token.
        covered: float64 occurrences of the token on which the latent fires / all its occurrences.
        own: bool, whether the token holds OWN_TOKEN of the latent's activation.
        f1: (L,) float64, see SCORE.
    """

    ids: Tensor
    share: Tensor
    covered: Tensor
    own: Tensor
    f1: Tensor

    @classmethod
    def joined(cls, parts: Iterable["OwnTokens"]) -> "OwnTokens":
        """Those of ranges of latents, one after the other."""
        columns = zip(*((p.ids, p.share, p.covered, p.own, p.f1) for p in parts), strict=True)
        return cls(*(torch.cat(column) for column in columns))

    def of(self, latent: int) -> list[int]:
        """The ids of a latent's own tokens, the one with the most activation first."""
        return list(self.ids[latent][self.own[latent]].tolist())


def own_tokens(pairs: Pairs, total: np.ndarray, token_counts: np.ndarray) -> OwnTokens:
    """Of a range of n latents.

    Args:
        pairs: what they do on single tokens.
        total: (n,) activation of each on all tokens.
        token_counts: (V,) occurrences of each token.
    """
    n, latents = len(total), torch.from_numpy(pairs.latent)
    chosen, rank = strongest(torch.from_numpy(pairs.act), latents, MOST_TOKENS)
    place = latents[chosen], rank
    ids = torch.zeros(n, MOST_TOKENS, dtype=torch.int64, device="cpu")
    sums, hits = (torch.zeros(n, MOST_TOKENS, dtype=torch.float64, device="cpu") for _ in range(2))
    ids[place], sums[place] = torch.from_numpy(pairs.token)[chosen], torch.from_numpy(pairs.act)[chosen]
    hits[place] = torch.from_numpy(pairs.n)[chosen].double()
    share = sums / torch.from_numpy(total).clamp_min(1e-30)[:, None]
    seen = torch.from_numpy(token_counts)[ids].double().clamp_min(1)
    own = share >= OWN_TOKEN
    precision = (share * own).sum(1)
    recall = (hits * own).sum(1) / (seen * own).sum(1).clamp_min(1)
    f1 = 2 * precision * recall / (precision + recall).clamp_min(1e-30)
    return OwnTokens(ids, share, hits / seen, own, f1)


def strongest(values: Tensor, latents: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest values of every latent.

    Args:
        values, latents: (entries,) a value and the latent that it belongs to.

    Returns:
        Positions of the entries chosen, ordered by latent and then by value, descending; equal values keep their
        order. And their ranks within the latent, 0 to n - 1. Both int64.
    """
    order = values.argsort(descending=True, stable=True)
    order = order[latents[order].argsort(stable=True)]
    grouped = latents[order]
    rank = torch.arange(len(order), dtype=torch.int64, device=order.device) - torch.searchsorted(grouped, grouped)
    kept = rank < n
    return order[kept], rank[kept]


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

        1 where a latent has one token, 0 where it has none.
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
        alone = tokens.own[latents].sum(1) == 1
        return torch.where(alone, 1, found.clamp(0, 1))

    def mean(self, tokens: OwnTokens, latent: int) -> Tensor:
        """(d,) float64 direction of the mean of a latent's own tokens, weighted by activation; of unit length."""
        vectors, weight = self.vectors(tokens.ids[latent][None])[0], tokens.share[latent] * tokens.own[latent]
        mean = weight @ torch.nn.functional.normalize(vectors, dim=1)
        return torch.nn.functional.normalize(mean, dim=0)


def different_words(texts: Iterable[str]) -> list[str]:
    """Texts of tokens, the first of each word: forms of one word are one."""
    words: dict[str, str] = {}
    for text in texts:
        words.setdefault(_form(text), text)
    return list(words.values())


def _form(text: str) -> str:
    """What is equal of forms of one word, in the sense of `same_word`."""
    bare = text.strip().lower().lstrip("-")
    return bare[:3] if len(bare) >= 3 else bare


class Described(NamedTuple):
    """What own tokens say of all latents: scores (L,) float64, see SCORE, and titles, one token of each word."""

    score: Tensor
    titles: list[str]


def described(tokens: OwnTokens, texts: Mapping[int, str], directions: Directions | None) -> Described:
    """Args: texts of the own tokens; directions where the model's embedding is known: else the cosine counts as 1."""
    n_words, titles = [], []
    for ids, own in zip(tokens.ids.tolist(), tokens.own.tolist(), strict=True):
        shown = [texts[token] for token, mine in zip(ids, own, strict=True) if mine]
        titles.append(" · ".join(different_words(shown)[:IN_TITLE]))
        n_words.append(len(different_words([text for text in shown if sum(map(str.isalpha, text)) >= 3])))
    score = tokens.f1 * (1 + torch.tensor(n_words, dtype=torch.float64, device="cpu")).log2()
    if directions is not None:
        score = score * directions.cohesion(tokens, torch.arange(len(score), dtype=torch.int64, device="cpu")).sqrt()
    return Described(score, titles)


def telling(
    score: Tensor, tokens: OwnTokens, n_fired: Tensor, n_rows: int, directions: Directions | None, n: int
) -> list[int]:
    """The n most telling latents, best first; see TELLING.

    Where too few have three tokens of their own and are neither rare nor dense, the others follow, by F1.

    Args:
        score: (L,) as `described` has it. n_fired: (L,) rows that each latent fires on, of n_rows.
    """
    enough = min(LEAST_FIRED, max(n_rows // 1000, 1))
    candidate = (n_fired >= enough) & (n_fired <= MOST_DENSE * n_rows) & tokens.own.any(1)
    many = candidate & (tokens.own.sum(1) >= 3)
    others = [candidate & ~many, ~candidate & (n_fired > 0) & tokens.own.any(1)]
    ranked = [_best_first(score, many), *(_best_first(tokens.f1, group) for group in others)]
    return _different(torch.cat(ranked), tokens, directions, n)


def _best_first(score: Tensor, mask: Tensor) -> Tensor:
    """The latents of a mask (L,), by score (L,), the best first."""
    order = score.argsort(descending=True, stable=True)
    return order[mask[order]]


def _different(ranked: Tensor, tokens: OwnTokens, directions: Directions | None, n: int) -> list[int]:
    """The first n that neither share a token with one before nor, where directions are known, mean the same."""
    chosen: list[int] = []
    taken: set[int] = set()
    means = torch.zeros(n, 0 if directions is None else len(directions.centre), dtype=torch.float64, device="cpu")
    columns = (ranked.tolist(), tokens.ids[ranked].tolist(), tokens.own[ranked].tolist())
    for latent, ids, own in zip(*columns, strict=True):
        mine = {token for token, its_own in zip(ids, own, strict=True) if its_own}
        if mine & taken:
            continue
        if directions is not None:
            mean = directions.mean(tokens, latent)
            if bool((means[: len(chosen)] @ mean > ALIKE).any()):
                continue
            means[len(chosen)] = mean
        taken |= mine
        chosen.append(latent)
        if len(chosen) == n:
            break
    return chosen
