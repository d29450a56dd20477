"""Running a model only as far as its last hook, and taking what the hooks see."""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from saefast.errors import InputError
from saefast.harvest.hooks import find_hook
from saefast.harvest.language_models import hidden_states
from saefast.harvest.workers import workers_for


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


class ModuleRunner:
    """Forward hooks on the modules of a torch model; the last one to fire ends the forward pass."""

    equal_lengths = False

    def __init__(self, model: nn.Module, hooks: Sequence[str]) -> None:
        self._model = model
        found = [find_hook(model, name) for name in hooks]
        self.hooks = [{"name": hook.name, "hf_name": hook.path} for hook in found]
        # Keys and values for generating more text are of no use here.
        takes_cache = "use_cache" in inspect.signature(model.forward).parameters
        self._extra = {"use_cache": False} if takes_cache else {}
        self.workers = workers_for(self._device())
        # What this thread's forward pass has found; on threads that are not in run(), hooks do nothing.
        self._running = threading.local()
        paths = {hook.path for hook in found}
        if len(paths) < len(found):
            raise InputError(f"hooks {', '.join(hooks)}: two of them are the same module")

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for hook in self.hooks:
                module = self._model.get_submodule(hook["hf_name"])
                stack.callback(module.register_forward_hook(self._listener(hook["name"])).remove)
            yield

    def run(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        # Attention is fastest without a mask.
        mask_argument = {} if bool(mask.all()) else {"attention_mask": mask}
        with _explained(self._model, ids):
            return self.run_inputs({"input_ids": ids, **mask_argument})

    def run_inputs(
        self, inputs: Mapping[str, Tensor], shaped: Callable[[Any, str], Tensor] = hidden_states
    ) -> dict[str, Tensor]:
        """Activations per hook for arguments of the model's forward by name, moved to its device.

        shaped(output, hook): activations (batch, length, d) out of what the hooked module gives. Errors of the model
        are raised as they are.
        """
        device = self._device()
        seen = self._running.seen = _Seen([hook["name"] for hook in self.hooks], shaped)
        try:
            with torch.inference_mode(), contextlib.suppress(_Stop):
                self._model(**{name: value.to(device) for name, value in inputs.items()}, **self._extra)
        finally:
            self._running.seen = None
        return seen.all()

    def _device(self) -> torch.device:
        parameter = next(self._model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def _listener(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def listen(module: nn.Module, args: Any, output: Any) -> None:
            seen = getattr(self._running, "seen", None)
            if seen is not None:
                seen.take(name, output)

        return listen


class HookedRunner:
    """TransformerLens' way: run_with_hooks(tokens, fwd_hooks=[(name, f(activation, hook))])."""

    # Sequences of one length need no padding, and so no agreement about masks.
    equal_lengths = True
    # run_with_hooks changes the model while it runs.
    workers = 1

    def __init__(self, model: Any, hooks: Sequence[str]) -> None:
        self._model = model
        known = getattr(model, "hook_dict", None)
        for name in hooks:
            if known is not None and name not in known:
                near = [key for key in known if key.split(".")[-1] == name.split(".")[-1]] or list(known)
                raise InputError(f"hook {name!r} is not in this model; there are {', '.join(near[:6])}")
        self.hooks = [{"name": name, "hf_name": name} for name in hooks]
        parameters = inspect.signature(model.run_with_hooks).parameters.values()
        takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
        # Asks TransformerLens not to compute logits, should no hook end the pass.
        self._extra = {"return_type": None} if takes_any or "return_type" in {p.name for p in parameters} else {}

    def attached(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def run(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        seen = _Seen([hook["name"] for hook in self.hooks])
        fwd_hooks = [(hook["name"], seen.named_hook(hook["name"])) for hook in self.hooks]
        with _explained(self._model, ids), torch.inference_mode(), contextlib.suppress(_Stop):
            self._model.run_with_hooks(ids, fwd_hooks=fwd_hooks, **self._extra)
        return seen.all()


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
        hint = (
            "lower batch_tokens or ctx_len" if isinstance(error, torch.OutOfMemoryError) else "does it run by itself?"
        )
        raise InputError(
            f"the model ({type(model).__name__}) failed on {tuple(ids.shape)} token ids up to {int(ids.max())}: "
            f"{type(error).__name__}: {reason}; {hint}"
        ) from error


class _Stop(Exception):
    """Every hook has fired; what the rest of the model would compute is of no use."""


class _Seen:
    def __init__(self, names: list[str], shaped: Callable[[Any, str], Tensor] = hidden_states) -> None:
        self._names, self._shaped = names, shaped
        self._found: dict[str, Tensor] = {}

    def named_hook(self, name: str) -> Callable[..., None]:
        return lambda activation, hook=None: self.take(name, activation)

    def take(self, name: str, output: Any) -> None:
        self._found[name] = self._shaped(output, name)
        if len(self._found) == len(self._names):
            raise _Stop

    def all(self) -> dict[str, Tensor]:
        missing = [name for name in self._names if name not in self._found]
        if missing:
            raise InputError(f"hook {missing[0]!r} never fired: the model's forward pass does not run that module")
        return {name: self._found[name] for name in self._names}
