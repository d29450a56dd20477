"""Checkpoints: exact, whole or absent, checked when read; and runs that go on from them as if never stopped."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_job

from saefast.data import shardfile
from saefast.data.opening import open_source
from saefast.data.source import Source
from saefast.engines.config import TrainConfig, preset
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, load
from saefast.training import checkpoint, run_folder
from saefast.training.api import Stopped, train
from saefast.training.progress import MetricsLog, read_metrics

CONFIG = train_job.SAE
CLOCKS = ("seconds", "tokens_per_second", "idle_share")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Steps this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**(train_job.CONFIG | {"n_tokens": 32 * 12, "save_every": 5, "log_every": 1} | changes))


def bits(value: Any) -> Any:
    """Something that == compares bit for bit."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().contiguous().view(-1)
        return value.dtype, tuple(value.shape), flat.view(torch.uint8).tolist() if flat.numel() else []
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, list | tuple) else repr(value)


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves, clocks apart."""
    last = checkpoint.latest(folder / "checkpoints")
    assert last is not None
    state = checkpoint.load(last)
    kept = {key: value for key, value in state.items() if key not in ("seconds", "waited", "settings", "rng", "line")}
    lines = [{key: value for key, value in line.items() if key not in CLOCKS} for line in read_metrics(folder)]
    return {"weights": bits(dict(load(folder).state_dict())), "state": bits(kept), "metrics": lines}


def stop_at(step: int) -> Callable[[dict[str, Any]], None]:
    """An on_log that ends the run with Ctrl-C at a step."""

    def on_log(line: dict[str, Any]) -> None:
        if line["step"] == step:
            os.kill(os.getpid(), 2)

    return on_log


def train_in_two(batches: Callable[[], Any], folder: Path, step: int, sae: SAEConfig, config: TrainConfig) -> None:
    with pytest.raises(Stopped):
        train(batches(), sae, config, folder, on_log=stop_at(step))
    torch.manual_seed(step)  # what the global generator is at must not matter
    train(batches(), sae, config, folder, resume=True)


STATE = {
    "numbers": [1, -(2**70), 0.1, 1e-320, float("inf"), True, None, "text", []],
    "nested": {"a": {"b": torch.arange(6).view(2, 3)}, "list": [torch.tensor(2.5), {"c": torch.zeros(0, 4)}]},
    "view": torch.arange(12.0).view(3, 4).T[1:],
    "special": torch.tensor([0.0, -0.0, torch.nan, torch.inf, 1e-45]),
    **{str(d): torch.tensor([1, 0, 3], dtype=torch.uint8).to(d) for d in (
        torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)},
}  # fmt: skip


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    sae = SAE(CONFIG, seed=1)
    path = checkpoint.save(tmp_path, 7, sae, STATE)
    assert path == tmp_path / "step_00000007"
    assert bits(checkpoint.load(path)) == bits(STATE)
    assert bits(dict(load(path).state_dict())) == bits(dict(sae.state_dict()))
    assert checkpoint.latest(tmp_path) == path
    assert {file.name for file in path.iterdir()} == {
        "sae.safetensors",
        "config.json",
        "engine.safetensors",
        "state.json",
    }


@pytest.mark.parametrize("value", [np.float64(1), {1: 2}, object(), {"deep": [torch.device("cpu")]}])
def test_what_cannot_come_back_exactly_is_refused(tmp_path: Path, value: Any) -> None:
    if isinstance(value, np.float64):
        value = np.arange(3)
    with pytest.raises(TypeError, match="no checkpoint can store"):
        checkpoint.save(tmp_path, 1, SAE(CONFIG), {"x": value})
    assert list(tmp_path.iterdir()) == []


def test_large_tensors_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shardfile, "_PIECE_BYTES", 64)
    assert bits(checkpoint.load(checkpoint.save(tmp_path, 1, SAE(CONFIG), STATE))) == bits(STATE)


def test_old_checkpoints_go(tmp_path: Path) -> None:
    for step in (5, 10, 99999999, 100000000):
        checkpoint.save(tmp_path, step, SAE(CONFIG), {}, keep=2)
    assert [checkpoint.step_of(path) for path in checkpoint.list_steps(tmp_path)] == [99999999, 100000000]
    assert checkpoint.latest(tmp_path) == tmp_path / "step_100000000"


def test_a_damaged_newer_checkpoint_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    for step in (10, 20):
        checkpoint.save(tmp_path, step, SAE(CONFIG), {})
    os.truncate(tmp_path / "step_00000020" / "engine.safetensors", 3)
    checkpoint.save(tmp_path, 15, SAE(CONFIG), {}, keep=1)
    with pytest.warns(RuntimeWarning, match="truncated: 3 bytes"):
        assert checkpoint.latest(tmp_path) == tmp_path / "step_00000015"
    checkpoint.save(tmp_path, 20, SAE(CONFIG), {"a": 1}, keep=1)
    assert checkpoint.load(tmp_path / "step_00000020") == {"a": 1}


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["sae.safetensors", "engine.safetensors", "config.json", "state.json"])
@pytest.mark.parametrize("damage", [cut, flip, Path.unlink, lambda file: os.truncate(file, 0)])
def test_damage_is_named_and_skipped(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    state = {"tensor": torch.arange(100.0), "number": 1}
    old, new = (checkpoint.save(tmp_path, step, SAE(CONFIG), state) for step in (5, 10))
    damage(new / name)
    if name == "state.json" and damage in (cut, flip):
        (new / name).write_text((new / name).read_text()[:-40])
    with pytest.raises(InputError) as caught:
        checkpoint.load(new)
    assert str(new / name) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.warns(RuntimeWarning, match="skipping a damaged checkpoint: .*step_00000010"):
        assert checkpoint.latest(tmp_path) == old
    damage(old / name)
    (old / "state.json").unlink(missing_ok=True)
    with pytest.warns(RuntimeWarning), pytest.raises(InputError, match="2 checkpoints, all damaged"):
        checkpoint.latest(tmp_path)


def test_foreign_state_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 5, SAE(CONFIG), {})
    for content in ("[]", '{"format": "saefast checkpoint", "version": 99}', "{}"):
        (path / "state.json").write_text(content)
        with pytest.raises(InputError, match="no checkpoint of this version"):
            checkpoint.load(path)


@pytest.mark.parametrize("step", [1, 2, 5, 8, 11])
@pytest.mark.parametrize("kind", ["array", "iterable"])
def test_resume_equals_an_uninterrupted_run(tmp_path: Path, kind: str, step: int) -> None:
    config = settings(init_rows=96, eval_every=3)  # stopping at step 1 and 2 lies within the rows drawn ahead
    train(train_job.data(kind), CONFIG, config, tmp_path / "whole")
    train_in_two(lambda: train_job.data(kind), tmp_path / "parts", step, CONFIG, config)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("engine", ["autograd", "fused"])
@pytest.mark.parametrize("name", ["saefast", "openai", "sparsify", "dictionary_learning", "saelens"])
def test_resume_of_every_recipe(tmp_path: Path, name: str, engine: str) -> None:
    changes = {"n_tokens": 320, "log_every": 1, "init_rows": 64, "save_every": 4, "dead_after": 3, "engine": engine}
    changes = train_job.CONFIG | changes
    sae, config = preset(name, 12, 48, 4, **changes, multi_topk_coef=0.1)
    train(train_job.rows(), sae, config, tmp_path / "whole")
    train_in_two(train_job.rows, tmp_path / "parts", 6, sae, config)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    if name == "openai":
        assert bits(dict(load(tmp_path / "parts/ema").state_dict())) == bits(
            dict(load(tmp_path / "whole/ema").state_dict())
        )


def test_resume_of_the_lean_optimiser(tmp_path: Path) -> None:
    config = settings(optimizer="adam-lean", engine="fused")
    train(train_job.rows(), CONFIG, config, tmp_path / "whole")
    train_in_two(train_job.rows, tmp_path / "parts", 5, CONFIG, config)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    assert load(tmp_path / "parts").dtype == torch.bfloat16


def test_resume_from_files_and_lists(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", train_job.rows().numpy())
    for number, batches in enumerate([lambda: tmp_path / "x.npy", lambda: list(train_job.rows().split(64))]):
        train(batches(), CONFIG, settings(), tmp_path / f"whole{number}")
        train_in_two(batches, tmp_path / f"parts{number}", 7, CONFIG, settings())
        assert outcome(tmp_path / f"parts{number}") == outcome(tmp_path / f"whole{number}")


def test_resume_of_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    sae = train(train_job.rows(), CONFIG, settings(), tmp_path / "run")
    before = outcome(tmp_path / "run")
    again = train(train_job.rows(), CONFIG, settings(), tmp_path / "run", resume=True)
    assert bits(dict(again.state_dict())) == bits(dict(sae.state_dict()))
    assert outcome(tmp_path / "run") == before


def test_resume_with_nothing_there_starts_and_says_so(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="holds no checkpoint: starting from the beginning"):
        train(train_job.rows(), CONFIG, settings(), tmp_path / "run", resume=True)
    train(train_job.rows(), CONFIG, settings(), tmp_path / "whole")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_a_run_can_be_made_longer(tmp_path: Path) -> None:
    """Exactly so where neither the learning rate nor the end of resampling depends on the length."""
    config = {"lr_decay_start": -1, "eval_every": 0, "resample_until": 1.0}
    train(train_job.rows(), CONFIG, settings(**config), tmp_path / "run")
    changed = settings(**config, n_tokens=32 * 20, log_every=4, save_every=7)
    train(train_job.rows(), CONFIG, changed, tmp_path / "run", resume=True)
    train(train_job.rows(), CONFIG, settings(**config, n_tokens=32 * 20), tmp_path / "whole")
    run, whole = outcome(tmp_path / "run"), outcome(tmp_path / "whole")
    assert run["weights"] == whole["weights"]
    assert run["state"] == whole["state"]
    assert [line["step"] for line in run["metrics"]] == [*range(1, 13), 16, 20]
    assert run_folder.read_config(tmp_path / "run") == (CONFIG, changed)


def test_resume_refuses_another_config_and_names_each_difference(tmp_path: Path) -> None:
    train(train_job.rows(), CONFIG, settings(), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    other = SAEConfig(12, 48, 5)
    with pytest.raises(InputError, match=r"\(k was 4, is 5; batch_size was 32, is 16; lr was 0.01, is 0.02\)"):
        train(train_job.rows(), other, settings(lr=2e-2, batch_size=16), tmp_path / "run", resume=True)
    with pytest.raises(InputError, match=r"at step 12, beyond the 6 steps asked for: raise n_tokens to at least 384"):
        train(train_job.rows(), CONFIG, settings(n_tokens=32 * 6), tmp_path / "run", resume=True)
    with pytest.raises(InputError, match="n_rows = 665, this source 475"):
        train(train_job.rows(500), CONFIG, settings(), tmp_path / "run", resume=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    renamed = SAEConfig(12, 48, 4, metadata={"note": "facts may change"})
    train(train_job.rows(), renamed, settings(), tmp_path / "run", resume=True)


def test_a_generator_cannot_be_resumed_and_is_told_why(tmp_path: Path) -> None:
    def generator() -> Iterator[torch.Tensor]:
        yield from train_job.rows().split(50)

    with pytest.raises(Stopped):
        train(generator(), CONFIG, settings(), tmp_path / "run", on_log=stop_at(6))
    with pytest.raises(InputError, match="is a generator and cannot be resumed: pass a list"):
        train(generator(), CONFIG, settings(), tmp_path / "run", resume=True)


def test_data_that_breaks_when_interrupted_does_not_cost_the_checkpoint(tmp_path: Path) -> None:
    """As when Ctrl-C ends the worker processes of a DataLoader that the loop is waiting for."""

    def fragile() -> Iterator[torch.Tensor]:
        for number, batch in enumerate(train_job.rows().split(32)):
            if number == 7:
                os.kill(os.getpid(), 2)
                raise RuntimeError("DataLoader worker exited unexpectedly")
            yield batch

    def whole() -> Source:
        return open_source(lambda: train_job.rows().split(32), shuffle_rows=0)

    with pytest.raises(Stopped, match="stopped at step 7;"):
        train(open_source(fragile, shuffle_rows=0), CONFIG, settings(), tmp_path / "run")
    train(whole(), CONFIG, settings(), tmp_path / "run", resume=True)
    train(whole(), CONFIG, settings(), tmp_path / "whole")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_resume_goes_back_past_a_damaged_checkpoint(tmp_path: Path) -> None:
    train(train_job.rows(), CONFIG, settings(), tmp_path / "run")
    expected = outcome(tmp_path / "run")
    os.truncate(tmp_path / "run/checkpoints/step_00000012/sae.safetensors", 100)
    with pytest.warns(RuntimeWarning, match="sae.safetensors is truncated: 100 bytes of"):
        train(train_job.rows(), CONFIG, settings(), tmp_path / "run", resume=True)
    assert outcome(tmp_path / "run") == expected


def test_checkpoints_serve_raw_inputs(tmp_path: Path) -> None:
    """Any checkpoint can be loaded and used, although training sees scaled inputs."""
    sae = train(train_job.rows() * 50, CONFIG, settings(engine="autograd"), tmp_path / "run")
    stored = load(tmp_path / "run/checkpoints/step_00000012")
    torch.testing.assert_close(dict(stored.state_dict()), dict(sae.state_dict()))


class TestMetricsLog:
    def test_lines_after_the_checkpoint_and_torn_lines_are_cut(self, tmp_path: Path) -> None:
        log = MetricsLog(tmp_path)
        for step in (2, 4, 6):
            log.write({"step": step})
        log.close()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "torn')
        assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4, 6]
        log = MetricsLog(tmp_path, after=4)
        log.write({"step": 8})
        log.close()
        assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4, 8]

    def test_each_line_is_there_at_once(self, tmp_path: Path) -> None:
        log = MetricsLog(tmp_path)
        log.write({"step": 1})
        assert read_metrics(tmp_path) == [{"step": 1}]
        log.write({"step": 1, "more": 2})
        assert read_metrics(tmp_path) == [{"step": 1, "more": 2}]

    def test_garbage_is_cut_on_resume_and_named_on_reading(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 3}\n')
        with pytest.raises(InputError, match=r"metrics\.jsonl line 2 is not valid JSON"):
            read_metrics(tmp_path)
        MetricsLog(tmp_path, after=3).close()
        assert read_metrics(tmp_path) == [{"step": 1}]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("at", range(14))
def test_full_disk_at_any_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The disk is full from the at-th flush of the second checkpoint on: the first stays, nothing half remains."""
    run = tmp_path / "run"
    calls = [0]
    original = os.fsync

    def full(descriptor: int) -> None:
        if (run / "checkpoints" / "step_00000005").exists():
            calls[0] += 1
            if calls[0] > at + 1:  # the first belongs to the folder of checkpoint 5 itself
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    message = r"cannot write .* \(No space left on device\): free space and resume; .*step_000000(05|10) is intact"
    with pytest.raises(InputError, match=message):
        train(train_job.rows(), CONFIG, settings(), run)
    assert not list(run.rglob("*.tmp"))
    monkeypatch.setattr(os, "fsync", original)
    for path in checkpoint.list_steps(run / "checkpoints"):
        checkpoint.verify(path)
    train(train_job.rows(), CONFIG, settings(), run, resume=True)
    train(train_job.rows(), CONFIG, settings(), tmp_path / "whole")
    assert outcome(run) == outcome(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a memory disk with the options given; skips where this is not allowed."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        if (
            shutil.which("mount") is None
            or subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True, check=False
            ).returncode
        ):
            pytest.skip("may not mount a small disk here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_really_fills_up(small_disk: Callable[[str], Path]) -> None:
    run = small_disk("size=100k") / "run"
    with pytest.raises(InputError, match=r"No space left on device.*is intact") as caught:
        train(train_job.rows(), CONFIG, settings(), run, keep_checkpoints=50)
    assert "\n" not in str(caught.value)
    assert not list(run.rglob("*.tmp"))
    kept = checkpoint.list_steps(run / "checkpoints")
    assert kept
    for path in kept:
        checkpoint.verify(path)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def test_a_disk_too_small_for_anything(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=4k")
    with pytest.raises(InputError, match=r"No space left on device.*nothing was saved"):
        train(train_job.rows(), CONFIG, settings(), disk / "run")
    assert not list(disk.rglob("*.tmp"))


def test_read_only_folder(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("size=100k")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(InputError, match=r"cannot write .*run \(Read-only file system\): nothing was saved"):
        train(train_job.rows(), CONFIG, settings(), disk / "run")


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(InputError, match=r"cannot write .*run"):
        train(train_job.rows(), CONFIG, settings(), tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"
