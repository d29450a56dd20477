"""delphi's cache: the activations of latents.db, token by token, for sequences of any length; and its own reader."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from latents_db import make_db
from odd_latents import dense, set_acts, set_meta, written
from safetensors.numpy import load_file

from saefast.analysis import delphi
from saefast.analysis.delphi import write_delphi
from saefast.analysis.export_names import Names
from saefast.errors import InputError
from saefast.latents.database import LatentsDB


def of_lengths(folder: Path, lengths: list[int], n_latents: int = 60) -> Path:
    """Sequences of several lengths: longer ones are cut."""
    path = make_db(folder, n_latents=n_latents, n_sequences=len(lengths), length=max(lengths), k=3)
    with closing(sqlite3.connect(path)) as db, db:
        for sequence, n in enumerate(lengths):
            tokens, latents, positions, acts = db.execute(
                "SELECT tokens, latents, positions, acts FROM sequences JOIN codes USING (sequence) WHERE sequence = ?",
                (sequence,),
            ).fetchone()
            kept = np.frombuffer(positions, "<u2") < n
            columns = [
                np.frombuffer(column, dtype)[kept].tobytes()
                for column, dtype in ((latents, "<i4"), (positions, "<u2"), (acts, "<f4"))
            ]
            db.execute("UPDATE sequences SET n = ?, tokens = ? WHERE sequence = ?", (n, tokens[: 4 * n], sequence))
            db.execute("UPDATE codes SET latents = ?, positions = ?, acts = ? WHERE sequence = ?", (*columns, sequence))
    return path


def stream(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Activations (n, L) and tokens (n,) of all sequences end to end."""
    acts, tokens = dense(path)
    return np.concatenate(acts), np.concatenate(tokens)


def splits(folder: Path) -> list[tuple[int, int, dict[str, np.ndarray]]]:
    """First and last latent of each file, and its tensors."""
    found = []
    for file in folder.glob("*.safetensors"):
        first, last = file.stem.split("_")
        found.append((int(first), int(last), load_file(file)))
    return sorted(found, key=lambda split: split[0])


def read_back(folder: Path, n_latents: int) -> tuple[np.ndarray, np.ndarray]:
    """Activations (n, L) as float16, and tokens (n,), as the files say."""
    first_tokens = splits(folder)[0][2]["tokens"]
    acts = np.zeros((first_tokens.size, n_latents), np.float16)
    for first, _, split in splits(folder):
        rows, positions, latents = split["locations"].astype(np.int64).T
        assert np.array_equal(split["tokens"], first_tokens)
        places = rows * first_tokens.shape[1] + positions
        assert not acts[places, first + latents].any()
        acts[places, first + latents] = split["activations"]
    return acts, first_tokens.ravel()


