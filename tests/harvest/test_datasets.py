"""Data sets as the field keeps them: objects and folders of `datasets`, Parquet, token ids, chats."""

import gzip
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch

from saefast.data.shards import ShardFolder
from saefast.errors import InputError
from saefast.harvest.config import HarvestConfig
from saefast.harvest.documents import Fingerprint, digest, skip_documents
from saefast.harvest.sequences import Sequencer, Window
from saefast.harvest.text import Text, open_text, open_texts
from saefast.harvest.to_disk import harvest

DOCUMENTS = tiny_models.documents(12)
IDS = [[5, 6, 7], [8, 2, 9, 3], [10], [11, 12]]
CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
TEMPLATE = (
    "{{ '[CLS] ' }}{% for m in messages %}"
    "{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no ' + m.role) }}{% endif %}"
    "{{ ('w7 ' if m.role == 'user' else 'w8 ') + m.content + ' [SEP] ' }}{% endfor %}"
)
CONFIG = HarvestConfig(hooks=("layers.1",), ctx_len=16, dtype="float32", forward="float32", device="cpu", heldout=0.25)


def tokenizer(chat: bool = False, special: bool = True) -> Any:
    made = tiny_models.tokenizer(special=special)
    if chat:
        made.chat_template = TEMPLATE
    return made


def as_lists(text: Text, **options: Any) -> list[Any]:
    return [d if isinstance(d, str) else d.tolist() for d in text.documents(**options)]


def windows(text: Any, ctx_len: int = 16, column: str = "text", **options: Any) -> list[Window]:
    sequencer = Sequencer(tokenizer(), ctx_len, **options)
    return list(sequencer.windows(open_text(text, column).documents(tokenizer()), Fingerprint()))


def kept(out: Path, text: Any, chat: bool = False, **settings: Any) -> tuple[ShardFolder, list[list[int]]]:
    """A harvest's folder, and its sequences."""
    config = HarvestConfig(**{**vars(CONFIG), **settings})
    model = tiny_models.model("llama")
    report = harvest(out, config, text=text, model=model, tokenizer=tokenizer(chat), progress=False)
    folder = ShardFolder(out)
    return folder, [folder.tokens(i).tolist() for i in range(report.sequences)]


# --- token ids ----------------------------------------------------------------------------------------------------

PADDED = np.array([[5, 6, 7, 0], [8, 2, 9, 3], [10, 0, 0, 0], [11, 12, 0, 0]])
MASKS = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])


class Encoding(dict[str, Any]):
    """A row of a tokenised data set, which has more fields than are needed."""


@pytest.mark.parametrize(
    "given",
    [
        IDS,
        [tuple(ids) for ids in IDS],
        [np.array(ids, dtype=np.int32) for ids in IDS],
        [torch.tensor(ids) for ids in IDS],
        (torch.tensor(ids, dtype=torch.int32) for ids in IDS),
        [{"input_ids": ids} for ids in IDS],
        [{"input_ids": torch.tensor(ids), "labels": ids} for ids in IDS],
        [Encoding(input_ids=PADDED[i].tolist(), attention_mask=MASKS[i].tolist()) for i in range(4)],
        [Encoding(input_ids=torch.tensor(PADDED[i : i + 2]), attention_mask=MASKS[i : i + 2]) for i in (0, 2)],
    ],
)
def test_token_ids_are_taken_as_they_are(given: Any) -> None:
    text = open_text(given)
    for _ in range(2):
        assert as_lists(text) == IDS
        assert not text.skipped
    (window,) = windows(text)
    assert window.ids == IDS
    assert window.tokens == 10


@pytest.mark.parametrize("make", [np.asarray, torch.tensor, lambda ids: np.asarray(ids, np.uint16)])
def test_an_array_of_ids_is_one_sequence_a_row(make: Any) -> None:
    assert as_lists(open_text(make(PADDED))) == PADDED.tolist()
    assert as_lists(open_text(make(PADDED[0]))) == [PADDED[0].tolist()]
    assert as_lists(open_text([make(PADDED[:2]), make(PADDED[2:])])) == PADDED.tolist()


