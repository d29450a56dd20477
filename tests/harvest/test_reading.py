"""Token sequences to run a model on once more: those of a harvest, and of a text as a harvest cuts it."""

import itertools

import numpy as np
import pytest
import tiny_models
import torch

from saefast.data.shards import ShardFolder
from saefast.errors import InputError
from saefast.harvest.harvester import Harvester
from saefast.harvest.reading import cut, folder_of, harvested
from saefast.harvest.to_disk import HarvestConfig, harvest

CONFIG = HarvestConfig(
    hooks=("layers.1",), ctx_len=16, dtype="float32", forward="float32", heldout=0.3, device="cpu", drop_first=1,
    prepend_bos=True,
)  # fmt: skip
TEXTS = tiny_models.documents(40)


@pytest.fixture(scope="module")
def given():
    return {"model": tiny_models.model("gpt2"), "tokenizer": tiny_models.tokenizer(special=False), "text": TEXTS}


@pytest.fixture(scope="module")
def folder(given, tmp_path_factory):
    path = tmp_path_factory.mktemp("acts")
    harvest(path, CONFIG, progress=False, **given)
    return ShardFolder(path)


def rows_of(folder, split):
    return {
        (int(s), int(p))
        for info in folder.shards(split)
        for shard in [folder.open(info)]
        for s, p in zip(shard.seq, shard.pos, strict=True)
    }


def test_a_harvest_and_its_text_read_the_same(folder, given):
    one, other = harvested(folder, ["layers.1"], 10**6), cut(Harvester(CONFIG, **given), 10**6)
    key = lambda ids: ids.tolist()  # noqa: E731
    # Sequences whose only tokens are left out have no row, and a harvest does not know them for training.
    kept = [ids for ids in other.sequences if len(ids) > 2]
    assert sorted(map(key, one.sequences)) == sorted(map(key, kept))
    # Not one sequence of a held-out document is there.
    held = {tuple(folder.tokens(seq).tolist()) for seq, _ in rows_of(folder, "heldout")}
    assert held
    assert not held & {tuple(ids.tolist()) for ids in one.sequences}
    batch = next(one.batches(10**6, 0))
    assert int(batch.kept.sum()) == len(rows_of(folder, "train"))


def test_batches_hold_each_sequence_once_a_pass(folder):
    reading = harvested(folder, ["layers.1"], 10**6)
    whole = sorted(ids.tolist() for ids in reading.sequences)
    batches, passes = reading.batches(64, seed=3), []
    for _ in range(2):
        seen = []
        while len(seen) < len(whole):
            batch = next(batches)
            assert batch.ids.numel() <= 64
            assert not (batch.kept & ~batch.mask).any()
            seen += [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]
        assert sorted(seen) == whole
        passes.append(seen)
    assert passes[0] != passes[1]
    again = [batch.ids for batch in itertools.islice(reading.batches(64, seed=3), 5)]
    assert all(map(torch.equal, again, (b.ids for b in itertools.islice(reading.batches(64, seed=3), 5))))
    assert any(not torch.equal(a, b.ids) for a, b in zip(again, reading.batches(64, seed=4), strict=False))


def test_so_many_tokens_and_no_more(folder, given):
    for reading in (harvested(folder, ["layers.1"], 50), cut(Harvester(CONFIG, **given), 50)):
        assert 50 <= reading.n_tokens < 50 + CONFIG.ctx_len
    assert harvested(folder, ["layers.1"], 50).digest != harvested(folder, ["layers.1"], 90).digest
    assert harvested(folder, ["layers.1"], 50).digest == harvested(folder, ["layers.1"], 50).digest


def test_rows_beyond_the_norm_limit(given, tmp_path):
    from dataclasses import replace

    model = tiny_models.model("gpt2")
    with torch.no_grad():
        model.wpe.weight[0] *= 2000
    config = replace(CONFIG, prepend_bos=None, drop_first=0, max_norm_multiple="auto")
    harvest(tmp_path / "acts", config, progress=False, **given | {"model": model})
    folder = ShardFolder(tmp_path / "acts")
    other = cut(Harvester(config, **given | {"model": model}), 10**6)
    reading = harvested(folder, ["layers.1"], 10**6)
    limit = reading.limits["layers.1"]
    assert limit == pytest.approx(10 * folder.index["median_norms"]["layers.1"])
    assert other.limits == pytest.approx(reading.limits, rel=1e-6)
    rows = torch.diag(torch.tensor([0.5, 0.99, 1.01])) * limit
    assert reading.ordinary({"layers.1": rows}).tolist() == [True, True, False]
    assert reading._replace(limits={}).ordinary({"layers.1": rows}) is None


def test_what_cannot_be_read(folder, given):
    assert folder_of(folder.path) is not None
    assert folder_of(str(folder.path)).path == folder.path
    assert folder_of(TEXTS) is None
    assert folder_of("no such folder") is None
    with pytest.raises(InputError, match="holds no token to train on: all are held out or left out"):
        cut(Harvester(CONFIG, **given | {"text": [np.array([2, 2, 2])]}), 100)
