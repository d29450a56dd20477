"""saefast's fused step in a loop that is somebody else's: forward, `loss.backward()`, and an optimiser's `step()`.

The pass over a batch happens in the forward. Its loss is a number to the loop, with a graph of one node, so gradients
of the weights are never made; `backward()` says that the batch counts; and when the loop's own optimiser has done its
step, which finds no gradient and so does nothing, the update is made, at the learning rate that the optimiser was given
by the loop's schedule. Every row takes part in every update, so the weights can be read at any time.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from saefast.engines.config import TrainConfig
from saefast.engines.fused import FusedEngine, Look
from saefast.errors import InputError
from saefast.models.sae import SAE
from saefast.ops.code import Number


class LedEngine(FusedEngine):
    """A FusedEngine whose learning rate is `rate`, which somebody else's schedule sets."""

    rate = 0.0

    def lr(self) -> float:
        return self.rate


class StepInLoop:
    """The step of one SAE in such a loop.

    Args:
        sae: whose tensors are the peer's parameters, or views of them.
        config: the peer's recipe. Its learning rate and schedule are not read.
        name: what the peer calls the SAE, for messages.

    Attributes:
        engine: makes the steps.
    """

    def __init__(self, sae: SAE, config: TrainConfig, name: str) -> None:
        # Nobody knows how long the run is, and nothing in a peer's recipe asks.
        self.engine = LedEngine(sae, config, total_steps=1 << 40, settle_every=1)
        self.name = name
        self._seen: Look | None = None
        self._counts = False

    def look(self, x: Tensor, target: Tensor | None = None) -> Look:
        """The forward pass over x (B, d_in)."""
        if self._counts:
            raise InputError(
                f"{self.name}: a second batch comes before the optimiser's step. The fused step knows no accumulation "
                "of gradients: set it to 1, or accelerate the SAE alone (saefast.accelerate)"
            )
        self._seen = self.engine.look(x, target)
        return self._seen

    def noted(self, seen: Look, loss: Number) -> Tensor:
        """The loss of what was seen, or the part of it that counts once, 0-d: to call backward() of."""
        value = torch.as_tensor(loss, dtype=torch.float32, device=seen.x.device)
        found: Tensor = Noted.apply(value.requires_grad_(True), self, seen)
        return found

    def counts(self, seen: Look, scale: float) -> None:
        """The batch seen last is the one that the next step is of.

        Args:
            scale: what its loss was multiplied by.
        """
        if scale != 1:
            raise InputError(
                f"{self.name}: the loss was multiplied by {scale:.3g} before backward(), and the fused step takes it "
                "as it is: leave it, or accelerate the SAE alone (saefast.accelerate)"
            )
        if seen is not self._seen:
            raise InputError(
                f"{self.name}: backward() of a batch that is not the last one: call it before the next one"
            )
        self._counts = True

    def follow(self, optimizer: torch.optim.Optimizer, group: int = 0) -> None:
        """From now on the update is made when this optimiser's step is, with the rate of one of its groups."""

        def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if self._counts and self._seen is not None:
                self.engine.rate = float(optimizer.param_groups[group]["lr"])
                seen, self._seen, self._counts = self._seen, None, False
                self.engine.take(seen)

        optimizer.register_step_post_hook(after_step)


def shared(sae: SAE, tensors: dict[str, Tensor]) -> None:
    """Makes these tensors the SAE's, by name; W_enc and W_dec (L, D) may be views of something transposed."""
    sae.load_state_dict({name: tensor.detach() for name, tensor in tensors.items()}, assign=True)
    sae.requires_grad_(True)


def row_major(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """A hook for state dicts: no transposed views, which other readers of a file need not know."""
    for name, value in state.items():
        state[name] = value.contiguous()


@contextlib.contextmanager
def replaced(thing: Any, **values: Any) -> Iterator[None]:
    """Attributes of an instance while the block runs."""
    kept = {name: vars(thing)[name] for name in values if name in vars(thing)}
    for name, value in values.items():
        object.__setattr__(thing, name, value)
    try:
        yield
    finally:
        for name in values:
            object.__delattr__(thing, name)
        vars(thing).update(kept)


class Noted(torch.autograd.Function):
    """The loss as it is. Its backward notes that it was called."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, step: StepInLoop, seen: Look) -> Tensor:
        ctx.step, ctx.seen = step, seen
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.step.counts(ctx.seen, float(grads[0]))
        return None, None, None
