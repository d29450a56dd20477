"""Odd arguments to every public function and command: each works, or is refused in one line, and harms nothing.

A case runs in a folder of its own, filled with files of other people; they are compared before and after.
"""

import contextlib
import dataclasses
import functools
import io
import os
import shutil
import tempfile
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models
import torch
from attack import odd, outcome, readers
from attack.odd import Make
from attack.pool import HANG, Arena, run_all
from attack.summary import Row
from latents_db import make_db

import saefast
from saefast import formats, ops
from saefast.analysis.evaluation import evaluate, evaluate_run
from saefast.analysis.export_names import Names
from saefast.analysis.exports import export
from saefast.cli import main as cli
from saefast.cli.calibrate import CalibrateArgs
from saefast.cli.convert import ConvertArgs
from saefast.cli.eval import EvalArgs
from saefast.cli.features import FeaturesArgs
from saefast.cli.finetune import FinetuneArgs
from saefast.cli.harvest import HarvestArgs
from saefast.cli.plan import PlanArgs
from saefast.cli.steer import SteerArgs
from saefast.cli.train import TrainArgs
from saefast.data.opening import open_source
from saefast.data.shards import ShardFolder
from saefast.engines.config import TrainConfig, preset
from saefast.errors import InputError
from saefast.harvest.live import live_sources
from saefast.harvest.text import open_text
from saefast.harvest.to_disk import HarvestConfig, harvest
from saefast.integrations.hooks import encode, replace
from saefast.integrations.recorded import RecordedCodes
from saefast.integrations.recording import record
from saefast.integrations.saebench import for_saebench
from saefast.integrations.steering import steer
from saefast.latents.database import LatentsDB
from saefast.latents.schema import LATENTS_DB
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.training.api import train
from saefast.training.finetune import finetune
from saefast.training.finetune_config import FinetuneConfig
from saefast.training.plan import make_plan
from saefast.training.progress import read_metrics
from saefast.training.run_folder import read_config
from saefast.training.several import Member, train_many

D_IN = readers.D_IN
ENCODINGS = ("utf-8", "ascii", "cp1252")


# The text may be all of Python's docstrings.
SHORT = dataclasses.replace(readers.HARVEST, max_tokens=200)
THEIRS = "the caller's own exception"


class Enough(Exception):
    """Training that does not refuse an odd setting is let go after a few steps."""


@dataclass(frozen=True)
class Call:
    """A function, arguments that it takes, and for each of them what it is given instead. mine: what it may write."""

    subject: str
    function: Callable[..., Any]
    good: dict[str, Make]
    instead: dict[str, dict[str, Make]]
    mine: tuple[str, ...] = ("out",)

    def cases(self) -> Iterator["Case"]:
        for name, values in self.instead.items():
            for label, make in values.items():
                yield Case(self, f"{name} = {label}", self.good | {name: make})


@dataclass(frozen=True)
class Case:
    call: Call
    what: str
    arguments: dict[str, Make]

    def run(self) -> Any:
        return self.call.function(**{name: make() for name, make in self.arguments.items()})


def rows(n: int = 200) -> torch.Tensor:
    return readers.rows(n)


def small() -> SAEConfig:
    return readers.SMALL


def briefly(line: Any) -> None:
    if line["step"] >= 4:
        raise Enough


# --- what is called


