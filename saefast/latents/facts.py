"""What latents.db says of itself: of which SAE, of which rows. By it a file is known to be of a run as it is now."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from saefast.data.item_names import unit_of
from saefast.data.mapped_source import MappedSource, Rows
from saefast.data.source import X
from saefast.latents.choice import SCORE, TELLING
from saefast.latents.logit_weights import Unembedding, written
from saefast.latents.schema import INTERVALS, PER_INTERVAL, TOP
from saefast.latents.spool import Spool
from saefast.models.architecture import Layer
from saefast.models.sae import SAE
from saefast.training.residual import Stack

WITHOUT_COSINE = " Here the cosine is left out: the model's input embedding is not known."


class Decoder(NamedTuple):
    """What latents write: rows (L, d), and where that is, in words."""

    rows: Tensor
    where: str


def decoder_of(sae: SAE) -> Decoder:
    """The decoder rows that latents are compared by: of several hooks that are reconstructed, those of the last."""
    parts = sae.architecture.target_parts()
    rows = written(sae)[:, -parts[-1] :]
    return Decoder(rows, "" if len(parts) == 1 else f"the last of {len(parts)} hooks")


def kind_of(source: MappedSource) -> str:
    """text, images, audio or another kind of input; rows, where nothing but rows is known."""
    return "rows" if source.folder is None else source.folder.kind


def sae_facts(stack: Stack, source: MappedSource, path: Path) -> dict[str, Any]:
    config, kind = stack.parts[-1].sae.config, stack.parts[-1].sae.architecture
    index = {} if source.folder is None else source.folder.index
    layers = []
    while isinstance(kind, Layer):
        layers.append(type(kind).__name__.lower())
        kind = kind.inner
    return {
        "digest": stack.digest(),
        "architecture": " over ".join([*layers, kind.name]),
        "d_in": config.d_in,
        "d_out": stack.parts[-1].sae.d_out,
        "k": config.k,
        "hook": config.metadata.get("hook_name") or ", ".join(source.hooks.get(X, ())),
        "model": config.metadata.get("model_name") or str(index.get("model", "")),
        "path": str(path.parent.resolve()),
    }


def row_facts(source: MappedSource, n_rows: int) -> dict[str, Any]:
    """Of n_rows rows of a source, held-out ones first."""
    index = {} if source.folder is None else source.folder.index
    return {
        "source": source.source_name,
        "data": str(index.get("text") or (source.source_name if source.folder is None else source.folder.path)),
        "folder": None if source.folder is None else str(source.folder.path.resolve()),
        "rows": n_rows,
        "available": available(source),
        "digest": data_digest(source),
    }


def available(source: MappedSource) -> int:
    return len(source.held[X]) + len(source.train[X])


def data_digest(source: MappedSource) -> str:
    """Of what rows a source has. Of a shard folder its index, which has digests of all files; of other files their
    names, sizes and times, so that no row is read."""
    found = hashlib.sha256(repr((sorted(source.hooks.items()), source.rows_masked)).encode())
    for folder in (source.folder, *source.others):
        if folder is not None:
            shards = [(shard["file"], shard["sha256"]) for shard in folder.index["shards"]]
            found.update(repr((sorted(map(repr, shards)), folder.index["tokens"])).encode())
    if source.folder is None:
        for rows in (source.held[X], source.train[X]):
            found.update(repr(_files(rows)).encode())
    return found.hexdigest()


def _files(rows: Rows) -> list[Any]:
    seen = []
    for segment in rows.segments:
        path = Path(segment.name)
        stat = path.stat() if path.is_file() else None
        seen.append((segment.name, tuple(segment.rows.shape), segment.first, stat and (stat.st_size, stat.st_mtime_ns)))
    return seen


def spool_facts(spool: Spool, kind: str) -> dict[str, Any]:
    return {
        "n_latents": spool.n_latents,
        "n_rows": spool.n_rows,
        "n_sequences": len(spool.source_sequences),
        "kind": kind,
        "unit": "rows" if kind == "rows" else unit_of(kind),
        "l0": len(spool.idx) / max(spool.n_rows, 1),
    }


def score_facts(tokens: bool, cosine: bool) -> str | None:
    """How latents were ranked, in sentences; None where they were not."""
    return f"{SCORE}{'' if cosine else WITHOUT_COSINE} {TELLING}" if tokens else None


def context_facts(why: str | None) -> dict[str, Any]:
    """why: there are none, in a sentence."""
    return {"top": TOP, "intervals": INTERVALS, "each": PER_INTERVAL, "why": why}


def logit_facts(unembedded: Unembedding | str, decoder: Decoder) -> dict[str, Any]:
    """In what sense tokens are raised, and by what is written where; or why there is nothing to tell."""
    return {
        "what": unembedded.what if isinstance(unembedded, Unembedding) else None,
        "why": None if isinstance(unembedded, Unembedding) else unembedded,
        "where": decoder.where,
    }
