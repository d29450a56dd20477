"""`saefast features`: latents.db, what every latent of a run responds to, and its most telling ones as a page."""

import contextlib
import signal
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from saefast.analysis.evaluation import load_finished, run_source
from saefast.analysis.feature_table import FeatureTable, make_table
from saefast.analysis.latent_stats import FEATURE_STATS, write_latent_stats
from saefast.analysis.plots import draw_features
from saefast.analysis.report import summary, write_features
from saefast.cli.args import announce_harvest, named, parse, watched
from saefast.data.mapped_source import MappedSource
from saefast.errors import InputError
from saefast.files import usable
from saefast.harvest.harvested_model import causal_language_model, harvested_model, harvested_tokenizer
from saefast.harvest.language_models import unwrapped
from saefast.latents import facts
from saefast.latents.build import ROWS, build_latents
from saefast.latents.database import LatentsDB
from saefast.latents.schema import LATENTS_DB
from saefast.latents.steps import Shown
from saefast.metrics.streaming import Sparsity
from saefast.training.residual import Stack, stack_of


@dataclass
class FeaturesArgs:
    """Find out what every latent of a run responds to, and show the most telling ones.

    Encodes rows once and leaves latents.db in the run's folder, which saefast explore shows; what is there already and
    of the same weights and data is used. Beside it features.html, features.md and features.png of some latents, and how
    often and how strongly every latent fired in feature_stats.safetensors.
    """

    run: tyro.conf.Positional[Path]
    """folder of a run, or of an SAE in any format with --data"""
    data: str | None = None
    """harvest or rows to look at, instead of the run's own"""
    model: str | None = None
    """language model that was harvested, where it is not found by its name: a folder, or a name that loads it"""
    rows: int = ROWS
    """rows to encode: the held-out ones first, then as many of the others"""
    top: Annotated[int, tyro.conf.arg(aliases=["--n"])] = 10
    """the most telling latents to show"""
    latents: tuple[int, ...] = ()
    """latents to show instead"""
    contexts: int = 6
    """contexts per latent"""


def main(argv: list[str]) -> int:
    args = parse(FeaturesArgs, argv, "features")
    table, written = run_features(args)
    print(summary(table.features))
    print(f"\nwritten: {written}")
    return 0


def run_features(args: FeaturesArgs, model: Any = None, tokenizer: Any = None) -> tuple[FeatureTable, str]:
    """Makes latents.db where it is not there, and the table of some latents. -> the table, the files written, in words.

    Args:
        model, tokenizer: those that were harvested, as objects; None is what args.model says, or the harvest's names.

    Raises:
        InputError: as `make_latents`; a latent that is not there.
    """
    for name in ("top", "contexts", "rows"):
        if getattr(args, name) < 1:
            raise InputError(f"{name} is {getattr(args, name)}: expected at least 1")
    model = args.model if model is None else model
    db = make_latents(args.run, args.data, model, tokenizer, args.rows)
    shown = list(args.latents) or _most_telling(db, args.top)
    for latent in shown:
        db.latent(latent)
    table = make_table(db, shown, args.contexts)
    sae = db.meta["sae"]
    title = f"{sae['model']} {sae['hook']}: what {len(shown)} of {db.n_latents:,} latents respond to"
    pages, picture = write_features(args.run, table, title), args.run / "features.png"
    files = [db.path, *pages, args.run / FEATURE_STATS]
    return table, named(files, lambda: draw_features(table, picture, title))


def _most_telling(db: LatentsDB, n: int) -> list[int]:
    """Those chosen; where rows have no tokens, and nothing says which tell most, those that fire most strongly."""
    return db.telling(n) or [row.latent for row in db.page("max_act", limit=n, dead=False)[0]]