def api() -> list[Call]:
    """Every public function."""
    path = odd.VALUES | odd.PATHS
    x = rows(20)
    data = path | odd.tensors(rows()) | BATCHES
    # Text may come through a pipe (`--text <(zcat x.gz)`), and whoever names one waits for its writer.
    texts = {label: make for label, make in path.items() if label != "a pipe"} | TEXTS
    calls = [
        *_settings(),
        Call(
            "train", functools.partial(train, progress=False),
            dict(batches=rows, sae_config=small, train_config=lambda: _brief(), out_dir=lambda: "out"),
            dict(batches=data, sae_config=odd.VALUES, train_config=odd.VALUES, out_dir=path | FOLDERS,
                 resume=odd.VALUES, keep_checkpoints=odd.VALUES, progress=odd.VALUES, on_log=odd.VALUES),
        ),
        Call(
            "train_many", functools.partial(train_many, progress=False),
            dict(members=lambda: {"a": Member(rows(), small(), _brief())}, out_dir=lambda: "out"),
            dict(members=odd.VALUES | MEMBERS, out_dir=path, resume=odd.VALUES, keep_checkpoints=odd.VALUES),
        ),
        Call(
            "open_source", lambda **given: readers.drawn(open_source(**given)),
            dict(data=lambda: "shards", hook=lambda: "layers.0"),
            dict(data=data, heldout=odd.VALUES, hook=odd.VALUES, hooks=odd.VALUES, key=odd.VALUES,
                 keys=odd.VALUES, d_in=odd.VALUES, d_out=odd.VALUES,
                 skip_bad_shards=odd.VALUES, verify=odd.VALUES, shuffle=odd.VALUES),
        ),
        Call("load", saefast.load, dict(path=lambda: "run"),
             dict(path=path, device=odd.VALUES | DEVICES, verify=odd.VALUES, format=odd.VALUES, dtype=odd.VALUES,
                  map=odd.VALUES)),
        Call("save", saefast.save, dict(sae=lambda: SAE(small(), seed=0), path=lambda: "out", format=lambda: "saelens"),
             dict(sae=odd.VALUES, path=path, format=odd.VALUES, density=odd.VALUES | odd.tensors(torch.rand(24)))),
        Call("formats.density", formats.density, dict(path=lambda: "run"), dict(path=path, format=odd.VALUES)),
        Call("SAE", SAE, dict(config=small), dict(config=odd.VALUES, seed=odd.VALUES, device=odd.VALUES | DEVICES)),
        Call("SAE.save", lambda path: SAE(small(), seed=0).save(path), {}, dict(path=path)),
        Call("preset", preset, dict(name=lambda: "saefast", d_in=lambda: 6, n_latents=lambda: 24, k=lambda: 3),
             dict.fromkeys(("name", "d_in", "n_latents", "k", "lr", "unknown"), odd.VALUES)),
        *[
            Call(f"SAE.{name}", lambda x, name=name: getattr(SAE(small(), seed=0), name)(x), {},
                 dict(x=odd.VALUES | odd.tensors(rows(5))))
            for name in ("encode_sparse", "encode", "forward")
        ],
        Call("SAE.decode", lambda f: SAE(small(), seed=0).decode(f), {},
             dict(f=odd.VALUES | odd.tensors(torch.rand(4, readers.LATENTS)))),
        Call("SAE.decode_sparse", lambda acts, idx: SAE(small(), seed=0).decode_sparse(acts, idx), code(4, 3),
             dict(acts=odd.VALUES | odd.tensors(torch.rand(4, 3)), idx=odd.VALUES | odd.tensors(code(4, 3)["idx"]()))),
        Call("SAE.with_k", lambda k: SAE(small(), seed=0).with_k(k).encode_sparse(x), {}, dict(k=odd.VALUES)),
        Call("evaluate", evaluate, dict(sae=lambda: SAE(small(), seed=0), batches=lambda: [x]),
             dict(sae=odd.VALUES, batches=odd.VALUES | BATCHES | odd.tensors(x), max_norm_multiple=odd.VALUES)),
        Call("evaluate_run", evaluate_run, dict(run=lambda: "run", lm_tokens=lambda: 0),
             dict(run=path, data=data, batch_size=odd.VALUES, lm_tokens=odd.VALUES, write=odd.VALUES,
                  max_norm_multiple=odd.VALUES, model=odd.VALUES, tokenizer=odd.VALUES),
             ("run/eval.json", "run/latents.safetensors")),
        Call("harvest", functools.partial(harvest, progress=False, **readers.language_model()),
             dict(out_dir=lambda: "out", config=lambda: SHORT, text=lambda: tiny_models.documents(9)),
             dict(out_dir=path | FOLDERS, config=odd.VALUES, text=texts, model=odd.VALUES,
                  tokenizer=odd.VALUES)),
        Call("live_sources", _draw_live, dict(config=lambda: readers.HARVEST, text=lambda: tiny_models.documents(9)),
             dict(config=odd.VALUES, text=odd.VALUES | TEXTS, reservoir_rows=odd.NUMBERS)),
        Call("finetune", _finetune, dict(sae=_spliceable, text=lambda: tiny_models.documents(9), out_dir=lambda: "out"),
             dict(sae=odd.VALUES, model=odd.VALUES, text=texts, config=odd.VALUES, out_dir=path | FOLDERS,
                  hook=odd.VALUES, tokenizer=odd.VALUES, harvest=odd.VALUES, resume=odd.VALUES,
                  keep_checkpoints=odd.VALUES)),
        Call("steer", functools.partial(_inside, steer),
             dict(sae=_spliceable, latents=lambda: {3: 1.0}),
             dict(model=odd.VALUES, sae=path, latents=odd.VALUES | LATENT_VALUES, mode=odd.VALUES, unit=odd.VALUES,
                  error_term=odd.VALUES, positions=odd.VALUES | POSITIONS, skip_ids=odd.VALUES, hook=odd.VALUES,
                  target_hook=odd.VALUES, max_acts=odd.VALUES | odd.tensors(torch.rand(24)))),
        Call("replace", functools.partial(_inside, replace), dict(saes=_spliceable),
             dict(saes=odd.VALUES, error_term=odd.VALUES, positions=odd.VALUES | POSITIONS,
                  skip_ids=odd.VALUES, hook=odd.VALUES)),
        Call("encode", functools.partial(_inside, encode), dict(saes=_spliceable),
             dict(model=odd.VALUES, saes=odd.VALUES, hook=odd.VALUES, every_pass=odd.VALUES)),
        Call("record", functools.partial(_inside, record), dict(saes=_spliceable, folder=lambda: "out"),
             dict(saes=odd.VALUES, folder=path | FOLDERS, dtype=odd.VALUES, positions=odd.VALUES | POSITIONS,
                  skip_ids=odd.VALUES, rows_per_shard=odd.VALUES)),
        Call("RecordedCodes", lambda folder: RecordedCodes(folder).verify(), {}, dict(folder=path)),
        Call("ShardFolder", lambda path: ShardFolder(path).verify(), {}, dict(path=path)),
        Call("open_text", lambda text, column: list(open_text(text, column)),
             dict(text=lambda: "text.jsonl", column=lambda: "text"), dict(text=texts, column=odd.VALUES)),
        Call("export", export, dict(db=_latents_db, kind=lambda: "neuronpedia", out=lambda: "out"),
             dict(db=odd.VALUES, kind=odd.VALUES, out=path | FOLDERS, latents=odd.VALUES, names=odd.VALUES)),
        *[
            Call("export", _export_named, dict(out=lambda: "out"), {name: odd.VALUES})
            for name in ("model_id", "layer", "source_set")
        ],
        Call("read_config", read_config, {}, dict(path=path)),
        Call("read_metrics", read_metrics, {}, dict(path=path)),
        Call("make_plan", make_plan,
             dict(sae_config=small, train_config=TrainConfig, device=lambda: "h100"),
             dict.fromkeys(("sae_config", "train_config", "device"), odd.VALUES)),
        Call("for_saebench", for_saebench,
             dict(sae=_spliceable, model_name=lambda: "gpt2", hook_name=lambda: "layers.0"),
             dict.fromkeys(("sae", "model_name", "hook_name", "hook_layer", "context_size"), odd.VALUES)),
        *_ops(),
    ]  # fmt: skip
    return calls


