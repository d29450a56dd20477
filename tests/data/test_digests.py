"""Every byte of what saefast writes is covered by a digest: a flipped bit anywhere is noticed, wherever it is."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypedDict

import pytest
import torch
import train_job
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from saefast.data.shard_writer import ShardWriter
from saefast.data.shards import ShardFolder
from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.files import read_sealed_json, write_sealed_json
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, load
from saefast.training import checkpoint, run_folder
from saefast.training.api import train
from saefast.training.loop import RunState

CONFIG = SAEConfig(d_in=6, n_latents=20, k=3, metadata={"model_name": "a model", "note": 'quotes " and \\ and {'})
STATE = {"step": 5, "scale": 0.125, "cursor": {"epoch": 0, "row": 160}, "tensor": torch.arange(40.0)}


class Scaled(TypedDict):
    scale: float


def settings() -> TrainConfig:
    return TrainConfig(**(train_job.CONFIG | {"n_tokens": 32 * 12, "save_every": 5}))


def flip(file: Path, whole: bytes, place: int, bit: int) -> None:
    changed = bytearray(whole)
    changed[place] ^= 1 << bit
    file.write_bytes(changed)


def unnoticed(file: Path, places: Iterable[int], read: Callable[[], object]) -> list[int]:
    """The places at which a flipped bit goes unnoticed. The bit is another one at each place; anything but an
    InputError of one line that names the file or its folder is raised."""
    whole, missed = file.read_bytes(), []
    for place in places:
        flip(file, whole, place, (place * 5 + place // 8) % 8)
        said = complaint(read)
        if said is None:
            missed.append(place)
        elif "\n" in said or str(file.parent) not in said:
            pytest.fail(f"byte {place}: {said}")
    file.write_bytes(whole)
    return missed


def complaint(read: Callable[[], object]) -> str | None:
    try:
        read()
    except InputError as error:
        return str(error)
    return None


def header_bytes(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def test_a_flipped_bit_anywhere_in_a_saved_sae_is_noticed(tmp_path: Path) -> None:
    SAE(CONFIG, seed=0).save(tmp_path)
    file = tmp_path / "sae.safetensors"
    places = [*range(header_bytes(file)), *range(header_bytes(file), file.stat().st_size, 7)]
    assert unnoticed(file, places, lambda: load(tmp_path)) == []
    load(tmp_path)
    with pytest.raises(AssertionError):  # without the check, most of it goes unnoticed: this test can fail
        assert unnoticed(file, places[-50:], lambda: load(tmp_path, verify=False)) == []


def test_a_digest_that_is_no_text_is_damage(tmp_path: Path) -> None:
    SAE(CONFIG, seed=0).save(tmp_path)
    file = tmp_path / "sae.safetensors"
    whole = file.read_bytes()
    start = whole.index(b'"sha256":"') + len(b'"sha256":"')
    half_a_pair = rb"\ud800"  # six characters of JSON, which stand for one that UTF-8 does not have
    file.write_bytes(whole[:start] + half_a_pair + whole[start + len(half_a_pair) :])
    with pytest.raises(InputError, match="is damaged"):
        load(tmp_path)


@pytest.mark.parametrize("bit", range(8))
def test_every_bit_of_the_digest_itself_is_noticed(tmp_path: Path, bit: int) -> None:
    SAE(CONFIG, seed=0).save(tmp_path)
    file = tmp_path / "sae.safetensors"
    whole = file.read_bytes()
    start = whole.index(b'"sha256":')
    for place in range(start, start + 9 + 66):
        flip(file, whole, place, bit)
        with pytest.raises(InputError):
            load(tmp_path)


def test_a_sealed_file_is_plain_safetensors_and_its_digest_can_be_recomputed_by_anybody(tmp_path: Path) -> None:
    sae = SAE(CONFIG, seed=0)
    sae.save(tmp_path)
    file = tmp_path / "sae.safetensors"
    with safe_open(file, framework="pt") as opened:
        kept = opened.metadata()["sha256"]
    assert all(torch.equal(tensor, sae.state_dict()[name]) for name, tensor in load_file(file).items())
    blanked = file.read_bytes().replace(kept.encode(), b"0" * 64, 1)
    assert hashlib.sha256(blanked).hexdigest() == kept


def test_a_file_from_before_there_were_digests_loads_with_a_word(tmp_path: Path) -> None:
    sae = SAE(CONFIG, seed=0)
    facts = {"format": "saefast", "config": json.dumps(CONFIG.to_dict())}
    save_file(dict(sae.state_dict()), tmp_path / "sae.safetensors", metadata=facts)
    with pytest.warns(RuntimeWarning, match="has no digest, so damage to it cannot be seen"):
        assert torch.equal(load(tmp_path).W_enc, sae.W_enc)
    load(tmp_path, verify=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_what_is_saved_has_the_dtype_of_the_parameters(tmp_path: Path, dtype: torch.dtype) -> None:
    sae = SAE(CONFIG, seed=0).to(dtype)
    sae.save(tmp_path)
    loaded = load(tmp_path)
    assert loaded.dtype == SAE(loaded.config).dtype == dtype
    assert run_folder.read_config(tmp_path)[0] == loaded.config


def test_an_old_file_whose_config_names_another_dtype_is_what_its_tensors_are(tmp_path: Path) -> None:
    facts = {"format": "saefast", "config": json.dumps(CONFIG.to_dict())}
    tensors = {name: tensor.bfloat16() for name, tensor in SAE(CONFIG, seed=0).state_dict().items()}
    save_file(tensors, tmp_path / "sae.safetensors", metadata=facts)
    loaded = load(tmp_path, verify=False)
    assert (loaded.dtype, loaded.config.dtype) == (torch.bfloat16, "bfloat16")


def test_parameters_that_no_config_can_describe_are_not_saved(tmp_path: Path) -> None:
    mixed = SAE(CONFIG, seed=0)
    mixed.b_enc.data = mixed.b_enc.data.double()
    for sae, message in (
        (mixed, r"parameters are of torch\.float\d\d, torch\.float\d\d: expected one of"),
        (SAE(CONFIG).to(torch.float8_e4m3fn), r"parameters are of torch\.float8_e4m3fn: expected one of"),
        (SAE(CONFIG, device="meta"), "on the meta device"),
    ):
        with pytest.raises(InputError, match=message):
            sae.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def written(folder: Path) -> ShardFolder:
    with ShardWriter(folder, [{"name": "layers.1", "hf_name": "model.layers.1"}]) as writer:
        rows = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
        writer.add("train", {"layers.1": rows}, torch.zeros(30), torch.arange(30))
        writer.commit({})
    return ShardFolder(folder)


def test_a_flipped_bit_anywhere_in_the_stats_is_noticed(tmp_path: Path) -> None:
    folder, file = written(tmp_path), tmp_path / "stats.safetensors"
    assert unnoticed(file, range(file.stat().st_size), folder.stats) == []
    assert folder.stats().count == 30


def test_damaged_stats_are_counted_anew_by_the_next_writer(tmp_path: Path) -> None:
    folder, file = written(tmp_path), tmp_path / "stats.safetensors"
    before = file.read_bytes()
    flip(file, before, len(before) - 3, 2)
    with ShardWriter(tmp_path, [{"name": "layers.1", "hf_name": "model.layers.1"}]) as writer:
        writer.commit({})
    assert file.read_bytes() == before
    assert folder.stats().count == 30


def test_stats_from_before_there_were_digests_are_read(tmp_path: Path) -> None:
    folder, file = written(tmp_path), tmp_path / "stats.safetensors"
    save_file(load_file(file), file)
    assert folder.stats().count == 30


def test_a_flipped_bit_anywhere_in_a_checkpoint_falls_back_to_the_older_one(tmp_path: Path) -> None:
    old, new = (checkpoint.save(tmp_path, step, SAE(CONFIG, seed=0), STATE) for step in (5, 10))
    for file in new.iterdir():
        step = 1 if file.name == "state.json" else 101
        assert unnoticed(file, range(0, file.stat().st_size, step), lambda: checkpoint.load(new)) == []
        whole = file.read_bytes()
        flip(file, whole, len(whole) // 2, 1)
        with pytest.warns(RuntimeWarning, match=f"skipping a damaged checkpoint: .*{new.name}"):
            assert checkpoint.latest(tmp_path) == old
        file.write_bytes(whole)
    assert checkpoint.latest(tmp_path) == new


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a state.json as an editor who knows about digests would."""
    value = json.loads((path / "state.json").read_text())
    change(value)
    write_sealed_json(path / "state.json", value)


