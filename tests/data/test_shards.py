"""Shard folders: what is written is what is read, damage is named, and a kill leaves the last commit whole."""

import json
import os
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from saefast.data import shard_writer
from saefast.data.activation_stats import ActivationStats
from saefast.data.shard_writer import ShardWriter
from saefast.data.shardfile import BLOCK, Column, digest_file, map_tensor, read_header, write_file
from saefast.data.shards import ShardFolder, dequantise, quantise
from saefast.errors import InputError
from saefast.files import write_sealed_json

HOOKS = [{"name": "layers.1", "hf_name": "encoder.layer.1"}, {"name": "layers.2", "hf_name": "encoder.layer.2"}]


def rows_of(seq, n, d=6):
    """Rows that tell their sequence and position; the second hook holds their negatives, one column less."""
    x = torch.zeros(n, d)
    x[:, 0], x[:, 1] = seq, torch.arange(n)
    x[:, 2:] = torch.randn(n, d - 2, generator=torch.Generator().manual_seed(seq)).bfloat16().float()
    return {"layers.1": x, "layers.2": -x[:, :-1]}


def fill(writer, sequences, length=10):
    """Every fifth sequence is held out; a commit whenever the shard is full."""
    for seq in sequences:
        split = "heldout" if seq % 5 == 4 else "train"
        if writer.room(split) < length:
            writer.commit({"next": seq})
        writer.add_sequences(seq, [seq // 2], [list(range(seq, seq + length))])
        writer.add(split, rows_of(seq, length), torch.full((length,), seq), torch.arange(length))


def written(path, n_seq=25, **options):
    with ShardWriter(path, HOOKS, rows_per_shard=80, **options) as writer:
        fill(writer, range(n_seq))
        writer.commit({"next": n_seq}, complete=True, note="x")
    return ShardFolder(path)


def all_rows(folder, split, hook):
    """(seq, pos) -> row, and the order they lie in."""
    found = {}
    for info in folder.shards(split, hook):
        shard = folder.open(info, hook)
        rows = shard.acts.float() if shard.scale is None else dequantise(shard.acts, shard.scale)
        for key, row in zip(zip(shard.seq.tolist(), shard.pos.tolist(), strict=True), rows, strict=True):
            assert key not in found
            found[key] = row
    return found


def test_rows_come_back_with_their_sequence_and_position_in_every_hook(tmp_path):
    folder = written(tmp_path / "acts")
    assert folder.hooks == ["layers.1", "layers.2"]
    assert [folder.d(h) for h in folder.hooks] == [6, 5]
    assert [s.rows for s in folder.shards("train", "layers.1")] == [80, 80, 40]
    assert folder.n_rows("heldout", "layers.1") == 50
    for split, wanted in (("train", lambda s: s % 5 != 4), ("heldout", lambda s: s % 5 == 4)):
        one, two = (all_rows(folder, split, h) for h in folder.hooks)
        # Row-aligned: the same order in every hook.
        assert list(one) == list(two)
        assert sorted(one) == [(s, p) for s in range(25) if wanted(s) for p in range(10)]
        for (seq, pos), row in one.items():
            assert torch.equal(row, rows_of(seq, 10)["layers.1"][pos])
            assert torch.equal(two[seq, pos], -row[:-1])


def test_rows_of_a_shard_are_shuffled_by_the_seed_and_only_then(tmp_path):
    orders = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1), ("d", None)):
        orders[name] = list(all_rows(written(tmp_path / name, shuffle_seed=seed), "train", "layers.1"))
    assert orders["a"] == orders["b"]
    assert orders["a"] != orders["c"]
    assert orders["d"] == sorted(orders["d"])
    # Each of the three shards still holds the sequences it was given.
    for name in ("a", "c"):
        assert [sorted(orders[name][i : i + 80]) for i in (0, 80, 160)] == [
            orders["d"][i : i + 80] for i in (0, 80, 160)
        ]