def test_a_column_of_ids_is_named_like_one_of_text(tmp_path: Path) -> None:
    rows = [{"ids": ids, "text": "not this"} for ids in IDS]
    assert as_lists(open_text(rows, "ids")) == IDS
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert as_lists(open_text(tmp_path, "ids")) == IDS
    # Where there is text it is what is asked for; another column is never guessed.
    assert as_lists(open_text([{"input_ids": [5], "text": "this"}])) == ["this"]
    with pytest.raises(InputError, match=r"has no text in field 'body' \(seen: fields input_ids\)"):
        list(open_text([{"input_ids": [5]}], "body"))


def test_ids_are_cut_to_the_context_and_get_no_special_tokens() -> None:
    ids = list(range(5, 45))
    for prepend in (None, True, False):
        cut = [sequence for window in windows([ids, "w1"], prepend_bos=prepend) for sequence in window.ids]
        assert cut[:3] == [ids[:16], ids[16:32], ids[32:]]
        assert (cut[3][0] == 2) == (prepend is not False)
    assert [window.tokens for window in windows([ids, "w1"])] == [41]


def test_rows_of_pre_tokenised_text_are_those_of_the_text(tmp_path: Path) -> None:
    documents = [" ".join(document.split()[:14]) for document in DOCUMENTS]
    strings, expected = kept(tmp_path / "strings", documents, heldout=0)
    rows = [{"input_ids": tokenizer()(document)["input_ids"]} for document in documents]
    ids, found = kept(tmp_path / "ids", rows, heldout=0)
    assert found == expected
    assert ids.index["dropped"] == strings.index["dropped"]
    assert ids.index["dropped"]["special"] == 2 * len(DOCUMENTS)
    by_place = []
    for folder in (strings, ids):
        shard = folder.open(folder.shards("train")[0], "layers.1")
        order = np.lexsort((shard.pos.numpy(), shard.seq.numpy()))
        by_place.append(shard.acts[torch.from_numpy(order)])
    assert torch.equal(*by_place)


@pytest.mark.parametrize("strange", [[5, 66], [-1], [10**12]])
def test_ids_outside_the_vocabulary_are_one_line(tmp_path: Path, strange: list[int]) -> None:
    with pytest.raises(
        InputError, match=rf"the text holds token id {strange[-1]}, but the model's vocabulary ends at 65"
    ):
        kept(tmp_path, [[5, 6], strange])


def test_a_tokenizer_of_more_tokens_than_the_model_knows_is_one_line(tmp_path: Path) -> None:
    large = tokenizer()
    large.add_tokens(["w1000"])
    with pytest.raises(InputError, match="the tokenizer gives token id 66, but the model's vocabulary ends at 65"):
        harvest(
            tmp_path, CONFIG, text=["w1", "w1000"], model=tiny_models.model("gpt2"), tokenizer=large, progress=False
        )


@pytest.mark.parametrize(
    "bad",
    [[1.5], [True], [[5], [6, 7]], ["a", 1], torch.tensor([0.5]), torch.tensor(3), torch.zeros(1, 1, 1).long(), [None]],
)
def test_what_are_no_ids_is_skipped(bad: Any) -> None:
    text = open_text([[5, 6], bad, [], {"input_ids": bad}, {"input_ids": None}, [7]])
    assert as_lists(text) == [[5, 6], [7]]
    assert text.n_skipped == 3
    assert all(" row " in line and " holds " in line for line in text.skipped)


def test_ids_and_mask_of_different_lengths_are_skipped() -> None:
    text = open_text([{"input_ids": [5, 6], "attention_mask": [1]}, {"input_ids": [7]}])
    assert as_lists(text) == [[7]]
    assert "has input_ids and attention_mask of different shapes" in text.skipped[0]


def test_two_copies_of_ids_are_on_one_side_and_the_seed_picks_it() -> None:
    copies = [ids for ids in ([[i, i + 1] for i in range(5, 60)]) for _ in range(2)]
    sides = {}
    for seed in range(3):
        (window,) = windows(copies, share=0.3, seed=seed)
        assert window.held[::2] == window.held[1::2]
        assert 10 < sum(window.held) < 60
        sides[seed] = tuple(window.held)
    assert len(set(sides.values())) == 3


