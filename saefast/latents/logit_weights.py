"""What each latent does to the model's next token: the tokens whose logit its decoder row raises and lowers most.

This is the direct effect alone: the decoder row goes through the final norm's scale and the unembedding as if no layer
stood in between (nostalgebraist 2020, the "logit lens"). It is that for any hook that has the model's width, however
early, and tells most of late layers. The norm divides by the length of what all latents and the rest of the model have
written, which a latent alone does not know: so values are logits up to a positive factor, one for each token that the
model reads, and can be compared within a latent and between latents.
"""

import copy
import inspect
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from saefast import ambient
from saefast.errors import InputError
from saefast.harvest.language_models import CAUSAL, unwrapped
from saefast.latents.products import ROWS, Products, unit_rows
from saefast.latents.steps import Advance, nothing
from saefast.models.sae import SAE

# How large the inputs are that a norm is tried with: what it adds under the root is nothing beside their squares.
_LARGE = 1e4


class Unembedding(NamedTuple):
    """What reads a token off a vector of the model's width.

    weight: (V, d) fp32. what: "logit", the weights of the model's head with the final norm folded in, so that
        weight · x is what x adds to the logits; "embedding", the directions of the tokens' input embeddings, of
        length 1, for models without such a head.
    """

    weight: Tensor
    what: Literal["logit", "embedding"]


class LogitWeights(NamedTuple):
    """Tokens of each latent: raised_ids, lowered_ids (L, n) int64, raised, lowered (L, n) fp32.

    raised descends, lowered ascends; ties go to the lower token.
    """

    raised_ids: Tensor
    raised: Tensor
    lowered_ids: Tensor
    lowered: Tensor


@ambient.plainly(grad=False)
def unembedding(model: Any, d: int, vocabulary: int | None = None) -> Unembedding | str:
    """The unembedding of a transformers model, or a sentence that says why there is none.

    Logits are counted from the average token's, since a softmax ignores what all tokens share. What the final norm does
    is measured, not told by its name: its scale (RMSNorm's weight, Gemma's 1 + weight, LayerNorm's) and whether it
    subtracts the mean. It is found by running the model on a few tokens.

    Args:
        model: a causal language model with its head; of any other that reads tokens, the input embedding is taken.
        d: width of the vectors, an SAE's d_out.
        vocabulary: tokens from here on stand for nothing (a matrix has more rows than the tokenizer tokens).
    """
    model, _ = unwrapped(model)
    model = getattr(model, "_orig_mod", model)
    embedding = _embedding(model)
    if isinstance(embedding, str):
        return embedding
    found = _head(model, embedding.shape[0])
    if found is not None and found.shape[1] == d:
        weight = found[:vocabulary]
        return Unembedding(weight - weight.mean(0), "logit")
    if embedding.shape[1] != d:
        return (
            f"the SAE writes vectors of {d} numbers, and the model's tokens are vectors of {embedding.shape[1]}: what "
            "a latent does to the next token can be told only where it writes into the model's own width"
        )
    return Unembedding(unit_rows(embedding[:vocabulary], "the model's input embedding"), "embedding")


def written(sae: SAE) -> Tensor:
    """(L, d_out): what each latent adds to the reconstruction where its activation is 1; `logit_weights` takes it.

    Decoder rows, of length 1 where activations are measured in their norms; W_dec itself where they are not.
    """
    W_dec = sae.W_dec.detach()
    if not sae.architecture.ranks_by_norm:
        return W_dec
    norms = sae.architecture.norms(W_dec, dict(sae.named_buffers())).sum(1, keepdim=True)
    return W_dec / torch.where(norms > 0, norms, 1)


@ambient.plainly(grad=False)
def logit_weights(rows: Tensor, unembedded: Unembedding, n: int = 10, advance: Advance = nothing) -> LogitWeights:
    """The n tokens that each latent raises most, and the n that it lowers most: exact fp32 products, never (L, V).

    A row of zeros raises and lowers nothing: its values are 0, and its tokens the first n.

    Args:
        rows: (L, d) of any float dtype: what latents write, see `written`.
        unembedded: as `unembedding` gives it. Values are logits for an activation of 1, or cosines.
        n: tokens of each, at most V.
        advance: called with how many latents more are done.

    Raises:
        InputError: rows of another width than the unembedding, values that are not finite, n out of bounds.
    """
    weight, what = unembedded
    if rows.dim() != 2 or rows.shape[1] != weight.shape[1]:
        raise InputError(f"rows has shape {tuple(rows.shape)}: expected (n_latents, {weight.shape[1]})")
    if not 1 <= n <= len(weight):
        raise InputError(f"n is {n}: expected how many tokens, 1 to {len(weight)}")
    units = unit_rows(rows, "rows")
    products, ids, values = Products(weight), [], []
    for start in range(0, len(rows), ROWS):
        x = units[start : start + ROWS].to(weight.device)
        if what == "logit":
            x = x * rows[start : start + ROWS].to(weight.device, torch.float32).norm(dim=1, keepdim=True)
        for sign in (1, -1):
            found, tokens = products.largest(sign * x, n)
            ids.append(tokens.long())
            values.append(sign * found)
        advance(len(x))
    empty_ids, empty = weight.new_zeros(0, n, dtype=torch.int64), weight.new_zeros(0, n)
    raised_ids, lowered_ids = (torch.cat([empty_ids, *ids[side::2]]) for side in (0, 1))
    raised, lowered = (torch.cat([empty, *values[side::2]]) for side in (0, 1))
    # -0 is a zero too.
    return LogitWeights(raised_ids, raised + 0.0, lowered_ids, lowered + 0.0)