def test_tokens_and_contexts_of_sequences(tmp_path):
    folder = written(tmp_path / "acts")
    assert len(folder.index["tokens"]) == 3
    assert folder.n_sequences == 25
    for seq in range(25):
        assert folder.tokens(seq).tolist() == list(range(seq, seq + 10))
        assert folder.document(seq) == seq // 2
    ids, place = folder.context(7, 4, before=2, after=3)
    assert ids.tolist() == [9, 10, 11, 12, 13, 14]
    assert ids[place] == folder.tokens(7)[4]
    ids, place = folder.context(7, 0)
    assert (ids.tolist(), place) == (list(range(7, 16)), 0)
    for seq in (-1, 25):
        with pytest.raises(InputError, match=f"sequence {seq} is not in .*, which has 25"):
            folder.tokens(seq)


@pytest.mark.parametrize("rows", [1, 7, 80])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
def test_files_are_safetensors_with_rows_on_a_page(tmp_path, dtype, rows):
    with ShardWriter(tmp_path, HOOKS[:1], dtype) as writer:
        # Odd widths and counts: what follows the rows must still lie where its dtype can be read.
        writer.add("train", {"layers.1": torch.randn(rows, 3)}, torch.arange(rows), torch.arange(rows))
        writer.commit({})
    file = tmp_path / "layers.1" / "00000.safetensors"
    assert read_header(file)["acts"].start % 4096 == 0
    loaded = load_file(file)
    shard = ShardFolder(tmp_path).open(ShardFolder(tmp_path).shards()[0])
    assert str(loaded["acts"].dtype) == f"torch.{dtype}"
    assert torch.equal(loaded["acts"], shard.acts)
    assert torch.equal(loaded["seq"], shard.seq)
    assert sorted(loaded["pos"].tolist()) == list(range(rows))
    assert ("scale" in loaded) == (dtype == "int8")


