"""The table that `saefast features` shows: telling latents with their tokens and strongest contexts, as text to read.

`features` gathers the statistics, `choice` picks the latents, `report` and `plots` write the table down.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saefast.analysis.choice import SCORE, OwnTokens, choose, own_tokens
from saefast.analysis.features import LatentStats, code_of
from saefast.data.mapped_source import MappedSource
from saefast.data.shards import SPLITS, Shard, ShardFolder, dequantise
from saefast.data.source import X, beside
from saefast.harvest.token_text import Texts, same_word
from saefast.models.sae import SAE

# Tokens shown before and after a firing.
BEFORE, AFTER = 14, 8
_BATCH = 8192


@dataclass
class TokenShare:
    """One of a latent's own tokens.

    Attributes:
        token: its id. text: as shown.
        share: activation on it / all activation of the latent.
        covered: occurrences of it on which the latent fires / all its occurrences.
    """

    token: int
    text: str
    share: float
    covered: float


@dataclass
class Snippet:
    """Tokens around one firing.

    Attributes:
        texts: their text, spaces included. acts: the latent's activation on each.
        peak: place of the firing among them.
    """

    texts: list[str]
    acts: list[float]
    peak: int

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return iter(zip(self.texts, self.acts, strict=True))


@dataclass
class Feature:
    """A latent to show: n_fired rows of all, its strongest activation, its own tokens, its strongest contexts."""

    latent: int
    score: float
    density: float
    n_fired: int
    max_act: float
    tokens: list[TokenShare]
    snippets: list[Snippet]

    @property
    def title(self) -> str:
        """The latent's tokens, one of each word."""
        words: list[str] = []
        for token in self.tokens:
            if not any(same_word(token.text, word) for word in words):
                words.append(token.text)
        return " · ".join(words[:5])


@dataclass
class FeatureTable:
    """features, best first, and what they were chosen from and how, in a few sentences."""

    features: list[Feature]
    about: str


def make_table(
    sae: SAE,
    source: MappedSource,
    stats: LatentStats,
    tokenizer: Any,
    embedding: Tensor | None,
    n: int = 10,
    contexts: int = 6,
    given: Callable[[Tensor], Tensor] | None = None,
) -> FeatureTable:
    """The n most telling latents with their tokens and strongest contexts, from what `features.collect` gathered.

    Args:
        source: the harvest that the stats are of.
        embedding: (V, d) the model's input embedding, for SCORE's cosine; None leaves it out.
        given: what the SAE encodes of the source's rows x; None is x.
    """
    assert source.folder is not None
    texts, tokens = Texts(tokenizer), own_tokens(stats)
    chosen = choose(stats, tokens, texts, n, embedding)
    places = {latent: _places(stats, latent, source.folder, contexts) for latent, _ in chosen}
    acts = _acts_around(sae, source, places, given or (lambda x: x))
    features = []
    for latent, score in chosen:
        n_fired, strongest = int(stats.sparsity.counts[latent]), float(stats.sparsity.max_act[latent])
        snippets = [_snippet(source.folder, texts, acts, (latent, seq, pos)) for seq, pos in places[latent]]
        density, shares = n_fired / stats.sparsity.n_rows, _shares(tokens, texts, latent)
        features.append(Feature(latent, score, density, n_fired, strongest, shares, snippets))
    return FeatureTable(features, _about(sae, source, stats, len(features), embedding is not None))


def _shares(tokens: OwnTokens, texts: Texts, latent: int) -> list[TokenShare]:
    columns = (column[latent].tolist() for column in (tokens.ids, tokens.share, tokens.covered, tokens.own))
    return [
        TokenShare(token, texts.token(token), share, covered)
        for token, share, covered, own in zip(*columns, strict=True)
        if own
    ]


def _about(sae: SAE, source: MappedSource, stats: LatentStats, n: int, cosine: bool) -> str:
    score = SCORE if cosine else SCORE + " Here the cosine is left out."
    l0 = stats.sparsity.compute()["l0"]
    return (
        f"The {n} most telling of {sae.config.n_latents:,} latents (L0 = {l0:.1f}), judged on "
        f"{stats.sparsity.n_rows:,} rows of {source.source_name}, held-out ones first. A percentage is the share of a "
        f"latent's activation that falls on a token. Contexts are the strongest, with repeats left out. {score}"
    )


