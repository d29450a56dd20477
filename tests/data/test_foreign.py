"""Activation caches of other libraries, written here in their layout and read back."""

import json

import numpy as np
import pytest
import torch
from batches import xs
from safetensors.torch import save_file

from saefast.data.foreign import read_foreign
from saefast.data.opening import open_source
from saefast.errors import InputError


def write_memmaps(folder, parts, dtype):
    folder.mkdir()
    for i, part in enumerate(parts):
        bits = part.to(dtype)
        array = bits.view(torch.int16).numpy() if dtype == torch.bfloat16 else bits.numpy()
        array.tofile(folder / f"shard_{i}.memmap")
        (folder / f"shard_{i}.meta").write_text(json.dumps({"shape": list(part.shape), "dtype": str(dtype)}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_memmap_shards_come_back_in_numeric_order(tmp_path, dtype):
    parts = [torch.randn(3 + i, 5) for i in range(11)]
    write_memmaps(tmp_path / "a", parts, dtype)
    rows = torch.cat([segment.rows for segment in read_foreign(tmp_path / "a", None)])
    assert torch.equal(rows, torch.cat(parts).to(dtype))


def test_a_short_memmap_is_named(tmp_path):
    write_memmaps(tmp_path / "a", [torch.randn(3, 5)], torch.float32)
    file = tmp_path / "a" / "shard_0.memmap"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"shard_0.memmap has 59 bytes, its .meta promises \(3, 5\) float32 = 60"):
        open_source(tmp_path / "a")


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_chunks_drop_padding_and_need_a_hook_among_several(tmp_path, kind):
    kept = []
    for hook in ("blocks.0.hook_out", "blocks.1.hook_out"):
        (tmp_path / hook).mkdir()
        for i in range(2):
            acts, mask = torch.randn(4, 6, 8), torch.ones(4, 6, dtype=torch.int64)
            mask[:, 4 + i :] = 0
            data = {"activation": acts, "tokens": torch.zeros(4, 6, dtype=torch.int64), "attention_mask": mask}
            file = tmp_path / hook / f"chunk-{i:08d}.{kind}"
            save_file(data, file) if kind == "safetensors" else torch.save(data | {"meta": [{}]}, file)
            kept.append(acts[mask.bool()])
    rows = torch.cat([segment.rows for segment in read_foreign(tmp_path, "blocks.1.hook_out")])
    assert torch.equal(rows, torch.cat(kept[2:]))
    with pytest.raises(InputError, match=r"blocks.0.hook_out, blocks.1.hook_out: say which with hook"):
        open_source(tmp_path)
    with pytest.raises(InputError, match="no hook 'x'"):
        open_source(tmp_path, hook="x")


def test_a_source_trains_on_every_row(tmp_path):
    parts = [torch.arange(10.0)[:, None] + 10 * i + torch.zeros(2) for i in range(3)]
    write_memmaps(tmp_path / "a", parts, torch.float32)
    source = open_source(tmp_path / "a", heldout=0.1)
    batches = source.batches(9)
    drawn = torch.cat(xs(batches, 3))[:, 0]
    assert sorted(drawn.tolist()) == list(range(27))
    assert torch.cat(xs(source.heldout(8)))[:, 0].tolist() == [27, 28, 29]


def test_arrow_folders_of_saelens(tmp_path):
    pa = pytest.importorskip("pyarrow")
    acts = np.random.default_rng(0).normal(size=(6, 4, 8)).astype(np.float32)
    columns = {"blocks.0.hook_out": pa.array(acts.tolist(), pa.list_(pa.list_(pa.float32())))}
    columns["token_ids"] = pa.array([[0] * 4] * 6)
    table = pa.table(columns)
    file = str(tmp_path / "data-00000-of-00001.arrow")
    with pa.OSFile(file, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    rows = torch.cat([segment.rows for segment in read_foreign(tmp_path, None)])
    assert torch.equal(rows, torch.from_numpy(acts).reshape(-1, 8))
    with pytest.raises(InputError, match="no 'x'"):
        read_foreign(tmp_path, "x")


@pytest.mark.peers
def test_arrow_folders_that_datasets_itself_wrote(tmp_path):
    datasets = pytest.importorskip("datasets")
    acts = np.random.default_rng(0).normal(size=(6, 4, 8)).astype(np.float32)
    features = datasets.Features(
        {"hook": datasets.Array2D((4, 8), "float32"), "token_ids": datasets.Sequence(datasets.Value("int32"), length=4)}
    )
    rows = {"hook": list(acts), "token_ids": [[1, 2, 3, 4]] * 6}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "a", num_shards=2)
    read = torch.cat([segment.rows for segment in read_foreign(tmp_path / "a", None)])
    assert torch.equal(read, torch.from_numpy(acts).reshape(-1, 8))


def test_an_arrow_file_that_points_out_of_itself_is_refused(tmp_path):
    """pyarrow believes offsets; to follow a damaged one ends the process."""
    pa = pytest.importorskip("pyarrow")
    inner = pa.ListArray.from_arrays(pa.array([0, 8, 16], pa.int32()), pa.array([0.5] * 16, pa.float32()))
    table = pa.table({"hook": pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), inner)})
    file = tmp_path / "data-00000-of-00001.arrow"
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    whole = file.read_bytes()
    offsets = np.array([0, 8, 16], np.int32).tobytes()
    assert read_foreign(tmp_path, None)[0].rows.shape == (2, 8)
    assert whole.count(offsets) == 1
    file.write_bytes(whole.replace(offsets, np.array([0, 8, 1 << 25], np.int32).tobytes()))
    with pytest.raises(InputError, match=f"{file.name} cannot be read as an Arrow stream"):
        read_foreign(tmp_path, None)
