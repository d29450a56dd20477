"""Odd values for arguments: wrong types, huge, negative, empty, impossible paths, tensors of every wrong kind."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Made anew for each case, so that no case sees what another did to a value.
Make = Callable[[], Any]

NUMBERS: dict[str, Make] = {
    "0": lambda: 0,
    "-1": lambda: -1,
    "7": lambda: 7,
    "2**31": lambda: 2**31,
    "2**63": lambda: 2**63,
    "10**30": lambda: 10**30,
    "0.5": lambda: 0.5,
    "-0.5": lambda: -0.5,
    "1e-320": lambda: 1e-320,
    "1e308": lambda: 1e308,
    "nan": lambda: float("nan"),
    "inf": lambda: float("inf"),
    "-inf": lambda: float("-inf"),
    "True": lambda: True,
    "3 + 4j": lambda: 3 + 4j,
    "np.int64(4)": lambda: np.int64(4),
    "np.float32(0.1)": lambda: np.float32(0.1),
    "tensor(2)": lambda: torch.tensor(2),
}
OBJECTS: dict[str, Make] = {
    "None": lambda: None,
    "''": lambda: "",
    "'x'": lambda: "x",
    "'nul\\0'": lambda: "nul\0",
    "'\\udcff'": lambda: "\udcff",
    "b'x'": lambda: b"x",
    "[]": list,
    "{}": dict,
    "()": tuple,
    "object()": object,
    "a generator": lambda: (i for i in range(3)),
    "a function": lambda: len,
    "a class": lambda: dict,
}
VALUES = NUMBERS | OBJECTS
# Relative to the case's folder, which is the current one.
PATHS: dict[str, Make] = {
    "a missing file": lambda: "missing/there",
    "a folder": lambda: "foreign",
    "a foreign file": lambda: "foreign/notes.txt",
    "an empty folder": lambda: "empty",
    "an empty file": lambda: "none.npy",
    "below a file": lambda: "foreign/notes.txt/x",
    "a symlink loop": lambda: "loop",
    "below a loop": lambda: "loop/x",
    "a dead link": lambda: "dead",
    "a device": lambda: "/dev/null",
    "where nobody may write": lambda: "/proc/saefast",
    "a long name": lambda: "n" * 300,
    "a long path": lambda: "n/" * 3000,
    "NUL": lambda: "nul\0.npy",
    "not UTF-8": lambda: "latin-\udce9",
    "no such user": lambda: "~nobody-of-this-name/x",
    "a Path": lambda: Path("x y\n"),
    "a pipe": lambda: "pipe",
    "another's weights": lambda: "foreign/sae.safetensors",
}


def tensors(good: Tensor) -> dict[str, Make]:
    """Tensors that are not quite the good one. Complex, sparse, on no device, strange in memory, or odd in value."""
    x = good.double() if good.is_floating_point() else good
    return {
        "bfloat16": lambda: good.bfloat16(),
        "float16": lambda: good.half(),
        "float64": lambda: good.double(),
        "int64": lambda: good.long(),
        "uint8": lambda: good.to(torch.uint8),
        "bool": lambda: good.bool(),
        "complex": lambda: torch.complex(good.float(), good.float()),
        "a scalar": lambda: good.flatten()[0],
        "1-D": lambda: good.flatten(),
        "3-D": lambda: good[None],
        "no rows": lambda: good[:0],
        "no columns": lambda: good[..., :0],
        "one row too many": lambda: torch.cat([good, good[:1]]),
        "one column too few": lambda: good[..., :-1],
        "transposed": lambda: good.mT if good.dim() > 1 else good,
        "strided": lambda: torch.stack([good, good], -1)[..., 0],
        "stride 0": lambda: good[:1].expand(good.shape),
        "negated in memory": lambda: torch._neg_view(good) if good.is_floating_point() else good,
        "with gradient": lambda: good.clone().requires_grad_() if good.is_floating_point() else good,
        "on meta": lambda: good.to("meta"),
        "sparse": lambda: good.to_sparse(),
        "numpy": lambda: good.numpy(),
        "a list": lambda: good.tolist(),
        "nan": lambda: torch.full_like(x, float("nan")) if x.is_floating_point() else torch.full_like(x, -1),
        "one inf": lambda: _with(good, float("inf")),
        "huge": lambda: x * 1e300 if x.is_floating_point() else torch.full_like(x, 2**31 - 1),
        "tiny": lambda: good * 1e-42,
        "zeros": lambda: torch.zeros_like(good),
        "equal": lambda: torch.ones_like(good),
        "negative": lambda: -good.abs(),
        "a parameter": lambda: torch.nn.Parameter(good) if good.is_floating_point() else good,
    }


def _with(good: Tensor, value: float) -> Tensor:
    out = good.clone().float()
    out.view(-1)[0] = value
    return out


# What people type after a flag.
WORDS = [
    "", "x", "0", "-1", "7", "1e3", "0.5", "nan", "inf", "-inf", "1e400", "9" * 30, "None", "True", "a,b", "../../x",
    "/proc/saefast/x", "loop", "foreign", "foreign/notes.txt", "dead", "pipe", "n" * 300, "nul\0", "\udcff", "é☃", "--",
    "-", "=",
]  # fmt: skip