def test_digests_tell_ids_from_strings_and_from_other_ids() -> None:
    string = "abcdefgh"
    same_bytes = np.frombuffer(string.encode(), dtype="<i8")
    documents = [string, same_bytes, np.array([1, 2]), np.array([2, 1]), np.array([1]), np.array([1, 2, 0])]
    assert len({digest(document, 8) for document in documents}) == len(documents)
    assert digest(np.array([1, 2], np.int32), 8) == digest(np.array([1, 2]), 8)


def test_a_harvest_of_ids_goes_on_and_refuses_others(tmp_path: Path) -> None:
    rows = [tokenizer()(document)["input_ids"] for document in tiny_models.documents(40)]
    whole, expected = kept(tmp_path / "whole", rows)
    for tokens in (50, 200, None):
        parts, found = kept(tmp_path / "parts", rows, max_tokens=tokens)
    assert found == expected
    assert parts.index["cursor"]["fingerprint"] == whole.index["cursor"]["fingerprint"]
    assert parts.index["splits"] == whole.index["splits"]
    kept(tmp_path / "other", rows, max_tokens=50)
    with pytest.raises(InputError, match="is not what the harvest began with"):
        kept(tmp_path / "other", [[9, *rows[0]], *rows[1:]])
    before = Fingerprint()
    before.add(np.array([1, 2]))
    with pytest.raises(InputError, match="is not what the harvest began with"):
        skip_documents(iter([np.array([1, 3])]), 1, Fingerprint(), before.value, "t")


# --- chats --------------------------------------------------------------------------------------------------------

CHAT_IDS = [2, 12, 6, 7, 3, 13, 8, 3]


def test_a_chat_is_written_out_by_the_tokenizers_template(tmp_path: Path) -> None:
    assert tokenizer(chat=True)("[CLS] w7 w1 w2 [SEP] w8 w3 [SEP]", add_special_tokens=False)["input_ids"] == CHAT_IDS
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps({"messages": CHAT, "id": i}) for i in range(3)))
    for given, column in ((tmp_path, "messages"), ([{"talk": CHAT}] * 3, "talk"), ([CHAT] * 3, "text")):
        assert as_lists(open_text(given, column), tokenizer=tokenizer(chat=True)) == [CHAT_IDS] * 3
    folder, found = kept(tmp_path / "out", str(tmp_path / "x.jsonl"), chat=True, text_column="messages")
    assert found == [CHAT_IDS] * 3
    # As always: special tokens are run, and their rows dropped.
    assert folder.index["dropped"]["special"] == 9


def test_keys_that_hold_nothing_are_no_part_of_a_message() -> None:
    messages = [message | {"tool_calls": None} for message in CHAT]
    template = TEMPLATE.replace("{% for m in messages %}", "{% for m in messages %}{{ 'w9 ' if 'tool_calls' in m }}")
    made = tokenizer()
    made.chat_template = template
    assert as_lists(open_text([messages]), tokenizer=made) == [CHAT_IDS]


def test_chats_that_the_template_refuses_are_skipped_and_counted() -> None:
    rows = [CHAT, [{"role": "owl", "content": "w1"}], [{"from": "human", "value": "w1"}], [{"role": "user"}], CHAT]
    text = open_text([{"messages": row} for row in rows], "messages")
    assert as_lists(text, tokenizer=tokenizer(chat=True)) == [CHAT_IDS] * 2
    assert text.n_skipped == 3
    assert "row 1 is a chat that the tokenizer's template refuses (no owl)" in text.skipped[0]
    assert "row 2 has messages of from, value, expected role and content" in text.skipped[1]


def test_a_tokenizer_without_a_template_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the text holds chats, and tokenizer .* has no chat template"):
        kept(tmp_path, [{"messages": CHAT}], text_column="messages")
    with pytest.raises(InputError, match="which a tokenizer writes out"):
        list(open_text([CHAT]))


# --- objects and folders of `datasets` ----------------------------------------------------------------------------


