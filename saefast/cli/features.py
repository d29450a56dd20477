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

from saefast.analysis.delphi import DELPHI
from saefast.analysis.evaluation import load_finished, run_source
from saefast.analysis.export_folder import check_place
from saefast.analysis.export_names import Names
from saefast.analysis.exports import Kind, export, parse_latents, telling
from saefast.analysis.latent_stats import FEATURE_STATS, write_latent_stats
from saefast.analysis.page import CONTEXTS, Shown, shown, summary, title_of, write_features
from saefast.analysis.plots import draw_features
from saefast.cli.args import announce_harvest, named, parse, watched
from saefast.data.mapped_source import MappedSource
from saefast.errors import InputError
from saefast.files import usable
from saefast.harvest.harvested_model import (
    causal_language_model,
    check_given,
    harvested_model,
    harvested_tokenizer,
)
from saefast.harvest.language_models import unwrapped
from saefast.latents import facts
from saefast.latents.build import ROWS, build_latents
from saefast.latents.database import LatentsDB
from saefast.latents.schema import LATENTS_DB
from saefast.latents.steps import Advance, Shares, nothing
from saefast.metrics.streaming import Sparsity
from saefast.training.residual import Stack, stack_of


@dataclass
class FeaturesArgs:
    """Find out what every latent of a run responds to, and show the most telling ones.

    Encodes rows once and leaves latents.db in the run's folder, which saefast explore shows; what is there already and
    of the same weights and data is used. Beside it features.html, features.md and features.png of some latents, and how
    often and how strongly every latent fired in feature_stats.safetensors. With --out, writes them for other tools.
    """

    run: tyro.conf.Positional[Path]
    """folder of a run, or of an SAE in any format with --data"""
    data: str | None = None
    """harvest or rows to look at, instead of the run's own"""
    model: str | None = None
    """language model that was harvested, where it is not found by its name: a folder, or a name that loads it"""
    rows: int = ROWS
    """rows to encode: the held-out ones first, then as many of the others"""
    top: Annotated[int | None, tyro.conf.arg(aliases=["--n"])] = None
    """the most telling latents to show; default 10, of a page in --out 100, of other exports all"""
    latents: str | None = None
    """latents to show instead, such as 5,17,8000-8010"""
    contexts: int = CONTEXTS
    """contexts per latent in features.html"""
    out: Path | None = None
    """a new folder to write them to, instead of features.html, .md and .png"""
    export: Kind = "page"
    """what --out is for: pages to share, or another tool"""
    model_id: str | None = None
    """what the other tool calls the model; default its name"""
    layer: int | None = None
    """what the other tool takes for the layer; default the number in the hook's name"""
    source_set: str | None = None
    """on Neuronpedia: the set of SAEs that this is one of"""


def main(argv: list[str]) -> int:
    args = parse(FeaturesArgs, argv, "features")
    found, written = run_features(args)
    if found:
        print(f"{summary(found)}\n")
    print(f"written: {written}")
    return 0


def run_features(args: FeaturesArgs, model: Any = None, tokenizer: Any = None) -> tuple[list[Shown], str]:
    """Makes latents.db where it is not there, and shows or exports some latents. -> those shown; what was written.

    Args:
        model, tokenizer: those that were harvested, as objects; None is what args.model says, or the harvest's names.

    Raises:
        InputError: as `make_latents`; a latent that is not there; an export that the SAE or rows are not fit for.
    """
    _check(args)
    db = make_latents(args.run, args.data, args.model if model is None else model, tokenizer, args.rows)
    latents = _asked_for(args, db)
    if args.out is not None:
        names = Names(db, args.model_id, args.layer, args.source_set)
        n = db.n_latents if latents is None and args.export != "page" else len(latents or ()) or None
        with _counted(args.export, n) as advance, _ended_in_order():
            return [], export(db, args.export, args.out, latents, names, advance)
    return _shown(args, db, telling(db, 10) if latents is None else latents)


