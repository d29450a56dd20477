"""Text sources: what becomes a document, what is skipped and said so, what cannot be read at all."""

import json
import sys
import types

import pytest
import torch

from saefast.errors import InputError
from saefast.harvest.docstrings import Docstrings, library_docstrings
from saefast.harvest.documents import Fingerprint, skip_documents
from saefast.harvest.text import open_text
from saefast.harvest.text_formats import DOCUMENT_CHARS


def test_folder_is_read_in_path_order_and_hidden_files_are_not(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "two.txt").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / ".git" / "config").write_text("hidden")
    assert list(open_text(tmp_path)) == ["first", "second"]


def test_what_is_not_utf8_is_skipped_and_listed_on_every_pass(tmp_path):
    (tmp_path / "good.txt").write_text("kept ü", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("gr\xfcn".encode("latin-1"))
    (tmp_path / "binary.bin").write_bytes(b"\0\1\2 text")
    text = open_text(tmp_path)
    for _ in range(2):
        assert list(text) == ["kept ü"]
        assert len(text.skipped) == 2
        assert any("latin.txt is not UTF-8" in line for line in text.skipped)
        assert any("binary.bin" in line and "NUL" in line for line in text.skipped)


def test_nothing_readable_is_an_error_that_says_why(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"\xff\xff")
    with pytest.raises(InputError, match=r"holds no text .*latin.txt is not UTF-8.*1 skipped"):
        list(open_text(tmp_path))
    (tmp_path / "latin.txt").unlink()
    with pytest.raises(InputError, match="holds no text"):
        list(open_text(tmp_path))


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert list(open_text(tmp_path / "a.txt")) == ["hello"]


def test_long_files_are_cut_at_blank_lines_and_lose_nothing(tmp_path):
    paragraphs = [f"{i} " + "word " * 500 + "\n\n" for i in range(60)]
    whole = "".join(paragraphs)
    (tmp_path / "long.txt").write_text(whole)
    documents = list(open_text(tmp_path / "long.txt"))
    assert "".join(documents) == whole
    assert len(documents) > 5
    assert all(d.endswith("\n\n") and len(d) < DOCUMENT_CHARS + 3000 for d in documents)


def test_one_endless_line_is_cut_too(tmp_path):
    (tmp_path / "line.txt").write_text("x" * (5 * DOCUMENT_CHARS))
    documents = list(open_text(tmp_path / "line.txt"))
    assert [len(d) for d in documents] == [2 * DOCUMENT_CHARS, 2 * DOCUMENT_CHARS, DOCUMENT_CHARS]


def test_jsonl_one_document_a_line(tmp_path):
    lines = [json.dumps({"body": "one"}), "", "{broken", json.dumps({"body": "two"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    text = open_text(tmp_path / "a.jsonl", column="body")
    assert list(text) == ["one", "two"]
    assert text.skipped == [
        f"{tmp_path / 'a.jsonl'} line 3 is not JSON (Expecting property name enclosed in double quotes)"
    ]
    with pytest.raises(InputError, match=r"line 1 has no text in field 'text' \(seen: fields body\)"):
        list(open_text(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("missing", ["./nowhere", "/no/such/folder", "notes.txt", "~/no-such-file-here"])
def test_missing_paths(missing):
    with pytest.raises(InputError, match="does not exist"):
        open_text(missing)


def test_dataset_name_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"'owner/name' is no file or folder.*pip install datasets"):
        list(open_text("owner/name"))


def test_dataset_name_config_split_and_column(monkeypatch):
    calls = []

    def load_dataset(name, config, split, streaming):
        calls.append((name, config, split, streaming))
        if name == "gone/away":
            raise FileNotFoundError("Dataset 'gone/away'\n doesn't exist")
        return [{"content": "one"}, {"content": ""}, {"content": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert list(open_text("owner/name:en:validation", column="content")) == ["one", "two"]
    assert list(open_text("owner/name", column="content")) == ["one", "two"]
    assert calls == [("owner/name", "en", "validation", True), ("owner/name", None, "train", True)]
    with pytest.raises(InputError, match="row 0 has no text in field 'text'"):
        list(open_text("owner/name"))
    with pytest.raises(InputError, match=r"nor a dataset that opens: Dataset 'gone/away' doesn't exist"):
        list(open_text("gone/away"))


def test_strings_and_generators_can_be_read_twice():
    for given in (["a", "b"], (word for word in ("a", "b"))):
        text = open_text(given)
        assert list(text) == list(text) == ["a", "b"]
    with pytest.raises(InputError, match="holds a int"):
        list(open_text([1]))
    with pytest.raises(InputError, match="holds no text"):
        list(open_text([]))


@pytest.mark.slow
def test_docstrings_are_many_distinct_and_in_an_order_the_seed_fixes():
    first, again, other = list(Docstrings(0)), list(Docstrings(0)), list(Docstrings(1))
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)
    assert len(first) == len(set(first)) > 5000
    assert 1_000_000 < sum(map(len, first)) == Docstrings(0).size()
    assert any(d.startswith("Serialize ``obj`` to a JSON formatted ``str``") for d in first)


def test_docstrings_of_a_tree_each_once_in_path_order_without_tests(tmp_path):
    for name, code in {
        "b.py": '"""Module b."""\nclass C:\n    """Class C."""\n    def f(self):\n        """Twice."""\n',
        "a/one.py": 'def g():\n    """Twice."""\nasync def h():\n    """Async h."""\n    x = "\\d"\n',
        "a/broken.py": "def (:\n",
        "test/skipped.py": '"""A test."""\n',
        "site-packages/other.py": '"""Not the library."""\n',
        "a/dashes.py": '"""-----"""\n',
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code)
    assert library_docstrings(tmp_path) == ("Twice.", "Async h.", "Module b.", "Class C.")


def test_skipping_checks_that_the_text_is_the_same():
    documents = ["a", "b", "c"]
    before = Fingerprint()
    for document in documents[:2]:
        before.add(document)
    iterator, seen = iter(documents), Fingerprint()
    skip_documents(iterator, 2, seen, before.value, "t")
    assert next(iterator) == "c"
    assert seen.count == 2
    for changed in (["a", "x", "c"], ["b", "a"], ["a"], ["ab", ""]):
        with pytest.raises(InputError, match="is not what the harvest began with"):
            skip_documents(iter(changed), 2, Fingerprint(), before.value, "t")


def test_what_cannot_be_read_as_documents_is_named():
    with pytest.raises(InputError, match="text is a Tensor, expected documents"):
        open_text(torch.tensor(2))


def test_halves_of_characters_become_the_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "broken \\ud83d here"}\n{"text": "whole \\ud83d\\ude00"}\n')
    assert list(open_text(tmp_path / "a.jsonl")) == ["broken � here", "whole 😀"]
    assert list(open_text(["x \ud800", "\ud83d\ude00 y", "z"])) == ["x �", "😀 y", "z"]
