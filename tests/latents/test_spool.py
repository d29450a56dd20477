"""The spool against the dense code that it is of: batches, shards, sequences met again, codes of any width."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from spooled import KINDS, UNEVEN, L, N, batches, dense, made, rows

from saefast.data.mapped_source import Located
from saefast.errors import InputError
from saefast.latents.spool import Spool, spool_codes

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("kind", KINDS)
def test_the_spool_holds_the_dense_code(kind: str, tmp_path: Path) -> None:
    sae, x = made(kind), rows()
    done: list[int] = []
    spool = spool_codes(sae, batches(x), tmp_path, done.append)
    expected = sae.encode(x).numpy()
    np.testing.assert_allclose(dense(spool), expected, rtol=1e-5, atol=1e-6)
    assert len(spool.idx) == len(spool.acts) == np.count_nonzero(expected) > N
    assert np.array_equal(spool.n_fired, (expected > 0).sum(0))
    assert sum(done) == spool.n_rows == N
    if kind in UNEVEN:
        assert len(set(np.diff(spool.row_ptr).tolist())) > 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_entries_by_latent_are_the_columns_of_the_dense_code(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = spool_codes(made(kind), batches(rows()), tmp_path)
    expected = dense(spool)
    for at_a_time in (1 << 21, 10):  # then rows are looked through in several goes
        monkeypatch.setattr(Spool.stretches, "__defaults__", (at_a_time,))
        for start, stop in ((0, L), (3, 17), (17, 18), (5, 5)):
            entries = spool.by_latent(start, stop)
            assert len(entries.ptr) == stop - start + 1
            assert entries.ptr[-1] == len(entries.row) == len(entries.acts)
            for latent in range(start, stop):
                part = slice(entries.ptr[latent - start], entries.ptr[latent - start + 1])
                fired = np.flatnonzero(expected[:, latent])
                assert np.array_equal(entries.row[part], fired)
                assert np.array_equal(entries.acts[part], expected[fired, latent])
                assert (entries.latent()[part] == latent - start).all()


@pytest.mark.parametrize("entries", [1, 30, 100, 10**9])
def test_ranges_are_all_latents_once(entries: int, tmp_path: Path) -> None:
    spool = spool_codes(made("jumprelu"), batches(rows()), tmp_path)
    for latents in (1, 7, 10**6):
        ranges = list(spool.ranges(entries, latents))
        assert [i for start, stop in ranges for i in range(start, stop)] == list(range(L))
        for start, stop in ranges:
            assert stop - start <= latents
            assert stop == start + 1 or spool.n_fired[start:stop].sum() <= entries
        # None could take in one more.
        for start, stop in ranges[:-1]:
            assert stop - start == latents or spool.n_fired[start : stop + 1].sum() > entries


def test_stretches_are_all_rows_once(tmp_path: Path) -> None:
    spool = spool_codes(made("relu"), batches(rows()), tmp_path)
    for entries in (1, 25, 10**9):
        found = list(spool.stretches(entries))
        assert [i for first, last in found for i in range(first, last)] == list(range(N))
        assert all(last == first + 1 or spool.row_ptr[last] - spool.row_ptr[first] <= entries for first, last in found)


def test_sequences_are_numbered_as_they_are_met(tmp_path: Path) -> None:
    """One begins in a batch, goes on in the next and comes again after others, as where rows were shuffled."""
    met = [[7, 7, 3, 3], [3, 9, 7, 2], [9, 9]]
    positions = [[0, 1, 0, 1], [2, 0, 300, 32767], [1, 2]]
    x = rows(10).split([4, 4, 2])
    given = [
        Located(part, torch.tensor(seq, dtype=torch.int32), torch.tensor(pos, dtype=torch.int16))
        for part, seq, pos in zip(x, met, positions, strict=True)
    ]
    spool = spool_codes(made("topk"), given, tmp_path)
    assert spool.located
    assert spool.source_sequences.tolist() == [7, 3, 9, 2]
    assert spool.sequence.tolist() == [0, 0, 1, 1, 1, 2, 0, 3, 2, 2]
    assert spool.position.tolist() == [p for part in positions for p in part]
    assert (spool.sequence.dtype, spool.position.dtype) == (np.int32, np.uint16)


def test_rows_of_no_known_sequence_have_a_code_all_the_same(tmp_path: Path) -> None:
    x = rows()
    plain = spool_codes(made("topk"), [Located(part, None, None) for part in x.split(50)], tmp_path)
    known = spool_codes(made("topk"), batches(x), tmp_path)
    mixed = spool_codes(made("topk"), [*batches(x[:100]), Located(x[100:], None, None)], tmp_path)
    for spool in (plain, mixed):
        assert np.array_equal(dense(spool), dense(known))
        assert not spool.located
        assert len(spool.sequence) == len(spool.position) == len(spool.source_sequences) == 0


def test_no_rows_and_rows_without_firings(tmp_path: Path) -> None:
    none = spool_codes(made("topk"), [], tmp_path)
    assert (none.n_rows, none.located, list(none.stretches())) == (0, False, [])
    assert none.by_latent(0, L).ptr.tolist() == [0] * (L + 1)
    sae = made("topk")
    sae.b_enc -= 1000
    silent = spool_codes(sae, batches(rows()), tmp_path)
    assert (len(silent.idx), silent.n_rows, silent.located) == (0, N, True)
    assert silent.row_ptr.tolist() == [0] * (N + 1)
    assert list(silent.ranges()) == [(0, L)]


def test_what_is_not_finite_is_refused_with_its_place(tmp_path: Path) -> None:
    x = rows()
    x[60, 3] = float("inf")
    with pytest.raises(InputError, match=r"row 60 \(sequence 498, position 14\) holds NaN or inf"):
        spool_codes(made("topk"), batches(x), tmp_path)
    sae = made("topk")
    sae.W_enc[5] = float("nan")
    with pytest.raises(InputError, match=r"the code of row 0 \(sequence 500, position 0\) holds NaN or inf"):
        spool_codes(sae, batches(rows()), tmp_path)
    bad = Located(rows(2), torch.zeros(2, dtype=torch.int32), torch.tensor([0, -1], dtype=torch.int16))
    with pytest.raises(InputError, match="positions are -1 to 0: expected 0 to 65535"):
        spool_codes(made("topk"), [bad], tmp_path)
    assert list(tmp_path.iterdir()) == []


def full_disk(dir: Path) -> IO[bytes]:
    return os.fdopen(os.open("/dev/full", os.O_WRONLY), "wb")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saefast.latents.spool.tempfile.TemporaryFile", full_disk)
    with pytest.raises(OSError) as found:
        spool_codes(made("topk"), batches(rows()), tmp_path)
    assert found.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_ended_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    program = f"""
        import os, torch
        from saefast.data.mapped_source import Located
        from saefast.latents.spool import spool_codes
        from saefast.models.config import SAEConfig
        from saefast.models.sae import SAE

        def endless():
            for i in range(10**9):
                if i == 3:
                    os.kill(os.getpid(), {int(number)})
                yield Located(torch.randn(50, 8), None, None)

        spool_codes(SAE(SAEConfig(d_in=8, n_latents=40, k=4)), endless(), {str(tmp_path)!r})
    """
    found = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, env=os.environ, capture_output=True, check=False
    )
    assert found.returncode == -number, found.stderr
    assert list(tmp_path.iterdir()) == []
