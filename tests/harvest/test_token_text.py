"""Tokens read as the text they came from, in every kind of tokenizer; all are made on the spot."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from saefast.harvest.token_text import Texts, same_word

# Headings make ## a token, and a longer one that begins with it.
CORPUS = [f"## Heading {i}\n### Part ##{i}\nThe fox jumps over the lazy dog – naïve 狐 🦊, don't!\n" for i in range(40)]
SENTENCES = ["## The fox isn't naïve – it jumps 🦊狐!\n", "over ##3 dogs,  the\tlazy", "The"]


def wrapped(core: Any, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def byte_level(vocabulary: int = 400) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=["<s>"], initial_alphabet=alphabet)
    core.train_from_iterator(CORPUS, trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return wrapped(core, bos_token="<s>")


def metaspace() -> PreTrainedTokenizerFast:
    """As Llama's and Gemma's: spaces become ▁, unknown characters bytes."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=names)
    core.train_from_iterator(
        ["▁" + text.replace(" ", "▁").replace("狐", "").replace("🦊", "") for text in CORPUS], trainer
    )
    # The trainer takes bytes for special tokens; a model's own files do not.
    vocabulary, merges = _parts(core)
    core.model = models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>")
    fresh = Tokenizer(core.model)
    fresh.normalizer, fresh.decoder = core.normalizer, core.decoder
    return wrapped(fresh, unk_token="<unk>", bos_token="<s>")


def _parts(core: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    model = json.loads(core.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def word_piece() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", "[CLS]"])
    core.train_from_iterator(CORPUS, trainer)
    return wrapped(core, unk_token="[UNK]", cls_token="[CLS]")


def whole_words() -> PreTrainedTokenizerFast:
    """No decoder at all, and a word that begins with ##."""
    names = sorted({word for text in (*CORPUS, *SENTENCES) for word in text.split()})
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate([*names, "[UNK]"])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(core, unk_token="[UNK]")


@pytest.mark.parametrize("text", SENTENCES)
def test_byte_level_tokens_read_as_their_text(text: str) -> None:
    tokenizer = byte_level()
    assert any(name.startswith("##") and len(name) > 2 for name in tokenizer.get_vocab())
    pieces = Texts(tokenizer).run(tokenizer(text)["input_ids"])
    assert "".join(pieces) == text.replace("\n", " ")
    assert pieces[0] == ""  # <s>
    assert not any("Ġ" in piece or "�" in piece for piece in pieces)


@pytest.mark.parametrize("text", SENTENCES)
def test_metaspace_tokens_read_as_their_text(text: str) -> None:
    tokenizer = metaspace()
    pieces = Texts(tokenizer).run(tokenizer(text)["input_ids"])
    assert "".join(pieces) == text.replace("\n", " ")
    assert not any("▁" in piece or "<0x" in piece for piece in pieces)


def test_word_pieces_are_told_by_their_decoder() -> None:
    tokenizer = word_piece()
    texts = Texts(tokenizer)
    ids = tokenizer("The lazy fox jumps over")["input_ids"]
    assert "".join(texts.run(ids)).split() == ["The", "lazy", "fox", "jumps", "over"]
    ends = next(token for name, token in tokenizer.get_vocab().items() if name.startswith("##") and len(name) > 3)
    assert texts.token(ends).startswith("-")


def test_whole_words_keep_their_signs() -> None:
    tokenizer = whole_words()
    pieces = Texts(tokenizer).run(tokenizer("over ##3 dogs, the lazy")["input_ids"])
    assert "".join(pieces) == "over ##3 dogs, the lazy"


def test_a_run_may_begin_and_end_inside_a_character() -> None:
    tokenizer = byte_level(vocabulary=258)  # bytes alone
    texts, ids = Texts(tokenizer), byte_level(vocabulary=258)("a🦊b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 6
    pieces = texts.run(ids)
    assert pieces == ["a", "", "", "", "🦊", "b"]
    assert [texts.continues(ids, pieces, i) for i in range(6)] == [False, True, True, True, False, False]
    assert texts.run(ids[:3]) == ["a", "", "�"]
    assert "".join(texts.run(ids[2:])).endswith("b")
    assert not texts.continues([0, ids[0]], ["", "a"], 0)  # <s> is a token of its own


def test_a_token_by_itself() -> None:
    tokenizer = byte_level()
    texts, vocabulary = Texts(tokenizer), tokenizer.get_vocab()
    assert texts.token(vocabulary["##"]) == "##"
    assert texts.token(vocabulary["Ġfox"]) == "fox"
    assert texts.token(vocabulary["Ċ"]) == r"'\n'"
    assert texts.token(vocabulary["Ġ"]) == "' '"
    assert texts.token(vocabulary["ð"]) == r"\xf0"  # the first byte of 🦊, no letter
    llama = metaspace()
    assert Texts(llama).token(llama.get_vocab()["▁"]) == "' '"
    begins = next(name for name in llama.get_vocab() if name.startswith("▁") and name[1:].isalpha())
    assert Texts(llama).token(llama.get_vocab()[begins]) == begins[1:]


def test_forms_of_a_word() -> None:
    assert same_word("raise", "Raised")
    assert same_word("run", "running")
    assert same_word("-ized", "-ize")
    assert not same_word("table", "row")
    assert not same_word("a", "all")


class Bert:
    """A word-piece tokenizer as far as Texts asks."""

    all_special_ids = (0, 1)
    names = ("[CLS]", "[SEP]", "don", "'", "t", "max", "_", "len", "##s", "(", "x", ")", ",", "print")

    def get_vocab(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.names[token]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens).replace(" ##", "")


def test_word_pieces_read_as_text() -> None:
    texts = Texts(Bert())
    ids = [
        Bert.names.index(w)
        for w in ["[CLS]", "don", "'", "t", "print", "max", "_", "len", "##s", "(", "x", ")", ",", "x"]
    ]
    assert "".join(texts.run(ids)) == " don't print max_lens (x), x"
    assert texts.token(8) == "-s"
    assert texts.n_words([7, 8, 5]) == 2  # -s is no word