def _brief(**changes: Any) -> TrainConfig:
    return readers.settings(6, **changes)


def _settings() -> list[Call]:
    """Every field of every config: made, and where it is not refused, used."""

    def trained(**changes: Any) -> None:
        with contextlib.suppress(Enough):
            train(rows(), small(), _brief(**changes), "out", progress=False, on_log=briefly)

    def configured(**changes: Any) -> None:
        config = SAEConfig(**dict(d_in=D_IN, n_latents=readers.LATENTS, k=3) | changes)
        SAE(config, seed=0).encode_sparse(torch.ones(2, config.d_in))
        config.to_dict()

    def harvested(**changes: Any) -> None:
        config = dataclasses.replace(readers.HARVEST, **changes)
        harvest("out", config, text=tiny_models.documents(9), progress=False, **readers.language_model())

    fields = {
        "TrainConfig": (trained, TrainConfig),
        "SAEConfig": (configured, SAEConfig),
        "HarvestConfig": (harvested, HarvestConfig),
    }
    return [
        Call(name, use, {}, {item.name: odd.VALUES | CHOICES.get(item.name, {}) for item in dataclasses.fields(config)})
        for name, (use, config) in fields.items()
    ]


def code(n: int, k: int) -> dict[str, Make]:
    return {"acts": lambda: torch.rand(n, k), "idx": lambda: torch.arange(n * k, dtype=torch.int32).view(n, k)}


