"""Text as people keep it: each format by its ending, packed or not; what is bad in it is left out and counted."""

import bz2
import csv
import gzip
import io
import json
import sys
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models

from saefast.cli.main import main
from saefast.data.shards import ShardFolder
from saefast.errors import InputError
from saefast.harvest import text_formats, unpack
from saefast.harvest.config import HarvestConfig
from saefast.harvest.text import open_text, open_texts
from saefast.harvest.to_disk import harvest

# What formats have to get right: quotes, commas, line breaks, other alphabets, and a document longer than the csv
# module's own limit.
DOCUMENTS = [
    'He said: "two, three"',
    "one\nand a second line\n",
    "\tΑθήνα 日本 😀",
    "w1 " * 60_000,
    "last",
]


def as_lines(documents: list[Any], column: str = "text") -> str:
    return "\n".join(json.dumps({"n": i, column: document}) for i, document in enumerate(documents)) + "\n"


def as_array(documents: list[Any], column: str = "text") -> str:
    return json.dumps([{"n": i, column: document} for i, document in enumerate(documents)], indent=1)


def as_table(documents: list[Any], column: str = "text", delimiter: str = ",") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([["n", column], *enumerate(documents)])
    return out.getvalue()


WRITERS: dict[str, Callable[..., str]] = {
    ".jsonl": as_lines,
    ".ndjson": as_lines,
    ".json": as_array,
    ".csv": as_table,
    ".tsv": lambda documents, column="text": as_table(documents, column, "\t"),
}


def zst(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    return bytes(zstandard.ZstdCompressor().compress(data))


PACKERS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zst}


def written(folder: Path, ending: str, documents: list[Any], column: str = "text") -> Path:
    """A file of documents in the format of its ending."""
    kind = next(kind for kind in WRITERS if ending.lower().startswith(kind))
    file = folder / f"x{ending}"
    file.write_bytes(PACKERS[ending.lower()[len(kind) :]](WRITERS[kind](documents, column).encode()))
    return file


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("ending", WRITERS)
def test_every_format_gives_the_same_documents(tmp_path: Path, ending: str, packed: str) -> None:
    text = open_text(written(tmp_path, ending + packed, DOCUMENTS))
    for _ in range(2):
        assert list(text) == DOCUMENTS
        assert not text.skipped
    other = open_text(written(tmp_path, ending.upper() + packed.upper(), DOCUMENTS, "body"), "body")
    assert list(other) == DOCUMENTS


@pytest.mark.parametrize("packed", PACKERS)
def test_packed_prose_is_read_as_prose(tmp_path: Path, packed: str) -> None:
    (tmp_path / f"x.md{packed}").write_bytes(PACKERS[packed]("Prose, ü.\n\nMore.\n".encode()))
    assert list(open_text(tmp_path)) == ["Prose, ü.\n\nMore.\n"]


@pytest.mark.parametrize("value", [None, 3, True, 0.5, {"a": 1}, [["x"]], ["a", "b"], [1.5], [[1], [2, 3]]])
@pytest.mark.parametrize("ending", [".jsonl", ".ndjson", ".json"])
def test_a_bad_record_is_skipped_and_counted(tmp_path: Path, ending: str, value: Any) -> None:
    text = open_text(written(tmp_path, ending, ["one", value, "two"]))
    assert list(text) == ["one", "two"]
    assert text.n_skipped == len(text.skipped) == 1
    assert text.skipped[0].startswith(f"{tmp_path}/x{ending} {'record' if ending == '.json' else 'line'} 2 holds ")


@pytest.mark.parametrize("ending", WRITERS)
def test_a_column_in_no_record_is_an_error_that_names_those_seen(tmp_path: Path, ending: str) -> None:
    file = written(tmp_path, ending, ["one", "two"])
    with pytest.raises(
        InputError, match=r"has no text in field 'body' \(seen: fields n, text\): name the field .*text_column"
    ):
        list(open_text(file, "body"))


def test_a_record_without_the_field_is_skipped_wherever_it_stands(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"text": "one"}\n{"b": 2}\n"bare"\n')
    text = open_text(tmp_path / "x.jsonl")
    assert list(text) == ["one", "bare"]
    assert [line.split(" line ")[1] for line in text.skipped] == [
        "1 has no text in field 'text' (seen: fields a)",
        "3 has no text in field 'text' (seen: fields b)",
    ]


