"""A folder of rows that are of no text keeps the names of its items, and says in one line that it has no tokens."""

from pathlib import Path

import pytest
import torch

from saefast.data.shard_writer import ShardWriter
from saefast.data.shards import ShardFolder
from saefast.errors import InputError

NAMES = ["a.png", "deep/日本.png", "", "a b.wav#t=0.000,20.500", "bytes \udcff"]


def write(folder: Path, commits: list[list[str]], first: int = 0) -> None:
    """Two rows of each item, in a commit per list."""
    hooks = [{"name": "layers.1", "hf_name": "encoder.layers.1"}]
    with ShardWriter(folder, hooks, "float32", shuffle_seed=None) as writer:
        for names in commits:
            n = len(names)
            seq = torch.arange(first, first + n).repeat_interleave(2)
            # Items of before are given again where a harvest goes on in the middle of some.
            writer.add_items(max(first - 1, 0), (["again"] if first else []) + names)
            writer.add("train", {"layers.1": seq[:, None].float().repeat(1, 4)}, seq, torch.arange(2).repeat(n))
            writer.commit({"docs": first + n, "seqs": first + n, "done": 0}, kind="images", data="there", input="x")
            first += n


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "h", [NAMES[:2], NAMES[2:4]])
    write(tmp_path / "h", [NAMES[4:]], first=4)
    return tmp_path / "h"


def test_every_row_leads_back_to_its_name(folder: Path) -> None:
    opened = ShardFolder(folder)
    assert opened.kind == "images"
    assert opened.n_sequences == len(NAMES)
    assert [opened.item(i) for i in range(len(NAMES))] == NAMES
    assert not opened.verify()
    seqs = torch.cat([opened.open(info).seq for info in opened.shards()])
    assert [opened.item(int(i)) for i in seqs] == [name for name in NAMES for _ in range(2)]


@pytest.mark.parametrize("number", [-1, len(NAMES)])
def test_an_item_that_is_not_there(folder: Path, number: int) -> None:
    with pytest.raises(InputError, match=f"item {number} is not in .*, which has 5"):
        ShardFolder(folder).item(number)


@pytest.mark.parametrize("ask", ["tokens", "document", "context", "token_ids"])
def test_tokens_are_refused_in_one_line(folder: Path, ask: str) -> None:
    opened = ShardFolder(folder)
    zero = torch.zeros(1, dtype=torch.int64)
    arguments = {"tokens": (0,), "document": (0,), "context": (0, 0), "token_ids": (zero, zero)}[ask]
    with pytest.raises(InputError, match="holds rows of images, not of text: they have no tokens"):
        getattr(opened, ask)(*arguments)


def test_a_text_has_no_items(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "t", [{"name": "a", "hf_name": "a"}], "float32") as writer:
        writer.add_sequences(0, [0], [[1, 2]])
        writer.add("train", {"a": torch.ones(2, 3)}, torch.zeros(2), torch.arange(2))
        writer.commit({"docs": 1, "seqs": 1, "done": 0})
    assert ShardFolder(tmp_path / "t").kind == "text"
    with pytest.raises(InputError, match="holds rows of text, which have tokens and no items"):
        ShardFolder(tmp_path / "t").item(0)


def test_damage_to_names_is_found(folder: Path) -> None:
    path = folder / "items" / "names-00001.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    assert [bad.file for bad in ShardFolder(folder).verify()] == [path]
    path.write_bytes(whole[:-3])
    assert [bad.file for bad in ShardFolder(folder).verify()] == [path]
    with pytest.raises(InputError, match=r"names-00001\.safetensors"):
        ShardFolder(folder).item(2)
    path.unlink()
    with pytest.raises(InputError, match=r"names-00001\.safetensors"):
        ShardFolder(folder).item(2)
