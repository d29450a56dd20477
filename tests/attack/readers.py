"""Everything that saefast reads from disk: how a whole folder is made, how it is read, and which bytes a digest covers.

A reader's `make` writes the same bytes in every process (`steady` sees to clocks and to safetensors' order of keys), so
that a case can be made again from its number alone.
"""

import contextlib
import dataclasses
import gzip
import importlib.util
import io
import itertools
import json
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import tiny_models
import torch
from latents_db import make_db
from safetensors.torch import save
from torch import Tensor

from saefast import formats
from saefast.analysis import latent_stats
from saefast.cli import main as cli
from saefast.data import shard_writer
from saefast.data.opening import open_source
from saefast.data.shard_writer import ShardWriter
from saefast.data.shards import ShardFolder
from saefast.data.source import Source
from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.harvest.text import open_text
from saefast.harvest.to_disk import HarvestConfig, harvest
from saefast.integrations.recorded import RecordedCodes
from saefast.integrations.recording import record
from saefast.latents.database import LatentsDB
from saefast.latents.schema import LATENTS_DB
from saefast.models import sae
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, load
from saefast.training.api import train
from saefast.training.loop import Run
from saefast.training.progress import read_metrics
from saefast.training.run_folder import read_config

D_IN, LATENTS = 6, 24


