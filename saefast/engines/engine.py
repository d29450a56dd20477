"""What the training loop asks of an engine, and what one step tells it."""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from saefast.data.source import where_it_ends
from saefast.errors import InputError
from saefast.models.sae import SAE
from saefast.ops.reference import accumulate_dtype

State = dict[str, Tensor | int | float]


class StepStats(NamedTuple):
    """Figures of one optimiser step, all of the batch it saw, before its update. Numbers or 0-d tensors."""

    loss: Tensor | float
    """What was minimised: reconstruction + auxk_coef · AuxK + multi_topk_coef · MultiTopK."""
    fvu: Tensor | float
    """Fraction of variance unexplained, Σ(x - x_hat)² / Σ(x - mean of the batch)²."""
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


class Engine(Protocol):
    """One way to take training steps. Rows come normalised: scaling inputs is the loop's business.

    Call `initialise` once with the first rows of a new run, or `load_state_dict` to continue one; then `step` for
    every batch; `finish` after the last. `state_dict` between steps, together with the SAE's own weights, holds all
    that a bit-exact continuation needs.
    """

    step_count: int
    """Optimiser updates done."""

    def initialise(self, rows: Tensor) -> None:
        """Sets what depends on data (b_dec, scales) from rows (n, d_in), in place in the SAE."""

    def step(self, x: Tensor) -> StepStats:
        """One update from a batch x (B, d_in). Raises InputError, with nothing changed, if the loss is not finite."""

    def state_dict(self) -> State:
        """Everything but the SAE's own weights. Tensors are the live ones: save or clone them before the next step."""

    def load_state_dict(self, state: State) -> None:
        """Takes back a state_dict; the SAE's weights must be those of the same moment."""

    def finish(self) -> None:
        """Brings the SAE to its final form: pending updates applied, decoder rows as SAEConfig promises."""


def check_batch(x: Tensor, sae: SAE) -> None:
    """Raises InputError where x is not (B >= 1, d_in) of floats."""
    if x.dim() != 2 or x.shape[1] != sae.config.d_in or x.shape[0] == 0 or not x.is_floating_point():
        raise InputError(
            f"x is {x.dtype} of shape {tuple(x.shape)}: expected floats of shape (batch >= 1, d_in = {sae.config.d_in})"
        )


def not_finite(step: int, loss: float, x: Tensor) -> InputError:
    """The error for a loss (or, where that is finite, a gradient) that is NaN or infinite, naming the likely cause."""
    bad = (~x.isfinite()).any(dim=1).nonzero()
    squares, limits = float(x.double().square().sum()), torch.finfo(accumulate_dtype(x.dtype))
    what = "a gradient" if math.isfinite(loss) else f"the loss ({loss})"
    if len(bad):
        cause = f"row {int(bad[0])} of the batch holds NaN or inf ({len(bad)} such rows): drop them from the data"
        cause += where_it_ends(x[bad[0]])
    elif bool((x == x[:1]).all()):
        cause = "all rows of the batch are equal, so their variance is 0: shuffle the data or use larger batches"
    elif not limits.tiny < squares < limits.max**0.75:
        size = f"{float(x.abs().max()):.1e} at most, and {limits.dtype} cannot hold their squares"
        cause = f"the inputs are too {'small' if squares < 1 else 'large'} ({size}): normalize='sqrt_d' scales them"
    else:
        cause = "the inputs are finite, so training diverged: lower lr or set max_grad_norm"
    return InputError(f"{what} is not finite at step {step}: {cause}. The weights are still those before this step")
