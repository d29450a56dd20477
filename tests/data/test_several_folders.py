"""Harvests of two models over the same text: rows of the same tokens, whatever each has left out."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from saefast.data.opening import open_source
from saefast.data.shard_writer import ShardWriter
from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.training.api import train

SEQS, LENGTH = 40, 12


def row_of(seq: Tensor, pos: Tensor, width: int) -> Tensor:
    """(n, width) that says which token it is of."""
    return torch.cat([torch.stack([seq, pos], 1).float(), torch.rand(len(seq), width - 2)], 1)


def harvest(path: Path, width: int, drop: float = 0.0, shift: int = 0, hook: str = "layer") -> Path:
    """A folder of SEQS sequences, every fifth held out, without a share of its tokens, in an order of its own."""
    generator = torch.Generator().manual_seed(width)
    with ShardWriter(path, [{"name": hook, "hf_name": hook}], "float32", rows_per_shard=100) as writer:
        for start in range(0, SEQS, 10):
            numbers = list(range(start, start + 10))
            writer.add_sequences(start, numbers, [[n + shift + i for i in range(LENGTH)] for n in numbers])
            seq = torch.tensor(numbers).repeat_interleave(LENGTH)
            pos = torch.arange(LENGTH).repeat(10)
            keep = torch.rand(len(seq), generator=generator) >= drop
            for split, mine in (("heldout", seq % 5 == 0), ("train", seq % 5 != 0)):
                there = mine & keep
                writer.add(split, {hook: row_of(seq[there], pos[there], width)}, seq[there], pos[there])
            writer.commit({})
        writer.commit({}, complete=True)
    return path


@pytest.mark.parametrize("drop", [0.0, 0.3])
def test_rows_are_of_the_same_tokens(tmp_path: Path, drop: float) -> None:
    folders = harvest(tmp_path / "base", 4), harvest(tmp_path / "chat", 6, drop, hook="other")
    source = open_source(folders, hooks={"x": ["layer", "other"]})
    assert source.part_widths() == (4, 6)
    drawn = [batch["x"] for batch in itertools.islice(source.batches(32, 3), 20)]
    held = [batch["x"] for batch in source.heldout(32)]
    for x in [*drawn, *held]:
        assert torch.equal(x[:, :2], x[:, 4:6])
    rows = torch.cat(held)
    assert bool((rows[:, 0] % 5 == 0).all())
    whole = SEQS // 5 * LENGTH
    assert len(rows[:, :2].unique(dim=0)) == len(rows)
    assert len(rows) == whole if drop == 0 else 0.5 * whole < len(rows) < whole
    for x, seq, pos in source.located("heldout", 16):  # type: ignore[attr-defined]
        assert torch.equal(x[:, :2], torch.stack([seq, pos], 1).float())
    next(batches := source.batches(4))
    at, x = source.describe_row(2), drawn  # of the batch drawn last
    del batches, x
    assert "/base/layer/" in at
    assert "/chat/other/" in at
    assert at.split(" beside ")[0].split("(")[1] == at.split(" beside ")[1].split("(")[1]


def test_one_hook_is_that_of_all_folders(tmp_path: Path) -> None:
    folders = harvest(tmp_path / "base", 4), harvest(tmp_path / "chat", 6)
    for source in (open_source(folders), open_source(folders, hook="layer")):
        assert dict(source.widths) == {"x": 10}


def test_a_run_on_two_models_says_where_its_rows_are(tmp_path: Path) -> None:
    folders = harvest(tmp_path / "base", 4), harvest(tmp_path / "run" / "chat", 6, 0.3)
    config = SAEConfig(10, 20, 2, activation="batchtopk", crosscode_widths=(4, 6))
    settings = TrainConfig(n_tokens=32 * 8, batch_size=32, save_every=0)
    sae = train(folders, config, settings, tmp_path / "run", hooks={"x": ["layer", "layer"]})
    kept = sae.config.metadata["data"]
    assert (kept["path"], kept["beside"]) == (str(tmp_path / "base"), ["chat"])
    from saefast.analysis.evaluation import evaluate_run

    found = evaluate_run(tmp_path / "run")
    assert 0 < found.about["heldout_rows"] < SEQS // 5 * LENGTH
    assert len(found.to_dict()["by_part"]["parts"]) == 2


def test_what_cannot_lie_side_by_side(tmp_path: Path) -> None:
    base, chat = harvest(tmp_path / "base", 4), harvest(tmp_path / "chat", 6)
    other = harvest(tmp_path / "other", 6, shift=1)
    with pytest.raises(InputError, match="sequence 0 is of different tokens; harvest both models with the same text"):
        open_source((base, other))
    with pytest.raises(InputError, match="3 hooks and 2 folders are given: expected a hook for each"):
        open_source((base, chat), hooks={"x": ["layer", "layer", "layer"]})
    with pytest.raises(InputError, match="hooks names x, target: several folders have the tensor 'x' alone"):
        open_source((base, chat), hooks={"x": "layer", "target": "layer"})
    with pytest.raises(InputError, match="shuffle is 'buffer', which streams one folder"):
        open_source((base, chat), shuffle="buffer")
    nothing = harvest(tmp_path / "nothing", 6, drop=0.0)
    torch.manual_seed(0)
    with pytest.raises(InputError, match="hook 'x' is not in it"):
        open_source((base, nothing), hook="x")