def _ops() -> list[Call]:
    """The ops, whose tensors reach C++."""
    W, x, b = torch.randn(24, 6), torch.randn(5, 6), torch.randn(24)
    acts, idx = torch.rand(5, 3), torch.arange(15, dtype=torch.int32).view(5, 3)
    latents = torch.tensor([1, 5, 9])
    encoder = {"x": lambda: x, "W_enc": lambda: W, "b_enc": lambda: b}
    odd_encoder = {name: odd.VALUES | odd.tensors(make()) for name, make in encoder.items()}
    pair = {"acts": lambda: acts, "idx": lambda: idx}
    odd_pair = {name: odd.VALUES | odd.tensors(make()) for name, make in pair.items()}
    matrices = {"W": odd.VALUES | odd.tensors(W), "x": odd.VALUES | odd.tensors(x)}
    row_ptr = torch.tensor([0, 3, 3, 9, 10, 15], dtype=torch.int32)
    csr = {"acts": acts.flatten, "idx": idx.flatten, "row_ptr": lambda: row_ptr}
    odd_row_ptr = {"row_ptr": odd.VALUES | odd.tensors(row_ptr)}
    return [
        Call(
            "ops.encode_topk", ops.encode_topk, encoder | {"k": lambda: 3},
            odd_encoder | dict.fromkeys(("k", "relu", "method", "precision", "max_scratch_bytes"), odd.VALUES)
            | {"latents": odd.VALUES | odd.tensors(latents), "scale": odd.VALUES | odd.tensors(b.abs())},
        ),
        Call(
            "ops.encode_batch_topk", ops.encode_batch_topk, encoder | {"k": lambda: 3},
            odd_encoder | {"k": odd.VALUES, "scale": odd.VALUES | odd.tensors(b.abs()),
                           "W_low": odd.VALUES | odd.tensors(W)},
        ),
        Call(
            "ops.encode_group_max", ops.encode_group_max, encoder | {"k": lambda: 3},
            odd_encoder | {"k": odd.VALUES, "scale": odd.VALUES | odd.tensors(b.abs()), "relu": odd.VALUES,
                           "W_low": odd.VALUES | odd.tensors(W)},
        ),
        Call("ops.threshold_encode", ops.threshold_encode, encoder | {"threshold": lambda: 0.5},
             odd_encoder | {"threshold": odd.VALUES | odd.tensors(b)}),
        Call("ops.spmm of CSR", ops.spmm, csr | {"W": lambda: W}, odd_row_ptr),
        Call("ops.sddmm of CSR", lambda acts, **given: ops.sddmm(**given), csr | {"x": lambda: x, "W": lambda: W},
             odd_row_ptr),
        Call("ops.spmm_t of CSR", ops.spmm_t, csr | {"x": lambda: x, "n_latents": lambda: 24}, odd_row_ptr),
        Call("ops.spmm", ops.spmm, pair | {"W": lambda: W}, odd_pair | {"W": matrices["W"]}),
        Call("ops.sddmm", ops.sddmm, {"x": lambda: x, "idx": lambda: idx, "W": lambda: W},
             matrices | {"idx": odd_pair["idx"]}),
        Call("ops.spmm_t", ops.spmm_t, pair | {"x": lambda: x, "n_latents": lambda: 24},
             odd_pair | {"x": matrices["x"], "n_latents": odd.VALUES}),
        Call("ops.sum_by_latent", ops.sum_by_latent, pair | {"n_latents": lambda: 24},
             odd_pair | {"n_latents": odd.VALUES}),
    ]  # fmt: skip