def test_a_wrong_column_is_said_before_a_large_file_is_read_through(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n' * 1000 + '{"text": "too late"}\n')
    with pytest.raises(InputError, match=r"x\.jsonl line 1 has no text in field 'text'"):
        list(open_text(tmp_path))
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n' * 999 + '{"text": "in time"}\n')
    text = open_text(tmp_path)
    assert list(text) == ["in time"]
    assert text.n_skipped == 999


def test_a_folder_of_several_formats_with_a_stray_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("prose")
    written(tmp_path, ".jsonl", ["one"])
    written(tmp_path, ".csv", ["two"])
    (tmp_path / "labels.csv").write_text("n,label\n0,3\n")
    (tmp_path / "package.json").write_text('{"name": "x", "version": 1}')
    text = open_text(tmp_path)
    assert list(text) == ["prose", "two", "one"]
    assert [line.split(" has no text")[0] for line in text.skipped] == [
        f"{tmp_path}/labels.csv line 2",
        f"{tmp_path}/package.json record 1",
    ]
    for file in tmp_path.glob("x.*"):
        file.unlink()
    with pytest.raises(InputError, match=r"labels\.csv line 2 has no text in field 'text' \(seen: fields n, label\)"):
        list(open_text(tmp_path))
    (tmp_path / "labels.csv").unlink()
    assert list(open_text(tmp_path)) == ["prose"]


@pytest.mark.parametrize("name", ["x.pdf", "x.PNG", "x.tar.gz", "x.npy", "x.safetensors", "x.bz2", "x.docx"])
def test_what_is_no_text_by_its_ending_is_said_so(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(bz2.compress(b"words"))
    with pytest.raises(InputError, match=rf"holds no text \(.*{name} is .* by its ending, not text, 1 skipped\)"):
        list(open_text(tmp_path / name))
    (tmp_path / "a.txt").write_text("kept")
    text = open_text(tmp_path)
    assert list(text) == ["kept"]
    assert text.n_skipped == 1


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [".gz", ".zst"])
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".txt"])
def test_of_a_packed_file_that_is_cut_off_what_was_read_stays(tmp_path: Path, ending: str, packed: str) -> None:
    words = np.random.default_rng(0).integers(0, 10**9, 40_000)
    documents = [" ".join(map(str, words[i : i + 40])) for i in range(0, 40_000, 40)]
    make = WRITERS.get(ending, lambda documents: "\n\n".join(documents))
    whole = PACKERS[packed](make(documents).encode())
    file = tmp_path / f"x{ending}{packed}"
    file.write_bytes(whole[: len(whole) // 2])
    text = open_text(file)
    found = list(text)
    assert text.n_skipped == 1
    assert "cannot be read to its end" in text.skipped[0]
    if ending == ".txt":
        assert "\n\n".join(documents).startswith("".join(found))
        assert len("".join(found)) > sum(map(len, documents)) / 4
    else:
        assert found == documents[: len(found)]
        assert len(found) > 300


@pytest.mark.parametrize("packed", [".gz", ".zst"])
def test_a_broken_packed_file_is_one_line(tmp_path: Path, packed: str) -> None:
    whole = bytearray(PACKERS[packed](as_lines(tiny_models.documents(2000)).encode()))
    whole[len(whole) // 2 : len(whole) // 2 + 60] = b"\xa5" * 60
    for name, data in {"broken": bytes(whole), "other": b"no such format", "empty": b"", "two": b""}.items():
        (tmp_path / f"{name}.jsonl{packed}").write_bytes(data)
    (tmp_path / f"two.jsonl{packed}").write_bytes(
        PACKERS[packed](b'{"text": "first"}\n') + PACKERS[packed](b'{"text": "second"}\n')
    )
    text = open_text(tmp_path)
    found = list(text)
    assert found[-2:] == ["first", "second"]
    assert {line.split(" ")[0].split("/")[-1] for line in text.skipped} >= {f"other.jsonl{packed}"}


def test_a_packed_file_is_never_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_formats, "LONGEST", 1 << 16)
    line = json.dumps({"text": "a" * (1 << 20)})
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(f"{line}\n".encode() + b'{"text": "kept"}\n'))
    text = open_text(tmp_path)
    assert list(text) == ["kept"]
    assert 1 <= text.n_skipped <= 17
    (tmp_path / "bomb.jsonl.gz").unlink()
    (tmp_path / "bomb.json").write_text(f'["first", {line}, "never met"]')
    text = open_text(tmp_path)
    assert list(text)[:1] == ["first"]


def test_bytes_that_are_not_utf8_cost_their_line_alone(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "one"}\n{"text": "gr\xfcn"}\n{"text": "two"}\n')
    (tmp_path / "y.csv").write_bytes(b"text,n\none,1\ngr\xfcn,2\ntwo,3\n")
    text = open_text(tmp_path)
    assert list(text) == ["one", "two", "one", "two"]
    assert text.skipped == [
        f"{tmp_path}/x.jsonl line 2 is not UTF-8 text",
        f"{tmp_path}/y.csv line 3 is not UTF-8 text",
    ]


def test_rows_of_a_table_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('n,text\n0,one\n1,two, and three\n\n2\n3,"open"quote\n4,four\n5,"never closed\n')
    text = open_text(tmp_path)
    assert list(text) == ["one", "four"]
    assert [line.split(" line ")[1].split(" (")[0] for line in text.skipped] == [
        "3 has 3 fields, the first row 2",
        "5 has 1 fields, the first row 2",
        "6 is no row of a table",
        "8 is no row of a table",
    ]
    assert csv.field_size_limit() == 131072


def test_json_files_are_read_record_by_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_formats, "_PIECE", 3)
    documents = ["a", "", "b" * 50, 'c "]" \\ [', "é"]
    for name, content in {
        "array": json.dumps(documents),
        "objects": as_array(documents),
        "lines": as_lines(documents),
        "strings": "\n".join(map(json.dumps, documents)),
        "spaced": "\n [ " + " , ".join(map(json.dumps, documents)) + "\n]\n",
    }.items():
        (tmp_path / f"{name}.json").write_text(content, encoding="utf-8")
        text = open_text(tmp_path / f"{name}.json")
        assert list(text) == [d for d in documents if d]
        assert not text.skipped
    (tmp_path / "one.json").write_text('{"text": "alone", "n": 12345}')
    assert list(open_text(tmp_path / "one.json")) == ["alone"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('["one", "two", {"text": "thr', "is not JSON"),
        ('["one", "two"', "is missing: the file ends inside its array"),
        ('["one", "two",', "is missing: the file ends inside its array"),
        ('["one", "two", nonsense, "three"]', "is not JSON"),
        ('["one", "two"] ["three"]', "is not read: it follows the array"),
        ('["one", "two", ' + "[" * 100_000, "is not JSON"),
        ('["one", "two", ' + "9" * 5000 + "]", "is not JSON"),
    ],
)
def test_of_a_damaged_json_file_what_comes_before_stays(tmp_path: Path, content: str, why: str) -> None:
    (tmp_path / "x.json").write_text(content)
    text = open_text(tmp_path)
    assert list(text) == ["one", "two"]
    assert text.n_skipped == 1
    assert f"x.json record 3 {why}" in text.skipped[0]


