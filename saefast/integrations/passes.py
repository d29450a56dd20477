"""Forward passes of a model: which tokens each reads, and where these stand in their sequences.

A module sees activations alone. What they are of is in the arguments of the model's own forward pass: token ids, the
attention mask and the cache of keys and values, with which `generate` reads a prompt first and then one token at a
time. Padding, on whichever side, is no token, and counts in no position.
"""

import contextlib
import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saefast.errors import InputError

# Which tokens something is done at; see `Chosen`.
Positions = Literal["all", "prompt", "generated"] | slice | int | Sequence[int] | Tensor

_IDS = ("input_ids", "input", "tokens")
_CACHES = ("past_key_values", "past_kv_cache")


@dataclass(frozen=True)
class Pass:
    """One forward pass over (batch, length) tokens.

    ids: (batch, length), or None where the model was given something else. mask: what it was given as its
    attention_mask. past: tokens, padding included, that its cache holds already. begun: the pass that began the
    sequences, None where that is this one, or was not seen. first_seq: the number of the first sequence.
    """

    batch: int
    length: int
    ids: Tensor | None = None
    mask: Any = None
    past: int = 0
    begun: "Pass | None" = None
    first_seq: int = 0

    def positions(self, device: torch.device) -> Tensor:
        """(batch, length) int64: how many tokens of the sequence come before each; -1 in padding.

        Raises InputError for a mask from which that cannot be told.
        """
        if self.mask is None:
            return (self.past + torch.arange(self.length, device=device)).expand(self.batch, -1)
        if not isinstance(self.mask, Tensor) or self.mask.dim() != 2 or self.mask.shape[1] < self.length:
            seen = tuple(self.mask.shape) if isinstance(self.mask, Tensor) else type(self.mask).__name__
            raise InputError(
                f"attention_mask is {seen}: which tokens are padding is told by one of shape (batch, tokens), 1 where "
                "a token stands"
            )
        mask = self.mask.to(device) != 0
        # A mask of the new tokens alone says nothing of the ones before: they count as tokens.
        before = 0 if mask.shape[1] > self.length else self.past
        return torch.where(mask, before + mask.long().cumsum(1) - 1, -1)[:, -self.length :]

    def prompt(self, device: torch.device) -> Tensor:
        """(batch, 1) int64: tokens of each sequence that were there before any was generated.

        Raises InputError where the pass that read them was not seen.
        """
        begun = self if self.past == 0 else self.begun
        if begun is None or begun.batch != self.batch:
            raise InputError(
                "positions are counted from the prompt's end, which the model read before: call it within the block"
            )
        return begun.positions(device).amax(1, keepdim=True) + 1


