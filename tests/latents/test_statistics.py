"""What is counted of every latent, against the dense code and plain loops; and the memory that it takes."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from allocations import Allocations
from spooled import KINDS, L, N, batches, dense, made, rows, spool_of

from saefast.data.mapped_source import MappedSource
from saefast.data.opening import open_source
from saefast.errors import InputError
from saefast.harvest.to_disk import HarvestConfig, harvest
from saefast.latents.choice import own_tokens
from saefast.latents.schema import BINS
from saefast.latents.spool import Entries, Spool, spool_codes
from saefast.latents.statistics import histograms, moments, pairs, tokens_of_rows
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

V = 17


@pytest.mark.parametrize("kind", KINDS)
def test_moments_and_histograms_are_those_of_the_dense_code(kind: str, tmp_path: Path) -> None:
    spool = spool_codes(made(kind), batches(rows()), tmp_path)
    expected = dense(spool).astype(np.float64)
    for start, stop in ((0, L), (5, 20)):
        entries = spool.by_latent(start, stop)
        found = moments(entries)
        np.testing.assert_allclose(found.total, expected.sum(0)[start:stop], rtol=1e-14)
        assert np.array_equal(found.largest, expected.max(0)[start:stop])
        counts = histograms(entries, found.largest)
        assert counts.shape == (stop - start, BINS)
        for place, column in enumerate(expected.T[start:stop]):
            acts = column[column > 0]
            by_numpy = np.histogram(acts, BINS, (0, acts.max()))[0] if len(acts) else np.zeros(BINS)
            assert np.array_equal(counts[place], by_numpy)


def test_the_bins_of_few_and_equal_activations() -> None:
    ptr = np.array([0, 1, 1, 4, 8])
    acts = np.array([3, 2, 2, 2, 1e-30, 50, 1, 49.5], np.float32)
    entries = Entries(ptr, np.arange(8), acts)
    counts = histograms(entries, moments(entries).largest)
    assert counts.sum(1).tolist() == [1, 0, 3, 4]
    assert (counts[0, -1], counts[2, -1]) == (1, 3)
    # 1 of 50 is where the second bin begins.
    assert (counts[3, 0], counts[3, 1], counts[3, -1]) == (1, 1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_latent_and_token_are_all_that_there_are(kind: str, tmp_path: Path) -> None:
    spool = spool_codes(made(kind), batches(rows()), tmp_path)
    tokens = np.random.default_rng(0).integers(0, V, N).astype(np.int32)
    code = dense(spool)
    for start, stop in ((0, L), (5, 20)):
        found = pairs(spool.by_latent(start, stop), tokens)
        sums, counts = np.zeros((stop - start, V)), np.zeros((stop - start, V), int)
        for row, token in enumerate(tokens):
            for latent in range(start, stop):
                if code[row, latent] > 0:
                    sums[latent - start, token] += code[row, latent]
                    counts[latent - start, token] += 1
        assert np.array_equal([found.latent, found.token], counts.nonzero())
        assert np.array_equal(found.n, counts[counts > 0])
        np.testing.assert_allclose(found.act, sums[counts > 0], rtol=1e-13)


def test_no_entries_have_no_pairs() -> None:
    entries = Entries(np.zeros(4, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    assert [len(column) for column in pairs(entries, np.zeros(5, np.int32))] == [0] * 4
    assert moments(entries).largest.tolist() == [0] * 3
    assert histograms(entries, np.zeros(3)).sum() == 0
    assert not own_tokens(pairs(entries, np.zeros(5, np.int32)), np.zeros(3), np.array([5])).own.any()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> MappedSource:
    folder = tmp_path_factory.mktemp("acts")
    config = HarvestConfig(hooks=("layers.1",), ctx_len=24, dtype="float32", heldout=0.2, device="cpu")
    given = {"model": tiny_models.model("bert"), "tokenizer": tiny_models.tokenizer()}
    harvest(folder, config, text=tiny_models.documents(40), progress=False, **given)
    found = open_source(folder)
    assert isinstance(found, MappedSource)
    return found


def spooled(source: MappedSource, folder: Path) -> Spool:
    both = [*source.located("heldout", 64), *source.located("train", 64)]
    return spool_codes(SAE(SAEConfig(d_in=16, n_latents=40, k=3), seed=0).requires_grad_(False), both, folder)


def test_the_token_of_every_row(source: MappedSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert source.folder is not None
    spool = spooled(source, tmp_path)
    for at_a_time in (1 << 20, 50):
        monkeypatch.setattr("saefast.latents.statistics._ROWS", at_a_time)
        found = tokens_of_rows(source.folder, spool)
        row = 0
        for located in [*source.located("heldout", 64), *source.located("train", 64)]:
            assert located.seq is not None
            assert located.pos is not None
            for seq, pos in zip(located.seq.tolist(), located.pos.tolist(), strict=True):
                assert found[row] == int(source.folder.tokens(seq)[pos])
                assert spool.source_sequences[spool.sequence[row]] == seq
                row += 1
        assert row == len(found) == spool.n_rows


def test_a_row_of_no_sequence_of_the_harvest_is_damage(source: MappedSource, tmp_path: Path) -> None:
    assert source.folder is not None
    spool = spooled(source, tmp_path)
    spool.source_sequences[3] = 10**6
    with pytest.raises(InputError, match="is of sequence 1000000, whose tokens are not there: the shard is damaged"):
        tokens_of_rows(source.folder, spool)


def most_held(n_rows: int) -> int:
    """The most bytes held at a time while all is counted, by NumPy and by torch, some 20,000 entries at a time."""
    generator = torch.Generator().manual_seed(0)
    idx = torch.randint(500, (n_rows, 8), generator=generator)
    spool = spool_of(torch.rand(n_rows, 8, generator=generator) + 0.1, idx, 500)
    tokens = torch.randint(10_000, (n_rows,), generator=generator).int().numpy()
    counts = np.bincount(tokens)
    tracemalloc.start()
    try:
        with Allocations() as made:
            for start, stop in spool.ranges(20_000):
                entries = spool.by_latent(start, stop)
                found = moments(entries)
                histograms(entries, found.largest)
                own_tokens(pairs(entries, tokens), found.total, counts)
        return made.peak + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_that_of_a_range_whatever_the_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Spool.stretches, "__defaults__", (5_000,))
    some, more = most_held(20_000), most_held(80_000)
    assert more <= 1.1 * some
    # What spool.MOST_ENTRIES says of an entry, counting a torch tensor of NumPy's memory twice.
    assert more <= 200 * 20_000
