"""A pipe or a device where a file should be is refused at once: nothing may ever come out of it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import saefast
from saefast.data.opening import open_source
from saefast.errors import InputError
from saefast.training.run_folder import read_config


def memmap(folder: Path) -> None:
    torch.zeros(4, 2).numpy().tofile(folder / "shard_0.memmap")


@pytest.mark.parametrize(
    ("name", "read", "prepare"),
    [
        ("config.json", read_config, None),
        ("sae.safetensors", saefast.load, None),
        ("x.safetensors", lambda folder: open_source(folder / "x.safetensors"), None),
        ("x.pt", lambda folder: open_source(folder / "x.pt"), None),
        ("x.npy", lambda folder: open_source(folder / "x.npy"), None),
        ("shard_0.meta", open_source, memmap),
        ("chunk-0.safetensors", open_source, None),
        ("chunk-0.pt", open_source, None),
        ("index.json", open_source, None),
    ],
)
def test_a_pipe_is_no_file(
    tmp_path: Path, name: str, read: Callable[[Path], Any], prepare: Callable[[Path], None] | None
) -> None:
    os.mkfifo(tmp_path / name)
    if prepare is not None:
        prepare(tmp_path)
    with pytest.raises(InputError, match=f"{name}|{tmp_path.name}"):
        read(tmp_path)


def test_a_memmap_that_is_a_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "shard_0.meta").write_text('{"shape": [4, 2], "dtype": "float32"}')
    (tmp_path / "shard_0.memmap").symlink_to("shard_0.memmap")
    with pytest.raises(InputError, match=r"shard_0.memmap.*symbolic links"):
        open_source(tmp_path)