def _check(args: FeaturesArgs) -> None:
    """Raises InputError for what would be refused after the pass, which may take minutes."""
    for name in ("top", "contexts", "rows"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: expected at least 1")
    if args.out is None and args.export != "page":
        raise InputError(f"export is {args.export!r} and out is not given: name a new folder with --out")
    if args.out is not None:
        check_place(usable(args.out).resolve(), args.export)
    if args.latents is not None:
        parse_latents(args.latents, load_finished(usable(args.run)).config.n_latents)


def _asked_for(args: FeaturesArgs, db: LatentsDB) -> list[int] | None:
    """The latents that the arguments name; None where they do not."""
    if args.latents is not None:
        return parse_latents(args.latents, db.n_latents)
    return None if args.top is None else telling(db, args.top)


def _shown(args: FeaturesArgs, db: LatentsDB, latents: list[int]) -> tuple[list[Shown], str]:
    found = [shown(db, db.latent(latent)) for latent in latents]
    title = f"{title_of(db)}: what {len(latents)} of {db.n_latents:,} latents respond to"
    pages = write_features(args.run, db, found, title, args.contexts)
    picture = args.run / "features.png"
    files = [db.path, *pages, args.run / FEATURE_STATS]
    return found, named(files, lambda: draw_features(found, picture, title))


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
        model, tokenizer: those that were harvested, or where they load from; None is the harvest's names. What is there
            already is made anew with a model that it was made without.
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
    if source.folder is not None:
        _check_given(source.folder.index, model, tokenizer)
    stack, path = stack_of(run, sae), run / LATENTS_DB
    why = _why_anew(path, stack, source, rows, model is not None)
    if why is None:
        db = LatentsDB(path)
    else:
        if why:
            print(f"{path} is made anew: {why}", flush=True)
        db = _built(stack, source, path, model, tokenizer, rows)
    _write_stats(db, run / FEATURE_STATS)
    return db


def _check_given(index: dict[str, Any], model: Any, tokenizer: Any) -> None:
    """Raises InputError for objects that are not those harvested, also where latents.db is there and needs neither."""
    if model is not None and not isinstance(model, str | Path):
        harvested_model(index, model)
    check_given(index, None, tokenizer)


def _why_anew(path: Path, stack: Stack, source: MappedSource, rows: int, with_model: bool) -> str | None:
    """Why latents.db is made, in words; "" where there is none, None where it is what is asked for."""
    if not path.exists():
        return ""
    try:
        meta = LatentsDB(path).meta
    except InputError as error:
        return str(error).split(":")[0]
    of, made = meta.get("rows") or {}, meta.get("n_rows", 0)
    if (meta.get("sae") or {}).get("digest") != stack.digest():
        return "the SAE has other weights now"
    if of.get("digest") != facts.data_digest(source):
        return f"it is of {of.get('source', 'other rows')}"
    if made < min(rows, facts.available(source)):
        return f"it is of {made:,} rows, and more are asked for"
    if with_model and facts.WITHOUT_COSINE in (meta.get("score") or ""):
        return "it was made without the model"
    return None


def _built(stack: Stack, source: MappedSource, path: Path, model: Any, tokenizer: Any, rows: int) -> LatentsDB:
    index, kind = {} if source.folder is None else source.folder.index, facts.kind_of(source)
    if kind != "text":
        # Images are read with the processor beside the model.
        processor = model if kind == "images" and isinstance(model, str | Path) else None
        with _bar() as moved, _ended_in_order():
            return build_latents(stack, source, path, processor=processor, rows=rows, progress=moved)
    tokenizer = harvested_tokenizer(index, tokenizer, model)
    # Handed over, so that no name here keeps the model in memory: its embeddings are all that is needed of it.
    loaded = [_model(index, model)]
    with _bar() as moved, _ended_in_order():
        return build_latents(*(stack, source, path), tokenizer=tokenizer, model=loaded.pop(), rows=rows, progress=moved)


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
def _bar() -> Iterator[Shares | None]:
    """One bar over all steps on stderr, with the time left, where a person watches."""
    if not watched():
        yield None
        return
    from tqdm import tqdm

    bar: Any
    form = "{desc:<12}{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left"
    with tqdm(total=1.0, bar_format=form) as bar:

        def moved(step: str, share: float) -> None:
            bar.set_description_str(step, refresh=False)
            bar.update(share - bar.n)

        yield moved


@contextlib.contextmanager
def _counted(export: Kind, n_latents: int | None) -> Iterator[Advance]:
    """Counts what an export has done, on stderr, where a person watches. delphi's goes by rows, and is soon done."""
    if not watched():
        yield nothing
        return
    from tqdm import tqdm

    bar: Any
    of = {"unit": " rows"} if export == DELPHI else {"unit": " latents", "total": n_latents}
    with tqdm(desc=export, unit_scale=True, **of) as bar:
        yield bar.update


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