def _places(stats: LatentStats, latent: int, folder: ShardFolder, n: int) -> list[tuple[int, int]]:
    """(sequence, position) of up to n strong firings: each token once while there are others, no context twice."""
    seen: set[tuple[int, ...]] = set()
    by_token: dict[int, int] = {}
    kept = []
    for order, place in enumerate(p for p in stats.top.places[latent].tolist() if p >= 0):
        seq, pos = place >> 16, place & 0xFFFF
        ids, middle = folder.context(seq, pos, 4, 4)
        context, token = tuple(ids.tolist()), int(ids[middle])
        if context not in seen:
            seen.add(context)
            by_token[token] = by_token.get(token, -1) + 1
            kept.append((by_token[token], order, (seq, pos)))
    return [where for _, _, where in sorted(kept)[:n]]


Place = tuple[int, int, int]  # latent, sequence, position


@torch.no_grad()
def _acts_around(
    sae: SAE, source: MappedSource, places: dict[int, list[tuple[int, int]]], given: Callable[[Tensor], Tensor]
) -> dict[Place, float]:
    """Activations of the chosen latents all over the sequences they are shown in."""
    assert source.folder is not None
    shown: dict[int, set[int]] = {}
    for latent, where in places.items():
        for number, _ in where:
            shown.setdefault(number, set()).add(latent)
    found: dict[Place, float] = {}
    sequences = torch.tensor(sorted(shown), dtype=torch.int32, device="cpu")
    for x, seq, pos in _rows_of(source, sequences):
        acts, idx = code_of(sae, given(x))
        wanted = torch.isin(idx, torch.tensor(list(places), dtype=idx.dtype, device="cpu")) & (acts > 0)
        for row, column in wanted.nonzero().tolist():
            latent, sequence = int(idx[row, column]), int(seq[row])
            if latent in shown[sequence]:
                found[latent, sequence, int(pos[row])] = float(acts[row, column])
    return found


def _rows_of(source: MappedSource, seqs: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """All rows of some sequences, at most _BATCH at a time: x (B, d), the hooks side by side, seq and pos (B,)."""
    folder, hooks = source.folder, source.hooks[X]
    assert folder is not None
    if source.others:
        yield from _picked_rows(source, seqs)
        return
    for split in SPLITS:
        for info in folder.shards_of_all(split, hooks):
            shards = [folder.open(info, hook) for hook in hooks]
            seq, pos = shards[0].seq, shards[0].pos
            for at in torch.isin(seq, seqs).nonzero()[:, 0].split(_BATCH):
                if len(at):
                    yield beside([_acts_at(shard, at) for shard in shards]), seq[at], pos[at]


def _picked_rows(source: MappedSource, seqs: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """As `_rows_of`, of several folders: all rows are read."""
    for split in SPLITS:
        for x, seq, pos in source.located(split, _BATCH):
            assert seq is not None
            assert pos is not None
            at = torch.isin(seq, seqs)
            if bool(at.any()):
                yield x[at], seq[at], pos[at]


def _acts_at(shard: Shard, at: Tensor) -> Tensor:
    """Some rows of a shard, as numbers."""
    return shard.acts[at] if shard.scale is None else dequantise(shard.acts[at], shard.scale[at])


def _snippet(folder: ShardFolder, texts: Texts, acts: dict[Place, float], where: Place) -> Snippet:
    latent, seq, pos = where
    ids, peak = folder.context(seq, pos, BEFORE, AFTER)
    values = [acts.get((latent, seq, pos - peak + i), 0.0) for i in range(len(ids))]
    pieces = [piece.replace("\n", " ") for piece in texts.run(ids.tolist())]
    for i in range(len(ids)):
        # A character of several tokens is shown once, with the strongest of their activations.
        if texts.continues(ids.tolist(), pieces, i):
            values[i + 1] = max(values[i : i + 2])
            peak = i + 1 if peak == i else peak
    return Snippet(pieces, values, peak)
