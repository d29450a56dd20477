"""Documents to harvest from: files, folders, data sets, Python objects, or Python's own docstrings."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from saefast.errors import InputError
from saefast.files import usable
from saefast.harvest.docstrings import Docstrings
from saefast.harvest.documents import Document, Text
from saefast.harvest.text_files import Files, names_a_file
from saefast.harvest.text_objects import Dataset, given
from saefast.typed import typed

__all__ = ["Text", "open_text", "open_texts"]


@typed
def open_text(text: str | Path | Iterable[Any] | None = None, column: str = "text", seed: int = 0) -> Text:
    """The documents of

    - a file, or all files below a folder: prose, .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, each also packed
      as .gz or .zst (see Files); a folder that `datasets` saved with save_to_disk;
    - a `datasets` name, "owner/name[:config[:split]]", which is streamed;
    - a Dataset or IterableDataset of `datasets`, a DatasetDict of one split, a data frame;
    - an iterable of records: strings, mappings with a field `column`, or token ids;
    - an array or tensor of token ids: (n,) one sequence, (n, length) one a row;
    - None: the docstrings of Python's standard library, shuffled with `seed`. Nothing is downloaded.

    column: the field or column that holds the text. Where it holds token ids, they are taken as they are: cut to the
    context length, never tokenised again, no special token added, and the rows of special tokens among them dropped as
    ever. So is "input_ids" (without what "attention_mask" says is padding) where column is "text" and there is none.
    Where it holds chats, lists of messages with role and content, the tokenizer's template writes them out, with the
    special tokens that it wants and no others.

    A record without text is skipped and counted (Text.skipped): null, a number, ids that are none, a line that is no
    JSON, a field that this record lacks. Halves of characters become U+FFFD.

    Raises InputError for what does not exist; and when it is read, for a column that no record has, naming those seen,
    a package that is missing, and what holds no text.
    """
    if text is None:
        return Docstrings(seed)
    if isinstance(text, Text):
        return text
    if not isinstance(text, str | Path):
        return given(text, column)
    path = usable(text)
    if path.exists():
        return Files(path, column)
    if isinstance(text, Path) or text.startswith((".", "/", "~")) or names_a_file(text):
        raise InputError(f"text {str(text)!r} does not exist")
    return Dataset(str(text), column)


def open_texts(names: Iterable[str], column: str = "text", seed: int = 0) -> Text:
    """Several texts as `open_text` takes them, one after the other."""
    return Joined([open_text(name, column, seed) for name in names])


class Joined(Text):
    """Several texts, one after the other."""

    def __init__(self, texts: Sequence[Text]) -> None:
        super().__init__(", ".join(text.name for text in texts))
        self._texts = texts

    def size(self) -> int | None:
        sizes = [text.size() for text in self._texts]
        return None if None in sizes else sum(size for size in sizes if size is not None)

    def _documents(self, tokenizer: Any) -> Iterator[Document]:
        for text in self._texts:
            yield from text.documents(tokenizer)
            self.skipped += text.skipped
            self.n_skipped += text.n_skipped
