"""`saefast harvest --data-parallel`: where processes run, and what comes of those that fail, are killed or stopped."""

import functools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import tiny_models
import torch

from saefast.cli.processes import Place, harvest_in, places
from saefast.data.shards import ShardFolder
from saefast.errors import InputError
from saefast.harvest import sequences
from saefast.harvest.to_disk import HarvestConfig, harvest

DOCUMENTS = tiny_models.documents(60)
TWO = [Place("cpu", 1), Place("cpu", 1)]


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    """As `settings` makes them, in this process too: it is put back when the test is over."""
    monkeypatch.setattr(sequences, "WINDOW_CHARS", 800)


@pytest.fixture
def lm(tmp_path):
    tiny_models.model("llama").save_pretrained(tmp_path / "lm")
    tiny_models.tokenizer(special=False).save_pretrained(tmp_path / "lm")
    return tmp_path / "lm"


def config_of(lm: Path) -> HarvestConfig:
    return HarvestConfig(
        model=str(lm), hooks=("layers.1",), ctx_len=16, dtype="float32", batch_tokens=100, heldout=0.2, device="cpu"
    )


def settings(lm: Path, then: str = ""):
    """What each process is given: small windows, and for the one that is first, what happens at its twelfth pass.

    The other one waits for that at its first pass: on a busy machine it would be done with everything by then.
    """
    sequences.WINDOW_CHARS = 800
    if then and multiprocessing.parent_process() is not None:
        happens, end = (
            lm.parent / "happens",
            {"kill": (os.getpid(), signal.SIGKILL), "stop": (os.getppid(), signal.SIGINT)},
        )

        def happen():
            happens.touch()
            os.kill(*end[then])

        def wait():
            while not happens.exists():
                time.sleep(0.01)

        try:
            (lm.parent / "first").touch(exist_ok=False)
        except FileExistsError:
            at_pass(1, wait)
        else:
            at_pass(12, happen)
    return config_of(lm), DOCUMENTS


def at_pass(n, action):
    passes = []

    def before(module, _):
        if type(module).__name__ == "LlamaModel":
            passes.append(1)
            if len(passes) == n:
                action()

    torch.nn.modules.module.register_module_forward_pre_hook(before)


def records(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "parts").glob("0*.json"))


def test_where_processes_run(monkeypatch):
    threads = torch.get_num_threads()
    assert places("auto", "cpu", {}) == [Place("cpu", threads)]
    assert places(3, "cpu", {}) == [Place("cpu", max(threads // 3, 1))] * 3
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [place.device for place in places("auto", "auto", {})] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert [place.device for place in places(6, "auto", {})][3:] == ["cuda:3", "cuda:0", "cuda:1"]
    assert [place.device for place in places("auto", "cuda:2", {})] == ["cuda:2"]
    # One of several that a launcher started.
    assert [place.device for place in places("auto", "auto", {"LOCAL_RANK": "2", "WORLD_SIZE": "8"})] == ["cuda:2"]
    assert [place.device for place in places("auto", "auto", {"SLURM_LOCALID": "1", "SLURM_NTASKS": "2"})] == ["cuda:1"]
    # A shell on a machine that srun gave, and no more.
    assert len(places("auto", "auto", {"SLURM_LOCALID": "0", "SLURM_NTASKS": "1"})) == 4
    with pytest.raises(InputError, match="data_parallel is 0, expected 'auto' or a number of processes"):
        places(0, "cpu", {})
    with pytest.raises(InputError, match="data_parallel is 1000000000000, expected at most "):
        places(10**12, "cpu", {})


def test_the_others_do_what_a_killed_process_was_at(tmp_path, lm):
    with pytest.warns(RuntimeWarning, match="was killed by signal 9; the others did its part"):
        report = harvest_in(tmp_path / "acts", functools.partial(settings, lm, "kill"), TWO, 1e9, False)
    whole = harvest(tmp_path / "one", config_of(lm), text=DOCUMENTS, progress=False)
    assert (report.rows, report.heldout_rows, report.documents) == (whole.rows, whole.heldout_rows, whole.documents)
    assert not ShardFolder(tmp_path / "acts").verify()
    assert any(
        json.loads((tmp_path / "acts/parts" / name).read_text())["folder"][-1] == "1"
        for name in records(tmp_path / "acts")
    )


def test_ctrl_c_ends_them_all_and_keeps_parts(tmp_path, lm):
    folder = tmp_path / "acts"
    with pytest.raises(KeyboardInterrupt):
        harvest_in(folder, functools.partial(settings, lm, "stop"), TWO, 1e9, False)
    assert multiprocessing.active_children() == []
    assert records(folder)
    assert not list((folder / "parts").glob("*.claim"))
    assert not (folder / "index.json").exists()


def test_what_every_process_refuses_is_said_once(tmp_path):
    with pytest.raises(InputError, match=r"^nothing will do$"):
        harvest_in(tmp_path / "acts", refused, TWO, 1e9, False)


def refused():
    if multiprocessing.parent_process() is None:
        return HarvestConfig(), None
    raise InputError("nothing will do")
