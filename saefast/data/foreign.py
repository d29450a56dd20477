"""Activations that other libraries (foreign ones) cached, read without importing them.

SAELens            a Hugging Face datasets folder: data-*.arrow, a column per hook, rows (context, d_in). Needs pyarrow
science-of-finetuning (dictionary_learning fork)    shard_{i}.memmap beside shard_{i}.meta (JSON: shape, dtype)
llamascopium       {hook}/[shard-{s}-]chunk-{n}.safetensors or .pt: activation (..., d_in) [, attention_mask, mask]
"""

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from saefast.data.segments import Segment, from_array, open_pt
from saefast.data.shardfile import map_tensor, read_header
from saefast.errors import InputError
from saefast.files import no_pipe, read_json, usable
from saefast.schema import Count

# numpy has no bfloat16: its bits lie there as int16.
STORED: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": np.int16,
}


class Shaped(TypedDict):
    """shard_{i}.meta: what must be there."""

    shape: list[Count]


class Meta(Shaped, total=False):
    """shard_{i}.meta."""

    dtype: str


Reader = Callable[[list[Path], str | None], list[Segment]]


def read_foreign(folder: Path, hook: str | None) -> list[Segment] | None:
    """Segments of a folder in one of the formats above, in order; None when it is in none of them.

    Raises InputError for files that are damaged, or a hook that is missing or not named among several.
    """
    for pattern, read in FORMATS:
        files = sorted(folder.glob(pattern), key=_numbers)
        if files:
            return read(files, hook)
    return _one_hook_folder(folder, hook)


def _one_hook_folder(folder: Path, hook: str | None) -> list[Segment] | None:
    """llamascopium keeps a folder per hook: the one asked for, or the only one."""
    hooks = sorted({file.parent for file in folder.rglob("*chunk-*") if file.parent != folder})
    if not hooks:
        return None
    names = [str(path.relative_to(folder)) for path in hooks]
    if hook is None and len(hooks) > 1:
        raise InputError(f"{folder} holds {', '.join(names)}: say which with hook")
    if hook is not None and hook not in names:
        raise InputError(f"{folder} has no hook {hook!r}; it holds {', '.join(names)}")
    return read_foreign(hooks[names.index(hook)] if hook else hooks[0], None)


def _read_arrow(files: list[Path], hook: str | None) -> list[Segment]:
    try:
        import pyarrow as pa
    except ImportError:
        raise InputError(f"{files[0]} is an Arrow file: pip install pyarrow to read it") from None
    segments = []
    for file in files:
        try:
            with pa.memory_map(str(no_pipe(usable(file)))) as source:
                table = pa.ipc.open_stream(source).read_all()
            name = _pick_column(file, [n for n in table.column_names if n != "token_ids"], hook)
            # Arrow trusts lengths and offsets; those of a damaged file would make it read beyond its memory.
            table.column(name).validate(full=True)
        except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
            raise InputError(f"{file} cannot be read as an Arrow stream, is it truncated? ({error})") from None
        segments += [_arrow_rows(file, chunk) for chunk in table.column(name).chunks if len(chunk)]
    return segments


def _pick_column(file: Path, names: list[str], hook: str | None) -> str:
    if hook is None and len(names) == 1:
        return names[0]
    if hook not in names:
        wanted = "say which with hook" if hook is None else f"there is no {hook!r}"
        raise InputError(f"{file} has the columns {', '.join(names) or 'none'}: {wanted}")
    return str(hook)


def _arrow_rows(file: Path, chunk: Any) -> Segment:
    """A column of (context, d_in) arrays, stored as lists of lists, as rows (n, d_in)."""
    rows = getattr(chunk, "storage", chunk).flatten()
    values = rows.flatten().to_numpy(zero_copy_only=False)
    if not len(rows) or len(values) % len(rows):
        raise InputError(f"{file}: expected rows of one width in every (context, d_in) entry")
    with warnings.catch_warnings():
        # The file is mapped read-only and nothing here writes to its rows.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return from_array(str(file), values.reshape(len(rows), -1))


def _read_memmaps(files: list[Path], hook: str | None) -> list[Segment]:
    _one_hook(files, hook)
    return [_read_memmap(file) for file in files]


def _read_memmap(file: Path) -> Segment:
    beside = file.with_suffix(".meta")
    meta: Meta = read_json(beside, Meta)
    shape, name = tuple(meta["shape"]), meta.get("dtype", "float32").removeprefix("torch.")
    if name not in STORED:
        raise InputError(f"{beside}: dtype is {name[:60]!a}, expected one of {', '.join(STORED)}")
    stored = np.dtype(STORED[name])
    size, expected = no_pipe(usable(file)).stat().st_size, math.prod(shape) * stored.itemsize
    if size != expected or not size:
        raise InputError(f"{file} has {size} bytes, its .meta promises {shape} {name} = {expected}: it is truncated")
    rows = torch.from_numpy(np.memmap(file, stored, mode="c", shape=shape))
    return from_array(str(file), rows.view(torch.bfloat16) if name == "bfloat16" else rows)


def _read_chunks(files: list[Path], hook: str | None) -> list[Segment]:
    _one_hook(files, hook)
    return [_read_chunk(file) for file in files]


def _one_hook(files: list[Path], hook: str | None) -> None:
    """Raises InputError for a hook that is not in the folder's name."""
    folder = files[0].parent
    if hook not in (None, folder.name):
        raise InputError(f"{folder} holds the rows of one hook and does not say which: leave out hook {hook!r}")


def _read_chunk(file: Path) -> Segment:
    if file.suffix == ".safetensors":
        tensors = {name: map_tensor(file, entry) for name, entry in read_header(file).items()}
    else:
        tensors = open_pt(file)
    if not isinstance(tensors, dict) or not isinstance(tensors.get("activation"), Tensor):
        held = ", ".join(map(str, tensors)) if isinstance(tensors, dict) else type(tensors).__name__
        raise InputError(f"{file} has no tensor 'activation'; it holds {held or 'none'}")
    rows = from_array(str(file), tensors["activation"])
    keep = _kept(tensors, rows.rows)
    return rows if keep is None else Segment(rows.name, rows.rows[keep])


def _kept(tensors: dict[str, Any], rows: Tensor) -> Tensor | None:
    """Which rows are tokens, not padding; None when all are."""
    keep = torch.ones(len(rows), dtype=torch.bool, device="cpu")
    for name in ("attention_mask", "mask"):
        if isinstance(tensors.get(name), Tensor) and tensors[name].numel() == len(rows):
            keep &= tensors[name].reshape(-1).bool()
    return None if bool(keep.all()) else keep


def _numbers(path: Path) -> list[int]:
    """Files in the order of the numbers in their names: shard_10 comes after shard_9."""
    return [int(number) for number in re.findall(r"\d+", path.name)]


FORMATS: list[tuple[str, Reader]] = [
    ("*.arrow", _read_arrow),
    ("shard_*.memmap", _read_memmaps),
    ("*chunk-*.safetensors", _read_chunks),
    ("*chunk-*.pt", _read_chunks),
]
