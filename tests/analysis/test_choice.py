"""Tokens that are a latent's own, and the choice of telling latents, against plain statements of both."""

import pytest
import torch
from allocations import Allocations
from torch import Tensor

from saefast.analysis.choice import MOST_TOKENS, Directions, OwnTokens, choose, own_tokens
from saefast.analysis.features import LatentStats, PairSums, TopExamples
from saefast.metrics.streaming import Sparsity

L, V = 30, 17


def planted(words: dict[int, list[int]], n: int = 4000) -> LatentStats:
    """A code in which latent l fires on just the tokens words[l], strongest on the first; token 0 has none."""
    tokens = torch.randint(0, V, (n,))
    acts, idx = torch.zeros(n, 2), torch.tensor([[0, 1]]).repeat(n, 1)
    for latent, own in words.items():
        for strength, token in enumerate(reversed(own), start=2):
            acts[tokens == token, 0] = float(strength) + 0.01 * latent
            idx[tokens == token, 0] = latent
    stats = LatentStats(Sparsity(L), TopExamples(L, 8), PairSums(L, V), torch.bincount(tokens, minlength=V))
    stats.sparsity.update(acts, idx.int())
    stats.top.update(acts, idx.int(), torch.arange(n))
    stats.pairs.update(acts, idx.int(), tokens)
    stats.pairs.close()
    return stats


def test_own_tokens_and_f1_of_a_planted_latent() -> None:
    tokens = own_tokens(planted({5: [3, 4, 7], 9: [11]}))
    assert set(tokens.ids[5][tokens.own[5]].tolist()) == {3, 4, 7}
    assert tokens.ids[5, 0] == 3  # the strongest first
    assert tokens.ids[9][tokens.own[9]].tolist() == [11]
    assert tokens.f1[5] == pytest.approx(1)
    assert tokens.covered[5][:3].tolist() == pytest.approx([1, 1, 1])
    assert tokens.share[5].sum() == pytest.approx(1)
    assert not tokens.own[6].any()


class Words:
    """Token 2i and 2i + 1 are two words; stands in for Texts."""

    def n_words(self, tokens: list[int]) -> int:
        return len(tokens)


def test_the_choice_prefers_families_and_takes_no_token_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saefast.analysis.choice.MOST_DENSE", 0.4)
    stats = planted({5: [3, 4, 7], 9: [11], 12: [13, 14, 15, 16], 3: [8, 9]})
    chosen = choose(stats, own_tokens(stats), Words(), n=10)  # type: ignore[arg-type]
    assert [latent for latent, _ in chosen][:2] == [12, 5]
    assert {latent for latent, _ in chosen} == {12, 5, 9, 3}
    embedding = torch.eye(V)
    embedding[[3, 4, 7]] = torch.tensor([[1.0] * V, [1.0] * V, [1.1] * V])
    # Tokens that are alike to the model come before more tokens that are not.
    assert choose(stats, own_tokens(stats), Words(), n=1, embedding=embedding)[0][0] == 5  # type: ignore[arg-type]


