"""Files as they are or packed by gzip or zstandard, read as bytes piece by piece: never whole in memory."""

import contextlib
import gzip
import importlib
import io
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from saefast.errors import InputError

PACKED = (".gz", ".zst")
# What reading a damaged file raises.
DAMAGED = (OSError, EOFError, zlib.error)
# zstandard says how large its input may be, and not its output: a small piece cannot become much.
_PIECE = 1 << 11
# What a file that cannot be read from front to back may be when unpacked, in bytes.
LARGEST = 1 << 33


def opened(path: Path) -> Any:
    """The file's bytes, unpacked where its ending says so.

    Reading raises one of DAMAGED where the file is cut off or broken, after all that comes before. Raises InputError
    where zstandard is not installed.
    """
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_Zstandard(path))
    return path.open("rb")


def opened_anywhere(path: Path) -> Any:
    """As `opened`, for formats that are not read from front to back: what is packed is unpacked beside it first.

    Raises OSError for what is too large to be unpacked so.
    """
    if path.suffix.lower() not in PACKED:
        return path.open("rb")
    with contextlib.ExitStack() as on_error:
        whole = on_error.enter_context(tempfile.TemporaryFile())
        size = 0
        with opened(path) as packed:
            while piece := packed.read(1 << 20):
                size += whole.write(piece)
                if size > LARGEST:
                    raise OSError(f"it is larger than {LARGEST >> 30} GiB when unpacked: unpack it, and name that")
        whole.seek(0)
        on_error.pop_all()
    return whole


class _Zstandard(io.RawIOBase):
    """A .zst file of one or more frames, unpacked."""

    def __init__(self, path: Path) -> None:
        self._begin, self._broken = _decompressor(path)
        self._file = path.open("rb")
        self._frame: Any = None
        self._packed = b""
        self._out = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        target = memoryview(into).cast("B")
        while not self._out:
            if not self._unpack():
                return 0
        n = min(len(target), len(self._out))
        target[:n], self._out = self._out[:n], self._out[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()

    def _unpack(self) -> bool:
        """The next piece; False at the end of the file."""
        piece = self._packed or self._file.read(_PIECE)
        if not piece:
            if self._frame is not None:
                raise EOFError("it ends before its last frame does")
            return False
        self._frame = self._frame or self._begin()
        try:
            self._out = memoryview(self._frame.decompress(piece))
        except self._broken as error:
            raise OSError(str(error)) from None
        self._packed = b""
        if self._frame.eof:
            self._packed, self._frame = self._frame.unused_data, None
        return True


def _decompressor(path: Path) -> tuple[Callable[[], Any], type[Exception]]:
    """What makes the decompressor of a frame, and the error it raises: Python's own, or the package zstandard's."""
    # Large dumps are packed with windows of up to 2 GiB.
    try:
        zstd = importlib.import_module("compression.zstd")
        options = {zstd.DecompressionParameter.window_log_max: 31}
        return lambda: zstd.ZstdDecompressor(options=options), zstd.ZstdError
    except ImportError:
        pass
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        raise InputError(f"{path} needs the package zstandard to be unpacked: pip install zstandard") from None
    return lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(), zstandard.ZstdError