def _spliceable() -> SAE:
    return SAE(SAEConfig(d_in=16, n_latents=24, k=3, metadata={"hook_name": "layers.0"}), seed=0)


@functools.cache
def _made_up_db() -> "tempfile.TemporaryDirectory[str]":
    """A folder with a latents.db, for as long as this process lives."""
    folder = tempfile.TemporaryDirectory()
    make_db(Path(folder.name))
    return folder


def _latents_db() -> LatentsDB:
    return LatentsDB(Path(_made_up_db().name) / LATENTS_DB)


def _export_named(out: Any, **given: Any) -> None:
    db = _latents_db()
    export(db, "neuronpedia", out, [1, 2], Names(db, **given))


def _inside(block: Any, **given: Any) -> None:
    """A pass of a model within a block over it."""
    lm = tiny_models.model("gpt2", head=True)
    with torch.no_grad(), block(**{"model": lm} | given):
        lm(torch.arange(5, 17).view(2, 6))


def _finetune(**given: Any) -> None:
    model = {"model": tiny_models.model("gpt2", head=True), "tokenizer": tiny_models.tokenizer()}
    few = {"config": FinetuneConfig(n_tokens=64, batch_tokens=32), "harvest": readers.HARVEST}
    finetune(**model | few | given, progress=False)


def _draw_live(**given: Any) -> None:
    sources = live_sources(**{"reservoir_rows": 64} | given | readers.language_model())
    try:
        for source in sources.values():
            next(source.batches(8))
    finally:
        for source in sources.values():
            source.close()


# --- what else may be given

POSITIONS: dict[str, Make] = {
    "a word": lambda: "last", "none": list, "far": lambda: [10**9, -(10**9)], "a slice": lambda: slice(-3, None),
    "a mask": lambda: torch.ones(2, 6, dtype=torch.bool), "a narrow mask": lambda: torch.ones(1, 6, dtype=torch.bool),
    "a slice of words": lambda: slice("a", "b"),
}  # fmt: skip
LATENT_VALUES: dict[str, Make] = {
    "huge": lambda: {3: 1e300}, "beyond": lambda: {24: 1.0}, "negative": lambda: {-1: 1.0}, "NaN": lambda: {3: np.nan},
    "numpy's": lambda: {np.int64(3): np.float32(1)}, "text": lambda: {"3": "1"}, "ids": lambda: [3, 4],
    "twice": lambda: [3, 3],
}  # fmt: skip
DEVICES: dict[str, Make] = {name: lambda name=name: name for name in ("meta", "cuda", "cuda:99", "mps", "cpu:7", "x:y")}
FOLDERS: dict[str, Make] = {
    "a run": lambda: "run",
    "a harvest": lambda: "shards",
    "a folder with a config.json": lambda: "foreign",
    "here": lambda: ".",
    "above": lambda: "..",
}
TEXTS: dict[str, Make] = {
    "no documents": list,
    "empty documents": lambda: ["", " ", "\n"],
    "numbers": lambda: [1, 2],
    "surrogates": lambda: ["w1 \ud800 w2"] * 9,
    "NUL": lambda: ["w1 \0 w2"] * 9,
    "one endless word": lambda: ["a" * 100_000],
    "a text file": lambda: "text.txt",
    "lines": lambda: "text.jsonl",
    "weights": lambda: "run/sae.safetensors",
}
BATCHES: dict[str, Make] = {
    "no batches": list,
    "empty batches": lambda: [rows(0)] * 3,
    "batches of other widths": lambda: [rows(8), rows(8)[:, :3]],
    "batches that are lists": lambda: [[[1.0] * D_IN] * 8] * 3,
    "batches in tuples": lambda: [(rows(8), torch.zeros(8))],
    "batches of numbers": lambda: [1, 2, 3],
    "a function that raises": lambda: _raising,
    "a function of an argument": lambda: lambda batch: batch,
    "an iterator that raises": lambda: (_raising() if i == 2 else rows(16) for i in range(9)),
    "an iterator": lambda: iter([rows(16)] * 20),
    "NaN at the end": lambda: torch.cat([rows(), torch.full((1, D_IN), float("nan"))]),
    "an int array": lambda: np.ones((50, D_IN), np.int32),
    "an object array": lambda: np.array([[object()] * D_IN] * 50),
    "a masked array": lambda: np.ma.masked_all((50, D_IN), np.float32),
    "a big-endian array": lambda: np.ones((200, D_IN), ">f4"),
    "a complex array": lambda: np.ones((50, D_IN), np.complex64),
    "a backwards array": lambda: np.ones((200, D_IN), np.float32)[::-1, ::-1],
    "a read-only array": lambda: np.broadcast_to(np.float32(1), (200, D_IN)),
}
MEMBERS: dict[str, Make] = {
    name: lambda name=name: {name: Member(rows(), small(), _brief())}
    for name in ("", ".", "..", "../x", "/proc/saefast", "a/b", "nul\0", "\udcff", "n" * 300)
} | {
    "one folder twice": lambda: {name: Member(rows(), small(), _brief()) for name in ("a", "./a")},
    "no member": lambda: {"a": None},
    "a number": lambda: {1: Member(rows(), small(), _brief())},
    "of a tuple": lambda: {"a": (rows(), small(), _brief())},
}
CHOICES: dict[str, dict[str, Make]] = {
    "engine": {"autograd": lambda: "autograd"},
    "optimizer": {"adam-lean": lambda: "adam-lean"},
    "device": DEVICES,
    "dtype": {name: lambda name=name: name for name in ("float16", "float64", "bfloat16", "int8", "complex64")},
    "hooks": {
        "no hook": tuple,
        "the same twice": lambda: ("layers.0", "layers.0"),
        "unknown": lambda: ("layers.99",),
        "the last": lambda: ("layers.2",),
        "with NUL": lambda: ("nul\0",),
        "everything": lambda: ("",),
        "a string": lambda: "layers.0",
    },
}


