"""Statistics of every latent: against brute force, with padding, and with the memory that they take at full size."""

import pytest
import torch
from allocations import Allocations
from torch import Tensor

from saefast.analysis.evaluation import evaluate
from saefast.analysis.features import PairSums, TopExamples, collect
from saefast.data.mapped_source import Located
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

L, K, V = 30, 4, 17


def code(n: int) -> tuple[Tensor, Tensor]:
    idx = torch.rand(n, L).argsort(1)[:, :K].int()
    acts = torch.rand(n, K)
    acts[torch.rand(n, K) < 0.2] = 0
    return acts, idx


@pytest.mark.parametrize("size", [400, 37])
def test_top_examples_are_those_of_the_dense_code(size: int) -> None:
    acts, idx = code(400)
    top = TopExamples(L, n=6)
    for part in torch.arange(400).split(size):
        top.update(acts[part], idx[part], part * 10)
    dense = torch.zeros(400, L).scatter(1, idx.long(), acts)
    best = dense.topk(6, dim=0)
    assert torch.equal(top.acts, best.values.T)
    assert torch.equal(top.places, torch.where(best.values.T > 0, best.indices.T * 10, -1))


def test_a_latent_with_few_firings_leaves_places_empty() -> None:
    top = TopExamples(3, n=4)
    top.update(
        torch.tensor([[0.5, 0.0], [0.7, 0.0]]), torch.tensor([[1, 0], [1, 2]], dtype=torch.int32), torch.tensor([8, 9])
    )
    assert top.places.tolist() == [[-1] * 4, [9, 8, -1, -1], [-1] * 4]
    assert top.acts[1].tolist() == pytest.approx([0.7, 0.5, 0, 0])


def test_pairs_of_latent_and_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saefast.analysis.features._PENDING", 100)  # so that sums are taken in several goes
    acts, idx = code(300)
    tokens = torch.randint(0, V, (300,))
    pairs = PairSums(L, V)
    for part in torch.arange(300).split(29):
        pairs.update(acts[part], idx[part], tokens[part])
    pairs.close()
    sums, counts = torch.zeros(L, V, dtype=torch.float64), torch.zeros(L, V, dtype=torch.int64)
    for b in range(300):
        for a, i in zip(acts[b].tolist(), idx[b].tolist(), strict=True):
            if a > 0:
                sums[i, tokens[b]] += a
                counts[i, tokens[b]] += 1
    assert torch.equal(torch.stack([pairs.latents, pairs.tokens]), counts.nonzero().T)
    assert torch.equal(pairs.counts, counts[counts > 0])
    torch.testing.assert_close(pairs.sums, sums[counts > 0])


def test_batches_without_places_still_count() -> None:
    sae = SAE(SAEConfig(d_in=6, n_latents=12, k=2), seed=0)
    stats = collect(sae, [Located(torch.randn(9, 6), None, None)])
    assert 0 < int(stats.sparsity.counts.sum()) <= 18
    assert stats.sparsity.n_rows == 9
    assert bool((stats.top.places == -1).all())


def test_a_full_table_keeps_what_matters_to_a_latent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other firing of a latent is on its own token, all others on tokens that come once: those are dropped."""
    monkeypatch.setattr("saefast.analysis.features._PENDING", 150)
    monkeypatch.setattr("saefast.analysis.features.KEPT_TOKENS", 3)
    monkeypatch.setattr("saefast.analysis.features._AT_A_TIME", 40)  # so that latents are sorted in several goes
    rows = torch.arange(3000)
    latents, on_own = rows % L, (rows // L) % 2 == 0
    tokens, acts = torch.where(on_own, latents, L + rows), torch.where(on_own, 1.0, 0.5) + 0.1 * torch.rand(3000)
    pairs = PairSums(L, 4000)
    for part in rows.split(100):
        pairs.update(acts[part, None], latents[part, None].int(), tokens[part])
        assert len(pairs._pending[0][0]) <= 150
    pairs.close()
    assert len(pairs.sums) <= 150 < len(tokens.unique()) / 4
    own = pairs.tokens == pairs.latents
    assert torch.equal(pairs.latents[own], torch.arange(L))
    assert pairs.counts[own].tolist() == [50] * L
    per_latent = torch.zeros(2, L, dtype=torch.float64).index_put_((on_own.long(), latents), acts.double(), True)
    torch.testing.assert_close(pairs.sums[own], per_latent[1])
    torch.testing.assert_close(pairs.totals, per_latent.sum(0))


def most_held(n_batches: int) -> int:
    """The most bytes that a table of pairs holds over some batches of latents and tokens drawn at random."""
    pairs = PairSums(500, 10_000)
    with Allocations(pairs.totals) as made:
        for _ in range(n_batches):
            pairs.update(torch.rand(100, 8) + 0.1, torch.randint(500, (100, 8)), torch.randint(10_000, (100,)))
        pairs.close()
    return made.peak


def test_memory_is_bounded_whatever_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saefast.analysis.features._PENDING", 10_000)
    monkeypatch.setattr("saefast.analysis.features._AT_A_TIME", 2_000)
    some, twice = most_held(100), most_held(200)
    assert twice <= 1.02 * some
    # Pairs at a time: those of a full table and those that wait. Each is three numbers, before and after it is summed.
    # And ten for those that are sorted together.
    assert twice <= (64 * 500 + 10_000 + 800) * 8 * 6 + 2_000 * 8 * 10


class Padded(SAE):
    """Gives as many entries a row as it likes: the code in any order, with entries of act 0 whose ids mean nothing."""

    def encode_sparse(self, x: Tensor, *, mixed: bool = False) -> tuple[Tensor, Tensor]:
        acts, idx = super().encode_sparse(x, mixed=mixed)
        more = int(torch.randint(0, 5, ()))
        order = torch.randperm(self.config.k + more)
        ids = torch.randint(0, self.config.n_latents, (len(x), more), dtype=idx.dtype)
        return torch.cat([acts, acts.new_zeros(len(x), more)], 1)[:, order], torch.cat([idx, ids], 1)[:, order]


def test_padding_counts_nowhere_and_k_may_differ_from_batch_to_batch() -> None:
    x, seq = torch.randn(300, 6), torch.arange(300, dtype=torch.int32)
    plain, padded = (kind(SAEConfig(d_in=6, n_latents=12, k=2), seed=0) for kind in (SAE, Padded))
    batches = [Located(x[part], seq[part], seq[part] % 7) for part in torch.arange(300).split(41)]
    one, other = (
        collect(sae, batches, n_examples=5, tokens_of=lambda seq, pos: (seq + pos) % V, vocabulary=V)
        for sae in (plain, padded)
    )
    assert torch.equal(one.top.acts, other.top.acts)
    assert torch.equal(one.top.places, other.top.places)
    assert one.pairs is not None
    assert other.pairs is not None
    for name in ("latents", "tokens", "counts"):
        assert torch.equal(getattr(one.pairs, name), getattr(other.pairs, name))
    torch.testing.assert_close(one.pairs.sums, other.pairs.sums)
    assert other.sparsity.compute() == pytest.approx(one.sparsity.compute())
    assert evaluate(padded, [b.x for b in batches]).compute() == pytest.approx(
        evaluate(plain, [b.x for b in batches]).compute(), rel=1e-5
    )
