"""Writing .npz files: arrays stored as they are, so that whoever reads them can map them."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saefast.data.shardfile import Column
from saefast.files import replacing

# numpy has no bfloat16: what it cannot name is written as float32.
_KINDS = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}


def write_npz(path: Path, columns: Mapping[str, Column]) -> None:
    """A file for numpy.load, written some rows at a time, whole or not at all."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, column in columns.items():
            kind: Any = _KINDS.get(column.dtype, np.float32)
            # A fixed date, so that the same SAE is the same file.
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(info, "w", force_zip64=True) as file:
                shape = tuple(column.shape)
                header = {"descr": np.dtype(kind).str, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for piece in column.pieces:
                    file.write(memoryview(_array(piece, kind)).cast("B"))


def _array(piece: Tensor, kind: Any) -> Any:
    return np.ascontiguousarray(piece.detach().cpu().float().numpy() if kind is np.float32 else piece.cpu().numpy())
