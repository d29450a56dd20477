"""Builds latents.db: rows are encoded once, and everything else comes from their sparse code, a range at a time.

Memory is O(L) beside one range of latents (spool.MOST_ENTRIES, MOST_LATENTS), the SAE, and the model's embeddings. The
file appears whole or not at all.
"""

import errno
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saefast import ambient
from saefast.data.mapped_source import Located, MappedSource
from saefast.errors import InputError
from saefast.files import replacing, usable
from saefast.harvest.token_text import Texts
from saefast.latents import choice, facts, statistics
from saefast.latents.choice import Directions, OwnTokens
from saefast.latents.codes import write_codes
from saefast.latents.cofiring import cofiring
from saefast.latents.contexts import Contexts, write_sequences
from saefast.latents.database import LatentsDB
from saefast.latents.examples import examples
from saefast.latents.images import MOST, write_images
from saefast.latents.inserts import carry_labels, check_ours, insert, insert_array, insert_meta, insert_ranked
from saefast.latents.layout import cluster_names, layout
from saefast.latents.logit_weights import Unembedding, logit_weights, unembedding
from saefast.latents.neighbours import neighbours
from saefast.latents.schema import create, finish
from saefast.latents.spool import Spool, spool_codes
from saefast.latents.steps import Shares, Steps
from saefast.models.sae import SAE
from saefast.training.residual import Part, Stack

# Rows that are encoded where nobody says how many.
ROWS = 1 << 18
# Rows encoded at a time; fewer where as many latents may be on as there are.
_BATCH, _MOST_CODE = 8192, 1 << 27
# The most telling latents that are chosen, to be shown first.
MOST_TELLING = 1000
# Tokens that a latent raises, and as many that it lowers.
_LOGITS = 10
# Instructions of SQLite's machine between two looks at whether the process is to end.
_INSTRUCTIONS = 1_000_000


