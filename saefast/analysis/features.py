"""What each latent responds to, gathered in one pass over rows: its strongest activations and the tokens it fires on.

Works on the sparse code of one batch at a time and keeps, for L latents, `n` examples and at most KEPT_TOKENS tokens of
each: O(L · (n + KEPT_TOKENS)) memory beside one batch, for any number of rows, vocabulary and width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from saefast.data.mapped_source import Located
from saefast.metrics.streaming import Sparsity
from saefast.models.sae import SAE

# Entries waiting to be summed before they are sorted into the table: about 100 MB.
_PENDING = 1 << 22
# Pairs sorted at a time where the table is full.
_AT_A_TIME = 1 << 18
# Tokens kept per latent where the table of pairs is full.
KEPT_TOKENS = 64


def strongest(values: Tensor, latents: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest values of every latent.

    Args:
        values, latents: (entries,) a value and the latent that it belongs to.

    Returns:
        Positions of the entries chosen, ordered by latent and then by value, descending; equal values keep their
        order. And their ranks within the latent, 0 to n - 1. Both int64.
    """
    order = values.argsort(descending=True, stable=True)
    order = order[latents[order].argsort(stable=True)]
    grouped = latents[order]
    rank = torch.arange(len(order), dtype=torch.int64, device=order.device) - torch.searchsorted(grouped, grouped)
    kept = rank < n
    return order[kept], rank[kept]


class TopExamples:
    """The n largest activations of every latent, descending, and a number saying where each came from.

    Attributes:
        acts: (L, n) fp32; 0 where a latent fired less than n times.
        places: (L, n) int64; -1 there.
    """

    def __init__(self, n_latents: int, n: int = 32, device: torch.device | str = "cpu") -> None:
        self.acts = torch.zeros(n_latents, n, dtype=torch.float32, device=device)
        self.places = torch.full((n_latents, n), -1, dtype=torch.int64, device=device)

    def update(self, acts: Tensor, idx: Tensor, places: Tensor) -> None:
        """Takes in a sparse code acts, idx (B, K) of rows that came from `places` (B,) int64.

        Equal activations keep the order they came in.
        """
        fired, n = acts > 0, self.acts.shape[1]
        values, latents = acts[fired].float(), idx[fired].long()
        best, rank = strongest(values, latents, n)
        present, line = latents[best].unique_consecutive(return_inverse=True)
        new_acts = values.new_zeros(len(present), n)
        new_places = torch.full_like(new_acts, -1, dtype=torch.int64)
        new_acts[line, rank] = values[best]
        new_places[line, rank] = places[:, None].expand(acts.shape)[fired][best]
        self._merge(present, new_acts, new_places)

    def _merge(self, latents: Tensor, acts: Tensor, places: Tensor) -> None:
        both = torch.cat([self.acts[latents], acts], 1)
        origin = torch.cat([self.places[latents], places], 1)
        best = both.argsort(dim=1, descending=True, stable=True)[:, : self.acts.shape[1]]
        self.acts[latents], self.places[latents] = both.gather(1, best), origin.gather(1, best)


