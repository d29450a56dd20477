"""Tokens read as the text they came from, in every kind of tokenizer; all are made on the spot."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from saefast.harvest.token_text import Texts, same_word
from saefast.readable import visible

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
    assert "".join(pieces) == text
    assert pieces[0] == ""  # <s>
    assert not any("Ġ" in piece or "�" in piece for piece in pieces)


@pytest.mark.parametrize("text", SENTENCES)
def test_metaspace_tokens_read_as_their_text(text: str) -> None:
    tokenizer = metaspace()
    pieces = Texts(tokenizer).run(tokenizer(text)["input_ids"])
    assert "".join(pieces) == text
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


def test_numbers_of_word_pieces_stay_whole() -> None:
    class Numbers(Bert):
        names = ("[CLS]", "[SEP]", "3", ".", "5", ",", "100", ":", "##0", "at", "30")

    texts, written = Texts(Numbers()), "3 . 5 at 3 : 30 , 5 , 3 , 100 . at 3 . ##0"
    ids = [Numbers.names.index(word) for word in written.split()]
    assert "".join(texts.run(ids)) == " 3.5 at 3:30, 5, 3,100. at 3.0"


def test_word_pieces_read_as_text() -> None:
    texts = Texts(Bert())
    ids = [
        Bert.names.index(w)
        for w in ["[CLS]", "don", "'", "t", "print", "max", "_", "len", "##s", "(", "x", ")", ",", "x"]
    ]
    assert "".join(texts.run(ids)) == " don't print max_lens (x), x"
    assert texts.token(8) == "-s"
    assert texts.n_words([7, 8, 5]) == 2  # -s is no word


def unigram(byte_fallback: bool = True) -> PreTrainedTokenizerFast:
    """As T5's and XLM-R's: sentencepiece's other model; without byte fallback what it does not know is <unk>."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    names = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.UnigramTrainer(vocab_size=420, special_tokens=names, unk_token="<unk>")
    core.train_from_iterator([text.replace("狐", "").replace("🦊", "") for text in CORPUS], trainer)
    vocabulary = [tuple(line) for line in json.loads(core.to_str())["model"]["vocab"]]
    fresh = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=byte_fallback))
    fresh.pre_tokenizer = core.pre_tokenizer
    last = [decoders.ByteFallback(), decoders.Fuse()] if byte_fallback else []
    fresh.decoder = decoders.Sequence([decoders.Metaspace(), *last]) if last else decoders.Metaspace()
    return wrapped(fresh, unk_token="<unk>", bos_token="<s>")


def suffixed() -> PreTrainedTokenizerFast:
    """As CLIP's text tokenizer and GPT-1's: the end of a word is a part of its token, so that no table tells all."""
    core = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>"], end_of_word_suffix="</w>")
    core.train_from_iterator(CORPUS, trainer)
    return wrapped(core, unk_token="<unk>")


KINDS = {
    "byte-level": byte_level(),
    "bytes alone": byte_level(258),
    "BPE with byte fallback": metaspace(),
    "unigram with byte fallback": unigram(),
    "unigram without": unigram(byte_fallback=False),
    "suffixes": suffixed(),
    "whole words": whole_words(),
    "word pieces": word_piece(),
}
LOSSLESS = ("byte-level", "bytes alone", "BPE with byte fallback")
# Right-to-left, joined emoji, Chinese, combining signs, control characters and HTML among what hypothesis draws.
SIGNS = [*"The fox jumps.!?\n\t \0\x1b\x85", "שלום ", "مرحبا", "👩‍🚀", "狐。", "é", "\u202e", "<b>", "�"]
DRAWN = st.one_of(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), st.sampled_from(SIGNS))
WRITTEN = st.lists(DRAWN, max_size=40).map("".join)


@pytest.mark.parametrize("kind", LOSSLESS)
@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(text=WRITTEN)
def test_any_text_comes_back(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]
    ids = tokenizer(text)["input_ids"]
    pieces = Texts(tokenizer).run(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "word pieces"])
@settings(max_examples=120, deadline=None, database=None, derandomize=True)
@given(data=st.data())
def test_any_ids_read_as_the_tokenizers_own_decoder_has_them(kind: str, data: st.DataObject) -> None:
    """Bytes of no character among them, as a model may write them, and runs that begin and end anywhere."""
    tokenizer = KINDS[kind]
    texts, special = Texts(tokenizer), {tokenizer.bos_token_id, tokenizer.unk_token_id} - {None}
    ids = data.draw(st.lists(st.integers(0, len(tokenizer.get_vocab()) - 1).filter(lambda i: i not in special)))
    pieces = texts.run(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == (tokenizer.decode(ids, clean_up_tokenization_spaces=False) if ids else "")


@pytest.mark.parametrize("kind", list(KINDS))
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(text=WRITTEN.map(lambda text: text.replace("�", "")))  # one that was written looks broken to who reads on
def test_what_a_table_of_tokens_tells_is_what_reading_on_tells(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]
    texts = Texts(tokenizer)
    kept = [i for i in tokenizer(text)["input_ids"] if not texts.is_special(i)]
    assert "".join(texts._decoded(kept)) == "".join(texts._read_on(kept))


def test_a_run_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a long sequence costs what its length is; a decoder that no table tells sees a few tokens at a time."""
    for kind, most in (("byte-level", 1.1), ("BPE with byte fallback", 1.1), ("suffixes", 10.0)):
        tokenizer = KINDS[kind]
        texts, ids = Texts(tokenizer), tokenizer("The fox jumps over the lazy dog" * 100)["input_ids"]
        texts.run(ids)  # now it knows the tokens
        seen: list[int] = []
        decode = texts._decode
        monkeypatch.setattr(
            texts, "_decode", lambda part, seen=seen, decode=decode: seen.append(len(part)) or decode(part)
        )
        texts.run(ids)
        assert 0 < sum(seen) <= most * len(ids)


def test_what_a_tokenizer_does_not_know_is_shown() -> None:
    for kind in ("unigram without", "word pieces", "whole words"):
        tokenizer = KINDS[kind]
        ids = tokenizer("lazy 🐢 lazy")["input_ids"]
        assert tokenizer.unk_token_id in ids
        assert "".join(Texts(tokenizer).run(ids)).split() == ["lazy", "�", "lazy"]


def test_halves_of_characters_are_broken_characters() -> None:
    class Slow(Bert):
        def decode(self, ids: list[int], **options: Any) -> str:
            return "".join(["a", "\ud83e", "b"][i] for i in ids)

        def get_vocab(self) -> dict[str, int]:
            return {}

        all_special_ids = ()

    assert Texts(Slow()).run([0, 1, 2]) == ["a", "�", "b"]


@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
def test_what_is_shown_is_visible_and_no_control_character(text: str) -> None:
    shown, lines = visible(text), visible(text, lines=True)
    shown.encode()
    assert not any(sign < " " or "\x7f" <= sign < "\xa0" or sign in "\u202e\u2066\u200f\u2028\ufeff" for sign in shown)
    assert lines.replace("\n", "↵").replace("\t", "⇥") == shown
    assert visible(shown) == shown


def test_control_characters_have_pictures() -> None:
    assert visible("a\x1b[31m\n\t\x00\x7f\u202e\ud800é👩‍🚀<b>") == "a␛[31m↵⇥␀␡\\u202e\\ud800é👩‍🚀<b>"
