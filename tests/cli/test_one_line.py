"""Damaged and foreign files, impossible paths and absurd sizes: one line that says what and where, never a traceback,
and never somebody else's file overwritten."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_job
from torch import nn

import saefast
from saefast import placement
from saefast.cli.main import main
from saefast.data import shardfile
from saefast.data.opening import open_source
from saefast.data.provenance import describe_data
from saefast.data.shard_writer import ShardWriter
from saefast.data.shards import ShardFolder
from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.files import read_json, usable, write_sealed_json
from saefast.harvest.capture import HookedRunner, ModuleRunner
from saefast.harvest.text import open_text
from saefast.harvest.to_disk import harvest
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, load
from saefast.training.api import train
from saefast.training.progress import read_metrics
from saefast.training.run_folder import read_config
from saefast.training.several import Member, train_many

CONFIG = train_job.SAE
DEEP = "[" * 100_000
HOOKS = [{"name": "layers.1", "hf_name": "m.layers.1"}, {"name": "layers.2", "hf_name": "m.layers.2"}]


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**(train_job.CONFIG | {"n_tokens": 32 * 4, "save_every": 2} | changes))


def refused(call: Callable[[], object], *said: object) -> str:
    """The one line that a call ends in; it holds every piece of `said`."""
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    for piece in said:
        assert str(piece) in text
    return text


def harvested(folder: Path) -> Path:
    with ShardWriter(folder, HOOKS) as writer:
        rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
        writer.add_sequences(0, [0, 1], [list(range(20)), list(range(20))])
        seq, pos = torch.arange(40) // 20, torch.arange(40) % 20
        writer.add("train", {"layers.1": rows, "layers.2": rows + 1}, seq, pos)
        writer.commit({"seqs": 2})
    return folder


# --- JSON of every kind -------------------------------------------------------------------------------------------


def test_deep_huge_and_unreadable_json_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    for content in (DEEP, '{"a": ' * 50_000, "[" + "9" * 5000 + "]", "nul", "", '{"a": "\\ud8', "{'a': 1}"):
        file.write_text(content)
        refused(lambda: read_json(file), file)
    file.write_bytes(b"\xff\xfe\x00[")
    refused(lambda: read_json(file), file)
    file.unlink()
    file.mkdir()
    refused(lambda: read_json(file), file, "Is a directory")
    refused(lambda: read_json(tmp_path / "none"), "does not exist")


@pytest.mark.parametrize("read", [read_config, lambda folder: train(train_job.rows(), CONFIG, settings(), folder)])
@pytest.mark.parametrize(
    "content", [DEEP, "[]", "3", "{}", '{"d_in": "4", "n_latents": 8}', '{"d_in": 4, "n_latents": 8, "train": []}',
                '{"d_in": 4, "n_latents": 8, "train": {"seed": "x"}}', '{"d_in": 4, "n_latents": 8, "k": null}',
                '{"d_in": 4, "n_latents": 8, "k": 2, "metadata": []}',
                '{"d_in": 4, "n_latents": 8, "train": {"lr": []}}']
)  # fmt: skip
def test_a_bad_config_is_named_with_its_file(tmp_path: Path, content: str, read: Callable[[Path], object]) -> None:
    (tmp_path / "config.json").write_text(content)
    if read is read_config:
        refused(lambda: read(tmp_path), tmp_path / "config.json")
    elif '"d_in"' not in content:
        refused(lambda: read(tmp_path), tmp_path / "config.json", "is no SAE's config: it is not overwritten")
        assert (tmp_path / "config.json").read_text() == content


CONFIGS: dict[str, Any] = {
    "deep": DEEP,
    "not an object": "[1]",
    "no widths": "{}",
    "absent": None,
    "width a string": '{"d_in": "6", "n_latents": 20}',
    "other widths": '{"d_in": 7, "n_latents": 20, "k": 3}',
    "absurd widths": json.dumps({"d_in": 2**31 - 1, "n_latents": 2**31 - 1, "k": 3}),
    "metadata a list": '{"d_in": 6, "n_latents": 20, "k": 3, "metadata": [1]}',
    "unknown activation": '{"d_in": 6, "n_latents": 20, "k": 3, "activation": ["topk"]}',
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_bad_config_inside_an_sae_is_named(tmp_path: Path, case: str) -> None:
    file = tmp_path / "sae.safetensors"
    columns = {name: shardfile.Column.of(t.detach()) for name, t in SAE(SAEConfig(6, 20, 3)).state_dict().items()}
    facts = {"format": "saefast"} | ({} if CONFIGS[case] is None else {"config": CONFIGS[case]})
    shardfile.write_file(file, columns, facts, sealed=True)
    refused(lambda: load(file), file)


# --- safetensors, .npy, .pt, .meta --------------------------------------------------------------------------------

HEADERS: dict[str, Any] = {
    "deep": DEEP.encode(),
    "a list": [],
    "a tensor that is a list": {"x": []},
    "no shape": {"x": {"dtype": "F32", "data_offsets": [0, 8]}},
    "shape a string": {"x": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}},
    "shape of strings": {"x": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}},
    "shape of floats": {"x": {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]}},
    "negative shape": {"x": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}},
    "dtype a list": {"x": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
    "one offset": {"x": {"dtype": "F32", "shape": [2], "data_offsets": [8]}},
    "three offsets": {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 9]}},
    "offsets backwards": {"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
    "offsets below 0": {"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
    "offset None": {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, None]}},
    "a shape beyond 64 bits": {"x": {"dtype": "F32", "shape": [2**70, 0], "data_offsets": [0, 0]}},
    "an empty shape beyond 64 bits": {"x": {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}},
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_bad_safetensors_header_is_named(tmp_path: Path, case: str) -> None:
    header = HEADERS[case] if isinstance(HEADERS[case], bytes) else json.dumps(HEADERS[case]).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused(lambda: shardfile.read_header(file), file)
    refused(lambda: open_source(file), file)


@pytest.mark.parametrize("metadata", [[], "x", {"a": 1}, {"sha256": None}, {"sha256": []}])
def test_bad_metadata_is_named(tmp_path: Path, metadata: Any) -> None:
    header = json.dumps({"__metadata__": metadata}).encode()
    (tmp_path / "stats.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    refused(lambda: shardfile.verify_seal(tmp_path / "stats.safetensors", set()), "stats.safetensors")


def test_a_damaged_npy_header_is_named(tmp_path: Path) -> None:
    """Every byte of the header replaced by brackets, quotes, NUL ...: numpy's parser raises a dozen kinds of errors."""
    file = tmp_path / "x.npy"
    np.save(file, np.zeros((4, 3), np.float32))
    whole, silent = file.read_bytes(), 0
    for place in range(128):
        for byte in b"\0([{'\"9-,\xff#":
            file.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
            try:
                open_source(file)
            except InputError as error:
                said = str(error)
                if "\n" in said or str(file) not in said:
                    pytest.fail(said)
            else:
                silent += 1
    assert silent < 1000