def _raising() -> Any:
    raise RuntimeError(THEIRS)


# --- command lines


# A pipe is good text, for whoever waits for its writer; and the demo without limits takes its five minutes.
NOT_TYPED = {("text", "pipe"), ("max-tokens", "None")}


@dataclass(frozen=True)
class Command:
    """A command line that works, in words; each flag in turn gets every odd word. mine: what it may write. more: other
    lines. bare: whether the command is also typed alone."""

    verb: str
    words: tuple[str, ...]
    flags: tuple[str, ...]
    mine: tuple[str, ...] = ("out",)
    more: tuple[tuple[str, ...], ...] = ()
    bare: bool = True

    def cases(self) -> Iterator["Case"]:
        for i, flag in enumerate(self.flags):
            for j, word in enumerate(odd.WORDS):
                if (flag, word) not in NOT_TYPED:
                    yield self._case((*self.words, f"--{flag}", word), ENCODINGS[(i + j) % 3])
        lines = [("--help",), ("--no-such-flag",), (*self.words, "stray"), *([()] if self.bare else []), *self.more]
        lines += [(word, *self.words[1:]) for word in odd.WORDS]
        for i, line in enumerate(lines):
            yield self._case(line, ENCODINGS[i % 3])

    def _case(self, line: tuple[str, ...], encoding: str) -> "Case":
        call = Call(f"saefast {self.verb}", typed, {}, {}, self.mine)
        return Case(
            call,
            f"{' '.join(line)!a} to {encoding}",
            {"argv": lambda: [self.verb, *line], "encoding": lambda: encoding},
        )


def typed(argv: list[str], encoding: str) -> None:
    """A command line in this process, its output in an encoding that may lack signs. InputError for exit code 2."""
    said, complaint = (io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaint):
        code = cli.main(argv)
    complaint.seek(0)
    lines = [
        line
        for line in complaint.read().splitlines()
        if not line.startswith(("saefast: warning:", "saefast: skipped:"))
    ]
    if code == cli.BAD_INPUT:
        raise InputError("\n".join(lines))
    if code:
        raise AssertionError(f"exit code {code}: {lines[-1:]}")


def flags_of(*kinds: type) -> tuple[str, ...]:
    names = dict.fromkeys(item.name for kind in kinds for item in dataclasses.fields(kind))
    inner = ("sae", "train", "settings", "data", "run")
    return tuple(name.replace("_", "-") for name in names if name not in inner)


