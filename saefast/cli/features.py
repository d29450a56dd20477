"""`saefast features`: what a run's most telling latents respond to, as a page, a table and a picture."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import tyro
from torch import Tensor

from saefast.analysis.evaluation import load_finished, run_source
from saefast.analysis.feature_table import FeatureTable, make_table
from saefast.analysis.features import collect
from saefast.analysis.latent_stats import FEATURE_STATS, write_latent_stats
from saefast.analysis.plots import draw_features
from saefast.analysis.report import summary, write_features
from saefast.cli.args import announce_harvest, named, parse, watched
from saefast.data.mapped_source import Located, MappedSource
from saefast.errors import InputError
from saefast.harvest.harvested_model import harvested_model, harvested_tokenizer
from saefast.harvest.language_models import unwrapped
from saefast.training.residual import stack_of

ROWS = 1 << 18
# Large, because merging a batch into the table of strongest activations costs the same for any size.
BATCH = 8192


@dataclass
class FeaturesArgs:
    """Show what a run's most telling latents respond to.

    Needs a run trained on a harvest, whose tokens are known. Leaves features.html, features.md and features.png in the
    run's folder, and how often and how strongly every latent fired in feature_stats.safetensors.
    """

    run: tyro.conf.Positional[Path]
    """folder of a run"""
    data: str | None = None
    """harvest to look at, instead of the run's own"""
    model: str | None = None
    """language model that was harvested, where it is not found by its name: a folder, or a name that loads it"""
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


def run_features(args: FeaturesArgs, model: Any = None, tokenizer: Any = None) -> tuple[FeatureTable, str]:
    """Makes the table and writes it. -> the table, and the files written, in words.

    Args:
        model, tokenizer: those that were harvested, as objects; None is what args.model says, or the harvest's names.

    Raises:
        InputError: the run's data has no tokens, its tokenizer does not load or is not the one of the harvest, or a
            model that is given is not the one harvested. One that loads by name and is another is done without.
    """
    for name in ("n", "contexts", "rows"):
        if getattr(args, name) < 1:
            raise InputError(f"{name} is {getattr(args, name)}: expected at least 1")
    sae = load_finished(args.run)
    announce_harvest(args.run, args.data)
    model, tokenizer = unwrapped(args.model if model is None else model, tokenizer)
    source = run_source(args.run, sae, args.data, watched(), model, tokenizer)
    if not isinstance(source, MappedSource) or source.folder is None:
        raise InputError(f"{source.source_name} holds no tokens: features need a run trained on a harvest")
    source.folder.require_text()
    index = source.folder.index
    tokenizer = harvested_tokenizer(index, tokenizer, model)
    embedding = _embedding(index, model)
    stack = stack_of(args.run, sae)
    batches = _progress((b._replace(x=stack.last_given(b.x)) for b in _rows(source, args.rows)), args.rows)
    vocabulary = len(tokenizer) if embedding is None else len(embedding)
    stats = collect(sae, batches, tokens_of=source.folder.token_ids, vocabulary=vocabulary)
    table = make_table(sae, source, stats, tokenizer, embedding, args.n, args.contexts, stack.last_given)
    hook = sae.config.metadata.get("hook_name", "")
    title = (
        f"{index.get('model', '')} {hook}: what {len(table.features)} of {sae.config.n_latents:,} latents respond to"
    )
    write_latent_stats(args.run / FEATURE_STATS, stats.sparsity)
    pages, picture = write_features(args.run, table, title), args.run / "features.png"
    return table, named([*pages, args.run / FEATURE_STATS], lambda: draw_features(table, picture, title))


def _embedding(index: dict[str, Any], given: Any) -> Tensor | None:
    """The input embedding (V, d) of the model that was harvested; None, with a word, where its name leads elsewhere."""
    try:
        weight: Tensor = harvested_model(index, given).get_input_embeddings().weight.detach().float().cpu()
    except InputError as error:
        if given is not None:
            raise
        warnings.warn(f"latents are chosen without the model's embedding: {error}", RuntimeWarning, stacklevel=2)
        return None
    return weight


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