HEADS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no files": lambda head: head.update(files={}),
    "a file left out": lambda head: head["files"].pop("engine.safetensors"),
    "another file": lambda head: head["files"].update({"../../x": {"bytes": 1, "sha256": ""}}),
    "a fingerprint without size": lambda head: head["files"]["config.json"].pop("bytes"),
    "a size below 0": lambda head: head["files"]["config.json"].update(bytes=-1),
    "files a list": lambda head: head.update(files=[]),
    "no state": lambda head: head.pop("state"),
    "state a list": lambda head: head.update(state=[1]),
    "another step": lambda head: head.update(step=11),
    "a tensor that is not there": lambda head: head["state"].update(tensor={"__tensor__": "x"}),
    "a tensor without a name": lambda head: head["state"].update(tensor={"__tensor__": [1]}),
    "no scale": lambda head: head["state"].pop("scale"),
    "scale a string": lambda head: head["state"].update(scale="1"),
    "the version before": lambda head: head.update(version=checkpoint.VERSION - 1),
    "a version to come": lambda head: head.update(version=checkpoint.VERSION + 1),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_state_that_does_not_hold_what_it_must_falls_back_to_the_older_one(tmp_path: Path, case: str) -> None:
    """Even with a digest that fits: `kind` and the list of files say what must be there."""
    kind: Any = dict[str, Any]
    if "scale" in case:
        kind = Scaled
    old, new = (checkpoint.save(tmp_path, step, SAE(CONFIG, seed=0), STATE) for step in (5, 10))
    reseal(new, HEADS[case])
    with pytest.warns(RuntimeWarning, match=f"skipping a damaged checkpoint: .*{new.name}") as warned:
        found = checkpoint.newest(tmp_path, kind)
    assert found is not None
    assert found[0] == old
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)


