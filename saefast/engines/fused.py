"""FusedEngine: the whole training step on the entries that fired, optimiser included: no autograd, no gradient tensor.

One stable sort groups the batch's entries by latent. Both weight matrices, b_enc and the gradient of b_dec come from
those groups: each latent's gradient row is summed, used by its Adam update and forgotten (saefast.optim).
"""

import contextlib
import math
import signal
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saefast import ambient
from saefast.engines.base import EngineBase
from saefast.engines.config import TrainConfig
from saefast.engines.engine import State, StepStats, checked, not_finite
from saefast.engines.fused_pass import Gradient, Model, Pass, fetched, serial_sum
from saefast.engines.hot import HotLatents, threshold
from saefast.engines.resample import due
from saefast.engines.weights import Scratch, Weights
from saefast.errors import InputError
from saefast.models.sae import SAE
from saefast.ops.code import Number
from saefast.ops.reference import accumulate_dtype
from saefast.optim.dispatch import row_ops
from saefast.optim.state import Job, Norm, RowGradient


class FusedEngine(EngineBase):
    """Engine "fused"; `saefast.engines.engine.Engine` is the interface, AutogradEngine the same maths in dense form.

    With settle_every = 1 every row is updated at every step, as dense Adam does, at dense Adam's cost; otherwise rows
    without a gradient are settled later (see `saefast.engines.weights`).

    Args:
        sae: trained in place; float32 (float64 in plain torch).
        config: the recipe.
        total_steps: length of the run, which the learning rate's decay ends at.
        settle_every: instead of the config's.
        mixed: bf16 products choose the candidates for the top k (saefast.ops.mixed); None is where that is faster.
        hot_share: share of tokens above which a latent is computed densely (`hot.py`); None is what the device's
            figures say, and never on a CPU.

    Raises:
        InputError: the SAE's dtype, or a setting only the autograd engine has.
    """

    name = "fused"

    @ambient.plainly(grad=False)
    def __init__(
        self,
        sae: SAE,
        config: TrainConfig,
        total_steps: int,
        *,
        settle_every: int | None = None,
        mixed: bool | None = None,
        hot_share: float | None = None,
    ) -> None:
        _check_settings(sae, config, settle_every)
        super().__init__(sae, config, total_steps)
        self.settle_every = settle_every if settle_every is not None else config.settle_every
        self.dense = self.settle_every == 1
        self.weights = Weights(sae, config, self.dense, mixed)
        # What sums are kept in.
        self.dtype = accumulate_dtype(sae.dtype)
        self.scratch = Scratch(self.dtype, sae.device)
        self.hot = self._new_hot(hot_share)

    def _new_hot(self, share: float | None) -> HotLatents | None:
        """Hot latents need one residual per token, codes of a fixed width, and an update of single rows."""
        if share is None:
            share = threshold(self.sae.device, self.sae.dtype)
        if share is None or self.dense or len(self.terms.prefixes) > 1 or not self.architecture.fixed_width:
            return None
        return HotLatents(self.sae.config.n_latents, share, self.sae.device)

    @ambient.plainly(grad=False)
    def step(self, x: Tensor, target: Tensor | None = None) -> StepStats:
        """One update from x (B, d_in).

        Raises:
            InputError: a loss or a gradient that is not finite, naming the step; weights and state stay as they were.
        """
        x, target = checked(x, target, self.sae, self.dtype)
        self.weights.bind()
        gradient = self._gradient(x, target)
        lr, jobs = self.lr(), self._jobs(gradient)
        sure = self._look(gradient, jobs, x, target)
        if self.config.max_grad_norm is not None:
            scale = min(1.0, self.config.max_grad_norm / (sure.norm + 1e-6))
            jobs = [job._replace(step=job.step._replace(grad_scale=scale)) for job in jobs]
        with uninterrupted():
            self._commit(gradient, sure, jobs, lr)
        norm = total_norm(jobs)
        figures = sure.loss, sure.fvu, sure.l0, self.dead.share(), sure.auxk, norm, lr
        return StepStats(*figures, gradient.penalty, gradient.coefficient)

    def _gradient(self, x: Tensor, target: Tensor) -> Gradient:
        model = Model(
            self.architecture, self.config, self.weights, self.dead, self.hot, self.mse_scale, self.scratch,
            self.kept(), self.at(), self.resamples(),
        )  # fmt: skip
        return Pass(model, x, target).gradient()

    def _jobs(self, g: Gradient) -> list[Job]:
        """The update of the four parameters, to be done in one go."""
        norms = {"pre_step": Norm.before_update, "post_step": Norm.after_update}
        norm, project = norms.get(self.config.decoder_norm, Norm.never), self.config.project_decoder_grad
        weights, none = self.weights, g.b_dec.new_zeros(0)
        plain = weights.constants(self.step_count + 1, self.lr())
        for_dec = plain._replace(project=project, norm=norm)
        touched = None if self.dense else g.groups.latents
        jobs = [Job(weights.dec, for_dec, g.for_dec, touched, none), Job(weights.enc, plain, g.for_enc, touched, none)]
        for block in g.blocks:
            jobs.append(Job(weights.dec, for_dec, given_rows(block.for_dec), block.ids, none))
            jobs.append(Job(weights.enc, plain, given_rows(block.for_enc), block.ids, none))
        jobs += [
            Job(weights.matrices["b_enc"], plain, given_rows(g.b_enc[None]), None, none),
            Job(weights.matrices["b_dec"], plain, given_rows(g.b_dec[None]), None, none),
        ]
        for name in weights.own:
            matrix = weights.matrices[name]
            jobs.append(Job(matrix, plain, given_rows(g.own[name].view(matrix.w.shape)), None, none))
        return [j._replace(squares=g.b_dec.new_zeros(len(j.gradient.offsets) - 1)) for j in jobs]

    def _look(self, g: Gradient, jobs: list[Job], x: Tensor, target: Tensor) -> "Sure":
        """The second wait for a GPU: what a step has to know of its gradient before anything is written.

        Raises:
            InputError: the loss, or the norm that is clipped, is not finite.
        """
        norm: Number = 0.0
        above: Number = 0.0
        rate = None
        if self.config.max_grad_norm is not None:
            for job in jobs:
                row_ops(job.matrix.w).gradient_squares(job)
            norm = total_norm(jobs)
        if self.hot is not None:
            rate = self.hot.after(g.code.counts(self.sae.config.n_latents), len(x), self.step_count)
            above = self.hot.above(rate, self.step_count)
        sure = Sure(rate, *fetched(g.loss, g.fvu, g.auxk, g.l0, norm, above))
        if not (math.isfinite(sure.loss) and math.isfinite(sure.norm)):
            raise not_finite(self.step_count, sure.loss, x, target)
        return sure

    def _commit(self, g: Gradient, sure: "Sure", jobs: list[Job], lr: float) -> None:
        """From gradients to new weights, counters and average. Nothing here is expected to fail."""
        if self.ema is not None and self.config.decoder_norm == "pre_step":
            # The average takes the weights of before this step's update, with decoder rows at unit norm.
            self.weights.normalise_decoder()
        self.average()
        row_ops(self.weights.enc.w).update_rows(jobs)
        self.weights.updated(lr)
        self.step_count += 1
        self.dead.take(g.since, g.fired, g.rows)
        self.take_kept(g.kept)
        if self.hot is not None and sure.rate is not None:
            self.hot.take(sure.rate, int(sure.above), self.step_count - 1)
        # Without momentum (beta1 = 0) a row without a gradient stays where it is.
        if not self.dense and self.config.beta1 > 0 and self.step_count % self.settle_every == 0:
            self.weights.settle_encoder()
        resamples = due(self.step_count, self.total_steps, self.config)
        if resamples and g.error is not None and (begun := self.begun_anew(g.error)) is not None:
            fresh, alive = begun
            self.weights.restart(fresh, alive, self.restarted(alive))

    @ambient.plainly(grad=False)
    def finish(self) -> None:
        """Settles all rows, and gives decoder rows the unit norm that SAEConfig promises."""
        self.weights.bind()
        with uninterrupted():
            self.weights.settle_all()
            if self.sae.config.unit_norm_decoder and self.config.decoder_norm != "never":
                self.weights.normalise_decoder()

    def state_dict(self) -> State:
        """Everything a bit-exact continuation needs, except the SAE's own weights, which a checkpoint stores beside."""
        state: State = {"step_count": self.step_count, "mse_scale": self.mse_scale}
        return state | {"drift": self.weights.drift.state()} | self._tensors()

    def _tensors(self) -> dict[str, Tensor]:
        """The state's tensors by name, live."""
        tensors = self.dead.tensors() | (self.hot.state() if self.hot is not None else {})
        tensors |= self.weights.tensors()
        tensors |= {f"kept.{name}": value for name, value in self.state.items()}
        return tensors | {f"ema.{name}": average for name, average in (self.ema or {}).items()}

    @ambient.plainly(grad=False)
    def load_state_dict(self, state: State) -> None:
        """Continues where another FusedEngine stood; the SAE's weights must be those of the same moment.

        Raises:
            InputError: an entry is missing or of another shape; nothing is changed then.
        """
        wanted = self._tensors()
        found = {name: self.taken(state, name, like) for name, like in wanted.items()}
        drift = state.get("drift")
        if not isinstance(drift, Tensor):
            raise InputError("state of engine 'fused': drift is missing; it belongs to another engine")
        table = self.weights.table_of(drift)
        self.step_count, self.mse_scale = int(state["step_count"]), float(state["mse_scale"])
        for name, like in wanted.items():
            like.copy_(found[name])
        self.weights.restored(table, self.step_count)
        if self.hot is not None:
            self.hot.loaded()