TRAIN = (
    "x.npy",
    "--out",
    "out",
    "--n-latents",
    "24",
    "--k",
    "3",
    "--n-tokens",
    "96",
    "--batch-size",
    "16",
    "--device",
    "cpu",
)
HARVEST = ("--out", "out", "--model", "model", "--text", "text.txt", "--hook", "layers.0", "--device", "cpu")
LIVE = (
    "--live", "--out", "out", "--model", "model", "--text", "text.txt", "--hook", "layers.0", "--n-tokens", "64",
    "--batch-size", "16", "--device", "cpu",
)  # fmt: skip
# Small, for a demo that is refused nothing takes its minutes.
DEMO = ("--max-tokens", "300", "--n-latents", "64", "--k", "4", "--n-tokens", "4096", "--out", "out")
RUN = ("run/eval.json", "run/latents.safetensors", "run/curves.png", "run/density.png", "run/feature")


def commands() -> list[Command]:
    return [
        Command("train", TRAIN, (*flags_of(TrainArgs, SAEConfig, TrainConfig), "no-resume"), more=(
            ("--out", "out"), ("--out", "run", "--resume"), ("--out", "out", "--resume"), ("--resume",),
            ("shards", "--out", "out", "--hooks", "layers.0,layers.1", "--n-tokens", "64", "--batch-size", "16"),
            ("shards", "--out", "out", "--hooks", "layers.0,layers.0", "--n-tokens", "64", "--batch-size", "16"),
            ("shards", "--out", "out", "--hooks", "../../x", "--n-tokens", "64"),
            ("x.npy", "--out", "out", "--hooks", "a,b"), ("x.npy", "--out", "foreign"), ("x.npy", "--out", ""),
            ("x.npy", "--out", "out", "--live"), LIVE,
        ), mine=("out", "run")),
        Command("harvest", HARVEST, (*flags_of(HarvestArgs, HarvestConfig), "hook")),
        Command("eval", ("run", "--lm-tokens", "0"), (*flags_of(EvalArgs), "data"), RUN),
        Command("features", ("run",), (*flags_of(FeaturesArgs), "data"), RUN),
        Command("convert", ("run", "out", "--format", "saelens"), flags_of(ConvertArgs)),
        Command("calibrate", ("run", "out", "--rows", "64"), (*flags_of(CalibrateArgs), "data"), RUN),
        Command("steer", ("lm", "steered", "--set", "3=1", "--prompt", "w1 w2", "--new-tokens", "2", "--device", "cpu"),
                flags_of(SteerArgs)),
        Command("finetune", ("run", "out"), (*flags_of(FinetuneArgs, FinetuneConfig), "data")),
        # The other settings are those of `train`.
        Command("plan", ("--device", "h100"), (*flags_of(PlanArgs), "k", "batch-size", "optimizer", "n-tokens")),
        Command("demo", DEMO, ("out", "n-latents", "k", "n-tokens", "max-tokens"), bare=False),
        Command("bench", ("no-such-benchmark",), ()),
        Command("no-such-command", (), ()),
    ]  # fmt: skip


# --- the arena