METAS: dict[str, Any] = {
    "no shape": {},
    "a list": [3, 5],
    "shape a number": {"shape": 15},
    "shape of strings": {"shape": ["3", "5"]},
    "negative": {"shape": [-3, -5]},
    "dtype a number": {"shape": [3, 5], "dtype": 32},
    "an unknown dtype": {"shape": [3, 5], "dtype": "torch.flot32"},
    "dtype object": {"shape": [3, 5], "dtype": "object"},
    "dtype int": {"shape": [3, 5], "dtype": "torch.int32"},
    "beyond 64 bits": {"shape": [2**62, 2**62], "dtype": "torch.float32"},
    "empty": {"shape": [0, 5], "dtype": "torch.float32"},
}


@pytest.mark.parametrize("case", METAS)
def test_a_bad_meta_is_named(tmp_path: Path, case: str) -> None:
    np.zeros((3, 5), np.float32).tofile(tmp_path / "shard_0.memmap")
    (tmp_path / "shard_0.meta").write_text(json.dumps(METAS[case]))
    refused(lambda: open_source(tmp_path), tmp_path / "shard_0.me")


@pytest.mark.parametrize("value", [3, [torch.zeros(2, 2)], {"activation": 3}, {"activation": [1.0]}, {1: 2}])
def test_a_chunk_of_other_things_is_named(tmp_path: Path, value: Any) -> None:
    torch.save(value, tmp_path / "chunk-0.pt")
    refused(lambda: open_source(tmp_path), "chunk-0.pt")


