"""Around a model's forward pass: eval mode, and token ids that its embedding has."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from saefast.errors import InputError


class _Held(NamedTuple):
    """A model in eval mode: by how many blocks, and in which mode each of its modules was before."""

    blocks: int
    before: list[tuple[nn.Module, bool]]


_lock = threading.Lock()
_held: dict[int, _Held] = {}


@contextlib.contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Puts a model in eval mode, so that dropout and the like are off; afterwards each of its modules is as it was.

    Of several such blocks at a time the last one to end gives the modes back: two harvests of one model do not switch
    dropout on for one another. What is no torch module is left alone.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    with _lock:
        held = _held.get(id(model)) or _Held(0, [(module, module.training) for module in model.modules()])
        _held[id(model)] = held._replace(blocks=held.blocks + 1)
        if any(module.training for module in model.modules()):
            model.eval()
    try:
        yield
    finally:
        with _lock:
            held = _held.pop(id(model))
            if held.blocks > 1:
                _held[id(model)] = held._replace(blocks=held.blocks - 1)
            else:
                _give_back(held.before)


def _give_back(before: list[tuple[nn.Module, bool]]) -> None:
    # A module's train() sets those inside it too: they come later in the list, and are set to their own after it.
    for module, training in before:
        if module.training != training:
            module.train(training)


def vocabulary_size(model: Any) -> int | None:
    """How many token ids a model has embeddings of, None where it does not say."""
    try:
        embeddings = model.get_input_embeddings()
    # A model of another kind may have no such method, or raise whatever it likes.
    except Exception:
        embeddings = getattr(model, "embed", None)
    size = getattr(embeddings, "num_embeddings", None) or getattr(getattr(model, "cfg", None), "d_vocab", None)
    return size if isinstance(size, int) and size > 0 else None


def check_ids(model: Any, ids: Tensor) -> None:
    """Raises InputError where token ids (batch, length) go beyond the model's embedding, as far as it says its size."""
    size = vocabulary_size(model)
    largest = int(ids.max()) if ids.numel() else 0
    if size is not None and largest >= size:
        raise InputError(
            f"token id {largest} is given to a {type(model).__name__} whose vocabulary ends at {size - 1}: "
            "take the tokenizer that belongs to the model (padding, too, needs an id that the model has)"
        )