class FakeDataset:
    """As much of datasets.Dataset, or IterableDataset, as is looked at."""

    def __init__(self, rows: list[dict[str, Any]], named: bool = True) -> None:
        self.rows = rows
        self.column_names = list(rows[0]) if named else None

    def select_columns(self, names: list[str]) -> "FakeDataset":
        return FakeDataset([{name: row[name] for name in names} for row in self.rows])

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_data_set_objects_are_read_by_column() -> None:
    rows = [{"text": document, "picture": object(), "n": i} for i, document in enumerate(DOCUMENTS)]
    for named in (True, False):
        text = open_text(FakeDataset(rows, named))
        assert as_lists(text) == as_lists(text) == DOCUMENTS
    with pytest.raises(InputError, match=r"has no text in field 'body' \(seen: fields text, picture, n\)"):
        open_text(FakeDataset(rows), "body")


def test_a_dict_of_splits_names_them_unless_there_is_one() -> None:
    rows = [{"text": document} for document in DOCUMENTS]
    assert as_lists(open_text({"train": FakeDataset(rows)})) == DOCUMENTS
    with pytest.raises(InputError, match=r"with the splits train, test: give one, text\['train'\]"):
        open_text({"train": FakeDataset(rows), "test": FakeDataset(rows)})
    with pytest.raises(
        InputError, match="text is a dict with the keys text: expected documents; rows are given as a list"
    ):
        open_text({"text": "one"})


def test_a_streamed_data_set_that_breaks_off_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Any:
        yield {"text": "one"}
        raise ConnectionError("no\nroute")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *a, **k: rows()))
    documents = open_text("owner/name").documents()
    assert next(documents) == "one"
    with pytest.raises(InputError, match="owner/name cannot be read on from row 1: no route"):
        next(documents)


def columns() -> dict[str, list[Any]]:
    n = 3000
    return {
        "text": [None if i == 7 else f"w{i % 60} w1" for i in range(n)],
        "n": list(range(n)),
        "input_ids": [[5 + i % 7, 6] for i in range(n)],
        "attention_mask": [[1, i % 2] for i in range(n)],
        "messages": [CHAT] * n,
    }


