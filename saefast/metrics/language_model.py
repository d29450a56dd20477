"""What a language model loses when an SAE's reconstruction takes the place of its activations.

Cross-entropy of the next token, in nats, with the activations as they are ("clean"), with x̂ in place of x ("sae") and
with zeros in place of x ("zero"); what a transcoder makes of x stands in place of its target. Special tokens
(beginning, end, padding ...) keep their own activations, because SAEs are not trained on them, and stay out of the
averages, both as the token read and as the token predicted.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saefast.errors import InputError
from saefast.forward import check_ids, eval_mode
from saefast.metrics.streaming import Metric
from saefast.places import Place, Taken, by_token, replaced, visited

LM_METRICS: dict[str, Metric] = {
    "ce_clean": Metric("cross-entropy of the untouched model, nats per token", "special tokens masked"),
    "ce_sae": Metric("the same with x̂ in place of x", "special tokens masked"),
    "ce_zero": Metric("the same with 0 in place of x", "special tokens masked"),
    "delta_loss": Metric("CE(sae) − CE(clean)", "Gemma Scope, arXiv 2408.05147, delta LM loss"),
    "loss_recovered": Metric(
        "(CE(zero) − CE(sae)) / (CE(zero) − CE(clean)), where CE(zero) > CE(clean)",
        "SAELens ce_loss_score, dictionary_learning frac_recovered, SAEBench",
    ),
    "kl_sae": Metric("mean KL(clean ‖ sae) of next-token distributions", "SAELens"),
    "kl_zero": Metric("mean KL(clean ‖ zero)", "SAELens"),
    "kl_score": Metric("(KL(zero) − KL(sae)) / KL(zero)", "SAELens kl_div_score"),
    "lm_tokens": Metric("tokens predicted", "special tokens masked"),
}


class TokenBatch(NamedTuple):
    """Sequences padded to one length: ids (B, T) int64, mask (B, T) bool, True where a token stands. rows (B, T) bool:
    where tokens are whose activations are replaced; None is all."""

    ids: Tensor
    mask: Tensor
    rows: Tensor | None = None


def batch_sequences(sequences: Iterable[Tensor], batch_size: int, pad_id: int = 0) -> Iterator[TokenBatch]:
    """1-D id tensors, `batch_size` at a time, padded on the right."""
    waiting: list[Tensor] = []
    for sequence in sequences:
        waiting.append(sequence.long())
        if len(waiting) == batch_size:
            yield _pad(waiting, pad_id)
            waiting = []
    if waiting:
        yield _pad(waiting, pad_id)


def _pad(sequences: list[Tensor], pad_id: int) -> TokenBatch:
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(s) for s in sequences], dtype=torch.int64, device="cpu")
    return TokenBatch(ids, torch.arange(ids.shape[1], device="cpu") < lengths[:, None])


@contextlib.contextmanager
def spliced(
    model: nn.Module,
    place: Place,
    replace: Callable[[Tensor], Tensor],
    where: Tensor,
    calls: Mapping[Place, int] | None = None,
) -> Iterator[None]:
    """While open, for one forward pass: the activations x (B, T, D) at a place are replace(x[where]) at the positions
    `where` (B, T) bool, and themselves elsewhere.

    calls: how often the module runs in such a pass; see saefast.places.replaced.

    Raises:
        InputError: the module gives something else, or the place's turn did not come.
    """

    def splice(x: Tensor) -> Tensor:
        out = x.clone()
        out[where] = replace(x[where]).to(x.dtype)
        return out

    with replaced(model, {place: splice}, calls, by_token(len(where), (where.shape[1],))):
        yield


def lm_scores(
    model: nn.Module,
    places: Sequence[Place],
    reconstruct: Callable[[Tensor], Tensor],
    batches: Iterable[TokenBatch],
    special_ids: Iterable[int] = (),
    replaces: Callable[[Tensor, Tensor], Tensor] | None = None,
    inputs: Sequence[Place] | None = None,
) -> dict[str, float]:
    """Clean, spliced and zero-ablated loss of a causal language model, named as in LM_METRICS.

    The model is in eval mode meanwhile.

    Args:
        model: called as model(input_ids=, attention_mask=) and returning `.logits` (B, T, V).
        places: whose activations are replaced, as `find_hook(model, name).places` has them. Those of several are x side
            by side, as the untouched model has them, and each is replaced by its own part of x̂.
        reconstruct: x (n, D) -> what takes the places' activations y (n, D_out), which are x itself without `inputs`.
        batches: the text.
        special_ids: token ids kept out of the replacement and of the averages, as are those outside a batch's rows.
        replaces: x, y -> (n,) bool, which of these rows are replaced, by x̂ and by zeros alike; None is all.
        inputs: of a transcoder, the places that x is taken from, as the untouched model has them.

    Raises:
        InputError: an encoder-decoder model; ids beyond the model's embedding; a place whose turn does not come, or of
            a module that runs several times and no turn is named; no batch holds two ordinary tokens in a row.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(
            f"{type(model).__name__} is an encoder with a decoder: it predicts one text from another, "
            "so there is no next-token loss of a text alone"
        )
    sums = torch.zeros(5, dtype=torch.float64, device="cpu")
    n_tokens = 0
    device = next(model.parameters()).device
    special = torch.tensor(sorted(special_ids), dtype=torch.int64, device="cpu")
    with eval_mode(model):
        for batch in batches:
            ordinary = batch.mask & ~torch.isin(batch.ids, special)
            if batch.rows is not None:
                ordinary &= batch.rows
            keep = (ordinary[:, :-1] & ordinary[:, 1:]).to(device)
            if not keep.any():
                continue
            check_ids(model, batch.ids)
            on_device = TokenBatch(batch.ids.to(device), batch.mask.to(device))
            seen = on_device, ordinary.to(device), keep
            sums += _batch_sums(model, places, inputs or places, reconstruct, replaces, *seen)
            n_tokens += int(keep.sum())
    if n_tokens == 0:
        raise InputError("no text to score: no sequence holds two ordinary tokens in a row")
    return _scores((sums / n_tokens).tolist()) | {"lm_tokens": n_tokens}