def _embedding(model: Any) -> Tensor | str:
    """(V, e) the input embedding, or why there is none."""
    name = type(model).__name__
    reads = getattr(model, "main_input_name", "input_ids")
    if not isinstance(model, nn.Module) or not hasattr(model, "get_input_embeddings"):
        return f"a {name} is no model of transformers, whose unembedding would be known"
    if reads != "input_ids" and "input_ids" not in inspect.signature(model.forward).parameters:
        return f"a {name} reads {reads}, not tokens"
    made: Any = model
    try:
        layer = made.get_input_embeddings()
    except NotImplementedError:
        layer = None
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return f"the input embedding of a {name} is no matrix of numbers"
    return weight.detach()


def _head(model: Any, n_tokens: int) -> Tensor | None:
    """(V, d) fp32, the head's weight with the final norm folded in; None where the model has no such head."""
    if not any(kind.__name__.endswith(CAUSAL) for kind in type(model).__mro__):
        return None
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    read, norm = _into_head(model, head, min(4, n_tokens))
    if not read:
        return None
    weight = weight.detach().float()
    if norm is None:
        return weight
    scale, centres = _norm_of(norm, weight.shape[1], weight.device)
    weight = weight * scale
    # The mean of x is gone before the head reads it: what a row makes of a constant vector does not count.
    return weight - weight.mean(1, keepdim=True) if centres else weight


def _into_head(model: Any, head: nn.Module, n: int) -> tuple[bool, nn.Module | None]:
    """Whether the head reads what the model's layers leave, with nothing but a norm in between; and that norm."""
    taken: list[Tensor] = []
    left: list[Tensor] = []
    given: list[tuple[nn.Module, Tensor]] = []
    norms = [m for m in model.modules() if "norm" in type(m).__name__.lower() and not list(m.children())]
    handles = [m.register_forward_hook(lambda module, _, made: given.append((module, made))) for m in norms]
    # The model proper; some call its decoder alone.
    parts = {model.base_model, model.get_decoder()} - {None, model}
    handles += [part.register_forward_hook(lambda module, _, made: left.append(made[0])) for part in parts]
    handles.append(head.register_forward_pre_hook(lambda module, args: taken.append(args[0])))
    try:
        model(torch.arange(n, dtype=torch.int64, device=model.get_input_embeddings().weight.device)[None])
    finally:
        for handle in handles:
            handle.remove()
    if not taken or not any(_same(made, taken[0]) for made in left):
        return False, None
    return True, next((module for module, made in reversed(given) if _same(made, taken[0])), None)


def _same(found: Any, taken: Tensor) -> bool:
    return isinstance(found, Tensor) and found.shape == taken.shape and torch.equal(found, taken)


def _norm_of(norm: nn.Module, d: int, device: torch.device) -> tuple[Tensor, bool]:
    """(d,) fp32, what a norm multiplies its columns by, and whether it subtracts the mean first."""
    # Without hooks, which are there for other passes than this one, and in fp32.
    plain: Any = copy.deepcopy(norm).float()
    place = next(plain.parameters(), torch.empty(0, dtype=torch.float32, device=device)).device

    def odd_part(x: Tensor) -> Tensor:
        """The norm without what it adds."""
        made: Tensor = plain.forward(torch.stack([x, -x]).to(place))
        return ((made[0] - made[1]) / 2).to(device)

    signs = torch.ones(d, dtype=torch.float32, device=device)
    centres = bool(odd_part(_LARGE * signs).abs().max() < 1e-2)
    signs[1::2] = -1
    x = signs - signs.mean() if centres else signs
    return odd_part(_LARGE * signs) / (x / x.square().mean().sqrt()), centres
