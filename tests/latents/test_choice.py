"""Tokens that are a latent's own, and the choice of telling latents, against plain statements of both."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from allocations import Allocations
from spooled import spool_of
from torch import Tensor

from saefast.harvest.token_text import same_word
from saefast.latents.choice import MOST_TOKENS, Directions, OwnTokens, described, different_words, own_tokens, telling
from saefast.latents.spool import Spool
from saefast.latents.statistics import moments, pairs

L, V = 30, 17


class Planted(NamedTuple):
    """A code and the tokens of its rows, with what is told of them."""

    spool: Spool
    counts: np.ndarray
    tokens: OwnTokens

    def choose(self, n: int = 10, embedding: Tensor | None = None) -> list[int]:
        directions = None if embedding is None else Directions(embedding, torch.from_numpy(self.counts))
        score = described(self.tokens, Different(), directions).score
        n_fired = torch.from_numpy(self.spool.n_fired)
        return telling(score, self.tokens, n_fired, self.spool.n_rows, directions, n)


class Different(dict[int, str]):
    """Texts of tokens that are all different words."""

    def __missing__(self, token: int) -> str:
        return "".join(chr(ord("a") + int(digit)) for digit in f"{token:05d}"[::-1])


def told(spool: Spool, row_tokens: np.ndarray, at_a_time: int = 10**9) -> Planted:
    counts, parts = np.bincount(row_tokens), []
    for start, stop in spool.ranges(at_a_time):
        entries = spool.by_latent(start, stop)
        parts.append(own_tokens(pairs(entries, row_tokens), moments(entries).total, counts))
    return Planted(spool, counts, OwnTokens.joined(parts))


def planted(words: dict[int, list[int]], n: int = 4000, **more: Any) -> Planted:
    """A code in which latent l fires on just the tokens words[l], strongest on the first; token 0 has none."""
    tokens = torch.randint(0, V, (n,))
    acts, idx = torch.zeros(n, 2), torch.tensor([[0, 1]]).repeat(n, 1)
    for latent, own in words.items():
        for strength, token in enumerate(reversed(own), start=2):
            acts[tokens == token, 0] = float(strength) + 0.01 * latent
            idx[tokens == token, 0] = latent
    return told(spool_of(acts, idx, L), tokens.numpy(), **more)


@pytest.mark.parametrize("at_a_time", [10**9, 1])  # all latents in one range, and one in each
def test_own_tokens_and_f1_of_a_planted_latent(at_a_time: int) -> None:
    tokens = planted({5: [3, 4, 7], 9: [11]}, at_a_time=at_a_time).tokens
    assert tokens.of(5) == [3, 4, 7]  # the strongest first
    assert tokens.of(9) == [11]
    assert tokens.f1[5] == pytest.approx(1)
    assert tokens.covered[5][:3].tolist() == pytest.approx([1, 1, 1])
    assert tokens.share[5].sum() == pytest.approx(1)
    assert not tokens.own[6].any()


def test_f1_weighs_what_a_latent_fires_on_besides() -> None:
    """Fires on a third of the occurrences of token 3, and with a fifth of its activation on tokens below 4 % each."""
    row_tokens = np.concatenate([np.full(300, 3), 100 + np.arange(100)])
    acts = torch.cat([torch.full((100, 1), 4.0), torch.zeros(200, 1), torch.ones(100, 1)])
    found = told(spool_of(acts, torch.full((400, 1), 7), L), row_tokens).tokens
    assert found.of(7) == [3]
    assert found.share[7, 0] == pytest.approx(0.8)
    assert found.covered[7, 0] == pytest.approx(1 / 3)
    assert found.f1[7] == pytest.approx(2 * 0.8 / 3 / (0.8 + 1 / 3))


def test_every_latent_has_a_score_and_a_title() -> None:
    found = planted({5: [3, 4, 7], 9: [11], 12: [13, 14]})
    texts = {3: "run", 4: "running", 7: "jump", 11: "lone", 13: "of", 14: "to"} | dict.fromkeys(range(3), "none")
    plain = described(found.tokens, texts, None)
    assert plain.titles[5] == "run · jump"
    assert plain.titles[9] == "lone"
    assert plain.titles[6] == ""
    # F1 is 1 of each: one word or two of three letters, or none.
    assert plain.score[[5, 9, 12, 6]].tolist() == pytest.approx([np.log2(3), 1, 0, 0])
    directions = Directions(torch.randn(V, 6), torch.from_numpy(found.counts))
    cosines = directions.cohesion(found.tokens, torch.arange(L))
    assert cosines[9] == 1  # of a single token
    scored = described(found.tokens, texts, directions)
    torch.testing.assert_close(scored.score, plain.score * cosines.sqrt())


def test_forms_of_one_word_are_one() -> None:
    texts = ["", " ", "a", "ab", "abc", "Abcd", "-abcx", "--abd", " Ab", "aB c", "-", "abd", "ﬃ"]
    for one in texts:
        for other in texts:
            assert (len(different_words([one, other])) == 1) == same_word(one, other), (one, other)
    assert different_words(["raise", "Raised", "-raise", "train", "a", "b", "a"]) == ["raise", "train", "a", "b"]


def test_the_choice_prefers_families_and_takes_no_token_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saefast.latents.choice.MOST_DENSE", 0.4)
    found = planted({5: [3, 4, 7], 9: [11], 12: [13, 14, 15, 16], 3: [8, 9]})
    chosen = found.choose(n=10)
    assert chosen[:2] == [12, 5]
    assert set(chosen) == {12, 5, 9, 3}
    embedding = torch.eye(V)
    embedding[[3, 4, 7]] = torch.tensor([[1.0] * V, [1.0] * V, [1.1] * V])
    # Tokens that are alike to the model come before more tokens that are not.
    assert found.choose(n=1, embedding=embedding) == [5]


def test_two_latents_of_one_token_are_not_both_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saefast.latents.choice.MOST_DENSE", 0.6)
    row_tokens = np.tile(np.arange(8), 500)
    idx = torch.from_numpy(np.stack([2 + row_tokens // 4, 10 + row_tokens // 2], 1))
    acts = torch.ones(4000, 2)
    acts[:, 1] = 0.5
    found = told(spool_of(acts, idx, L), row_tokens).choose(n=10)
    assert found == [2, 3]


def plain_vectors(tokens: OwnTokens, embedding: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """All vectors (L, 8, V) and weights (L, 8) at once."""
    centre = (counts.double() @ embedding.double()) / counts.sum()
    vectors = torch.nn.functional.normalize(embedding[tokens.ids].double() - centre, dim=2)
    return vectors, tokens.share * tokens.own


@pytest.mark.parametrize("at_a_time", [1, 7, 1000])
def test_cosines_made_in_parts_are_those_of_all_vectors_at_once(
    at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = planted({5: [3, 4, 7], 9: [11], 12: [13, 14, 15, 16], 3: [8, 9]})
    tokens, counts, embedding = given.tokens, torch.from_numpy(given.counts), torch.randn(V, 6)
    monkeypatch.setattr("saefast.latents.choice._AT_A_TIME", at_a_time * MOST_TOKENS * 6)
    directions = Directions(embedding, counts)
    vectors, weight = plain_vectors(tokens, embedding, counts)
    found = directions.cohesion(tokens, torch.arange(L))
    for latent in range(L):
        top = bottom = 0.0
        for i in range(MOST_TOKENS):
            for j in set(range(MOST_TOKENS)) - {i}:
                both = float(weight[latent, i] * weight[latent, j])
                top, bottom = top + both * float(vectors[latent, i] @ vectors[latent, j]), bottom + both
        alone = float(len(tokens.of(latent)) == 1)
        assert float(found[latent]) == pytest.approx(min(max(top / bottom, 0), 1) if bottom else alone, abs=1e-12)
        mean = (weight[latent] @ vectors[latent]) / (weight[latent] @ vectors[latent]).norm().clamp_min(1e-12)
        torch.testing.assert_close(directions.mean(tokens, latent), mean)
    assert torch.equal(directions.cohesion(tokens, torch.tensor([12, 3])), found[[12, 3]])


def test_latents_whose_tokens_mean_the_same_are_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saefast.latents.choice.MOST_DENSE", 0.4)
    found = planted({5: [3, 4, 7], 12: [13, 14, 15], 3: [8, 9, 10]})
    embedding = torch.eye(V)
    embedding[[3, 4, 7, 13, 14, 15]] += 3 * torch.eye(V)[1]
    shown = found.choose(n=10, embedding=embedding)
    assert len({5, 12} & set(shown)) == 1
    assert 3 in shown


FIRED, WIDTH = 8, 768


def peak(n_latents: int, vocabulary: int = 4096, n_rows: int = 1024) -> int:
    """The most bytes of tensors held while latents are described and chosen. Each latent fires FIRED times."""
    K = n_latents * FIRED // n_rows
    embedding, row_tokens = torch.randn(vocabulary, WIDTH), torch.randint(0, vocabulary, (n_rows,)).numpy()
    acts, idx = torch.rand(n_rows, K) + 0.5, (torch.arange(n_rows * K) % n_latents).view(n_rows, K)
    spool = spool_of(acts, idx, n_latents)
    with Allocations(embedding, acts, idx) as made:
        found = told(spool, row_tokens, at_a_time=1 << 17)
        chosen = found.choose(50, embedding)
    assert len(chosen) == 50
    return made.peak


@pytest.mark.slow
def test_at_full_size_memory_is_that_of_what_is_kept_per_latent() -> None:
    """At 131,072 latents of width 768 the vectors of all tokens, (L, 8, 768) in float64, would be 6.4 GB.

    Counted in numbers of 8 bytes that live at a time. Of a range of 2^17 entries, at most 12 an entry. Of each latent,
    4 for every token looked at (OwnTokens, joined from ranges: twice), 8 for scores, masks and orders. And the vectors
    of the few latents that are looked at together.
    """
    L = 131072
    assert peak(L) <= 8 * ((1 << 17) * 12 + L * (2 * 4 * MOST_TOKENS + 8)) + 4 * 2**20