def check_columns(given: Any, **where: Any) -> None:
    """That text, ids and chats of `columns` come out of it, row by row."""
    expected = columns()
    text = open_text(given, **where)
    for _ in range(2):
        assert as_lists(text) == [t for t in expected["text"] if t is not None]
        assert text.n_skipped == 1
        assert " row 7 holds a " in text.skipped[0]
    ids = [row[: sum(mask)] for row, mask in zip(expected["input_ids"], expected["attention_mask"], strict=True)]
    assert as_lists(open_text(given, "input_ids")) == ids
    chats = open_text(given, "messages").documents(tokenizer(chat=True))
    assert next(chats).tolist() == CHAT_IDS
    with pytest.raises(InputError, match=r"has no text in field 'body' \(seen: fields text, n, input_ids, att"):
        list(open_text(given, "body"))


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".feather", "stream.arrow"])
def test_parquet_and_arrow_files(tmp_path: Path, ending: str, packed: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    write_table(arrow.table(columns()), file := tmp_path / f"x{ending}")
    if packed:
        (tmp_path / f"x{ending}{packed}").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    check_columns(tmp_path)
    check_columns(tmp_path / f"x{ending}{packed}")


def write_table(table: Any, file: Path, rows: int = 700) -> None:
    """A Parquet file, an Arrow file, or an Arrow stream, in pieces of so many rows."""
    import pyarrow.feather
    import pyarrow.parquet

    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(table, file, row_group_size=rows)
    elif file.suffix == ".feather":
        pyarrow.feather.write_feather(table, file, chunksize=rows)
    else:
        new = pyarrow.ipc.new_stream if "stream" in file.name else pyarrow.ipc.new_file
        with new(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)


@pytest.mark.parametrize("ending", [".parquet", ".arrow", "stream.arrow"])
def test_damaged_tables_are_one_line(tmp_path: Path, ending: str) -> None:
    arrow = pytest.importorskip("pyarrow")
    (tmp_path / "a.txt").write_text("prose")
    write_table(arrow.table({"text": [f"w{i % 60}" for i in range(9000)]}), file := tmp_path / f"x{ending}")
    whole = file.read_bytes()
    broken = bytearray(whole)
    broken[len(whole) // 2 : len(whole) // 2 + 400] = b"\xa5" * 400
    for data in (whole[: len(whole) // 2], bytes(broken), whole[:3], b"", b"PAR1" * 9, b"ARROW1" * 9):
        file.write_bytes(data)
        text = open_text(tmp_path)
        found = as_lists(text)
        assert found[0] == "prose"
        if data == whole[: len(whole) // 2] and "stream" in ending:
            assert len(found) > 3000
        if data != bytes(broken):
            assert text.n_skipped == 1
            assert f"x{ending} cannot be read to its end (" in text.skipped[0]


def test_arrow_text_that_is_not_utf8_costs_its_row_alone(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    data = arrow.array([b"one", b"gr\xfcn", b"two"], arrow.binary()).view(arrow.string())
    write_table(arrow.table({"text": data}), tmp_path / "x.arrow")
    text = open_text(tmp_path)
    assert as_lists(text) == ["one", "two"]
    assert text.skipped == [f"{tmp_path}/x.arrow row 1 is not UTF-8 text"]


def test_real_data_set_objects(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict(columns())
    check_columns(made)
    check_columns(made.to_iterable_dataset(num_shards=3))
    check_columns(made.with_format("torch", columns=["input_ids"], output_all_columns=True))
    check_columns(datasets.DatasetDict(train=made))
    with pytest.raises(InputError, match=r"text is a DatasetDict with the splits train, test: give one"):
        open_text(datasets.DatasetDict(train=made, test=made))
    shuffled = made.shuffle(seed=0)
    assert as_lists(open_text(shuffled, "input_ids"))[0] == [
        token for token, one in zip(shuffled[0]["input_ids"], shuffled[0]["attention_mask"], strict=True) if one
    ]


def test_real_saved_data_sets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict(columns())
    made.save_to_disk(tmp_path / "one", num_shards=3)
    # What `map` caches beside the rows is not read a second time.
    datasets.load_from_disk(tmp_path / "one").map(lambda row: {"text": "cached"}, new_fingerprint="1")
    assert len(list((tmp_path / "one").glob("*.arrow"))) > 3
    check_columns(tmp_path / "one")
    datasets.DatasetDict(train=made, test=made).save_to_disk(tmp_path / "splits")
    with pytest.raises(
        InputError, match=rf"splits holds the splits train, test: name one of them, {tmp_path}/splits/train"
    ):
        list(open_text(tmp_path / "splits"))
    check_columns(tmp_path / "splits" / "test")
    _, found = kept(tmp_path / "out", str(tmp_path / "one"), max_tokens=200)
    _, same = kept(tmp_path / "given", made, max_tokens=200)
    assert found == same


def test_saved_data_sets_are_recognised_without_the_package(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    for i, name in enumerate(["data-00000-of-00002.arrow", "data-00001-of-00002.arrow", "cache-1234.arrow"]):
        write_table(arrow.table({"text": [f"w{i}"]}), tmp_path / name)
    (tmp_path / "dataset_info.json").write_text("{}")
    listed = [{"filename": f"data-0000{i}-of-00002.arrow"} for i in range(2)]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": listed}))
    text = open_text(tmp_path)
    assert as_lists(text) == ["w0", "w1"]
    assert not text.skipped
    for state in ("{", "[]", '{"_data_files": 3}', '{"_data_files": []}', "{}"):
        (tmp_path / "state.json").write_text(state)
        with pytest.raises(InputError, match=r"state\.json "):
            list(text)


def test_data_frames_are_read_by_column() -> None:
    pandas = pytest.importorskip("pandas")
    check_columns(pandas.DataFrame(columns()))


def test_several_texts_of_several_kinds(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w1")
    (tmp_path / "b.jsonl").write_text('{"input_ids": [5, 6]}\n{"input_ids": "w2"}\n{"input_ids": 3}\n')
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": CHAT}))
    joined = open_texts([str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.jsonl")])
    assert as_lists(joined, tokenizer=tokenizer(chat=True)) == ["w1", [5, 6], "w2", CHAT_IDS]
    assert joined.n_skipped == 1