@dataclass(frozen=True)
class Reader:
    """make(folder) writes whole files; read(folder) gives what a user would get of them, or raises InputError.

    files: glob patterns of the files to damage. covered: those whose every byte a digest covers. writes: reading
    changes the folder. weight: share of the cases. needs: packages without which it is left out. part: of the
    attack, that it belongs to.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    covered: tuple[str, ...] = ()
    writes: bool = False
    weight: int = 1
    needs: tuple[str, ...] = ()
    part: str = "fuzz"


def rows(n: int, seed: int = 0) -> Tensor:
    """(n, D_IN) made of few directions."""
    generator = torch.Generator().manual_seed(seed)
    code = torch.rand(n, 2 * D_IN, generator=generator) ** 4
    return code @ torch.randn(2 * D_IN, D_IN, generator=generator)


# --- shard folders


def make_shards(folder: Path, dtype: str = "bfloat16") -> None:
    """Two hooks, two commits, three shards: 90 rows to train on and 20 held out, of 11 sequences of 10 tokens."""
    hooks = [{"name": name, "hf_name": f"model.{name}"} for name in ("layers.0", "layers.1")]
    with ShardWriter(folder, hooks, dtype, settings={"model": "tiny"}) as writer:
        for first, splits in ((0, ["train"] * 5 + ["heldout"] * 2), (7, ["train"] * 4)):
            seqs = range(first, first + len(splits))
            writer.add_sequences(first, [*seqs], [[10 * seq + i for i in range(10)] for seq in seqs])
            for seq, split in zip(seqs, splits, strict=True):
                x = {hook["name"]: rows(10, seed=seq + 100 * i) for i, hook in enumerate(hooks)}
                writer.add(split, x, torch.full((10,), seq), torch.arange(10))
            writer.commit(
                {"docs": seqs.stop, "seqs": seqs.stop, "done": 0, "tokens": 10 * seqs.stop}, complete=first > 0
            )


def read_shards(folder: Path, verify: bool = False) -> Any:
    opened = ShardFolder(folder, verify=verify)
    if verify and (bad := opened.verify()):
        raise InputError(bad[0].reason)
    found: list[Any] = []
    for hook in opened.hooks:
        source = open_source(folder, hook=hook, verify=verify)
        found += [list(source.located(split, 64)) for split in ("train", "heldout")]  # type: ignore[attr-defined]
        found.append(vars(opened.stats(hook)))
    return found + [(opened.tokens(seq), opened.document(seq)) for seq in range(opened.n_sequences)]


def read_buffer(folder: Path) -> Any:
    source = open_source(folder, hook="layers.1", shuffle="buffer")
    try:
        return drawn(source, 4)
    finally:
        if hasattr(source, "close"):
            source.close()


def drawn(source: Source, n: int = 3) -> list[Any]:
    """What training sees: batches, the held-out share, and what a row is called."""
    batches = source.batches(32, seed=1)
    found: list[Any] = [next(batches) for _ in range(n)]
    return [*found, source.n_rows, list(source.heldout(16))]


# --- files and caches of activations


def make_npy(folder: Path) -> None:
    np.save(folder / "x.npy", rows(100).numpy())


def make_pt(folder: Path) -> None:
    torch.save({"x": rows(100), "ids": torch.arange(100)}, folder / "x.pt")


def make_old_pt(folder: Path) -> None:
    torch.save(rows(100), folder / "x.pt", _use_new_zipfile_serialization=False)
    # The name of a storage is its address in memory.
    steady_name = re.sub(rb"\d{12,16}", lambda found: b"1" * len(found[0]), (folder / "x.pt").read_bytes())
    (folder / "x.pt").write_bytes(steady_name)


def make_safetensors(folder: Path) -> None:
    write_safetensors({"x": rows(100), "ids": torch.arange(100)}, folder / "x.safetensors")


def make_memmaps(folder: Path) -> None:
    for i, kind in enumerate((torch.float32, torch.bfloat16)):
        x = rows(40 + i, seed=i).to(kind)
        bits = x.view(torch.int16) if kind == torch.bfloat16 else x
        bits.numpy().tofile(folder / f"shard_{i}.memmap")
        (folder / f"shard_{i}.meta").write_text(json.dumps({"shape": list(x.shape), "dtype": str(kind)}))


def make_chunks(folder: Path, write: Callable[[dict[str, Tensor], Path], Any], suffix: str) -> None:
    for i in range(2):
        mask = torch.ones(4, 10, dtype=torch.int64)
        mask[:, 7 + i :] = 0
        (folder / "blocks.0").mkdir(exist_ok=True)
        values = {"activation": rows(40, seed=i).view(4, 10, D_IN), "attention_mask": mask}
        write(values, folder / "blocks.0" / f"chunk-{i:08d}{suffix}")


def make_arrow(folder: Path) -> None:
    import pyarrow as pa

    for i in range(2):
        columns = {"blocks.0": pa.array(rows(24, seed=i).view(6, 4, D_IN).tolist(), pa.list_(pa.list_(pa.float32())))}
        columns["token_ids"] = pa.array([[0] * 4] * 6)
        table = pa.table(columns)
        file = str(folder / f"data-0000{i}-of-00002.arrow")
        with pa.OSFile(file, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)


def read_file(name: str) -> Callable[[Path], Any]:
    return lambda folder: drawn(open_source(folder / name))


def read_folder(folder: Path) -> Any:
    return drawn(open_source(folder))


# --- SAEs, runs and checkpoints


def settings(n_steps: int, **changes: Any) -> TrainConfig:
    """A rate without decay, so that a run that is lengthened is the longer run from its beginning."""
    values: dict[str, Any] = dict(
        n_tokens=16 * n_steps, batch_size=16, lr=1e-2, lr_decay_start=-1, dead_after=100, auxk_k=4, log_every=1,
        save_every=3, eval_every=2, seed=3, device="cpu",
    )  # fmt: skip
    return TrainConfig(**values | changes)


SMALL = SAEConfig(d_in=D_IN, n_latents=LATENTS, k=3, metadata={"model_name": "tiny"})


def make_sae(folder: Path) -> None:
    SAE(SMALL, seed=0).save(folder)


def read_sae(folder: Path) -> Any:
    return found_in(load(folder))


def make_foreign(name: str) -> Callable[[Path], None]:
    """An SAE in another library's format, of the first kind that this one has."""

    def make(folder: Path) -> None:
        nested: dict[str, Any] = dict(activation="batchtopk", matryoshka=(8, LATENTS))
        for changes in ({}, dict(activation="jumprelu"), dict(activation="relu"), nested):
            sae = SAE(dataclasses.replace(SMALL, **changes), seed=0)
            for buffer in sae.buffers():
                buffer.fill_(0.5)
            with contextlib.suppress(InputError):
                formats.save(sae, folder, name)
                return
        raise AssertionError(f"{name} has none of these")

    return make


