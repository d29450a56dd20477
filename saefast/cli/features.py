"""`saefast features`: what a run's most telling latents respond to, as a page, a table and a picture."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import tyro

from saefast.analysis.evaluation import load_finished, run_source
from saefast.analysis.feature_table import FeatureTable, make_table
from saefast.analysis.features import collect
from saefast.analysis.plots import draw_features
from saefast.analysis.report import summary, write_features
from saefast.cli.args import announce_harvest, named, parse, watched
from saefast.data.mapped_source import Located, MappedSource
from saefast.errors import InputError
from saefast.harvest import language_models as models

ROWS = 1 << 18
# Large, because merging a batch into the table of strongest activations costs the same for any size.
BATCH = 8192


@dataclass
class FeaturesArgs:
    """Show what a run's most telling latents respond to.

    Needs a run trained on a harvest, whose tokens are known. Leaves features.html, features.md and features.png in the
    run's folder.
    """

    run: tyro.conf.Positional[Path]
    """folder of a run"""
    data: str | None = None
    """harvest to look at, instead of the run's own"""
    n: int = 10
    """latents to show"""
    contexts: int = 6
    """contexts per latent"""
    rows: int = ROWS
    """rows to encode: the held-out ones first, then as many of the others"""


def main(argv: list[str]) -> int:
    args = parse(FeaturesArgs, argv, "features")
    table, written = run_features(args)
    print(summary(table.features))
    print(f"\nwritten: {written}")
    return 0


def run_features(args: FeaturesArgs) -> tuple[FeatureTable, str]:
    """Makes the table and writes it. -> the table, and the files written, in words.

    Raises:
        InputError: the run's data has no tokens, or its model does not load.
    """
    for name in ("n", "contexts", "rows"):
        if getattr(args, name) < 1:
            raise InputError(f"{name} is {getattr(args, name)}: expected at least 1")
    sae = load_finished(args.run)
    announce_harvest(args.run, args.data)
    source = run_source(args.run, sae, args.data, watched())
    if not isinstance(source, MappedSource) or source.folder is None:
        raise InputError(f"{source.source_name} holds no tokens: features need a run trained on a harvest")
    index = source.folder.index
    name, revision = str(index.get("model", "")), index.get("revision")
    tokenizer = models.load_tokenizer(name, revision=revision)
    model: Any = models.load_model(name, revision=revision)
    embedding = model.get_input_embeddings().weight
    batches = _progress(_rows(source, args.rows), args.rows)
    stats = collect(sae, batches, tokens_of=source.folder.token_ids, vocabulary=len(embedding))
    table = make_table(sae, source, stats, tokenizer, embedding, args.n, args.contexts)
    hook = sae.config.metadata.get("hook_name", "")
    title = f"{name} {hook}: what {len(table.features)} of {sae.config.n_latents:,} latents respond to"
    pages, picture = write_features(args.run, table, title), args.run / "features.png"
    return table, named(pages, lambda: draw_features(table, picture, title))


def _rows(source: MappedSource, limit: int) -> Iterator[Located]:
    """Held-out rows, then the others, until there are `limit`."""
    for batch in chain(source.located("heldout", BATCH), source.located("train", BATCH)):
        yield Located(*(None if column is None else column[:limit] for column in batch))  # type: ignore[arg-type]
        limit -= len(batch.x)
        if limit <= 0:
            return


def _progress(batches: Iterator[Located], rows: int) -> Iterator[Located]:
    """The batches, with a bar on stderr where a person watches."""
    if not watched():
        yield from batches
        return
    from tqdm import tqdm

    bar: Any
    with tqdm(desc="features", unit=" rows", unit_scale=True, total=rows) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch.x))
