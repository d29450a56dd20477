"""Sound files as float32 samples: wav by Python's own `wave`, what that does not read by soundfile or scipy."""

import importlib
import math
import wave
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saefast.errors import InputError
from saefast.harvest.items import Unreadable

WAV = (".wav", ".wave")
# Samples a second that no recording has more of: a damaged header would ask for a filter as long.
FASTEST = 1_000_000
# What soundfile reads besides.
OTHERS = (".flac", ".ogg", ".mp3", ".aif", ".aiff")


class Length(NamedTuple):
    """rate: samples a second; n: how many there are of each channel."""

    rate: int
    n: int


def length_of(file: Path) -> Length:
    """What a file's header says. Raises Unreadable, or InputError where a package is missing to read such files."""
    try:
        if file.suffix.lower() in WAV:
            found = _wav_length(file)
        else:
            info = _soundfile(file).info(str(file))
            found = Length(int(info.samplerate), int(info.frames))
    except (Unreadable, InputError):
        raise
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror or error})") from None
    except Exception as error:  # soundfile's and scipy's own
        raise Unreadable(f"is no sound that opens ({type(error).__name__}: {str(error)[:80]})") from None
    if not 0 < found.rate <= FASTEST:
        raise Unreadable(f"claims to have {found.rate} samples a second")
    return found


def samples_of(file: Path, start: int, stop: int) -> np.ndarray:
    """Samples start to stop of a file, float32 from -1 to 1, the mean of its channels. Raises as `length_of` does."""
    try:
        found = _wav_samples(file, start, stop) if file.suffix.lower() in WAV else _others_samples(file, start, stop)
    except (Unreadable, InputError):
        raise
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror or error})") from None
    except Exception as error:
        raise Unreadable(f"is no sound that opens ({type(error).__name__}: {str(error)[:80]})") from None
    if len(found) != stop - start or not len(found):
        raise Unreadable(f"holds {len(found)} samples where its header says {stop - start}")
    mono: np.ndarray = found.mean(1, dtype=np.float32)
    return mono


def resampled(samples: np.ndarray, rate: int, wanted: int, file: Path) -> np.ndarray:
    """Samples (n,) at the wanted rate, by scipy's polyphase filter. Raises InputError without scipy."""
    if rate == wanted:
        return samples
    try:
        signal = importlib.import_module("scipy.signal")
    except ImportError:
        raise InputError(
            f"{file} has {rate} samples a second, the model's feature extractor takes {wanted}, and to resample it the"
            " package scipy is needed: pip install scipy, or convert the files"
        ) from None
    common = math.gcd(rate, wanted)
    return np.asarray(signal.resample_poly(samples, wanted // common, rate // common), dtype=np.float32)


def _wav_length(file: Path) -> Length:
    try:
        with wave.open(str(file), "rb") as opened:
            return Length(opened.getframerate(), opened.getnframes())
    except (wave.Error, EOFError) as error:
        rate, samples = _other_wav(file, str(error) or "it ends too early")
        return Length(rate, len(samples))


def _wav_samples(file: Path, start: int, stop: int) -> np.ndarray:
    """(n, channels) float32."""
    try:
        with wave.open(str(file), "rb") as opened:
            opened.setpos(min(start, opened.getnframes()))
            raw, width, channels = opened.readframes(stop - start), opened.getsampwidth(), opened.getnchannels()
    except (wave.Error, EOFError) as error:
        return _scaled(_other_wav(file, str(error) or "it ends too early")[1][start:stop])
    whole = raw[: len(raw) // (width * channels) * width * channels]
    if width == 3:
        # numpy has no integers of 24 bits: they become the upper bytes of 32.
        padded = np.zeros((len(whole) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(whole, np.uint8).reshape(-1, 3)
        return _scaled(padded.view("<i4").reshape(-1, channels))
    samples = np.frombuffer(whole, {1: "u1", 2: "<i2", 4: "<i4"}[width])
    return _scaled(samples.reshape(-1, channels))


def _other_wav(file: Path, why: str) -> tuple[int, np.ndarray]:
    """Rate and samples (n, channels) of a wav file that `wave` does not read, as floating-point ones."""
    try:
        wavfile = importlib.import_module("scipy.io.wavfile")
    except ImportError:
        raise Unreadable(f"is no wav that Python reads by itself ({why}); with scipy installed it may") from None
    rate, samples = wavfile.read(str(file))
    return int(rate), samples.reshape(len(samples), -1)


def _others_samples(file: Path, start: int, stop: int) -> np.ndarray:
    samples, _ = _soundfile(file).read(str(file), start=start, stop=stop, dtype="float32", always_2d=True)
    return np.asarray(samples)


def _soundfile(file: Path) -> Any:
    try:
        return importlib.import_module("soundfile")
    except (ImportError, OSError):  # OSError: it is there, and the library below it is not
        raise InputError(
            f"{file} is no wav, and to read it the package soundfile is needed: pip install soundfile"
        ) from None


def _scaled(samples: np.ndarray) -> np.ndarray:
    """float32 from -1 to 1 of integers of any width; 8 bits are without sign."""
    if samples.dtype.kind == "f":
        return samples.astype(np.float32)
    half = float(2 ** (8 * samples.dtype.itemsize - 1))
    return (samples.astype(np.float64) / half - (samples.dtype == np.uint8)).astype(np.float32)