def test_int8_error_is_within_the_stated_bound(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2000, 33, generator=generator) * torch.logspace(-20, 20, 2000)[:, None]
    rows[5] = 0
    codes, scale = quantise(rows)
    error = (dequantise(codes, scale).double() - rows.double()).abs().amax(1)
    bound = rows.double().abs().amax(1) / 254 * (1 + 1e-4)
    assert bool((error <= bound).all())
    # The bound is tight: random rows come close to it.
    assert float((error / bound.clamp(min=1e-300)).max()) > 0.95
    assert not dequantise(codes, scale)[5].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_int8_keeps_bad_rows_bad(bad):
    rows = torch.randn(3, 4)
    rows[1, 2] = bad
    back = dequantise(*quantise(rows))
    assert back[1].isnan().all()
    assert back[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_stats_are_those_of_the_stored_training_rows(tmp_path, dtype):
    folder = written(tmp_path / "acts", dtype=dtype)
    for hook in folder.hooks:
        x = torch.stack(list(all_rows(folder, "train", hook).values())).double()
        stats = folder.stats(hook)
        assert stats.count == len(x) == 200
        for seen, exact in (
            (stats.sum, x.sum(0)),
            (stats.mean, x.mean(0)),
            (stats.sum_sq_norm, x.square().sum()),
            (stats.sum_norm, x.norm(dim=1).sum()),
            (stats.products, x.T @ x),
        ):
            assert torch.allclose(seen, exact, rtol=1e-6, atol=1e-4)
        assert stats.mean_norm == pytest.approx(float(x.norm(dim=1).mean()), rel=1e-6)


def test_products_only_where_they_are_cheap():
    assert ActivationStats.empty(768).products is not None
    assert ActivationStats.empty(769).products is None
    assert ActivationStats.empty(5, products=False).products is None


def test_going_on_after_a_stop_gives_the_folder_of_one_go(tmp_path):
    whole = written(tmp_path / "whole")
    with ShardWriter(tmp_path / "two", HOOKS, rows_per_shard=80) as writer:
        fill(writer, range(17))
        # Sequences since the last commit are lost with the writer, as in a kill.
    with ShardWriter(tmp_path / "two", HOOKS, rows_per_shard=80) as writer:
        start = writer.cursor["next"]
        assert 0 < start < 17
        fill(writer, range(start, 25))
        writer.commit({"next": 25}, complete=True, note="x")
    assert ShardFolder(tmp_path / "two").index == whole.index
    assert not ShardFolder(tmp_path / "two").verify()
    assert (tmp_path / "two" / "stats.safetensors").read_bytes() == (
        tmp_path / "whole" / "stats.safetensors"
    ).read_bytes()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", range(7))
def test_a_kill_at_any_step_of_a_commit_leaves_the_commit_before(tmp_path, monkeypatch, step):
    """The second commit renames 2 hooks x 2 splits, tokens, stats, index: the kill comes before rename `step`."""
    with ShardWriter(tmp_path, HOOKS, rows_per_shard=80) as writer:
        fill(writer, range(12))
        index = (tmp_path / "index.json").read_bytes()
        stats = load_file(tmp_path / "stats.safetensors")
        fill(writer, range(12, 16))
        renames = iter(range(100))
        replace = os.replace

        def killing(source, target):
            if next(renames) == step:
                raise Killed
            replace(source, target)

        monkeypatch.setattr(os, "replace", killing)
        with pytest.raises(Killed):
            writer.commit({"next": 16})
        monkeypatch.setattr(os, "replace", replace)
    assert (tmp_path / "index.json").read_bytes() == index
    assert not ShardFolder(tmp_path).verify()
    (tmp_path / "layers.1" / ".00007.safetensors.abc.tmp").write_bytes(b"what a SIGKILL leaves")
    with ShardWriter(tmp_path, HOOKS, rows_per_shard=80) as writer:
        again = writer.cursor["next"]
        assert not list(tmp_path.rglob("*.tmp"))
        writer.commit(writer.cursor)
        # Statistics that were renamed before the index are counted anew.
        recounted = load_file(tmp_path / "stats.safetensors")
        assert all(torch.allclose(recounted[key], stats[key], rtol=1e-12) for key in stats)
        fill(writer, range(again, 25))
        writer.commit({"next": 25}, complete=True)
    folder = ShardFolder(tmp_path)
    assert sorted(all_rows(folder, "train", "layers.1")) == [(s, p) for s in range(25) if s % 5 != 4 for p in range(10)]
    assert not folder.verify()
    assert folder.tokens(24).tolist() == list(range(24, 34))
    assert folder.stats("layers.2").count == 200


def test_going_on_after_a_commit_without_training_rows(tmp_path):
    for _ in range(2):
        with ShardWriter(tmp_path, HOOKS) as writer:
            writer.add("heldout", rows_of(4, 10), torch.full((10,), 4), torch.arange(10))
            writer.commit({})
    with ShardWriter(tmp_path, HOOKS) as writer:
        writer.add("train", rows_of(5, 10), torch.full((10,), 5), torch.arange(10))
        writer.commit({})
    folder = ShardFolder(tmp_path)
    assert folder.index["splits"] == {"train": 10, "heldout": 20}
    assert folder.stats("layers.1").count == 10
    assert torch.equal(folder.stats("layers.1").sum, rows_of(5, 10)["layers.1"].double().sum(0))


def test_disk_full_loses_no_finished_shard(tmp_path, monkeypatch):
    with ShardWriter(tmp_path, HOOKS, rows_per_shard=80) as writer:
        fill(writer, range(12))

        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(shard_writer, "write_file", full)
        with pytest.raises(OSError, match="No space left"):
            writer.commit({"next": 12})
    folder = ShardFolder(tmp_path)
    assert folder.index["splits"] == {"train": 80, "heldout": 20}
    assert not folder.verify()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "index.json",
        "layers.1",
        "layers.2",
        "stats.safetensors",
        "tokens",
    ]


