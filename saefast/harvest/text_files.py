"""Text in files and folders: the format is what a file's ending says."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from saefast.errors import InputError
from saefast.harvest import arrow_files
from saefast.harvest.documents import Document, Text
from saefast.harvest.records import LOOK, NoColumn, Record, documents_of, has_field
from saefast.harvest.text_formats import READERS, prose
from saefast.harvest.unpack import DAMAGED, PACKED

# Endings of what is no text, by what it is; all that is not known here is looked into.
_NOT_TEXT = {
    "a picture": "png jpg jpeg gif bmp webp tif tiff ico heic",
    "sound": "wav mp3 flac ogg m4a aac opus",
    "a film": "mp4 mov avi mkv webm",
    "an archive": "zip tar tgz 7z rar bz2 xz lz4 jar whl",
    "an office document": "doc docx xls xlsx ppt pptx odt ods odp",
    "a document with a layout": "pdf epub djvu",
    "weights or arrays": "npy npz safetensors pt pth ckpt gguf onnx h5 hdf5 pkl pickle",
    "a program": "exe dll so dylib o a pyc class wasm",
    "a database": "db sqlite sqlite3 mdb",
    "a font": "ttf otf woff woff2",
}
_WHAT = {f".{ending}": what for what, endings in _NOT_TEXT.items() for ending in endings.split()}


class Files(Text):
    """A file, or every file below a folder in the order of their paths; hidden ones are not looked at.

    By their ending, .gz and .zst after it allowed: .jsonl and .ndjson are one record a line, .json an array of records
    or single ones, .csv and .tsv tables whose first row names the columns, .parquet, .arrow and .feather what pyarrow
    reads, a folder that `datasets` saved its rows in order. Anything else is prose in UTF-8, cut at blank lines into
    documents of about DOCUMENT_CHARS. Pictures, archives and the like are skipped by their ending; so is what is not
    UTF-8, holds NUL bytes or is damaged from there on, and each record without text.
    """

    def __init__(self, path: Path, column: str = "text") -> None:
        super().__init__(str(path))
        self._path, self._column = path, column

    def size(self) -> int | None:
        files = self._files()
        plain = all(format_of(file) not in arrow_files.ENDINGS and not is_packed(file) for file in files)
        return sum(file.stat().st_size for file in files) if plain else None

    def _files(self) -> list[Path]:
        return files_below(self._path) if self._path.is_dir() else [self._path]

    def _documents(self, tokenizer: Any) -> Iterator[Document]:
        for file in self._files():
            try:
                yield from self._in_file(file, tokenizer)
            except NoColumn as error:
                self._without_column(file, error)
            except UnicodeDecodeError as error:
                self.skip(f"{file} is not UTF-8 text ({error.reason} after byte {error.start})")
            except DAMAGED as error:
                self.skip(f"{file} cannot be read to its end ({getattr(error, 'strerror', None) or error})")

    def _in_file(self, file: Path, tokenizer: Any) -> Iterator[Document]:
        ending = format_of(file)
        if ending in _WHAT:
            self.skip(f"{file} is {_WHAT[ending]} by its ending, not text")
        elif (records := records_in(file, self._column)) is not None:
            yield from documents_of(records, self._column, tokenizer, self.skip)
        else:
            yield from prose(file)

    def _without_column(self, file: Path, error: NoColumn) -> None:
        """Skips a file of records without the field. Raises InputError where no other file has it either.

        A single object in a .json file of a folder may be anything, the settings of some program above all.
        """
        settings = format_of(file) == ".json" and error.records == 1
        others = [other for other in self._files() if other != file]
        if file == self._path or not (settings or any(map(self._has_column, others))):
            raise InputError(str(error)) from None
        self.skip(str(error))

    def _has_column(self, file: Path) -> bool:
        """Whether one of a file's first records has the field."""
        records = None if format_of(file) in _WHAT else records_in(file, self._column)
        try:
            return any(has_field(record, self._column) for _, record in islice(records or (), LOOK))
        except (NoColumn, UnicodeDecodeError, *DAMAGED):
            return False


def records_in(file: Path, column: str) -> Iterator[Record] | None:
    """The records of a file whose ending says that it has some."""
    ending = format_of(file)
    if ending in arrow_files.ENDINGS:
        return arrow_files.records(file, column)
    return READERS[ending](file) if ending in READERS else None


def format_of(file: Path) -> str:
    """The ending that says what is in a file, in small letters: ".csv" of x.CSV.gz."""
    return (Path(file.stem) if is_packed(file) else file).suffix.lower()


def is_packed(file: Path) -> bool:
    return file.suffix.lower() in PACKED


def names_a_file(text: str) -> bool:
    """Whether a name ends like a file of text or records, there or not."""
    return format_of(Path(text)) in {".txt", ".md", *READERS, *arrow_files.ENDINGS} or is_packed(Path(text))


def files_below(folder: Path) -> list[Path]:
    """Every file below a folder in the order of their paths, without hidden ones; of saved data sets what has rows."""
    found = sorted(_visible_files(folder))
    saved = {parent: arrow_files.saved_files(parent) for parent in {file.parent for file in found}}
    files = []
    for file in found:
        listed = saved[file.parent]
        if listed is None or file in listed:
            files.append(file)
    return files


def _visible_files(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts):
            yield file
