"""Folders of sound, made a model's input by its own feature extractor."""

import functools
import hashlib
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from saefast.errors import InputError
from saefast.files import usable
from saefast.harvest.image_folder import files_below, name_below, processed, size_of, tensors_of
from saefast.harvest.items import FileItems, Ref, Unreadable
from saefast.harvest.sound import OTHERS, WAV, length_of, resampled, samples_of

# A stretch where nothing else says how long: attention takes memory that grows with the square of it.
SECONDS = 30.0
# What wav2vec2 and Whisper make their first frame of, in seconds.
LEAST = 0.025


class _Stretch(NamedTuple):
    """Samples start to stop of a file; why: it cannot be read."""

    file: Path
    rate: int
    start: int
    stop: int
    why: str = ""


class AudioFolder(FileItems):
    """The sound files in a folder and all below it in the order of their paths, or one file; hidden ones are left out.

    Channels are averaged, other rates resampled to the feature extractor's. A file that is longer than `seconds` is cut
    into stretches of equal length, each an item. Each goes through the feature extractor alone. Raises InputError where
    there is no file, or where the extractor would cut stretches of that length short.
    """

    kind = "audio"

    def __init__(self, path: str | Path, processor: Any, seconds: float | None = None) -> None:
        super().__init__()
        self._root, self._processor = usable(path), processor
        self._files = files_below(self._root, WAV + OTHERS, "audio")
        self.name = str(self._root)
        self.input = (getattr(processor, "model_input_names", None) or ["input_features"])[0]
        rate = getattr(processor, "sampling_rate", None)
        if not isinstance(rate, int):
            raise InputError(f"processor is a {type(processor).__name__}: expected a feature extractor for sound")
        self._rate = rate
        longest = _longest(processor)
        if seconds is not None and seconds > longest:
            raise InputError(f"audio_seconds is {seconds}, but {type(processor).__name__} takes at most {longest:g}")
        self._seconds = seconds or min(longest, SECONDS)

    def refs(self) -> Iterator[Ref]:
        for file in self._files:
            name, size = name_below(self._root, file), size_of(file)
            try:
                rate, n = length_of(file)
            except Unreadable as error:
                yield Ref(name, size, _Stretch(file, 1, 0, 0, str(error)))
                continue
            pieces = max(math.ceil(n / (rate * self._seconds)), 1)
            edges = [n * i // pieces for i in range(pieces + 1)]
            for start, stop in pairwise(edges):
                part = f"#t={start / rate:.3f},{stop / rate:.3f}" if pieces > 1 else ""
                yield Ref(name + part, size // pieces, _Stretch(file, rate, start, stop))

    def total(self) -> int:
        return sum(map(size_of, self._files))

    def digest(self, ref: Ref) -> str:
        stat = ref.place.file.stat()
        # All stretches of a file are held out, or none.
        return _digest(str(ref.place.file), stat.st_size, stat.st_mtime_ns)

    def read(self, ref: Ref) -> tuple[dict[str, Tensor], Tensor | None]:
        file, rate, start, stop, why = ref.place
        if why:
            raise Unreadable(why)
        if stop - start < LEAST * rate:
            raise Unreadable(f"is shorter than {LEAST} seconds, which models of sound take for a frame")
        samples = resampled(samples_of(file, start, stop), rate, self._rate, file)
        made = processed(self._processor, samples, sampling_rate=self._rate, return_attention_mask=True)
        inputs = tensors_of(made)
        # One that leaves nothing out says nothing, and some models were trained without.
        mask = inputs.get("attention_mask")
        if mask is not None and bool(mask.all()):
            del inputs["attention_mask"]
        return inputs, None


def _longest(processor: Any) -> float:
    """Seconds that a feature extractor keeps of what it is given."""
    for name in ("chunk_length", "max_length_s"):
        if isinstance(value := getattr(processor, name, None), int | float):
            return float(value)
    if type(processor).__name__ == "ASTFeatureExtractor":
        # Counted in frames, a hundred a second.
        return float(processor.max_length) / 100
    return math.inf


# The stretches of one file come one after the other.
@functools.lru_cache(maxsize=64)
def _digest(file: str, size: int, changed: int) -> str:
    found = hashlib.blake2b(digest_size=16)
    with Path(file).open("rb") as opened:
        while piece := opened.read(1 << 20):
            found.update(piece)
    return found.hexdigest()