def plain_vectors(tokens: OwnTokens, embedding: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """All vectors (L, 8, V) and weights (L, 8) at once."""
    centre = (counts.double() @ embedding.double()) / counts.sum()
    vectors = torch.nn.functional.normalize(embedding[tokens.ids].double() - centre, dim=2)
    return vectors, tokens.share * tokens.own


@pytest.mark.parametrize("at_a_time", [1, 7, 1000])
def test_cosines_made_in_parts_are_those_of_all_vectors_at_once(
    at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = planted({5: [3, 4, 7], 9: [11], 12: [13, 14, 15, 16], 3: [8, 9]})
    tokens, embedding = own_tokens(stats), torch.randn(V, 6)
    assert stats.token_counts is not None
    monkeypatch.setattr("saefast.analysis.choice._AT_A_TIME", at_a_time * MOST_TOKENS * 6)
    directions = Directions(embedding, stats.token_counts)
    vectors, weight = plain_vectors(tokens, embedding, stats.token_counts)
    found = directions.cohesion(tokens, torch.arange(L))
    for latent in range(L):
        top = bottom = 0.0
        for i in range(MOST_TOKENS):
            for j in set(range(MOST_TOKENS)) - {i}:
                both = float(weight[latent, i] * weight[latent, j])
                top, bottom = top + both * float(vectors[latent, i] @ vectors[latent, j]), bottom + both
        assert float(found[latent]) == pytest.approx(min(max(top / bottom, 0), 1) if bottom else 0, abs=1e-12)
        mean = (weight[latent] @ vectors[latent]) / (weight[latent] @ vectors[latent]).norm().clamp_min(1e-12)
        torch.testing.assert_close(directions.mean(tokens, latent), mean)
    assert torch.equal(directions.cohesion(tokens, torch.tensor([12, 3])), found[[12, 3]])


def test_latents_whose_tokens_mean_the_same_are_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saefast.analysis.choice.MOST_DENSE", 0.4)
    stats = planted({5: [3, 4, 7], 12: [13, 14, 15], 3: [8, 9, 10]})
    embedding = torch.eye(V)
    embedding[[3, 4, 7, 13, 14, 15]] += 3 * torch.eye(V)[1]
    chosen = choose(stats, own_tokens(stats), Words(), n=10, embedding=embedding)  # type: ignore[arg-type]
    shown = [latent for latent, _ in chosen]
    assert len({5, 12} & set(shown)) == 1
    assert 3 in shown


FIRED, CONTEXTS, WIDTH = 8, 16, 768


def peaks(n_latents: int, vocabulary: int = 4096, n_rows: int = 1024) -> tuple[int, int]:
    """The most bytes held while a batch is taken in, and while latents are chosen. Each latent fires FIRED times."""
    K = n_latents * FIRED // n_rows
    embedding, tokens = torch.randn(vocabulary, WIDTH), torch.randint(0, vocabulary, (n_rows,))
    acts, idx = torch.rand(n_rows, K) + 0.5, (torch.arange(n_rows * K) % n_latents).view(n_rows, K).int()
    with Allocations(embedding, tokens, acts, idx) as made:
        stats = LatentStats(Sparsity(n_latents), TopExamples(n_latents, CONTEXTS), PairSums(n_latents, vocabulary))
        stats.token_counts = torch.bincount(tokens, minlength=vocabulary)
        stats.sparsity.update(acts, idx)
        stats.top.update(acts, idx, torch.arange(n_rows))
        assert stats.pairs is not None
        stats.pairs.update(acts, idx, tokens)
        stats.pairs.close()
        taking_in, made.peak = made.peak, made.held
        chosen = choose(stats, own_tokens(stats), Words(), 10, embedding)  # type: ignore[arg-type]
    assert len(chosen) == 10
    assert all(score > 0 for _, score in chosen)
    return taking_in, made.peak


@pytest.mark.slow
def test_at_full_size_memory_is_that_of_what_is_kept_per_latent() -> None:
    """At 131,072 latents of width 768 the vectors of all tokens, (L, 8, 768) in float64, would be 6.4 GB.

    Counted in numbers of 8 bytes that live at a time. Taking in a batch: per context the act and place kept (1.5), the
    batch's (1.5), both copied side by side (2.5), their order (3) and the new ones (1.5), so 10; per entry of the batch
    its latent, token, key, act, count and what sorts them, 8. Choosing: 1.5 per context kept, 12 per pair (latent,
    token, count, sum and what sorts them), 8 per token looked at (see OwnTokens), 8 for the rest; and the vectors of
    the few latents that are looked at together.
    """
    L = 131072
    taking_in, choosing = peaks(L)
    assert taking_in <= 8 * L * (10 * CONTEXTS + 8 * FIRED)
    assert choosing <= 8 * (L * (1.5 * CONTEXTS + 12 * FIRED + 8 * MOST_TOKENS + 8)) + 4 * 2**20