def test_a_writer_that_never_commits_leaves_nothing(tmp_path):
    with ShardWriter(tmp_path / "acts", HOOKS) as writer:
        fill(writer, range(3))
        assert (tmp_path / "acts" / ".spool").is_dir()
    assert not (tmp_path / "acts").exists()


def test_one_writer_at_a_time(tmp_path):
    with ShardWriter(tmp_path, HOOKS), pytest.raises(InputError, match="is being written by another harvest"):
        ShardWriter(tmp_path, HOOKS)
    ShardWriter(tmp_path, HOOKS).close()


def test_a_folder_of_other_settings_is_refused(tmp_path):
    written(tmp_path, settings={"model": "one", "ctx_len": 128})
    for hooks, options, message in (
        (HOOKS[:1], {}, "was begun with hooks layers.1, layers.2, now layers.1 are asked for"),
        (HOOKS, {"dtype": "float32"}, "was begun with dtype = 'bfloat16', now 'float32'"),
        (HOOKS, {"shuffle_seed": 3}, "shuffle = .*'seed': 0"),
        (HOOKS, {"settings": {"model": "two", "ctx_len": 128}}, "model = 'one', now 'two' is asked for: choose"),
    ):
        with pytest.raises(InputError, match=message):
            ShardWriter(
                tmp_path, hooks, **{"rows_per_shard": 80, "settings": {"model": "one", "ctx_len": 128}} | options
            )
    other = [{**hook, "hf_name": "elsewhere"} for hook in HOOKS]
    with pytest.raises(InputError, match=r"now layers.1 \(the module elsewhere\), layers.2 \(the module elsewhere\)"):
        ShardWriter(tmp_path, other, rows_per_shard=80, settings={"model": "one", "ctx_len": 128})
    # A refused writer holds no lock, and leaves no file.
    assert not (tmp_path / ".lock").exists()
    ShardWriter(tmp_path, HOOKS, rows_per_shard=80, settings={"model": "one", "ctx_len": 128}).close()


def test_widths_may_not_change(tmp_path):
    with ShardWriter(tmp_path, HOOKS) as writer:
        writer.add("train", rows_of(0, 4), torch.zeros(4), torch.arange(4))
        with pytest.raises(InputError, match=r"hook layers.1: 9 columns, the folder holds 6"):
            writer.add("train", rows_of(0, 4, d=9), torch.zeros(4), torch.arange(4))
    with pytest.raises(InputError, match="dtype 'float8' is unknown"):
        ShardWriter(tmp_path, HOOKS, "float8")


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file cannot be written: "):
        ShardWriter(tmp_path / "file", HOOKS)


def damage(file, kind):
    content = file.read_bytes()
    if kind == "missing":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(content[:-7])
    elif kind == "flipped":
        place = 4096 + 33
        file.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
    elif kind == "dtype":
        file.write_bytes(content.replace(b'"BF16"', b'"F16" ', 1))
    elif kind == "garbage":
        file.write_bytes(b"{" * len(content))
    elif kind == "no acts":
        file.write_bytes(content.replace(b'"acts"', b'"acds"', 1))


