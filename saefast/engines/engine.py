"""What the training loop asks of an engine, and what one step tells it."""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from saefast.data.source import where_it_ends
from saefast.engines.dead import DeadLatents
from saefast.errors import InputError
from saefast.models.sae import SAE
from saefast.ops.reference import accumulate_dtype

State = dict[str, Tensor | int | float]


class StepStats(NamedTuple):
    """Figures of one optimiser step, all of the batch it saw, before its update. Numbers or 0-d tensors."""

    loss: Tensor | float
    """What was minimised: the architecture's reconstruction terms + auxk_coef · AuxK + its sparsity penalty."""
    fvu: Tensor | float
    """Fraction of variance unexplained, Σ(target - x_hat)² / Σ(target - mean of the batch)²."""
    l0: Tensor | float
    """Latents with an activation above 0, per token."""
    dead_share: Tensor | float
    """Share of the latents that are dead after this batch."""
    auxk_loss: Tensor | float
    """The AuxK loss without its coefficient; 0 where it did not run."""
    grad_norm: Tensor | float
    """Global norm of the gradients after projection and before clipping."""
    lr: float
    """Learning rate of this step."""
    sparsity_loss: Tensor | float = 0.0
    """The sparsity penalty with its coefficient; 0 where the architecture has none."""
    sparsity_coef: Tensor | float = 0.0


class Engine(Protocol):
    """One way to take training steps. Rows come scaled by one number, which is the loop's business.

    Where the SAE normalises each row by itself, a step does the same, and is of the normalised rows: its loss, its
    figures.

    Call `initialise` once with the first rows of a new run, or `load_state_dict` to continue one; then `step` for
    every batch; `finish` after the last. `state_dict` between steps, together with the SAE's own weights, holds all
    that a bit-exact continuation needs.
    """

    step_count: int
    """Optimiser updates done."""
    dead: DeadLatents
    """How long ago each latent fired."""

    def initialise(self, rows: Tensor, targets: Tensor | None = None) -> None:
        """Sets what depends on data (b_dec, scales) from rows (n, d_in), in place in the SAE."""

    def step(self, x: Tensor, target: Tensor | None = None) -> StepStats:
        """One update from a batch x (B, d_in), to reconstruct target (B, d_out); None is x itself.

        Raises InputError, with nothing changed, if the loss is not finite.
        """

    def lr(self) -> float:
        """The learning rate of the step to come."""

    def decay_from(self, step: int, total_steps: int) -> None:
        """Changes the schedule: the learning rate falls from `step` on, and is at its end after total_steps."""

    def averaged(self) -> dict[str, Tensor] | None:
        """The moving average of the weights by name; None where the recipe keeps none, or before a step."""

    def state_dict(self) -> State:
        """Everything but the SAE's own weights. Tensors are the live ones: save or clone them before the next step."""

    def load_state_dict(self, state: State) -> None:
        """Takes back a state_dict; the SAE's weights must be those of the same moment."""

    def finish(self) -> None:
        """Brings the SAE to its final form: pending updates applied, decoder rows as SAEConfig promises."""


def checked(x: Tensor, target: Tensor | None, sae: SAE, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x and target as an engine takes them, `normalised`, of one dtype and contiguous; target None is x.

    Raises:
        InputError: x is not (B >= 1, d_in) of floats, or target not (B, d_out).
    """
    d_in, d_out = sae.config.d_in, sae.d_out
    if x.dim() != 2 or x.shape[1] != d_in or x.shape[0] == 0 or not x.is_floating_point():
        raise InputError(
            f"x is {x.dtype} of shape {tuple(x.shape)}: expected floats of shape (batch >= 1, d_in = {d_in})"
        )
    if target is x:
        target = None
    expected = (len(x), d_out)
    if target is None and d_out != d_in:
        raise InputError(f"target is missing: this SAE maps rows of d_in = {d_in} to others of d_out = {d_out}")
    if target is not None and (target.shape != expected or not target.is_floating_point()):
        raise InputError(
            f"target is {target.dtype} of shape {tuple(target.shape)}: expected floats of shape {expected}, a row for "
            f"each of x's {tuple(x.shape)}"
        )
    x = x.to(dtype).contiguous()
    return normalised(x, x if target is None else target.to(dtype).contiguous(), sae)


def normalised(x: Tensor, target: Tensor, sae: SAE) -> tuple[Tensor, Tensor]:
    """x and target, which is x itself where there is no other, with each row as the SAE normalises it.

    Raises:
        InputError: the SAE normalises rows, and the target is not x.
    """
    norm = sae.architecture.row_norm(x)
    if norm is None:
        return x, target
    if target is not x:
        raise InputError(
            "target is another tensor than x, which this SAE (input_norm) normalises token by token: it reconstructs "
            "the rows that it takes; leave the target out, or set input_norm to 'none'"
        )
    x = norm.normed(x).to(x.dtype)
    return x, x


def not_finite(step: int, loss: float, x: Tensor, target: Tensor | None = None) -> InputError:
    """The error for a loss (or, where that is finite, a gradient) that is NaN or infinite, naming the likely cause."""
    what = "a gradient" if math.isfinite(loss) else f"the loss ({loss})"
    cause = _cause(x)
    if target is not None and target is not x and cause == DIVERGED:
        cause = _cause(target).replace("inputs", "targets")
    return InputError(f"{what} is not finite at step {step}: {cause}. The weights are still those before this step")


DIVERGED = "the inputs are finite, so training diverged: lower lr or set max_grad_norm"


def _cause(x: Tensor) -> str:
    """What is wrong with a batch, if anything is."""
    bad = (~x.isfinite()).any(dim=1).nonzero()
    squares, limits = float(x.double().square().sum()), torch.finfo(accumulate_dtype(x.dtype))
    if len(bad):
        cause = f"row {int(bad[0])} of the batch holds NaN or inf ({len(bad)} such rows): drop them from the data"
        return cause + where_it_ends(x[bad[0]])
    if bool((x == x[:1]).all()):
        return "all rows of the batch are equal, so their variance is 0: shuffle the data or use larger batches"
    if not limits.tiny < squares < limits.max**0.75:
        size = f"{float(x.abs().max()):.1e} at most, and {limits.dtype} cannot hold their squares"
        return f"the inputs are too {'small' if squares < 1 else 'large'} ({size}): normalize='median' scales them"
    return DIVERGED