def read_foreign(folder: Path) -> Any:
    return found_in(formats.load(folder))


def found_in(loaded: SAE) -> list[Any]:
    x = rows(5)
    return [dict(loaded.state_dict()), loaded.config.to_dict(), *loaded.encode_sparse(x)]


def make_run(folder: Path, n_steps: int = 6, **changes: Any) -> None:
    """A run of 6 steps with checkpoints of steps 3 and 6 that is to go on to 9; its data lies beside it."""
    (folder / "data").mkdir()
    make_shards(folder / "data", "float32")
    source = open_source(folder / "data", hook="layers.0", shuffle=changes.pop("shuffle", "mapped"))
    train(source, SMALL, settings(n_steps, **changes), folder / "run", progress=False)
    (folder / "run" / "sae.safetensors").unlink()


def resume_run(folder: Path, **changes: Any) -> Any:
    source = open_source(folder / "data", hook="layers.0", shuffle=changes.pop("shuffle", "mapped"))
    trained = train(source, SMALL, settings(9, **changes), folder / "run", resume=True, progress=False)
    steps = [line["step"] for line in read_metrics(folder / "run")]
    return [found_in(trained), found_in(load(folder / "run")), steps[-3:]]


def make_finished(folder: Path) -> None:
    """A finished run as `saefast train` leaves it, its data inside."""
    (folder / "run").mkdir()
    np.save(folder / "run" / "x.npy", rows(300).numpy())
    words = ["--n-latents", "24", "--k", "3", "--n-tokens", "96", "--batch-size", "16", "--save-every", "3"]
    words += ["--lr-decay-start", "-1", "--device", "cpu", "--log-every", "1"]
    command(["train", str(folder / "run" / "x.npy"), "--out", str(folder / "run"), *words])


def command(argv: list[str]) -> str:
    """A command line in this process; its output. Raises InputError of the line on stderr where it ends with 2."""
    said, complaint = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaint):
        code = cli.main(argv)
    lines = complaint.getvalue().splitlines()
    if code:
        errors = [line for line in lines if "warning:" not in line]
        raise InputError("\n".join(errors)) if code == cli.BAD_INPUT else AssertionError(f"exit code {code}: {errors}")
    for line in lines:
        warnings.warn(line, RuntimeWarning, stacklevel=1)
    return said.getvalue()


def eval_run(folder: Path) -> Any:
    """`saefast eval` as a user types it, without the pictures."""
    with mock.patch("saefast.cli.eval.draw_run", return_value=[]):
        said = command(["eval", str(folder / "run"), "--lm-tokens", "0"])
    table = [line for line in said.splitlines() if str(folder) not in line]
    return [table, json.loads((folder / "run" / "eval.json").read_text())["metrics"]]


def resume_command(folder: Path) -> Any:
    """`saefast train --resume`, which knows the run's settings and data from its files alone."""
    command(["train", "--out", str(folder / "run"), "--resume", "--n-tokens", "144"])
    return found_in(load(folder / "run"))


def make_config(folder: Path) -> None:
    make_sae(folder)
    config = SMALL.to_dict() | {"train": settings(6).to_dict()}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def read_settings(folder: Path) -> Any:
    return [config.to_dict() for config in read_config(folder / "config.json")]