def test_what_is_skipped_is_counted_without_end_and_kept_to_a_thousand_lines(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n' + '{"text": null}\n' * 1234)
    joined = open_texts([str(tmp_path / "x.jsonl")] * 2)
    assert list(joined) == ["one", "one"]
    assert joined.n_skipped == 2468
    assert len(joined.skipped) == 2000


# --- packages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "package"), [("x.parquet", "pyarrow"), ("x.arrow.gz", "pyarrow"), ("x.jsonl.zst", "zstandard")]
)
def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    for module in ("pyarrow", "zstandard", "compression.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(InputError, match=rf"{name} needs the package {package} .*: pip install {package}"):
        list(open_text(tmp_path))


class ByZlib:
    """A decompressor of frames as Python 3.14's own and zstandard's are, over zlib."""

    def __init__(self, **options: Any) -> None:
        self._zlib = zlib.decompressobj()

    def decompress(self, data: bytes) -> bytes:
        return self._zlib.decompress(data)

    eof = property(lambda self: self._zlib.eof)
    unused_data = property(lambda self: self._zlib.unused_data)


def test_pythons_own_zstandard_is_taken_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = types.SimpleNamespace(
        ZstdDecompressor=ByZlib,
        ZstdError=zlib.error,
        DecompressionParameter=types.SimpleNamespace(window_log_max="window_log_max"),
    )
    monkeypatch.setitem(sys.modules, "compression", types.ModuleType("compression"))
    monkeypatch.setitem(sys.modules, "compression.zstd", own)
    monkeypatch.setattr(unpack, "_PIECE", 7)
    frames = [zlib.compress(as_lines([document]).encode()) for document in DOCUMENTS]
    (tmp_path / "x.jsonl.zst").write_bytes(b"".join(frames))
    assert list(open_text(tmp_path)) == DOCUMENTS
    (tmp_path / "x.jsonl.zst").write_bytes(b"".join(frames)[:-9])
    text = open_text(tmp_path)
    assert list(text) == DOCUMENTS[:-1]
    assert "ends before its last frame does" in text.skipped[0]
    (tmp_path / "x.jsonl.zst").write_bytes(frames[0] + b"garbage after it")
    text = open_text(tmp_path)
    assert list(text) == DOCUMENTS[:1]
    assert text.n_skipped == 1


# --- harvests -----------------------------------------------------------------------------------------------------

CONFIG = HarvestConfig(hooks=("layers.1",), ctx_len=16, dtype="float32", forward="float32", device="cpu", heldout=0.2)


def rows_of(out: Path, text: Any, **settings: Any) -> ShardFolder:
    config = HarvestConfig(**{**vars(CONFIG), **settings})
    model = {"model": tiny_models.model("llama"), "tokenizer": tiny_models.tokenizer(special=False)}
    report = harvest(out, config, text=text, progress=False, **model)
    assert report.complete
    return ShardFolder(out)


def sequences(folder: ShardFolder) -> list[list[int]]:
    return [folder.tokens(i).tolist() for i in range(int(folder.index["cursor"]["seqs"]))]


def test_a_harvest_of_any_format_is_that_of_the_documents(tmp_path: Path) -> None:
    documents = tiny_models.documents(30)
    bad = [*documents[:10], None, *documents[10:]]
    expected = sequences(rows_of(tmp_path / "strings", documents))
    assert len(expected) > 30
    for ending in (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".csv", ".tsv"):
        file = written(tmp_path, ending, documents if ending in (".csv", ".tsv") else bad)
        assert sequences(rows_of(tmp_path / ending, str(file))) == expected


def test_half_a_character_ends_no_harvest_and_a_resumed_one_meets_it_again(tmp_path: Path) -> None:
    documents = [*tiny_models.documents(20), "w1 \ud83d w2", *tiny_models.documents(20, 1)]
    file = tmp_path / "x.jsonl"
    file.write_text(as_lines([*documents[:5], None, *documents[5:]]))
    whole = sequences(rows_of(tmp_path / "whole", str(file)))
    assert sequences(rows_of(tmp_path / "given", documents)) == whole
    for tokens in (60, 300, None):
        parts = rows_of(tmp_path / "parts", str(file), max_tokens=tokens)
    assert sequences(parts) == whole


def test_the_command_says_what_was_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    tiny_models.model("llama").save_pretrained(model)
    tiny_models.tokenizer(special=False).save_pretrained(model)
    file = written(tmp_path, ".ndjson", ["w1 w2 w3", *[None] * 1200, "w4 w5"], "body")
    argv = ["harvest", "--out", f"{tmp_path}/out", "--model", f"{model}", "--text", f"{file}", "--hook", "layers.1"]
    assert main([*argv, "--text-column", "body", "--ctx-len", "8", "--device", "cpu"]) == 0
    said = capsys.readouterr().err
    assert f"saefast: skipped: {file} line 2 holds a NoneType, expected text, token ids or messages" in said
    assert "saefast: skipped: 1,195 more" in said
    assert main([*argv[:2], f"{tmp_path}/other", *argv[3:], "--text-column", "txt"]) == 2
    assert "has no text in field 'txt' (seen: fields n, body)" in capsys.readouterr().err