def test_a_mask_that_is_no_tensor_is_left_out(tmp_path: Path) -> None:
    torch.save({"activation": torch.ones(4, 3), "mask": [1, 1, 0, 0]}, tmp_path / "chunk-0.pt")
    assert open_source(tmp_path, heldout=0).n_rows == 4


def test_a_line_of_text_that_is_no_json_is_skipped_by_its_number(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join([DEEP, '{"text": ' + "9" * 5000 + "}", "{", '{"text": "kept"}']))
    text = open_text(file)
    assert list(text) == ["kept"]
    assert [line.split(" is not JSON")[0] for line in text.skipped] == [f"{file} line {n}" for n in (1, 2, 3)]


# --- index.json ---------------------------------------------------------------------------------------------------

INDEX: dict[str, Callable[[dict[str, Any]], object]] = {
    "version a string": lambda index: index.update(version="1"),
    "no version": lambda index: index.pop("version"),
    "hooks an object": lambda index: index.update(hooks={}),
    "no hooks": lambda index: index.update(hooks=[]),
    "a hook without hf_name": lambda index: index["hooks"][0].pop("hf_name"),
    "hooks of one folder": lambda index: index["hooks"][1].update(name=".layers.1"),
    "a hook in the tokens' folder": lambda index: index["hooks"][1].update(name="tokens"),
    "d a string": lambda index: index["hooks"][0].update(d="6"),
    "no digest of a hook": lambda index: index["shards"][0]["sha256"].pop("layers.2"),
    "no checksums of a hook": lambda index: index["shards"][0]["crc32"].pop("layers.2"),
    "checksums a number": lambda index: index["shards"][0]["crc32"].update({"layers.2": 3}),
    "rows below 0": lambda index: index["shards"][0].update(rows=-1),
    "an unknown split": lambda index: index["shards"][0].update(split="test"),
    "a file outside": lambda index: index["shards"][0].update(file="../../x.safetensors"),
    "tokens outside": lambda index: index["tokens"][0].update(file="/etc/passwd"),
    "no n_seq": lambda index: index["tokens"][0].pop("n_seq"),
    "sequences that leave a gap": lambda index: index["tokens"][0].update(first_seq=1),
    "dtype unknown": lambda index: index.update(dtype="float8"),
    "splits a list": lambda index: index.update(splits=[]),
    "cursor a list": lambda index: index.update(cursor=[]),
    "dropped a string": lambda index: index.update(dropped="none"),
}


@pytest.mark.parametrize("case", INDEX)
def test_a_bad_index_is_named(tmp_path: Path, case: str) -> None:
    file = harvested(tmp_path) / "index.json"
    index = json.loads(file.read_text())
    INDEX[case](index)
    write_sealed_json(file, index)
    refused(lambda: ShardFolder(tmp_path), file)
    refused(lambda: ShardWriter(tmp_path, HOOKS), file)


def test_an_index_of_before_there_were_digests_is_read_and_a_changed_one_is_not(tmp_path: Path) -> None:
    file = harvested(tmp_path) / "index.json"
    whole = file.read_text()
    file.write_text(whole.replace('"split": "train"', '"split": "heldout"'))
    refused(lambda: ShardFolder(tmp_path), file, "is damaged: its digest is not the one written")
    index = json.loads(whole)
    del index["sha256"]
    file.write_text(json.dumps(index))
    assert ShardFolder(tmp_path).n_rows(hook="layers.1") == 40