def test_checkpoints_of_version_1_are_refused_by_their_version(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 5, SAE(CONFIG), STATE)
    head = json.loads((path / "state.json").read_text())
    del head["sha256"]
    (path / "state.json").write_text(json.dumps(head | {"version": 1}, indent=2))
    with pytest.raises(InputError, match="is of version 1, expected 4"):
        checkpoint.load(path)
    with pytest.warns(RuntimeWarning), pytest.raises(InputError, match=r"1 checkpoints, all damaged .*is of version 1"):
        checkpoint.latest(tmp_path)


def test_a_state_that_lost_its_digest_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 5, SAE(CONFIG), STATE)
    head = json.loads((path / "state.json").read_text())
    del head["sha256"]
    (path / "state.json").write_text(json.dumps(head, indent=2))
    with pytest.raises(InputError, match="has lost its digest"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", ["sae.safetensors", "engine.safetensors", "config.json", "state.json"])
def test_a_folder_or_a_loop_of_links_in_a_files_place_falls_back(tmp_path: Path, name: str) -> None:
    old, new = (checkpoint.save(tmp_path, step, SAE(CONFIG), STATE) for step in (5, 10))
    (new / name).unlink()
    (new / name).mkdir()
    with pytest.warns(RuntimeWarning, match=re.escape(str(new))):
        assert checkpoint.latest(tmp_path) == old
    (new / name).rmdir()
    (new / name).symlink_to(new / name)
    with pytest.warns(RuntimeWarning, match=re.escape(str(new))):
        assert checkpoint.latest(tmp_path) == old


@pytest.mark.parametrize("missing", sorted(RunState.__required_keys__))
def test_resume_falls_back_past_a_state_without_one_of_its_entries(tmp_path: Path, missing: str) -> None:
    train(train_job.rows(), train_job.SAE, settings(), tmp_path)
    whole = dict(load(tmp_path).state_dict())
    steps = checkpoint.list_steps(tmp_path / "checkpoints")
    reseal(steps[-1], lambda head: head["state"].pop(missing))
    with pytest.warns(RuntimeWarning, match=rf"skipping a damaged checkpoint: .*{missing} is missing"):
        train(train_job.rows(), train_job.SAE, settings(), tmp_path, resume=True)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load(tmp_path).state_dict().items())


@pytest.mark.parametrize(
    ("old", "new"), [('"scale": ', '"scale": 1'), ('"cursor": {', '"cursor": { '), ('"tokens": ', '"tokens": 9')]
)
def test_one_changed_digit_no_longer_resumes_into_another_run(tmp_path: Path, old: str, new: str) -> None:
    train(train_job.rows(), train_job.SAE, settings(), tmp_path)
    newest = checkpoint.list_steps(tmp_path / "checkpoints")[-1]
    text = (newest / "state.json").read_text()
    if old not in text:
        pytest.fail(f"{old} is not in state.json: this test checks nothing")
    (newest / "state.json").write_text(text.replace(old, new, 1))
    with pytest.warns(RuntimeWarning, match="its digest is not the one written"):
        assert checkpoint.latest(tmp_path / "checkpoints") != newest


def test_sealed_json_is_json_and_comes_back(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "text": 'quotes " \n and ünïcode', "nested": {"sha256": "not the seal"}}
    write_sealed_json(tmp_path / "x.json", value)
    found = read_sealed_json(tmp_path / "x.json")
    assert {key: found[key] for key in value} == value
    assert json.loads((tmp_path / "x.json").read_text()) == found
    write_sealed_json(tmp_path / "y.json", found)
    assert (tmp_path / "y.json").read_bytes() == (tmp_path / "x.json").read_bytes()