@ambient.plainly(grad=False)
def build_latents(
    sae: SAE | Stack,
    source: MappedSource,
    path: str | Path,
    *,
    tokenizer: Any = None,
    model: Any = None,
    processor: Any = None,
    rows: int = ROWS,
    progress: Shares | None = None,
) -> LatentsDB:
    """Encodes rows of a source and writes what every latent responds to.

    Args:
        sae: a stack where it is the residual of others: the last of it is described.
        path: of the file. One that is there is replaced once the new one is whole; labels in it are kept.
        tokenizer: of the rows' text; None is for rows of something else.
        model: that was harvested; its input embedding says how alike tokens are, and its unembedding what latents
            write. None does without.
        processor: of the images that rows are of, or a folder or name that it loads from; see `write_images`.
        rows: how many to encode: held-out ones first, then others.
        progress: is told the step under way and the share of all work that is done.

    Raises:
        InputError: rows is below 1, tokens of rows are not there, a row or activation is NaN or inf, or the file is
            another program's.
        OSError: the disk is full.
    """
    path, started = usable(path), time.monotonic()
    if rows < 1:
        raise InputError(f"rows is {rows}: expected at least 1")
    check_ours(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stack = sae if isinstance(sae, Stack) else Stack([Part(sae)])
    with replacing(path) as temporary, closing(create(temporary)) as db, _writing(db):
        build = _Build(stack, source, db, tokenizer, model, processor, min(rows, facts.available(source)), progress)
        # Its embeddings are all that is needed from here on.
        del model
        build.fill(path)
        insert_meta(db, {"seconds": round(time.monotonic() - started, 1)})
        finish(db)
        carry_labels(path, temporary)
    if progress is not None:
        progress("", 1.0)
    return LatentsDB(path)


@contextmanager
def _writing(db: sqlite3.Connection) -> Iterator[None]:
    """Ctrl-C is answered within long statements, and a full disk is the error that it is everywhere."""
    # Python looks at signals when it runs this.
    db.set_progress_handler(lambda: 0, _INSTRUCTIONS)
    try:
        yield
    except sqlite3.OperationalError as error:
        if str(error) == "interrupted":
            raise KeyboardInterrupt from None
        if "full" in str(error):
            raise OSError(errno.ENOSPC, "no space left on the disk that latents.db is written to") from None
        raise


def rows_of(source: MappedSource, limit: int, batch: int = _BATCH) -> Iterator[Located]:
    """Held-out rows, then the others, until there are `limit`."""
    for located in chain(source.located("heldout", batch), source.located("train", batch)):
        yield Located(*(None if column is None else column[:limit] for column in located))  # type: ignore[arg-type]
        limit -= len(located.x)
        if limit <= 0:
            return


class _Build:
    """One pass. What several steps need is kept here."""

    def __init__(
        self,
        stack: Stack,
        source: MappedSource,
        db: sqlite3.Connection,
        tokenizer: Any,
        model: Any,
        processor: Any,
        n_rows: int,
        progress: Shares | None,
    ) -> None:
        self.stack, self.source, self.db, self.n_rows = stack, source, db, n_rows
        self.processor = processor
        self.sae, self.kind = stack.parts[-1].sae, facts.kind_of(source)
        self.decoder = facts.decoder_of(self.sae)
        self.texts = None if tokenizer is None or self.kind != "text" else Texts(tokenizer)
        self.tokenizer_name = None if self.texts is None else str(getattr(tokenizer, "name_or_path", "") or "")
        self.embedding = None if self.texts is None else _embedding(model)
        self.unembedding = self._unembedding(model, None if tokenizer is None else len(tokenizer))
        self.steps = Steps(self._costs(), progress)

    def _costs(self) -> dict[str, float]:
        L, d = self.decoder.rows.shape
        encoded = self.n_rows * L * self.sae.config.d_in
        entries = self.n_rows * self.sae.config.k
        # In products of the encoder, of which two cores do about 2e11 a second.
        return {
            "encoding": encoded,
            "contexts": 2e6 * self.n_rows,
            "codes": 3e4 * entries,
            "latents": 2e5 * entries + 1.5e7 * L,
            "scores": 2e7 * L,
            "neighbours": L * L * d,
            "map": 1e8 * L,
            "images": 2e9 * self._most_images(),
            "logits": 0 if isinstance(self.unembedding, str) else 2 * L * self.unembedding.weight.numel(),
            "indexes": 1e7 * L,
        }

    def _unembedding(self, model: Any, vocabulary: int | None) -> Unembedding | str:
        """What reads tokens off what latents write, or why there is nothing that does."""
        if self.kind != "text":
            return f"rows are of no text ({self.kind}): there are no tokens to raise"
        if self.source.others:
            return "the latents write into several models at once"
        if model is None or self.texts is None:
            return "the model was not at hand"
        return unembedding(model, self.decoder.rows.shape[1], vocabulary)

    def fill(self, path: Path) -> None:
        spool = self._spooled(path)
        about = facts.spool_facts(spool, self.kind)
        contexts = self._contexts(spool)
        tokens = self._tokens(spool)
        found = self._by_range(spool, tokens, contexts)
        own = OwnTokens.joined(found.own) if found.own else None
        cosine = self._latents(spool, found, own, tokens)
        insert_meta(self.db, self._relatives(spool, own))
        self._logits()
        insert_meta(self.db, about | self._images(spool))
        insert_meta(
            self.db,
            {
                "sae": facts.sae_facts(self.stack, self.source, path),
                "rows": facts.row_facts(self.source, self.n_rows),
                "contexts": facts.context_facts(None if contexts is not None else self._no_contexts()),
                "logits": facts.logit_facts(self.unembedding, self.decoder),
                "score": facts.score_facts(tokens is not None, cosine),
                "tokenizer": self.tokenizer_name,
                "built": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            },
        )
        self.steps.begin("indexes", 1)

    def _most_images(self) -> int:
        """How many images may have to be read."""
        return min(self.source.folder.n_sequences, MOST) if self.kind == "images" and self.source.folder else 0

    def _images(self, spool: Spool) -> dict[str, Any]:
        """The table of images, and what is known of them; nothing where rows are of none."""
        if self.kind != "images" or self.source.folder is None:
            return {}
        advance = self.steps.begin("images", self._most_images())
        return write_images(self.db, spool, self.source.folder, self.processor, advance)

    def _spooled(self, path: Path) -> Spool:
        # Codes of any width are padded to the fullest row's.
        widest = self.sae.config.k if self.sae.architecture.fixed_width else self.sae.config.n_latents
        batch = max(1, min(_BATCH, _MOST_CODE // widest))
        batches = rows_of(self.source, self.n_rows, batch)
        given = (located._replace(x=self.stack.last_given(located.x)) for located in batches)
        return spool_codes(self.sae, given, path.parent, self.steps.begin("encoding", self.n_rows))

    def _contexts(self, spool: Spool) -> Contexts | None:
        """The tables of sequences, their contexts and their codes; None where rows are of nothing that is shown."""
        if self._no_contexts() or not spool.located:
            return None
        contexts = write_sequences(self.db, spool, self.source, self.texts, self.steps.begin("contexts", self.n_rows))
        write_codes(self.db, spool, self.steps.begin("codes", self.n_rows))
        return contexts

    def _no_contexts(self) -> str | None:
        """Why there are no contexts, in a sentence; None where there are."""
        if self.kind == "rows":
            return "rows of which nothing else is known have no contexts: harvest them to see what they are of"
        if self.kind == "audio":
            return "sound is not shown yet"
        return None

    def _tokens(self, spool: Spool) -> np.ndarray | None:
        """(n_rows,) int32: the token of each row; None where rows are of no text."""
        if self.texts is None or self.source.folder is None or not spool.located:
            return None
        tokens = statistics.tokens_of_rows(self.source.folder, spool)
        largest = int(tokens.max(initial=0))
        if self.embedding is not None and largest >= len(self.embedding):
            raise InputError(
                f"{self.source.source_name} has the token {largest}, and the model's input embedding "
                f"{len(self.embedding)} rows: it is another model's"
            )
        return tokens

    def _by_range(self, spool: Spool, tokens: np.ndarray | None, contexts: Contexts | None) -> "_Found":
        """What comes from the entries of each latent."""
        L = spool.n_latents
        found = _Found(np.zeros(L), np.zeros(L), [])
        counts = None if tokens is None else np.bincount(tokens)
        advance = self.steps.begin("latents", L)
        for start, stop in spool.ranges():
            entries = spool.by_latent(start, stop)
            found.total[start:stop], found.largest[start:stop] = moments = statistics.moments(entries)
            histograms = statistics.histograms(entries, moments.largest)
            fired = np.flatnonzero(spool.n_fired[start:stop])
            blobs = [counts_of_bins.astype("<i4").tobytes() for counts_of_bins in histograms[fired]]
            insert(self.db, "histograms", fired + start, blobs)
            if tokens is not None and counts is not None:
                pairs = statistics.pairs(entries, tokens)
                found.own.append(choice.own_tokens(pairs, moments.total, counts))
            if contexts is not None:
                insert(self.db, "examples", *examples(entries, start, spool, contexts, moments.largest))
            together = cofiring(spool, entries, start)
            insert_ranked(self.db, "cofiring", together.ids, together.lift, together.rows, first=start)
            advance(stop - start)
        return found

    def _latents(self, spool: Spool, found: "_Found", own: OwnTokens | None, tokens: np.ndarray | None) -> bool:
        """The tables of latents and of their tokens. -> Whether the score has its cosine."""
        density = spool.n_fired / max(spool.n_rows, 1)
        scores: Any = [None] * spool.n_latents
        titles, directions = [""] * spool.n_latents, None
        advance = self.steps.begin("scores", spool.n_latents)
        if tokens is not None and own is not None and self.texts is not None:
            counts = np.bincount(tokens)
            texts = self._insert_tokens(self.texts, counts)
            if self.embedding is not None:
                directions = Directions(self.embedding, torch.from_numpy(counts))
            described = choice.described(own, texts, directions)
            titles, scores = described.titles, described.score.numpy()
            self._insert_latent_tokens(own)
            n_fired = torch.from_numpy(spool.n_fired)
            best = choice.telling(described.score, own, n_fired, spool.n_rows, directions, MOST_TELLING)
            insert(self.db, "telling", np.arange(len(best)), best)
        mean = found.total / np.maximum(spool.n_fired, 1)
        insert(
            self.db,
            "latents",
            *(np.arange(spool.n_latents), spool.n_fired, density, mean, found.largest, scores),
            *((spool.n_fired == 0).astype(int), (density > 0.01).astype(int), titles),
        )
        insert_array(self.db, "density", "float32", density)
        advance(spool.n_latents)
        return directions is not None

    def _insert_tokens(self, texts: Texts, counts: np.ndarray) -> dict[int, str]:
        """-> The text of each token that occurs."""
        seen = np.flatnonzero(counts)
        found = {token: _storable(texts.token(token)) for token in seen.tolist()}
        insert(self.db, "tokens", seen, list(found.values()), counts[seen])
        return found

    def _logits(self) -> None:
        """Tokens that latents raise and lower; those that occur nowhere get a text as well."""
        if isinstance(self.unembedding, str):
            return
        n = min(_LOGITS, len(self.unembedding.weight))
        advance = self.steps.begin("logits", len(self.decoder.rows))
        found = logit_weights(self.decoder.rows, self.unembedding, n, advance)
        ids = torch.stack([found.lowered_ids, found.raised_ids], 1).cpu().numpy()
        values = torch.stack([found.lowered, found.raised], 1).double().cpu().numpy()
        latent, side, rank = np.indices(ids.shape).reshape(3, -1)
        insert(self.db, "logit_weights", latent, 2 * side - 1, rank, ids.ravel(), values.ravel())
        assert self.texts is not None
        seen = [token for (token,) in self.db.execute("SELECT token FROM tokens")]
        new = np.setdiff1d(ids, seen)
        texts = [_storable(self.texts.token(token)) for token in new.tolist()]
        insert(self.db, "tokens", new, texts, np.zeros(len(new), int))

    def _insert_latent_tokens(self, own: OwnTokens) -> None:
        share, covered = own.share.numpy(), own.covered.numpy()
        # Places that a latent has no token for have no share.
        ids = np.where(share > 0, own.ids.numpy(), -1)
        insert_ranked(self.db, "latent_tokens", ids, share, covered, own.own.numpy().astype(int))

    def _relatives(self, spool: Spool, own: OwnTokens | None) -> dict[str, Any]:
        """Neighbours, and the map of all latents. -> How the map was made, and the names of its clusters."""
        L, rows = spool.n_latents, self.decoder.rows
        cosines, ids = neighbours(rows, advance=self.steps.begin("neighbours", L))
        insert_ranked(self.db, "neighbours", ids.cpu().numpy(), cosines.double().cpu().numpy())
        self.steps.begin("map", 1)
        found = layout(rows, ids, cosines)
        insert_array(self.db, "map", "float32", found.points)
        insert_array(self.db, "cluster", "int16", found.cluster)
        names = [""] * found.n_clusters
        if own is not None and self.texts is not None:
            latent, place = own.own.numpy().nonzero()
            columns = own.ids.numpy()[latent, place], own.share.numpy()[latent, place]
            texts = self.texts
            names = cluster_names(found.cluster, latent, *columns, lambda token: _storable(texts.token(token)))
        return {"map": {"method": found.method, "variance": found.variance}, "clusters": names}


class _Found:
    """Of all latents: total and largest (L,) float64 activation, and the own tokens of each range of them."""

    def __init__(self, total: np.ndarray, largest: np.ndarray, own: list[OwnTokens]) -> None:
        self.total, self.largest, self.own = total, largest, own


def _storable(text: str) -> str:
    """SQLite takes no halves of characters."""
    return text.encode("utf-8", "replace").decode()


def _embedding(model: Any) -> Tensor | None:
    """The input embedding (V, d) of a model; None where there is none."""
    if model is None:
        return None
    weight: Tensor = model.get_input_embeddings().weight.detach().cpu()
    return weight