@pytest.mark.parametrize("kept", [False, True])
def test_what_a_harvest_kept_is_read_from_its_settings(tmp_path: Path, kept: bool) -> None:
    """It was once looked for where no harvest writes it: then special tokens always counted as left out."""
    with ShardWriter(tmp_path, HOOKS[:1], settings={"keep_special_tokens": kept}) as writer:
        writer.add("train", {"layers.1": torch.randn(40, 6)}, torch.zeros(40), torch.arange(40))
        writer.commit({})
    assert ShardFolder(tmp_path).keeps_special_tokens == kept
    source = open_source(tmp_path, shuffle="mapped")
    facts = describe_data(tmp_path, tmp_path / "run", source, hook=None, key=None, heldout=0.05)
    assert facts["exclude_special_tokens"] == (not kept)


def test_tokens_that_do_not_fit_the_index_are_named(tmp_path: Path) -> None:
    file = harvested(tmp_path) / "index.json"
    index = json.loads(file.read_text())
    index["tokens"][0]["n_seq"] = 3
    write_sealed_json(file, index)
    folder = ShardFolder(tmp_path)
    for call in (lambda: folder.tokens(2), lambda: folder.document(0), lambda: folder.token_ids(torch.tensor([2]), torch.tensor([0]))):  # fmt: skip  # noqa: E501
        refused(call, tmp_path / "tokens")
    assert folder.verify()


@pytest.mark.parametrize("offsets", [[0, 30, 20], [1, 20, 40], [0, 20, 41], [0, 20, -1]])
def test_damaged_offsets_and_positions_are_named(tmp_path: Path, offsets: list[int]) -> None:
    harvested(tmp_path)
    columns = {
        "ids": torch.arange(40, dtype=torch.int32),
        "offsets": torch.tensor(offsets),
        "doc": torch.zeros(2).long(),
    }
    shardfile.write_file(tmp_path / "tokens/00000.safetensors", {k: shardfile.Column.of(v) for k, v in columns.items()})
    refused(lambda: ShardFolder(tmp_path).tokens(0), "its offsets do not rise from 0 to its 40 ids")


def test_a_position_outside_its_sequence_is_named(tmp_path: Path) -> None:
    folder = ShardFolder(harvested(tmp_path))
    for pos in (-1, 20, 2**14):
        refused(lambda pos=pos: folder.token_ids(torch.tensor([0, 1]), torch.tensor([0, pos])), "position is outside")


# --- paths --------------------------------------------------------------------------------------------------------


def test_a_harvest_without_a_folder_does_not_write_into_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: harvest("", model=object()), "is no path of a file or folder")
    assert list(tmp_path.iterdir()) == []


PATHS = ["", "a\0b", "x" * 5000, "\ud800", "~nobody-of-this-name/x"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "use",
    [usable, load, read_config, read_metrics, open_source, read_json, ShardFolder,
     lambda path: SAE(CONFIG).save(path), lambda path: train(train_job.rows(), CONFIG, settings(), path),
     lambda path: train(path, CONFIG, settings()), lambda path: ShardWriter(path, HOOKS),
     lambda path: train_many({"a": Member(train_job.rows(), CONFIG, settings())}, path),
     lambda path: saefast.analysis.evaluation.evaluate_run(path)],
)  # fmt: skip
def test_impossible_paths_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, use: Any) -> None:
    import saefast.analysis.evaluation  # noqa: F401

    monkeypatch.chdir(tmp_path)
    text = refused(lambda: use(path), "is no path of a file or folder")
    assert text.isascii()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["", ".npy", ".safetensors", ".pt"])
def test_loops_of_links_are_refused(tmp_path: Path, suffix: str) -> None:
    loop = tmp_path / f"loop{suffix}"
    loop.symlink_to(loop)
    for path in (loop, loop / "inside"):
        for use in (load, open_source, read_json, read_config, ShardFolder, SAE(CONFIG).save):
            refused(lambda use=use, path=path: use(path), "oop")
        refused(lambda path=path: train(train_job.rows(), CONFIG, settings(), path), "oop")