@torch.no_grad()
def _batch_sums(
    model: nn.Module,
    places: Sequence[Place],
    inputs: Sequence[Place],
    reconstruct: Callable[[Tensor], Tensor],
    replaces: Callable[[Tensor, Tensor], Tensor] | None,
    batch: TokenBatch,
    where: Tensor,
    keep: Tensor,
) -> Tensor:
    """Sums over kept positions of CE clean, sae, zero and KL(clean ‖ sae), KL(clean ‖ zero). -> (5,) float64."""
    targets = batch.ids[:, 1:][keep]

    def log_probs() -> Tensor:
        logits = model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
        return logits[:, :-1][keep].float().log_softmax(-1)

    def cross_entropy(log_p: Tensor) -> Tensor:
        return -log_p.gather(1, targets[:, None]).sum(dtype=torch.float64)

    every = dict.fromkeys([*places, *inputs])
    taken = Taken(every, by_token(len(where), (where.shape[1],)))
    with visited(model, every, taken.take):
        clean = log_probs()
    parts = [taken.value(place)[where] for place in places]
    x, y = torch.cat([taken.value(place)[where] for place in inputs], -1), torch.cat(parts, -1)
    entropies, divergences = [cross_entropy(clean)], []
    for other in (reconstruct(x).to(y.dtype), torch.zeros_like(y)):
        if replaces is not None:
            other = torch.where(replaces(x, y)[:, None], other, y)
        others = other.split([part.shape[-1] for part in parts], -1)
        with contextlib.ExitStack() as stack:
            for place, part in zip(places, others, strict=True):
                stack.enter_context(spliced(model, place, _always(part), where, taken.calls))
            log_p = log_probs()
        entropies.append(cross_entropy(log_p))
        divergences.append((clean.exp() * (clean - log_p)).sum(dtype=torch.float64))
    return torch.stack([*entropies, *divergences]).cpu()


def _always(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _x: value


def _scores(means: list[float]) -> dict[str, float]:
    clean, sae, zero, kl_sae, kl_zero = means
    return {
        "ce_clean": clean,
        "ce_sae": sae,
        "ce_zero": zero,
        "delta_loss": sae - clean,
        "loss_recovered": (zero - sae) / (zero - clean) if zero > clean else float("nan"),
        "kl_sae": kl_sae,
        "kl_zero": kl_zero,
        "kl_score": (kl_zero - kl_sae) / kl_zero if kl_zero else float("nan"),
    }


def why_missing(scores: dict[str, float]) -> dict[str, str]:
    """For each of lm_scores' figures that does not exist (NaN), why."""
    reasons = {
        "loss_recovered": "zero-ablation hurts nothing, ce_zero is not above ce_clean: there is no loss to recover",
        "kl_score": "zero-ablation changes nothing, kl_zero is 0",
    }
    return {name: reasons.get(name, "not a number") for name, value in scores.items() if math.isnan(value)}