DAMAGE = {
    # kind: message, offset in the file
    "missing": (r"does not exist", lambda size: None),
    "truncated": (r"is truncated at byte (\d+)", lambda size: size - 7),
    "flipped": (r"is damaged: bytes 0 to \d+ differ from the checksum", lambda size: 0),
    "dtype": (r"acts at byte 4096 is torch.float16 \(80, 6\), the index says torch.bfloat16", lambda size: 0),
    "garbage": (r"truncated or no safetensors file", lambda size: None),
    "no acts": (r"has no tensor acts", lambda size: 0),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_with_file_and_offset(tmp_path, kind):
    written(tmp_path)
    file = tmp_path / "layers.1" / "00001.safetensors"
    size = file.stat().st_size
    damage(file, kind)
    message, offset = DAMAGE[kind]
    (bad,) = ShardFolder(tmp_path).verify()
    assert bad.file == file
    assert str(file) in bad.reason
    assert re.search(message, bad.reason)
    assert "\n" not in bad.reason
    if kind != "garbage":
        assert bad.offset == offset(size)
    checked = ShardFolder(tmp_path, verify=True)
    with pytest.raises(InputError, match=message):
        checked.shards("train", "layers.1")
    # The other hook is whole, and without the bad shard so is this one.
    assert checked.n_rows("train", "layers.2") == 200
    lenient = ShardFolder(tmp_path, skip_bad_shards=True, verify=True)
    assert lenient.n_rows("train", "layers.1") == 120
    assert [skipped.file for skipped in lenient.skipped] == [file]


@pytest.mark.parametrize("kind", ["missing", "truncated", "flipped"])
def test_damaged_tokens_are_named(tmp_path, kind):
    written(tmp_path)
    file = tmp_path / "tokens" / "00001.safetensors"
    damage(file, kind)
    (bad,) = ShardFolder(tmp_path).verify()
    assert bad.file == file
    assert str(file) in bad.reason


def test_only_a_flipped_bit_needs_the_checksums_to_be_seen(tmp_path):
    written(tmp_path)
    damage(tmp_path / "layers.1" / "00001.safetensors", "flipped")
    assert ShardFolder(tmp_path).n_rows("train", "layers.1") == 200


def test_a_flipped_bit_is_placed_within_its_block(tmp_path, monkeypatch):
    content = torch.arange(2 * BLOCK // 8 + 100)
    digest = write_file(tmp_path / "x.safetensors", {"x": Column.of(content)})
    assert digest == digest_file(tmp_path / "x.safetensors")
    assert len(digest.blocks) == 3
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.seek(BLOCK + 5)
        file.write(b"\xff")
    changed = digest_file(tmp_path / "x.safetensors")
    assert [a == b for a, b in zip(digest.blocks, changed.blocks, strict=True)] == [True, False, True]


def test_a_mapped_tensor_reads_the_file_and_never_writes_it(tmp_path):
    write_file(
        tmp_path / "x.safetensors", {"x": Column.of(torch.arange(6.0).view(2, 3)), "e": Column.of(torch.zeros(0, 3))}
    )
    before = (tmp_path / "x.safetensors").read_bytes()
    entries = read_header(tmp_path / "x.safetensors")
    x = map_tensor(tmp_path / "x.safetensors", entries["x"])
    assert map_tensor(tmp_path / "x.safetensors", entries["e"]).shape == (0, 3)
    x += 1
    assert (tmp_path / "x.safetensors").read_bytes() == before


def test_folders_that_are_none(tmp_path):
    with pytest.raises(InputError, match="is no shard folder: it has no index"):
        ShardFolder(tmp_path)
    (tmp_path / "index.json").write_text('{"format": "other"}')
    with pytest.raises(InputError, match="is not the index of a shard folder"):
        ShardFolder(tmp_path)
    (tmp_path / "index.json").write_text('{"format": "saef')
    with pytest.raises(InputError, match="is not valid JSON"):
        ShardFolder(tmp_path)
    written(tmp_path / "acts")
    index = json.loads((tmp_path / "acts" / "index.json").read_text())
    write_sealed_json(tmp_path / "acts" / "index.json", index | {"version": 3})
    with pytest.raises(InputError, match="has version 3, this saefast reads up to 2: upgrade"):
        ShardFolder(tmp_path / "acts")


def test_quantise_matches_numpy_rounding():
    x = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    codes, scale = quantise(torch.from_numpy(x))
    reference = np.abs(x).max(1) / np.float32(127)
    assert np.array_equal(scale.numpy(), reference)
    assert np.array_equal(codes.numpy(), np.rint(x / reference[:, None]).astype(np.int8))