class Passes:
    """The passes of a model while `attached` is open. current: the one under way or the last; None before the first,
    and where a pass does not say what it reads. number: how many there were.

    `model(...)` says it by its arguments. TransformerLens' models call their own `forward`, past torch's hooks on the
    model as a whole, so that theirs is wrapped. Where a part of a model is called alone, it is what the embedding is
    given.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._signature = inspect.signature(model.forward)
        # What a signature takes as **kwargs comes as one argument of that name.
        parameters = self._signature.parameters.values()
        self._rest = next((p.name for p in parameters if p.kind == p.VAR_KEYWORD), "")
        self.two_stacks = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self.number = 0
        self.current: Pass | None = None
        # Whether the model's own forward pass is under way.
        self._inside = False
        # Whether a module that is called now belongs to a pass that was seen to begin.
        self.counted = False
        self._next_seq = 0

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        embedding = _embedding(self._model)
        with contextlib.ExitStack() as stack:
            handles = []
            if hasattr(self._model, "run_with_hooks"):
                stack.enter_context(self._wrapped())
            else:
                handles = [
                    self._model.register_forward_pre_hook(self._enter, with_kwargs=True),
                    self._model.register_forward_hook(self._leave, always_call=True),
                ]
            if embedding is not None and embedding is not self._model:
                handles.append(embedding.register_forward_pre_hook(self._embed))
            for handle in handles:
                stack.callback(handle.remove)
            yield

    @contextlib.contextmanager
    def _wrapped(self) -> Iterator[None]:
        """The model with a forward of its own for as long."""
        model, before, plain = self._model, vars(self._model).get("forward"), self._model.forward

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._enter(model, args, kwargs)
            try:
                return plain(*args, **kwargs)
            finally:
                self._leave(model, args, None)

        model.forward = forward
        try:
            yield
        finally:
            if before is None:
                del model.forward
            else:
                model.forward = before

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside = True
        try:
            given = self._signature.bind_partial(*args, **kwargs).arguments
        except TypeError:  # the model itself will say what is wrong
            given = {}
        self._begin({**given.pop(self._rest, {}), **given})

    def _leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._inside = self.counted = False

    def _embed(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self._inside and not in_backward() and args:
            self._begin({"input_ids": args[0]})

    def _begin(self, given: Mapping[str, Any]) -> None:
        self.number += 1
        self.counted = True
        shape, ids = _shape(given)
        if shape is None or self.two_stacks:
            self.current = None
            return
        past = _past_length(given)
        goes_on = past > 0 and self.current is not None
        first = self.current.first_seq if goes_on and self.current is not None else self._next_seq
        begun = (self.current.begun or self.current) if goes_on and self.current is not None else None
        self.current = Pass(*shape, ids, given.get("attention_mask"), past, begun, first)
        if not goes_on:
            self._next_seq += shape[0]


def _embedding(model: nn.Module) -> nn.Module | None:
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    # Models of another kind have no such method, or raise whatever they like.
    except Exception:
        found = getattr(model, "embed", None)
    return found if isinstance(found, nn.Module) else None


def _shape(given: Mapping[str, Any]) -> tuple[tuple[int, int] | None, Tensor | None]:
    """(batch, length) of what a pass is given, and its token ids."""
    for name in _IDS:
        ids = given.get(name)
        if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.dim() in (1, 2):
            ids = ids if ids.dim() == 2 else ids[None]
            return (ids.shape[0], ids.shape[1]), ids
    # TransformerLens' HookedTransformer.generate gives embeddings as its input.
    for name in ("inputs_embeds", "input"):
        embeds = given.get(name)
        if isinstance(embeds, Tensor) and embeds.dim() == 3:
            return (embeds.shape[0], embeds.shape[1]), None
    return None, None


def _past_length(given: Mapping[str, Any]) -> int:
    """Tokens that the cache of a pass holds."""
    at = given.get("cache_position")
    if isinstance(at, Tensor) and at.numel():
        return int(at.flatten()[0])
    cache = next((given[name] for name in _CACHES if given.get(name) is not None), None)
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    first: Any = next(iter(cache), None)
    # TransformerLens' entries have (batch, position, heads, d), old ones of transformers (batch, heads, position, d).
    if hasattr(first, "past_keys"):
        return int(first.past_keys.shape[1])
    return int(first[0].shape[-2]) if first is not None else 0


def in_backward() -> bool:
    """Whether this thread is in a backward pass: modules then run again where activations were not kept."""
    return bool(torch._C._current_graph_task_id() != -1)


@dataclass(frozen=True)
class Chosen:
    """Which tokens of a pass something is done at.

    Args:
        positions: "all"; "prompt" and "generated", the tokens that `generate` was given and those that it then read
            back; a position, or several, or a slice of them, counted from a sequence's first token (padding is none),
            negative ones from the prompt's end, so that slice(-1, None) is its last token and all that follow; or a
            bool tensor (batch, length), for passes of that shape.
        skip_ids: ids of tokens that are left out, such as the tokenizer's all_special_ids.

    Raises:
        InputError: positions or skip_ids are anything else.
    """

    positions: Any = "all"
    skip_ids: Iterable[int] = ()
    _skip: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        if not _is_positions(self.positions):
            raise InputError(
                f"positions is {str(self.positions)[:60]!r}: expected 'all', 'prompt', 'generated', a position, "
                "several of them, a slice without a step, or a bool tensor (batch, length)"
            )
        skip = self.skip_ids.flatten().tolist() if isinstance(self.skip_ids, Tensor) else self.skip_ids
        found = [skip] if isinstance(skip, str) else list(skip)
        if not all(_is_int(one) for one in found):
            raise InputError(f"skip_ids is {str(found)[:60]}: expected ids of tokens, whole numbers")
        object.__setattr__(self, "_skip", tuple(int(one) for one in found))

    @property
    def everything(self) -> bool:
        return isinstance(self.positions, str) and self.positions == "all" and not self._skip

    def where(self, of: Pass, device: torch.device) -> Tensor:
        """(batch, length) bool: the chosen tokens; never padding.

        Raises InputError where the pass does not say what is asked for.
        """
        at = of.positions(device)
        found = (at >= 0) & self._asked(of, at)
        if not self._skip:
            return found
        if of.ids is None:
            raise InputError("skip_ids are given, and the model reads no token ids: leave skip_ids out")
        return found & ~torch.isin(of.ids.to(device), torch.tensor(self._skip, dtype=torch.int64, device=device))

    def _asked(self, of: Pass, at: Tensor) -> Tensor:
        asked = self.positions
        if isinstance(asked, Tensor) and asked.dtype == torch.bool:
            if asked.shape != at.shape:
                raise InputError(
                    f"positions has shape {tuple(asked.shape)}, the model reads {tuple(at.shape)} tokens: expected one "
                    "shape; for generate, give positions by their numbers"
                )
            return asked.to(at.device)
        match asked:
            case "all":
                return torch.ones_like(at, dtype=torch.bool)
            case "prompt":
                return at < of.prompt(at.device)
            case "generated":
                return at >= of.prompt(at.device)
            case slice():
                start = self._from(of, at, asked.start or 0)
                return at >= start if asked.stop is None else (at >= start) & (at < self._from(of, at, asked.stop))
        several = [asked] if _is_int(asked) else [int(one) for one in asked]
        found = torch.zeros_like(at, dtype=torch.bool)
        for one in several:
            found |= at == self._from(of, at, one)
        return found

    @staticmethod
    def _from(of: Pass, at: Tensor, position: int) -> Tensor | int:
        """A position; a negative one, beyond the prompt's beginning, is none."""
        position = max(min(int(position), 2**31), -(2**31))
        if position >= 0:
            return position
        found = of.prompt(at.device) + position
        return torch.where(found >= 0, found, -2)


def _is_int(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool | Tensor)


def _is_positions(given: Any) -> bool:
    if isinstance(given, str):
        return given in ("all", "prompt", "generated")
    if isinstance(given, slice):
        return given.step is None and all(one is None or _is_int(one) for one in (given.start, given.stop))
    if isinstance(given, Tensor):
        return given.dtype == torch.bool and given.dim() == 2
    return _is_int(given) or (isinstance(given, Sequence) and all(map(_is_int, given)))
