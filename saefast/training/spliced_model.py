"""A language model with an SAE's reconstruction in the place of its rows: the two passes of a step of fine-tuning."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saefast.errors import InputError
from saefast.forward import check_ids, eval_mode
from saefast.harvest.hooks import find_hook
from saefast.harvest.reading import ReadBatch
from saefast.metrics.language_model import spliced
from saefast.models.sae import SAE
from saefast.places import Place, Taken, by_token, visited
from saefast.training.residual import RESIDUAL


class Clean(NamedTuple):
    """What the untouched model makes of a batch: rows (B, T, d) at each hook, logits (B, T, V), and how often each of
    the hooks' modules ran."""

    rows: dict[str, Tensor]
    logits: Tensor
    calls: dict[Place, int]


def own_hooks(sae: SAE, hook: Any = None, target: Any = None) -> tuple[list[str], list[str]]:
    """The hooks whose rows an SAE takes, side by side, and those whose rows it gives out.

    Args:
        hook, target: one, or several; None is what its metadata says.

    Raises:
        InputError: neither says it; the SAE is trained on what another one leaves over.
    """
    about = sae.config.metadata
    if RESIDUAL in about:
        raise InputError(
            f"sae is trained on what the SAE of {about[RESIDUAL]['run']} leaves over, and stands in for nothing by "
            "itself: take that one"
        )
    # A run on several hooks keeps their names in one text.
    own = str(about.get("hook_name") or "").split(",")
    hook = own if hook is None else hook
    if not hook or not hook[0]:
        raise InputError("hook is None, and the SAE's metadata has no hook_name: name the module whose rows it takes")
    if target is None:
        target = str(about["hook_name_out"]).split(",") if about.get("hook_name_out") else hook
    hooks, targets = ([one] if isinstance(one, str) else list(one) for one in (hook, target))
    if not hooks or not targets or not all(isinstance(name, str) for name in (*hooks, *targets)):
        raise InputError(f"hook is {hook!a} and target_hook {target!a}: expected names of modules")
    return hooks, targets


class SplicedModel:
    """A causal language model of transformers, the hooks whose rows an SAE takes, side by side, and those whose rows it
    gives out (targets; the same ones for an SAE that reconstructs).

    Raises InputError for anything else, and for an unknown hook.
    """

    def __init__(self, model: Any, hooks: Sequence[str], targets: Sequence[str] | None = None) -> None:
        if not isinstance(model, nn.Module) or hasattr(model, "run_with_hooks"):
            raise InputError(f"model is a {type(model).__name__}: expected a causal language model of transformers")
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise InputError(
                f"{type(model).__name__} is an encoder with a decoder: it predicts one text from another, so there are "
                "no next-token distributions of a text alone"
            )
        self.model, self.hooks = model, tuple(hooks)
        self.maps = targets is not None and tuple(targets) != self.hooks
        self.targets = self.hooks if targets is None else tuple(targets)
        self.every = tuple(dict.fromkeys((*self.hooks, *self.targets)))
        self._places = {hook: find_hook(model, hook).places for hook in self.every}
        self.device = next(model.parameters()).device
        # Keys and values for generating more text are of no use here.
        takes = inspect.signature(model.forward).parameters
        self._extra = {"use_cache": False} if "use_cache" in takes else {}
        self._widths: list[int] = []

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """While open, the model is in eval mode and no gradient goes to its weights; then all is as it was."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            with eval_mode(self.model):
                yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    @torch.no_grad()
    def clean(self, batch: ReadBatch) -> Clean:
        """The pass without an SAE."""
        check_ids(self.model, batch.ids)
        places = list(dict.fromkeys(place for found in self._places.values() for place in found))
        taken = Taken(places, by_token(len(batch.ids), (batch.ids.shape[1],)))
        with visited(self.model, places, taken.take):
            logits = self._logits(batch)
        rows = {hook: torch.cat([taken.value(p) for p in found], -1) for hook, found in self._places.items()}
        self._widths = [taken.value(place).shape[-1] for place in self._replaced()]
        return Clean(rows, logits, dict(taken.calls))

    def spliced(self, batch: ReadBatch, clean: Clean, where: Tensor, x_hat: Tensor) -> Tensor:
        """The logits with x_hat (n, D) in place of the targets' rows `where` (B, T) bool, differentiable in x_hat."""
        with contextlib.ExitStack() as stack:
            for place, part in zip(self._replaced(), x_hat.split(self._widths, -1), strict=True):
                stack.enter_context(spliced(self.model, place, _always(part), where, clean.calls))
            return self._logits(batch)

    def _replaced(self) -> list[Place]:
        return [place for hook in self.targets for place in self._places[hook]]

    def _logits(self, batch: ReadBatch) -> Tensor:
        # Attention is fastest without a mask.
        mask = {} if bool(batch.mask.all()) else {"attention_mask": batch.mask.long()}
        found = getattr(self.model(input_ids=batch.ids, **mask, **self._extra), "logits", None)
        if not isinstance(found, Tensor) or found.shape[:2] != batch.ids.shape:
            raise InputError(
                f"{type(self.model).__name__} gives no logits of tokens: load it with its language-model head "
                "(AutoModelForCausalLM)"
            )
        return found


def _always(value: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _x: value
