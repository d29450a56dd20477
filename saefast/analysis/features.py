"""What each latent responds to: its strongest activations, and the tokens it fires on, in one pass over the code.

Works on the sparse code (B, K) of one batch at a time and keeps n examples per latent, (L, n) in all: never (rows, L),
and every row is encoded once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from saefast.data.mapped_source import Located
from saefast.metrics.streaming import Sparsity
from saefast.models.sae import SAE
from saefast.ops import mixed

# Pairs waiting to be summed before they are sorted into the table: about 100 MB while that happens.
_PENDING = 1 << 22


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
        fired = acts > 0
        values, latents = acts[fired].float(), idx[fired].long()
        origin = places[:, None].expand(acts.shape)[fired]
        order = values.argsort(descending=True, stable=True)
        order = order[latents[order].argsort(stable=True)]
        values, latents, origin = values[order], latents[order], origin[order]
        present, counts = torch.unique_consecutive(latents, return_counts=True)
        rank = torch.arange(len(latents), device=latents.device)
        rank -= (counts.cumsum(0) - counts).repeat_interleave(counts)
        group = torch.arange(len(present), device=latents.device).repeat_interleave(counts)
        n = self.acts.shape[1]
        kept = rank < n
        new_acts = values.new_zeros(len(present), n)
        new_places = torch.full_like(new_acts, -1, dtype=torch.int64)
        new_acts[group[kept], rank[kept]] = values[kept]
        new_places[group[kept], rank[kept]] = origin[kept]
        self._merge(present, new_acts, new_places)

    def _merge(self, latents: Tensor, acts: Tensor, places: Tensor) -> None:
        both = torch.cat([self.acts[latents], acts], 1)
        origin = torch.cat([self.places[latents], places], 1)
        best = both.argsort(dim=1, descending=True, stable=True)[:, : self.acts.shape[1]]
        self.acts[latents], self.places[latents] = both.gather(1, best), origin.gather(1, best)


class PairSums:
    """A table from pairs (latent, token) to how often and with how much activation they met.

    Attributes, after `close`, sorted by latent and then token:
        latents, tokens: (pairs,) int64. counts: (pairs,) int64. sums: (pairs,) float64.
    """

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self._waiting = 0

    def update(self, acts: Tensor, idx: Tensor, tokens: Tensor) -> None:
        """Takes in a sparse code acts, idx (B, K) of rows whose tokens are (B,) int64."""
        fired = acts > 0
        keys = (idx.long() * self.vocabulary + tokens[:, None])[fired]
        self._pending.append((keys, torch.ones_like(keys), acts[fired].double()))
        self._waiting += len(keys)
        if self._waiting > _PENDING:
            self._sum()

    def close(self) -> None:
        self._sum()
        keys, self.counts, self.sums = self._pending[0]
        self.latents, self.tokens = keys // self.vocabulary, keys % self.vocabulary

    def _sum(self) -> None:
        empty = torch.zeros(0, dtype=torch.int64, device="cpu")
        parts = self._pending or [(empty, empty, empty.double())]
        keys, counts, sums = (torch.cat(column) for column in zip(*parts, strict=True))
        unique, place = torch.unique(keys, return_inverse=True)
        counts = counts.new_zeros(len(unique)).index_add_(0, place, counts)
        sums = sums.new_zeros(len(unique)).index_add_(0, place, sums)
        self._pending, self._waiting = [(unique, counts, sums)], 0


@dataclass
class LatentStats:
    """What one pass over rows tells of every latent. tokens and token_counts are None where rows have no tokens."""

    sparsity: Sparsity
    top: TopExamples
    pairs: PairSums | None = None
    token_counts: Tensor | None = None


TokensOf = Callable[[Tensor, Tensor], Tensor]


def quick_encoder(sae: SAE) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """`sae.encode_sparse` for x (B, d_in), by way of a bf16 copy of W_enc where that is faster (saefast.ops.mixed)."""
    if sae.config.rescale_acts_by_decoder_norm or not mixed.pays_off(sae.W_enc):
        return sae.encode_sparse
    W_low = sae.W_enc.to(torch.bfloat16)
    centre = sae.b_dec if sae.config.apply_b_dec_to_input else torch.zeros_like(sae.b_dec)
    return lambda x: mixed.encode_topk_mixed(x.to(sae.dtype) - centre, W_low, sae.W_enc, sae.b_enc, sae.config.k)


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
        stats.pairs, stats.token_counts = PairSums(vocabulary), torch.zeros(vocabulary, dtype=torch.int64, device="cpu")
    encode = quick_encoder(sae)
    for batch in batches:
        acts, idx = (t.cpu() for t in encode(batch.x.to(sae.device)))
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