def make_latents(
    run: str | Path,
    data: str | None = None,
    model: Any = None,
    tokenizer: Any = None,
    rows: int = ROWS,
) -> LatentsDB:
    """A run's latents.db: what is there, if it is of these weights, this data and enough rows, or made now.

    Leaves feature_stats.safetensors beside it. A bar on stderr where a person watches.

    Args:
        run: folder of a run, or of an SAE in any format. data: as --data, None is what the run was trained on.
        model, tokenizer: those that were harvested, or where they load from; None is the harvest's names.
        rows: how many to encode at least, where there are as many.

    Raises:
        InputError: no SAE there, no data, a tokenizer that does not load or is not the one of the harvest, or a model
            that is given is not the one harvested. One that loads by name and is another is done without.
    """
    run = usable(run)
    sae = load_finished(run)
    announce_harvest(run, data)
    model, tokenizer = unwrapped(model, tokenizer)
    source = run_source(run, sae, data, watched(), model, tokenizer)
    if not isinstance(source, MappedSource):
        raise InputError(f"{source.source_name} comes as a stream: latents are shown of rows in files")
    stack, path = stack_of(run, sae), run / LATENTS_DB
    why = _why_anew(path, stack, source, rows)
    if why is None:
        db = LatentsDB(path)
    else:
        if why:
            print(f"{path} is made anew: {why}", flush=True)
        db = _built(stack, source, path, model, tokenizer, rows)
    _write_stats(db, run / FEATURE_STATS)
    return db


def _why_anew(path: Path, stack: Stack, source: MappedSource, rows: int) -> str | None:
    """Why latents.db is made, in words; "" where there is none, None where it is what is asked for."""
    if not path.exists():
        return ""
    try:
        meta = LatentsDB(path).meta
    except InputError as error:
        return str(error).split(":")[0]
    if meta["sae"]["digest"] != stack.digest():
        return "the SAE has other weights now"
    if meta["rows"]["digest"] != facts.data_digest(source):
        return f"it is of {meta['rows']['source']}"
    if meta["rows"]["rows"] < min(rows, facts.available(source)):
        return f"it is of {meta['rows']['rows']:,} rows, and more are asked for"
    return None


def _built(stack: Stack, source: MappedSource, path: Path, model: Any, tokenizer: Any, rows: int) -> LatentsDB:
    given, index = model, {} if source.folder is None else source.folder.index
    # Images are read with the processor beside the model.
    processor = model if facts.kind_of(source) == "images" and isinstance(model, str | Path) else None
    if facts.kind_of(source) == "text":
        tokenizer = harvested_tokenizer(index, tokenizer, model)
        model = _model(index, given)
    else:
        tokenizer = model = None
    with _bar() as shown, _ended_in_order():
        return build_latents(
            stack, source, path, tokenizer=tokenizer, model=model, processor=processor, rows=rows, progress=shown
        )


def _model(index: dict[str, Any], given: Any) -> Any:
    """The model that was harvested, with its head where it has one. None, and a word, where its name leads astray."""
    try:
        try:
            return causal_language_model(index, given)
        except InputError:
            return harvested_model(index, given)
    except InputError as error:
        if given is not None:
            raise
        warnings.warn(f"latents are described without the model: {error}", RuntimeWarning, stacklevel=2)
        return None


def _write_stats(db: LatentsDB, file: Path) -> None:
    """How often and how strongly each latent fired, for those who read no database."""
    columns = zip(*db.query("SELECT n_fired, n_fired * mean_act, max_act FROM latents ORDER BY latent"), strict=True)
    sparsity = Sparsity(db.n_latents)
    for name, column in zip(("counts", "total_act", "max_act"), columns, strict=True):
        dtype = torch.int64 if name == "counts" else torch.float64
        setattr(sparsity, name, torch.tensor(column, dtype=dtype, device="cpu"))
    sparsity.n_rows = int(db.meta["n_rows"])
    write_latent_stats(file, sparsity)


@contextlib.contextmanager
def _bar() -> Iterator[Shown | None]:
    """One bar over all steps on stderr, with the time left, where a person watches."""
    if not watched():
        yield None
        return
    from tqdm import tqdm

    bar: Any
    form = "{desc:<12}{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
    with tqdm(total=1.0, bar_format=form) as bar:

        def shown(step: str, share: float) -> None:
            bar.set_description_str(step, refresh=False)
            bar.update(share - bar.n)

        yield shown


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """SIGTERM ends what is done here as Ctrl-C does, so that nothing half done is left."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt("terminated")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