def _check_settings(sae: SAE, config: TrainConfig, settle_every: int | None) -> None:
    lean = config.optimizer == "adam-lean"
    wanted = (torch.float32, torch.bfloat16) if lean else (torch.float32, torch.float64)
    if sae.dtype not in wanted:
        raise InputError(f"dtype is {sae.dtype}: optimizer {config.optimizer!r} trains float32 weights")
    if lean and config.ema_decay is not None:
        raise InputError("ema_decay needs optimizer='adam': an average of bfloat16 weights would not move")
    if config.reproduce_bugs:
        raise InputError("reproduce_bugs needs engine='autograd': the fused engine has no such mode")
    if config.eps <= 0:
        raise InputError(f"eps is {config.eps}: engine 'fused' needs more than 0")
    if settle_every is not None and settle_every < 1:
        raise InputError(f"settle_every is {settle_every}: expected at least 1")


class Sure(NamedTuple):
    """A step's numbers on the host, before anything is written."""

    rate: Tensor | None
    """`HotLatents.after`."""
    loss: float
    fvu: float
    auxk: float
    l0: float
    norm: float
    """0 where gradients are not clipped: it comes with the update then."""
    above: float
    """`HotLatents.above`."""


def given_rows(grad: Tensor) -> RowGradient:
    """Gradient rows (n, D) that exist already, as groups of one entry."""
    n = torch.arange(len(grad) + 1, dtype=torch.int32, device=grad.device)
    return RowGradient(grad, n, n[:-1], torch.ones_like(grad[:, 0]))


def total_norm(jobs: list[Job]) -> Number:
    """The global norm of the gradients whose squares the jobs hold."""
    squares = serial_sum(torch.cat([job.squares for job in jobs]))
    return squares.sqrt() if isinstance(squares, Tensor) else math.sqrt(squares)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back until the block is done, so that weights and state move together."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs signal handlers in the main thread only
        return
    held: list[tuple[int, Any]] = []
    kept = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    kept = {s: handler for s, handler in kept.items() if callable(handler)}
    try:
        for s in kept:
            signal.signal(s, lambda number, frame: held.append((number, frame)))
        yield
    finally:
        for s, handler in kept.items():
            signal.signal(s, handler)
        for number, frame in held:
            kept[signal.Signals(number)](number, frame)  # type: ignore[operator,misc]
