"""Every file of another library is of exactly one format, as a folder and by itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from their_files import (
    write_across,
    write_batchtopk,
    write_circuit_tracer,
    write_dictionary_learning,
    write_sparsify,
)

from saefast.formats.dictionary_learning import KINDS
from saefast.formats.registry import formats
from saefast.formats.source import Source

# Who writes, which file names the SAE where that is one, and which format it is.
WRITERS: dict[str, tuple[Callable[[Path], None], str | None, str]] = {
    "sparsify": (write_sparsify, "sae.safetensors", "sparsify"),
    "batchtopk": (lambda folder: write_batchtopk(folder, "topk"), "sae.pt", "batchtopk"),
    "jumprelu of batchtopk": (lambda folder: write_batchtopk(folder, "jumprelu"), "sae.pt", "batchtopk"),
    "matryoshka_sae": (
        lambda folder: write_batchtopk(folder, "batch-topk", {"threshold": torch.tensor(0.2)}),
        "sae.pt",
        "matryoshka_sae",
    ),
    "a layer of circuit-tracer": (write_circuit_tracer, "layer_0.safetensors", "circuit_tracer"),
    "across layers": (lambda folder: write_across(folder, 2, thresholds=True), None, "circuit_tracer"),
} | {
    name: (lambda folder, name=name: write_dictionary_learning(folder, name), "ae.pt", "dictionary_learning")  # type: ignore[misc]
    for name in KINDS
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
def test_one_format_each(name: str, tmp_path: Path) -> None:
    write, file, format = WRITERS[name]
    write(tmp_path / "sae")
    places = [tmp_path / "sae"] if file is None else [tmp_path / "sae", tmp_path / "sae" / file]
    for place in places:
        assert [known for known, one in formats.items() if one.recognises(Source(place))] == [format], place