def test_names_that_are_not_utf_8_work(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe"))
    np.save(Path(os.fsdecode(os.fsencode(tmp_path) + b"/rows\xff.npy")), train_job.rows().numpy())
    data = Path(os.fsdecode(os.fsencode(tmp_path) + b"/rows\xff.npy"))
    sae = train(data, CONFIG, settings(), folder)
    assert torch.equal(load(folder).W_enc, sae.W_enc)
    train(data, CONFIG, settings(), folder, resume=True)


# --- other people's files and folders -----------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("place", [".", "ema"])
@pytest.mark.filterwarnings("ignore:.*holds no checkpoint")
def test_a_config_of_another_program_is_never_overwritten(tmp_path: Path, resume: bool, place: str) -> None:
    foreign = tmp_path / place / "config.json"
    foreign.parent.mkdir(exist_ok=True)
    for content in ('{"architectures": ["GPT2LMHeadModel"]}', "not JSON", "[]"):
        foreign.write_text(content)
        refused(
            lambda: train(train_job.rows(), CONFIG, settings(), tmp_path, resume=resume), foreign, "not overwritten"
        )
        refused(lambda: SAE(CONFIG).save(foreign.parent), foreign, "not overwritten")
        assert foreign.read_text() == content
        assert sum(path.is_file() for path in tmp_path.rglob("*")) == 1


def test_a_config_of_ours_is_no_obstacle(tmp_path: Path) -> None:
    """As when settings are written by hand first, or a run was killed right at its beginning."""
    (tmp_path / "config.json").write_text(json.dumps(SAEConfig(3, 9, 2).to_dict()))
    train(train_job.rows(), CONFIG, settings(), tmp_path)
    assert read_config(tmp_path)[0] == CONFIG
    load(tmp_path).save(tmp_path)


def test_a_damaged_config_of_a_run_with_checkpoints_does_not_stop_it(tmp_path: Path) -> None:
    train(train_job.rows(), CONFIG, settings(), tmp_path)
    (tmp_path / "config.json").write_text("{")
    train(train_job.rows(), CONFIG, settings(), tmp_path, resume=True)
    assert read_config(tmp_path)[0] == CONFIG


def test_a_harvest_leaves_other_peoples_hidden_files(tmp_path: Path) -> None:
    theirs = tmp_path / ".notes.tmp"
    theirs.write_text("theirs")
    harvested(tmp_path)
    ShardWriter(tmp_path, HOOKS).close()
    assert theirs.read_text() == "theirs"


@pytest.mark.parametrize(
    "names", [["../x"], ["/tmp/x"], ["a/../../x"], [""], ["."], ["a", "./a"], ["a", "a/b"], ["a\0"], []]
)
def test_members_stay_in_the_runs_folder(tmp_path: Path, names: list[str]) -> None:
    members = {name: Member(train_job.rows(), CONFIG, settings()) for name in names}
    refused(lambda: train_many(members, tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


ONE = ["--n-latents", "24", "--k", "2", "--n-tokens", "64", "--batch-size", "16"]
BAD_COMMANDS: dict[str, tuple[list[str], str]] = {
    "no folder": (["train", "x.npy", "--out", ""], "--out is empty"),
    "no folder, with =": (["train", "x.npy", "--out="], "--out is empty"),
    "no folder for a harvest": (["harvest", "--out", ""], "--out is empty"),
    "no data": (["train", "", "--out", "run"], "an argument is empty"),
    "hooks outside": (["train", "acts", "--hooks", "../../x", "--out", "run"], "is no name for an SAE"),
    "hooks of an array": (["train", "x.npy", "--hooks", "a,b", "--out", "run"], "has no hooks to choose from"),
    "a hook of an array": (["train", "x.npy", "--hook", "a", "--out", "run"], "has no hooks to choose from"),
    "a hook twice": (["train", "acts", "--hooks", "layers.1,layers.1", "--out", "run"], "is named twice"),
    "a hook by both names": (["train", "acts", "--hooks", "layers.1,m.layers.1", "--out", "run"], "name each once"),
    "no hooks": (["train", "acts", "--hooks", ",", "--out", "run"], "is no name for an SAE"),
    "hook and hooks": (
        ["train", "acts", "--hook", "layers.1", "--hooks", "layers.2", "--out", "run"],
        "one or the other",
    ),
    "a key of an array": (["train", "x.npy", "--key", "a", "--out", "run"], "holds one array and no names"),
    "a key of a .pt of one array": (["train", "x.pt", "--key", "a", "--out", "run"], "holds one array and no names"),
    "a key of a harvest": (["train", "acts", "--hook", "layers.1", "--key", "a", "--out", "run"], "has no keys"),
    "meta": (["train", "x.npy", "--device", "meta", "--out", "run"], "device is 'meta'"),
    "a seed beyond 64 bits": (["train", "x.npy", "--seed", str(2**63 - 1) + "0", "--out", "run"], "2^63"),
    "an absurd dictionary": (["train", "x.npy", "--n-latents", "2000000000", "--out", "run"], "needs at least"),
    "a dictionary beyond ids": (["train", "x.npy", "--n-latents", "1T", "--out", "run"], "less than 2^31"),
    "an absurd batch": (["train", "x.npy", "--batch-size", "1T", "--out", "run"], "the run has only"),
    "an absurd batch of many tokens": (
        ["train", "x.npy", "--batch-size", "1T", "--n-tokens", "2T", "--out", "run"],
        "needs at least",
    ),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_a_bad_command_ends_in_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = train_job.rows(60)
    np.save("x.npy", rows.numpy())
    torch.save(rows, "x.pt")
    harvested(Path("acts"))
    before = sorted(tmp_path.rglob("*"))
    argv, message = BAD_COMMANDS[case]
    assert main(argv) == 2
    *notes, last = capfd.readouterr().err.splitlines()
    assert last.startswith("saefast: error: ")
    assert message in last
    assert all(" is " in note for note in notes)  # what 1T was taken for
    assert sorted(tmp_path.rglob("*")) == before


# --- sizes, seeds, devices ----------------------------------------------------------------------------------------


def test_absurd_sizes_are_refused_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "_memory_of", lambda device: 10**9)
    monkeypatch.setattr("saefast.models.sae.init_weights", lambda *args, **kwargs: pytest.fail("weights were made"))
    refused(lambda: SAE(SAEConfig(1000, 10**6, 4)), "d_in = 1000 needs at least 8.0 GB, cpu has 1.0 GB")
    # The weights would fit, the optimiser's state as well does not.
    refused(lambda: train(torch.randn(50, 1000), SAEConfig(1000, 10**5, 4), settings()), "n_latents = 100000", "2.")
    rows = torch.randn(5000, 4)
    refused(lambda: train(rows, SAEConfig(4, 16, 2), TrainConfig(batch_size=10**9, n_tokens=10**12)), "batch_size")
    refused(
        lambda: train(rows, SAEConfig(4, 16, 2), TrainConfig(batch_size=4800, n_epochs=1)), "4800", "only 4750 tokens"
    )
    # More than any number of passes over them.
    refused(lambda: train(rows, SAEConfig(4, 16, 2), TrainConfig(batch_size=95_000)), "95000", "has only", "tokens")


def test_little_data_still_makes_a_run_of_one_step() -> None:
    train(torch.randn(50, 12), CONFIG, TrainConfig(engine="autograd"))


def test_rows_for_initialisation_are_at_most_the_runs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    from saefast.training.feed import Feed

    look_ahead = Feed.look_ahead

    def counting(self: Feed, n_rows: int) -> torch.Tensor:
        seen.append(n_rows)
        return look_ahead(self, n_rows)

    monkeypatch.setattr(Feed, "look_ahead", counting)
    train(train_job.rows(), CONFIG, settings(init_rows=2**40))
    assert seen == [128]


def test_drawing_ahead_counts_each_batch_once() -> None:
    """With a million rows of initialisation in batches of one it summed 5e11 lengths."""
    from saefast.training.feed import Feed

    class Lengths(torch.Tensor):
        counted = 0

        def __len__(self) -> int:
            Lengths.counted += 1
            return int(self.shape[0])

    feed = Feed(open_source(train_job.rows()), settings(batch_size=1), torch.device("cpu"), torch.float32)
    feed._batches = ({"x": x.as_subclass(Lengths)} for x in train_job.rows(600).split(1))
    assert feed.look_ahead(500).x.shape == (500, 12)
    assert Lengths.counted < 5000


@pytest.mark.parametrize("seed", [-1, 2**63, 10**30, 0.5, True])
def test_seeds_of_more_than_64_bits_are_refused(seed: Any) -> None:
    refused(lambda: TrainConfig(seed=seed), "seed is", "expected int")
    refused(lambda: SAE(CONFIG, seed=seed), "seed is")


@pytest.mark.parametrize("optimizer", ["adam", "adam-lean"])
def test_the_largest_seed_trains(optimizer: Any) -> None:
    train(train_job.rows(), CONFIG, settings(seed=2**63 - 1, optimizer=optimizer, init_encoder_scale=True))


@pytest.mark.parametrize("device", ["cuda:99", "meta", "nonsense", "", "cpu:x"])
def test_devices_that_are_not_there_are_refused(tmp_path: Path, device: str) -> None:
    SAE(CONFIG).save(tmp_path)
    refused(lambda: load(tmp_path, device=device), "device is", "try 'auto'")
    refused(lambda: train(train_job.rows(), CONFIG, settings(device=device)), "device is", "try 'auto'")


def test_tensors_without_values_are_refused() -> None:
    refused(lambda: train(torch.empty(100, 12, device="meta"), CONFIG, settings()), "meta device")


def test_metadata_that_is_no_json_is_refused_at_once() -> None:
    for metadata in ({"x": object()}, {"x": np.int64(3)}, {"x": {1, 2}}):
        refused(lambda metadata=metadata: SAEConfig(4, 8, 2, metadata=metadata), "metadata cannot be written as JSON")


# --- models -------------------------------------------------------------------------------------------------------


class Embedding(nn.Module):
    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.layer, self.error = nn.Embedding(10, 4), error

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        return self.layer(input_ids)

    def run_with_hooks(self, ids: torch.Tensor, fwd_hooks: Any) -> None:
        self(ids)


@pytest.mark.parametrize("kind", [ModuleRunner, HookedRunner])
def test_whatever_a_model_raises_is_one_line_with_its_cause(kind: Any) -> None:
    ids, mask = torch.tensor([[1, 50]]), torch.ones(1, 2, dtype=torch.bool)
    for error in (
        None,
        KeyError("x"),
        RuntimeError("two\nlines"),
        torch.OutOfMemoryError("no memory"),
        ZeroDivisionError(),
    ):
        runner = kind(Embedding(error), ["layer"])
        with runner.attached(), pytest.raises(InputError) as caught:
            runner.run(ids, mask)
        text = str(caught.value)
        assert "\n" not in text
        assert "the model (Embedding) failed on (1, 2) token ids up to 50: " in text
        assert ("lower batch_tokens" in text) == isinstance(error, torch.OutOfMemoryError)
        assert caught.value.__cause__ is error or isinstance(caught.value.__cause__, IndexError)


def test_an_interrupt_of_a_model_stays_one() -> None:
    runner = ModuleRunner(Embedding(KeyboardInterrupt()), ["layer"])  # type: ignore[arg-type]
    with runner.attached(), pytest.raises(KeyboardInterrupt):
        runner.run(torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.bool))