@pytest.mark.parametrize(
    ("lengths", "width", "left_out"),
    [
        ([64] * 20, 64, 0),  # of one length that windows of 32 divide: a row each
        ([30] * 40, 256, 176),
        ([7, 300, 1, 64, 33], 256, 149),
        ([40, 60], 96, 4),
        ([33], 32, 1),
        ([256, 256, 255], 256, 255),
    ],
)
def test_every_activation_is_at_its_token(tmp_path: Path, lengths: list[int], width: int, left_out: int) -> None:
    path = of_lengths(tmp_path, lengths)
    acts, tokens = stream(path)
    db = LatentsDB(path)
    if left_out:
        with pytest.warns(RuntimeWarning, match=f"{left_out} tokens are left out"):
            n = write_delphi(db, tmp_path / "out", range(60), Names(db))
    else:
        n = write_delphi(db, tmp_path / "out", range(60), Names(db))
    place = tmp_path / "out" / "latents" / "layers.1"
    kept = len(tokens) - left_out
    found, found_tokens = read_back(place, 60)
    assert np.array_equal(found_tokens, tokens[:kept])
    assert np.array_equal(found, acts[:kept].astype(np.float16))
    assert n == (acts[:kept] > 0).sum() == sum(len(split["activations"]) for _, _, split in splits(place))
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    assert (config["cache_ctx_len"], config["n_tokens"], config["n_splits"]) == (width, kept, 5)
    assert config["model_name"] == "made-up"
    assert splits(place)[0][2]["tokens"].shape == (kept // width, width)
    counts = torch.load(tmp_path / "out" / "log" / "hookpoint_firing_counts.pt", weights_only=True)
    assert counts["layers.1"].tolist() == (acts[:kept] > 0).sum(0).tolist()


def test_splits_cover_the_latents_and_keep_the_order_of_tokens(tmp_path: Path) -> None:
    path = make_db(tmp_path, n_latents=61, n_sequences=10, length=32, k=3)
    db = LatentsDB(path)
    write_delphi(db, tmp_path / "out", range(61), Names(db))
    found = splits(tmp_path / "out" / "latents" / "layers.1")
    assert [first for first, _, _ in found] == [0, *(last + 1 for _, last, _ in found[:-1])]
    assert found[-1][1] == 60
    assert len(found) == 5
    for first, last, split in found:
        assert {name: tensor.dtype for name, tensor in split.items()} == {
            "locations": np.uint16, "activations": np.float16, "tokens": np.int64
        }  # fmt: skip
        rows, positions, latents = split["locations"].astype(np.int64).T
        assert latents.max(initial=0) <= last - first
        for latent in np.unique(latents):
            mine = latents == latent
            assert np.all(np.diff(rows[mine] * 32 + positions[mine]) > 0)


def test_large_numbers_take_uint32_and_many_activations_more_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_db(tmp_path, n_latents=60, n_sequences=4, length=64, k=3)
    db = LatentsDB(path)
    monkeypatch.setattr(delphi, "SPLITS", 1)
    for most, small, n_splits in ((100, 64, 8), (1 << 24, 63, 1)):
        monkeypatch.setattr(delphi, "MOST_ENTRIES", most)
        monkeypatch.setattr(delphi, "SMALL", small)
        write_delphi(db, tmp_path / "out", range(60), Names(db))
        found = splits(tmp_path / "out" / "latents" / "layers.1")
        assert len(found) == n_splits
        assert found[-1][1] == 59
        # A row has 64 tokens.
        expected = np.dtype(np.uint16 if small == 64 else np.uint32)
        assert {split["locations"].dtype for _, _, split in found} == {expected}
        acts, _ = read_back(tmp_path / "out" / "latents" / "layers.1", 60)
        assert np.array_equal(acts, stream(path)[0].astype(np.float16))


def test_huge_and_tiny_activations(tmp_path: Path) -> None:
    path = make_db(tmp_path, n_latents=60, n_sequences=4, length=32, k=3)
    set_acts(path, 1e6)
    db = LatentsDB(path)
    write_delphi(db, tmp_path / "out", range(60), Names(db))
    found, _ = read_back(tmp_path / "out" / "latents" / "layers.1", 60)
    assert np.isfinite(found).all()
    assert np.array_equal(found, np.minimum(stream(path)[0], 65504).astype(np.float16))
    set_acts(path, 1e-11)
    acts, _ = stream(path)
    write_delphi(db, tmp_path / "out", range(60), Names(db))
    found, _ = read_back(tmp_path / "out" / "latents" / "layers.1", 60)
    # Its own writer takes nothing up to 1e-5 for an activation, but counts all above 0.
    assert np.array_equal(found > 0, acts > 1e-5)
    counts = torch.load(tmp_path / "out" / "log" / "hookpoint_firing_counts.pt", weights_only=True)
    assert counts["layers.1"].tolist() == (acts > 0).sum(0).tolist()


def test_some_latents_alone(tmp_path: Path) -> None:
    path = make_db(tmp_path, n_latents=60, n_sequences=4, length=32, k=3)
    db = LatentsDB(path)
    acts, _ = stream(path)
    n = write_delphi(db, tmp_path / "out", [3, 40, 1], Names(db))
    found, _ = read_back(tmp_path / "out" / "latents" / "layers.1", 60)
    expected = np.zeros_like(acts)
    expected[:, [1, 3, 40]] = acts[:, [1, 3, 40]]
    assert np.array_equal(found, expected.astype(np.float16))
    assert n == (expected > 0).sum()


def test_what_cannot_be_a_cache_is_refused(tmp_path: Path) -> None:
    path = of_lengths(tmp_path, [20, 11])
    db = LatentsDB(path)
    with pytest.raises(InputError, match="is of 31 tokens: delphi needs 32"):
        write_delphi(db, tmp_path / "out", range(60), Names(db))
    for hook in ("../up", "..", "a/b"):
        set_meta(path, "sae", json.dumps({"digest": "d", "model": "m", "hook": hook}))
        with pytest.raises(InputError, match="no name of a folder"):
            write_delphi(LatentsDB(path), tmp_path / "out", range(60), Names(LatentsDB(path)))
    (tmp_path / "two").mkdir()
    path = make_db(tmp_path / "two", n_latents=60, n_sequences=4, length=32, k=3)
    with written(path) as raw:
        raw.execute("UPDATE sequences SET tokens = zeroblob(8) WHERE sequence = 2")
    db = LatentsDB(path)
    with pytest.raises(InputError, match=r"sequence 2 of .* has 2 tokens of 32"):
        write_delphi(db, tmp_path / "out", range(60), Names(db))
    assert not (tmp_path / "out").exists()


class Words:
    """As much of a tokenizer as delphi's reader calls."""

    def batch_decode(self, ids: Any) -> list[str]:
        return [f" {int(i)}" for i in ids]


@pytest.mark.peers
@pytest.mark.parametrize("lengths", [[64] * 20, [7, 300, 1, 64, 33, 500, 256]])
def test_its_own_reader_finds_the_windows_that_a_latent_fires_in(tmp_path: Path, lengths: list[int]) -> None:
    loader = pytest.importorskip("delphi.latents.loader")
    config = pytest.importorskip("delphi.config")
    path = of_lengths(tmp_path, lengths)
    acts, tokens = stream(path)
    db = LatentsDB(path)
    write_delphi(db, tmp_path / "out", range(60), Names(db))
    constructor = config.ConstructorConfig(min_examples=1, n_non_activating=2)
    sampler = config.SamplerConfig(n_examples_train=2, n_examples_test=2, n_quantiles=2)
    dataset = loader.LatentDataset(
        tmp_path / "out" / "latents", sampler, constructor, tokenizer=Words(), modules=["layers.1"]
    )
    kept = dataset.tokens.numel()
    assert dataset.tokens.flatten().tolist() == tokens[:kept].tolist()
    windows, window_tokens = acts[:kept].reshape(-1, 32, 60), tokens[:kept].reshape(-1, 32)
    seen = {}
    for record in dataset:
        latent = record.latent.latent_index
        seen[latent] = record
        mine = windows[:, :, latent]
        fires = mine.max(1) > 0
        assert record.per_token_frequency == pytest.approx((mine > 0).mean())
        assert record.per_context_frequency == pytest.approx(fires.mean())
        shown = {(tuple(e.tokens.tolist()), tuple(e.activations.tolist())) for e in record.examples}
        halves = mine.astype(np.float16).astype(float)
        pairs = zip(window_tokens[fires].tolist(), halves[fires].tolist(), strict=True)
        expected = {(tuple(ids), tuple(values)) for ids, values in pairs}
        assert shown == expected
        quiet = {tuple(t) for t in window_tokens[~fires].tolist()}
        assert all(tuple(e.tokens.tolist()) in quiet for e in record.not_active)
    assert sorted(seen) == np.flatnonzero(acts[:kept].any(0)).tolist()