def make_metrics(folder: Path) -> None:
    lines = [{"step": step, "tokens": 16 * step, "losses/overall_loss": 1 / step} for step in range(1, 20)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


# --- text, and harvests that go on


def make_text(folder: Path) -> None:
    for name, seed in (("a.txt", 0), ("b.md", 1)):
        (folder / name).write_text("\n\n".join(tiny_models.documents(20, seed)))
    lines = [json.dumps({"text": text, "n": i}) for i, text in enumerate(tiny_models.documents(20, 2))]
    (folder / "c.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "d.jsonl.gz").write_bytes(gzip.compress(("\n".join(lines) + "\n").encode(), mtime=0))
    (folder / "e.json").write_text(f"[{', '.join(lines)}]")
    table = [f'{i},"{text}"' for i, text in enumerate(tiny_models.documents(20, 3))]
    (folder / "f.csv").write_text("\n".join(["n,text", *table]) + "\n")


def read_text(folder: Path) -> Any:
    text = open_text(folder)
    found = list(text)
    # Left out with a word is no silence.
    for line in text.skipped:
        warnings.warn(line, RuntimeWarning, stacklevel=1)
    return found


HARVEST = HarvestConfig(
    hooks=("layers.0", "layers.1"), ctx_len=16, dtype="float32", batch_tokens=100, heldout=0.2, device="cpu",
    rows_per_shard=100, forward="float32",
)  # fmt: skip


@cache
def language_model() -> dict[str, Any]:
    return {"model": tiny_models.model("gpt2"), "tokenizer": tiny_models.tokenizer()}


def make_harvest(folder: Path, tokens: int = 150) -> None:
    config = dataclasses.replace(HARVEST, max_tokens=tokens)
    harvest(folder / "acts", config, text=tiny_models.documents(20), progress=False, **language_model())


def resume_harvest(folder: Path) -> Any:
    make_harvest(folder, 250)
    return read_shards(folder / "acts")


# --- bytes that are the same in every process


def write_safetensors(tensors: dict[str, Tensor], path: Any, metadata: dict[str, str] | None = None) -> None:
    """As safetensors.torch.save_file, with the header's keys in one order."""
    raw = save(tensors, metadata)
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(dict(sorted(header.items())), separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(len(text) + -len(text) % 8)
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@contextlib.contextmanager
def steady() -> Iterator[None]:
    """Clocks that tick once a look, and safetensors whose headers come in one order."""
    with contextlib.ExitStack() as stack:
        for module in (sae, shard_writer, latent_stats):
            if hasattr(module, "save_file"):
                stack.enter_context(mock.patch.object(module, "save_file", write_safetensors))
        ticks = itertools.count(1)
        stack.enter_context(mock.patch.object(time, "perf_counter", side_effect=lambda: next(ticks) / 1000))
        marked = Run.__post_init__

        def begin(run: Run) -> None:
            run.begun = time.perf_counter()
            marked(run)

        stack.enter_context(mock.patch.object(Run, "__post_init__", begin))
        yield


def write_all(folder: Path, reader: Reader) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    with steady():
        reader.make(folder)


def copy_of(folder: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target, symlinks=True)


CHECKPOINT = "run/checkpoints/step_00000006/"


def make_latents(folder: Path) -> None:
    make_db(folder, n_latents=12, n_sequences=3, length=20)


def read_latents(folder: Path) -> Any:
    """All that a page of each latent shows."""
    db = LatentsDB(folder / LATENTS_DB)
    rows, n = db.page("telling", limit=50)
    found: list[Any] = [n, [row[:3] for row in rows], db.telling(), [db.array("map"), db.array("cluster")]]
    for row in rows:
        found += [db.histogram(row.latent), db.tokens_of(row.latent), db.logit_weights(row.latent)]
        found += [db.neighbours(row.latent), db.cofiring(row.latent)]
        found += [[example.act, example.context.pieces] for example in db.examples(row.latent)]
    return found


def make_codes(folder: Path) -> None:
    lm = tiny_models.model("gpt2")
    at = {"layers.0": 0, "layers.1.mlp": 1}
    saes = {hook: SAE(SAEConfig(d_in=16, n_latents=LATENTS, k=3), seed=seed) for hook, seed in at.items()}
    with torch.no_grad(), record(lm, saes, folder / "codes", rows_per_shard=8):
        lm(torch.arange(5, 29).view(2, 12))


def read_codes(folder: Path) -> Any:
    codes = RecordedCodes(folder / "codes")
    codes.verify()
    return [(rows.ids, rows.seq, rows.pos, [tuple(code) for code in rows.codes.values()]) for rows in codes.batches(5)]


READERS = [
    Reader(
        "shards, verified", make_shards, lambda folder: read_shards(folder, verify=True),
        ("index.json", "stats.safetensors", "*/*.safetensors"), ("stats.safetensors", "*/*.safetensors"), weight=3,
    ),
    Reader("shards", make_shards, read_shards, ("index.json", "stats.safetensors", "*/*.safetensors"), weight=3),
    Reader(
        "shards, int8", lambda folder: make_shards(folder, "int8"), read_shards,
        ("index.json", "layers.*/*.safetensors"),
    ),
    Reader("shards, buffer", make_shards, read_buffer, ("index.json", "layers.1/*.safetensors"), weight=2),
    Reader(".npy", make_npy, read_file("x.npy"), ("x.npy",), weight=2),
    Reader(".pt", make_pt, read_file("x.pt"), ("x.pt",), weight=2),
    Reader(".pt, before torch 1.6", make_old_pt, read_file("x.pt"), ("x.pt",)),
    Reader(".safetensors", make_safetensors, read_file("x.safetensors"), ("x.safetensors",), weight=2),
    Reader("memmap cache", make_memmaps, read_folder, ("*.memmap", "*.meta"), weight=2),
    Reader(
        "chunk cache, .safetensors", lambda folder: make_chunks(folder, write_safetensors, ".safetensors"), read_folder,
        ("blocks.0/*",),
    ),
    Reader("chunk cache, .pt", lambda folder: make_chunks(folder, torch.save, ".pt"), read_folder, ("blocks.0/*",)),
    Reader("Arrow cache", make_arrow, read_folder, ("*.arrow",), needs=("pyarrow",)),
    Reader("SAE", make_sae, read_sae, ("sae.safetensors", "config.json"), ("sae.safetensors",), weight=3),
    *[
        Reader(f"SAE, {name}", make_foreign(name), read_foreign, ("**/*.*",), part="formats")
        for name, one in formats.formats.items()
        if one.writes and name != "saefast"
    ],
    Reader("config.json", make_config, read_settings, ("config.json",), weight=2),
    Reader(
        "checkpoint", make_run, resume_run, (CHECKPOINT + "*", "run/config.json", "run/metrics.jsonl"),
        (CHECKPOINT + "*", "run/config.json", "run/metrics.jsonl"), writes=True, weight=3,
    ),
    Reader(
        "checkpoint, lean, buffer",
        lambda folder: make_run(folder, optimizer="adam-lean", shuffle="buffer"),
        lambda folder: resume_run(folder, optimizer="adam-lean", shuffle="buffer"),
        (CHECKPOINT + "*",), (CHECKPOINT + "*",), writes=True,
    ),
    Reader(
        "train --resume", make_finished, resume_command,
        (CHECKPOINT + "*", "run/config.json", "run/metrics.jsonl", "run/sae.safetensors"), (CHECKPOINT + "*",),
        writes=True,
    ),
    Reader(
        "eval", make_finished, eval_run, ("run/sae.safetensors", "run/metrics.jsonl", "run/config.json", "run/x.npy"),
        ("run/sae.safetensors",), writes=True,
    ),
    Reader(
        "recorded codes", make_codes, read_codes, ("codes/index.json", "codes/*/*.safetensors"),
        ("codes/index.json", "codes/*/*.safetensors"), weight=2, needs=("transformers",),
    ),
    Reader("latents.db", make_latents, read_latents, (LATENTS_DB,), part="latents"),
    Reader("metrics.jsonl", make_metrics, read_metrics, ("metrics.jsonl",)),
    Reader("text", make_text, read_text, ("a.txt", "b.md", "c.jsonl", "d.jsonl.gz", "e.json", "f.csv"), weight=2),
    Reader(
        "harvest, goes on", make_harvest, resume_harvest,
        ("acts/index.json", "acts/stats.safetensors", "acts/*/*.safetensors"), writes=True,
    ),
]  # fmt: skip


def available(part: str | None = None) -> list[Reader]:
    """Those whose packages are there, of one part or all."""
    mine = [reader for reader in READERS if part in (None, reader.part)]
    return [reader for reader in mine if all(importlib.util.find_spec(name) for name in reader.needs)]