class PairSums:
    """A table from pairs (latent, token) to how often and with how much activation they met.

    It holds up to max(KEPT_TOKENS · L, _PENDING) pairs. Where there are more, the KEPT_TOKENS tokens with the most
    activation so far stay of every latent. So a token is counted in full unless it had less than 1/KEPT_TOKENS of its
    latent's activation when the table was full: what makes a token a latent's own (choice.OWN_TOKEN) is more.

    Attributes, after `close`, sorted by latent and then token:
        latents, tokens: (pairs,) int64. counts: (pairs,) int64. sums: (pairs,) float64.
        totals: (L,) float64 activation of each latent on all tokens, dropped ones included.
    """

    def __init__(self, n_latents: int, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.totals = torch.zeros(n_latents, dtype=torch.float64, device="cpu")
        empty = torch.zeros(0, dtype=torch.int64, device="cpu")
        # Columns of what is summed already and of what waits for it: keys, counts, sums.
        self._pending = [empty], [empty], [empty.double()]
        self._waiting = 0

    def update(self, acts: Tensor, idx: Tensor, tokens: Tensor) -> None:
        """Takes in a sparse code acts, idx (B, K) of rows whose tokens are (B,) int64."""
        fired = acts > 0
        latents, values = idx[fired].long(), acts[fired].double()
        keys = latents * self.vocabulary + tokens[:, None].expand(acts.shape)[fired]
        self.totals.index_add_(0, latents, values)
        for column, new in zip(self._pending, (keys, torch.ones_like(keys), values), strict=True):
            column.append(new)
        self._waiting += len(keys)
        if self._waiting > _PENDING:
            self._sum()

    def close(self) -> None:
        self._sum()
        (keys,), (self.counts,), (self.sums,) = self._pending
        self.latents, self.tokens = keys // self.vocabulary, keys % self.vocabulary

    def _sum(self) -> None:
        table = self._summed()
        if len(table[0]) > max(KEPT_TOKENS * len(self.totals), _PENDING):
            kept = self._most_active(table[0], table[2])
            table = [column[kept] for column in table]
        for column, new in zip(self._pending, table, strict=True):
            column.append(new)
        self._waiting = 0

    def _summed(self) -> list[Tensor]:
        """Takes all columns, and gives them back with one line a key, ascending."""
        keys, place = torch.unique(_taken(self._pending[0]), return_inverse=True)
        table = [keys]
        for parts in self._pending[1:]:
            values = _taken(parts)
            table.append(values.new_zeros(len(keys)).index_add_(0, place, values))
        return table

    def _most_active(self, keys: Tensor, sums: Tensor) -> Tensor:
        """Where the KEPT_TOKENS largest sums of each latent stand, ascending. Sorts some latents at a time."""
        n_latents = len(self.totals)
        step = max(1, n_latents * _AT_A_TIME // len(keys))
        first = torch.arange(0, n_latents + step, step, dtype=torch.int64, device="cpu") * self.vocabulary
        kept = [
            start + strongest(sums[start:stop], keys[start:stop] // self.vocabulary, KEPT_TOKENS)[0].sort().values
            for start, stop in pairwise(torch.searchsorted(keys, first).tolist())
        ]
        return torch.cat(kept)


def _taken(parts: list[Tensor]) -> Tensor:
    """Parts as one tensor; the list is empty then, so that nothing is held twice."""
    whole = torch.cat(parts)
    parts.clear()
    return whole


@dataclass
class LatentStats:
    """What one pass over rows tells of every latent. pairs and token_counts are None where rows have no tokens."""

    sparsity: Sparsity
    top: TopExamples
    pairs: PairSums | None = None
    token_counts: Tensor | None = None


TokensOf = Callable[[Tensor, Tensor], Tensor]


def code_of(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """The sparse code of x (B, d_in) as the SAE gives it: acts, idx (B, K) on the CPU.

    K may differ from batch to batch. An entry with act 0 is padding, of any id, and not counted in here.
    """
    acts, idx = sae.encode_sparse(x.to(sae.device), mixed=True)
    return acts.cpu(), idx.cpu()


@torch.no_grad()
def collect(
    sae: SAE,
    batches: Iterable[Located],
    n_examples: int | None = None,
    tokens_of: TokensOf | None = None,
    vocabulary: int = 0,
) -> LatentStats:
    """Encodes every batch once.

    Args:
        batches: rows with their sequence and position.
        n_examples: activations kept per latent; None is 16 to 128, fewer for more latents. Their places are
            (seq << 16) + pos.
        tokens_of: from (seq, pos) to token ids, each (B,); None where nothing is known of tokens.
        vocabulary: one more than the largest token id.
    """
    L = sae.config.n_latents
    stats = LatentStats(Sparsity(L), TopExamples(L, n_examples or min(max((1 << 20) // L, 16), 128)))
    if tokens_of is not None:
        stats.pairs = PairSums(L, vocabulary)
        stats.token_counts = torch.zeros(vocabulary, dtype=torch.int64, device="cpu")
    for batch in batches:
        acts, idx = code_of(sae, batch.x)
        stats.sparsity.update(acts, idx)
        if batch.seq is None or batch.pos is None:
            continue
        seq, pos = batch.seq.long(), batch.pos.long()
        stats.top.update(acts, idx, (seq << 16) + pos)
        if tokens_of is not None and stats.pairs is not None and stats.token_counts is not None:
            tokens = tokens_of(seq, pos)
            stats.pairs.update(acts, idx, tokens)
            stats.token_counts += torch.bincount(tokens, minlength=vocabulary)
    if stats.pairs is not None:
        stats.pairs.close()
    return stats