class Arguments:
    """An arena (see pool.py)."""

    def __init__(self, place: str, only: str = "") -> None:
        torch.set_num_threads(1)
        os.environ["HF_HUB_OFFLINE"] = "1"
        self._place = Path(place, str(os.getpid()))
        self._cases = all_cases(only)
        make_template(self._place / "template")

    def run(self, number: int) -> dict[str, str]:
        case = self._cases[number]
        here = self._place / "here"
        shutil.rmtree(here, ignore_errors=True)
        copy(self._place / "template", here)
        os.chdir(here)
        before = snapshot(here)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            found, detail = self._outcome(case)
        os.chdir(self._place)
        return _answer(case, *self._harm(case, before, snapshot(here), found, detail))

    def show(self, number: int) -> str:
        """The case again, for a person: raises whatever it raises."""
        case = self._cases[number]
        copy(self._place / "template", self._place / "here")
        os.chdir(self._place / "here")
        print(f"{case.call.subject}: {case.what}")
        return f"works: {case.run()!r:.300}"

    def _outcome(self, case: Case) -> tuple[str, str]:
        try:
            case.run()
        except InputError as error:
            return outcome.refusal(error)
        except BaseException as error:
            if str(error) == THEIRS:  # which is none of saefast's business, and may come in the middle of a run
                return outcome.WORKS, THEIRS
            return outcome.TRACEBACK, outcome.frame_of(error)
        return outcome.WORKS, ""

    def _harm(
        self, case: Case, before: dict[str, str], after: dict[str, str], found: str, detail: str
    ) -> tuple[str, str]:
        if found in outcome.FAULTS:
            return found, detail
        changed = [name for name in before if after.get(name) != before[name] and not name.startswith(case.call.mine)]
        if changed:
            return outcome.ALTERED, f"{', '.join(changed)} changed; {detail}"
        new = [name for name in after if name not in before]
        # A run that ends in bad rows keeps what it saved before.
        begun = any("/checkpoints/step_" in name for name in new)
        if found == outcome.REFUSED and new and not begun:
            return outcome.LITTER, f"{', '.join(new)[:200]} left by what was refused: {detail}"
        return found, detail


def _answer(case: Case, found: str, detail: str) -> dict[str, str]:
    return {
        "subject": case.call.subject,
        "outcome": found,
        "what": f"{case.call.subject}, {case.what}",
        "detail": detail,
    }


@functools.cache
def all_cases(only: str = "") -> list[Case]:
    """All in one order, so that a number names a case."""
    found = [case for call in [*api(), *commands()] for case in call.cases()]
    return [case for case in found if only in case.call.subject]


def make_template(folder: Path) -> None:
    """Other people's files, a harvest, a run, a model, data, and things that are no files."""
    folder.mkdir(parents=True)
    np.save(folder / "x.npy", rows().numpy())
    (folder / "none.npy").write_bytes(b"")
    for name in ("foreign", "empty", "shards"):
        (folder / name).mkdir()
    (folder / "foreign" / "config.json").write_text('{"theirs": 1}')
    (folder / "foreign" / "notes.txt").write_text("theirs")
    (folder / "foreign" / "sae.safetensors").write_bytes(b"theirs")
    readers.make_shards(folder / "shards")
    readers.make_finished(folder)
    readers.language_model()["model"].save_pretrained(folder / "model")
    readers.language_model()["tokenizer"].save_pretrained(folder / "model")
    tiny_models.model("gpt2", head=True).save_pretrained(folder / "lm")
    tiny_models.tokenizer(special=False).save_pretrained(folder / "lm")
    _spliceable().save(folder / "steered")
    documents = tiny_models.documents(20)
    (folder / "text.txt").write_text("\n\n".join(documents))
    (folder / "text.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in documents))
    (folder / "loop").symlink_to("loop")
    (folder / "dead").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")


def copy(template: Path, here: Path) -> None:
    shutil.copytree(template, here, symlinks=True, ignore=lambda _, names: [n for n in names if n == "pipe"])
    os.mkfifo(here / "pipe")


def snapshot(folder: Path) -> dict[str, str]:
    """What every file holds, by its name; links and pipes by what they are."""
    found = {}
    for path in folder.rglob("*"):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file" if path.is_file() else "other"
        name = os.fsencode(path.relative_to(folder)).decode("utf-8", "backslashreplace")
        found[name] = sha256(path.read_bytes()).hexdigest() if kind == "file" else kind
    return found


def open_arena(**arguments: typing.Any) -> Arguments:
    return Arguments(**arguments)


def run(place: str, numbers: Iterable[int] | None = None, workers: int = 1, only: str = "") -> Iterator[Row]:
    """What came of every case, in whatever order they are done."""
    cases = all_cases(only)
    arena = Arena("attack.arguments", {"place": place, "only": only})
    for number, answer in run_all(arena, range(len(cases)) if numbers is None else numbers, workers):
        if isinstance(answer, str):
            answer = _answer(cases[number], outcome.HANG if answer == HANG else outcome.CRASH, answer)
        filtered = f' --only "{only}"' if only else ""
        yield Row(**answer, again=f"make attack ARGS='--part arguments{filtered} --case {number}'")
