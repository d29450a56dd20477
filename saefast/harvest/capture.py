"""Running a model only as far as its last hook, and taking what stands there."""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from saefast.errors import InputError
from saefast.forward import check_ids, eval_mode
from saefast.harvest.decoders import decoder_of
from saefast.harvest.hooks import Hook, expand_hooks, expand_names, known_place
from saefast.harvest.workers import workers_for
from saefast.places import Place, Shape, Taken, activations, by_token, visited

# Tokens that are run to the model's end before the first batch.
_FEW = 64


class Runner(Protocol):
    """A model ready to be harvested.

    equal_lengths: it must be given sequences of one length at a time. workers: threads that may call run at a time.
    """

    hooks: list[dict[str, str]]
    equal_lengths: bool
    workers: int

    def attached(self) -> contextlib.AbstractContextManager[object]:
        """Within it, run may be called."""
        ...

    def run(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Activations (batch, length, d) per hook for token ids and mask (batch, length)."""
        ...


def runner_for(model: Any, hooks: Sequence[str]) -> Runner:
    """A Runner for a Hugging Face module or for anything with run_with_hooks. Raises InputError for neither."""
    if not hooks:
        raise InputError("hooks is empty: name at least one module, for example layers.4")
    if len(set(hooks)) < len(hooks):
        raise InputError(f"hooks {', '.join(hooks)}: one is named twice")
    if hasattr(model, "run_with_hooks"):
        return HookedRunner(model, hooks)
    if isinstance(model, nn.Module):
        return ModuleRunner(model, hooks)
    raise InputError(f"model is a {type(model).__name__}, expected a Hugging Face model or one with run_with_hooks")


class _PlacesRunner:
    """What runners of both kinds of model share: which values of a pass are a hook's, and when a pass may be stopped.

    Before the first batch a few of its tokens run through the whole model, which shows how often each module runs: a
    pass that is stopped at the last hook would not tell. Later passes stop there.
    """

    def __init__(self, model: Any, hooks: Sequence[Hook]) -> None:
        self._model, self._hooks = model, hooks
        self.hooks = [{"name": hook.name, "hf_name": hook.path} for hook in hooks]
        self._places = tuple(dict.fromkeys(place for hook in hooks for place in hook.places))
        self._counting, self._counted = threading.Lock(), False

    def _count(self, run: Callable[[], Taken]) -> None:
        """Once: sees by a whole pass that each place's turn comes, and that it is clear which turn is meant."""
        with self._counting:
            if not self._counted:
                taken = run()
                for place in self._places:
                    taken.check(place)
                self._counted = True

    def _rows(self, taken: Taken, own: Callable[[Tensor], Tensor] = lambda value: value) -> dict[str, Tensor]:
        """Per hook the values of its places, own(value) of each, side by side (batch, length, d)."""
        rows = {}
        for hook in self._hooks:
            parts = [own(taken.value(place)) for place in hook.places]
            if len({part.shape[:2] for part in parts}) > 1:
                shapes = ", ".join(str(tuple(part.shape)) for part in parts)
                raise InputError(f"hook {hook.name!r} joins activations of shapes {shapes}: expected the same tokens")
            rows[hook.name] = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return rows


class ModuleRunner(_PlacesRunner):
    """Forward hooks on the modules of a torch model; the last place to have its turn ends the forward pass.

    While attached, the model is in eval mode.
    """

    equal_lengths = False

    def __init__(self, model: nn.Module, hooks: Sequence[str]) -> None:
        super().__init__(model, expand_hooks(model, hooks))
        takes = inspect.signature(model.forward).parameters
        # Keys and values for generating more text are of no use here.
        self._extra = {"use_cache": False} if "use_cache" in takes else {}
        self._decoder = decoder_of(model, self._places)
        # Places that have (length, batch, d), as the first pass shows.
        self._turned: set[str] = set()
        self.workers = workers_for(self._device())
        # What this thread's forward pass takes; on threads that are not in run(), hooks do nothing.
        self._running = threading.local()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        with eval_mode(self._model), visited(self._model, self._places, self._visit):
            yield

    def run(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        check_ids(self._model, ids)
        few = ids[:1, :_FEW], mask[:1, :_FEW]
        with _explained(self._model, ids):
            self._count(lambda: self._pass(self._inputs(*few), self._by_token(*few[0].shape), stops=False))
            taken = self._pass(self._inputs(ids, mask), self._by_token(*ids.shape), stops=True)
        decoder, length = self._decoder, ids.shape[1]
        return self._rows(taken, lambda value: decoder.of_tokens(value, length) if decoder else value)

    def _by_token(self, batch: int, length: int) -> Shape:
        # A decoder has one position more.
        return by_token(batch, (length, length + 1) if self._decoder else (length,), self._turned)

    def run_inputs(self, inputs: Mapping[str, Tensor], shaped: Shape = activations) -> dict[str, Tensor]:
        """Activations per hook for arguments of the model's forward by name, moved to its device.

        shaped: makes activations (batch, length, d) of what a hooked module gives; see `activations`. Errors of the
        model are raised as they are. What comes after the hooks may need other inputs, as a decoder does.
        """
        self._count(lambda: self._pass(inputs, shaped, stops=False, may_fail=True))
        return self._rows(self._pass(inputs, shaped, stops=True))

    def _pass(self, inputs: Mapping[str, Tensor], shaped: Shape, stops: bool, may_fail: bool = False) -> Taken:
        """may_fail: an error after all places had their turn is none."""
        taken, device = Taken(self._places, shaped), self._device()
        self._running.taken, self._running.stops = taken, stops
        try:
            with torch.inference_mode(), contextlib.suppress(_Stop):
                self._model(**{name: value.to(device) for name, value in inputs.items()}, **self._extra)
        except Exception:
            if not (may_fail and taken.complete()):
                raise
        finally:
            self._running.taken = None
        return taken

    def _visit(self, place: Place, given: Any) -> None:
        taken: Taken | None = getattr(self._running, "taken", None)
        if taken is not None:
            taken.take(place, given)
            if self._running.stops and taken.complete():
                raise _Stop

    def _inputs(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        # Attention is fastest without a mask. Masks are numbers, as tokenizers give them: some models subtract them.
        inputs = {"input_ids": ids} if bool(mask.all()) else {"input_ids": ids, "attention_mask": mask.long()}
        return inputs | self._decoder.inputs(ids, mask) if self._decoder else inputs

    def _device(self) -> torch.device:
        parameter = next(self._model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device


class HookedRunner(_PlacesRunner):
    """TransformerLens' way: run_with_hooks(tokens, fwd_hooks=[(name, f(activation, hook))])."""

    # Sequences of one length need no padding, and so no agreement about masks.
    equal_lengths = True
    # run_with_hooks changes the model while it runs.
    workers = 1

    def __init__(self, model: Any, hooks: Sequence[str]) -> None:
        super().__init__(model, lens_hooks(model, hooks))
        parameters = inspect.signature(model.run_with_hooks).parameters.values()
        takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
        # Asks TransformerLens not to compute logits, should no hook end the pass.
        self._extra = {"return_type": None} if takes_any or "return_type" in {p.name for p in parameters} else {}

    def attached(self) -> contextlib.AbstractContextManager[object]:
        return eval_mode(self._model)

    def run(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        check_ids(self._model, ids)
        with _explained(self._model, ids):
            self._count(lambda: self._pass(ids[:1, :_FEW], stops=False))
            taken = self._pass(ids, stops=True)
        return self._rows(taken)

    def _pass(self, ids: Tensor, stops: bool) -> Taken:
        taken = Taken(self._places)

        def listener(place: Place) -> Callable[..., None]:
            def take(activation: Any, hook: Any = None) -> None:
                taken.take(place, activation)
                if stops and taken.complete():
                    raise _Stop

            return take

        fwd_hooks = [(place.path, listener(place)) for place in self._places]
        with torch.inference_mode(), contextlib.suppress(_Stop):
            self._model.run_with_hooks(ids, fwd_hooks=fwd_hooks, **self._extra)
        return taken


def lens_hooks(model: Any, names: Sequence[str]) -> list[Hook]:
    """What hook names mean in a model with hook points of its own (TransformerLens'); patterns are those they match.

    Raises InputError for a name that it has not.
    """
    known = getattr(model, "hook_dict", None)
    names, every = (names, []) if known is None else (expand_names(list(known), names), list(known))
    hooks = [Hook(name, tuple(known_place(every, p) for p in name.split("+"))) for name in names]
    for place in (place for hook in hooks for place in hook.places):
        name = place.path
        if known is not None and name not in known:
            near = [key for key in known if key.split(".")[-1] == name.split(".")[-1]] or list(known)
            raise InputError(f"hook {name!r} is not in this model; there are {', '.join(near[:6])}")
        if place.side == "in":
            raise InputError(f"hook {str(place)!r}: a hook point has no input of its own, leave out :in")
    return hooks


@contextlib.contextmanager
def _explained(model: Any, ids: Tensor) -> Iterator[None]:
    """Any error that a model raises on token ids (batch, length) as one line, with that error as its cause.

    Raises:
        InputError: naming the model, its error, and the ids it was given.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        hint = "does it run by itself?"
        if isinstance(error, torch.OutOfMemoryError):
            hint = "lower batch_tokens or ctx_len"
        elif isinstance(model, nn.Module) and "pixel_values" in inspect.signature(model.forward).parameters:
            hint = "for hooks in what it reads images with, give images or items instead of text"
        raise InputError(
            f"the model ({type(model).__name__}) failed on {tuple(ids.shape)} token ids up to {int(ids.max())}: "
            f"{type(error).__name__}: {reason}; {hint}"
        ) from error


class _Stop(Exception):
    """Every place has had its turn; what the rest of the model would compute is of no use."""
