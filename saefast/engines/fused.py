"""FusedEngine: the whole training step on the entries that fired, optimiser included: no autograd, no gradient tensor.

One stable sort groups the batch's entries by latent. Both weight matrices, b_enc and the gradient of b_dec come from
those groups: each latent's gradient row is summed, used by its Adam update and forgotten (saefast.optim).
"""

import contextlib
import dataclasses
import math
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saefast import ambient
from saefast.engines import dense_pass
from saefast.engines.base import EngineBase
from saefast.engines.config import TrainConfig
from saefast.engines.engine import State, StepStats, checked, not_finite
from saefast.engines.fused_pass import Pass
from saefast.engines.gradient import BlockGradient, Gradient, Model, fetched, serial_sum
from saefast.engines.hot import HotLatents
from saefast.engines.resample import due
from saefast.engines.weights import Scratch, Weights
from saefast.errors import InputError
from saefast.models.sae import SAE
from saefast.ops.code import Code, Number
from saefast.ops.reference import accumulate_dtype
from saefast.optim.dispatch import row_ops
from saefast.optim.state import AdamStep, Job, Norm, RowGradient


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
        hot_share: share of tokens above which a latent is computed densely (`hot.py`); None is never.
        dense_share: share of all B · L entries above which a step is done by dense chunks, where each latent decides
            for itself (`dense_pass.py`); None is what was measured.

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
        dense_share: float | None = None,
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
        self.dense_share = self._dense_share(dense_share)
        # Of B · L entries in the step before. Before the first one nothing is known, and most begin with many.
        self.share = torch.ones((), dtype=torch.float64, device="cpu") if dense_pass.serves(self.architecture) else None

    def _dense_share(self, given: float | None) -> float:
        rule = self.architecture.pointwise
        if rule is not None and rule.pays_everywhere(self.config):
            if not dense_pass.serves(self.architecture):
                raise InputError(
                    f"engine is 'fused', and activation={self.architecture.name!r} pays for all latents on all tokens "
                    "and wants to see its code, which would be all of them: use engine='autograd'"
                )
            return -1.0
        return dense_pass.PAYS_OFF if given is None else given

    def _many(self, B: int) -> bool:
        """Whether a batch has so many entries, as far as the one before can tell, that none of them are listed."""
        if self.share is None:
            return False
        longest = dense_pass.ENTRIES / max(B * self.sae.config.n_latents, 1)
        return float(self.share) > min(self.dense_share, longest)

    def _new_hot(self, share: float | None) -> HotLatents | None:
        """Hot latents need one residual per token, codes of a fixed width, and an update of single rows."""
        several = len(self.terms.prefixes) > 1 or len(self.architecture.blocks()) > 1
        if share is None or self.dense or several or not self.architecture.fixed_width:
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
        if self._many(len(x)):
            return self._dense_step(x, target)
        return self._update(x, target, self._gradient(x, target))

    @ambient.plainly(grad=False)
    def look(self, x: Tensor, target: Tensor | None = None) -> "Look":
        """What a step from x (B, d_in) would find. Nothing is changed; `take` makes the step of it.

        Raises:
            InputError: as `step`.
        """
        x, target = checked(x, target, self.sae, self.dtype)
        self.weights.bind()
        work = Pass(dataclasses.replace(self._model(), wants_error=True), x, target)
        found = work.gradient()
        return Look(x, target, work.code, found)

    @ambient.plainly(grad=False)
    def take(self, seen: "Look") -> StepStats:
        """The update from a batch that `look` has seen, with no other look and no step in between.

        Raises:
            InputError: as `step`.
        """
        self.weights.bind()
        return self._update(seen.x, seen.target, seen.gradient)

    def _update(self, x: Tensor, target: Tensor, gradient: Gradient) -> StepStats:
        lr, jobs = self.lr(), self._jobs(gradient)
        sure = self._look(gradient, jobs, x, target)
        if self.config.max_grad_norm is not None:
            jobs = scaled(jobs, min(1.0, self.config.max_grad_norm / (sure.norm + 1e-6)))
        with uninterrupted():
            self.consider(x, target, gradient.error)
            self._commit(x, gradient, sure, jobs, lr)
        norm = total_norm(jobs)
        figures = sure.loss, sure.fvu, sure.l0, self.dead.share(), sure.auxk, norm, lr
        return StepStats(*figures, gradient.penalty, gradient.coefficient)

    def _gradient(self, x: Tensor, target: Tensor) -> Gradient:
        return Pass(self._model(), x, target).gradient()

    def _dense_step(self, x: Tensor, target: Tensor) -> StepStats:
        """`step` by dense chunks: gradient rows are made, and used, chunk by chunk, once the loss is known."""
        dense = dense_pass.DensePass(self._model(), x, target)
        found, lr, scale = dense.forward(), self.lr(), 1.0
        if self.config.max_grad_norm is not None:
            before = float(self._by_chunks(dense, gradient_squares, 1.0))
            if not math.isfinite(before):
                raise not_finite(self.step_count, found.loss, x, target)
            scale = min(1.0, self.config.max_grad_norm / (before + 1e-6))
        with uninterrupted():
            self.consider(x, target, found.error)
            self._begin_update()
            norm = self._by_chunks(dense, row_ops(self.weights.enc.w).update_rows, scale)
            self._end_update(x, found, lr)
            self._take_share(found.share)
        figures = found.loss, found.fvu, found.l0, self.dead.share(), 0.0, norm, lr
        return StepStats(*figures, found.penalty, found.coefficient)

    def _by_chunks(self, dense: dense_pass.DensePass, act: Callable[[list[Job]], None], scale: float) -> Number:
        """Does something with the update of one chunk after the other, then with the rest's. -> The gradient's norm."""
        squares = []
        for block in dense.blocks():
            jobs = scaled(self._sized(self._of_block(block)), scale)
            act(jobs)
            squares += [job.squares for job in jobs]
        jobs = scaled(self._sized(self._of_few(dense.few)), scale)
        act(jobs)
        return root_of_sum(squares + [job.squares for job in jobs])

    def _model(self) -> Model:
        return Model(
            self.architecture, self.config, self.weights, self.dead, self.hot, self.mse_scale, self.scratch,
            self.kept(), self.at(), self.resamples(),
        )  # fmt: skip

    def _constants(self) -> tuple[AdamStep, AdamStep]:
        """Of this update: W_dec's, and all others'."""
        norms = {"pre_step": Norm.before_update, "post_step": Norm.after_update}
        norm, project = norms.get(self.config.decoder_norm, Norm.never), self.config.project_decoder_grad
        plain = self.weights.constants(self.step_count + 1, self.lr())
        return plain._replace(project=project, norm=norm), plain

    def _jobs(self, g: Gradient) -> list[Job]:
        """The update of all parameters, to be done in one go."""
        weights, none = self.weights, g.b_dec.new_zeros(0)
        for_dec, plain = self._constants()
        touched = None if self.dense else g.groups.latents
        jobs = [Job(weights.dec, for_dec, g.for_dec, touched, none), Job(weights.enc, plain, g.for_enc, touched, none)]
        for block in g.blocks:
            jobs += self._of_block(block)
        return self._sized(jobs + self._of_few(g))

    def _of_block(self, block: BlockGradient) -> list[Job]:
        (for_dec, plain), none = self._constants(), block.for_dec.new_zeros(0)
        return [
            Job(self.weights.dec, for_dec, given_rows(block.for_dec), block.ids, none),
            Job(self.weights.enc, plain, given_rows(block.for_enc), block.ids, none),
        ]

    def _of_few(self, g: Gradient | dense_pass.Few) -> list[Job]:
        """The update of the parameters that are small beside the two matrices."""
        plain, none = self._constants()[1], g.b_dec.new_zeros(0)
        jobs = []
        for name, grad in ({"b_enc": g.b_enc, "b_dec": g.b_dec} | g.own).items():
            matrix = self.weights.matrices[name]
            step = plain._replace(lr=plain.lr * self.rates.get(name, 1.0))
            jobs.append(Job(matrix, step, given_rows(grad.view(matrix.w.shape)), None, none))
        return jobs

    def _sized(self, jobs: list[Job]) -> list[Job]:
        """With room for the squares of their gradient rows."""
        new = self.weights.b_dec.new_zeros
        return [job._replace(squares=new(len(job.gradient.offsets) - 1)) for job in jobs]

    def _look(self, g: Gradient, jobs: list[Job], x: Tensor, target: Tensor) -> "Sure":
        """The second wait for a GPU: what a step has to know of its gradient before anything is written.

        Raises:
            InputError: the loss, or the norm that is clipped, is not finite.
        """
        norm: Number = 0.0
        above: Number = 0.0
        rate = None
        if self.config.max_grad_norm is not None:
            gradient_squares(jobs)
            norm = total_norm(jobs)
        if self.hot is not None:
            rate = self.hot.after(g.code.counts(self.sae.config.n_latents), len(x), self.step_count)
            above = self.hot.above(rate, self.step_count)
        sure = Sure(rate, *fetched(g.loss, g.fvu, g.auxk, g.l0, norm, above, g.code.offsets[-1]))
        if not (math.isfinite(sure.loss) and math.isfinite(sure.norm)):
            raise not_finite(self.step_count, sure.loss, x, target)
        return sure

    def _commit(self, x: Tensor, g: Gradient, sure: "Sure", jobs: list[Job], lr: float) -> None:
        """From gradients to new weights, counters and average. Nothing here is expected to fail."""
        self._begin_update()
        row_ops(self.weights.enc.w).update_rows(jobs)
        if self.hot is not None and sure.rate is not None:
            self.hot.take(sure.rate, int(sure.above), self.step_count)
        self._end_update(x, g, lr)
        self._take_share(sure.entries / (g.rows * self.sae.config.n_latents))

    def _begin_update(self) -> None:
        if self.ema is not None and self.config.decoder_norm == "pre_step":
            # The average takes the weights of before this step's update, with decoder rows at unit norm.
            self.weights.normalise_decoder()
        self.average()

    def _end_update(self, x: Tensor, g: Gradient | dense_pass.Forward, lr: float) -> None:
        """What follows when all rows have been updated."""
        self.weights.updated(lr)
        self.step_count += 1
        self.dead.take(g.since, g.fired, g.rows)
        self.take_kept(g.kept)
        # Without momentum (beta1 = 0) a row without a gradient stays where it is.
        if not self.dense and self.config.beta1 > 0 and self.step_count % self.settle_every == 0:
            self.weights.settle_encoder()
        resamples = due(self.step_count, self.total_steps, self.config)
        if resamples and g.error is not None and (begun := self.begun_anew(x, g.error)) is not None:
            fresh, alive = begun
            self.weights.restart(fresh, alive, self.restarted(fresh, alive))

    def _take_share(self, share: float) -> None:
        if self.share is not None:
            self.share.fill_(share)

    @ambient.plainly(grad=False)
    def settle(self) -> None:
        """Makes the SAE's weights what dense training would have by now: to be read in the middle of a run."""
        self.weights.bind()
        with uninterrupted():
            self.weights.settle_all()

    @ambient.plainly(grad=False)
    def finish(self) -> None:
        """Settles all rows, and gives decoder rows the unit norm that SAEConfig promises."""
        self.settle()
        with uninterrupted():
            if self.sae.config.unit_norm_decoder and self.config.decoder_norm != "never":
                self.weights.normalise_decoder()

    def state_dict(self) -> State:
        """Everything a bit-exact continuation needs, except the SAE's own weights, which a checkpoint stores beside."""
        state: State = {"step_count": self.step_count, "mse_scale": self.mse_scale}
        return state | {"drift": self.weights.drift.state()} | self._tensors() | self.draw.tensors()

    def _tensors(self) -> dict[str, Tensor]:
        """The state's tensors by name, live."""
        tensors = self.dead.tensors() | (self.hot.state() if self.hot is not None else {})
        tensors |= self.weights.tensors()
        tensors |= {} if self.share is None else {"share": self.share}
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
        self.load_draw(state)
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


class Look(NamedTuple):
    """A batch that an engine has looked at: `FusedEngine.look`."""

    x: Tensor
    target: Tensor
    code: Code
    gradient: Gradient
    """With the residual in `error`, which is good until the next look or step."""


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
    entries: float
    """Of the code."""


def given_rows(grad: Tensor) -> RowGradient:
    """Gradient rows (n, D) that exist already, as groups of one entry."""
    n = torch.arange(len(grad) + 1, dtype=torch.int32, device=grad.device)
    return RowGradient(grad, n, n[:-1], torch.ones_like(grad[:, 0]))


def scaled(jobs: list[Job], scale: float) -> list[Job]:
    """With their gradients times a number."""
    return [job._replace(step=job.step._replace(grad_scale=scale)) for job in jobs]


def gradient_squares(jobs: list[Job]) -> None:
    for job in jobs:
        row_ops(job.matrix.w).gradient_squares(job)


def total_norm(jobs: list[Job]) -> Number:
    """The global norm of the gradients whose squares the jobs hold."""
    return root_of_sum([job.squares for job in jobs])


def root_of_sum(squares: list[Tensor]) -> Number:
    """The root of the sum of all."""
    found = serial_sum(torch.cat(squares))
    return found.sqrt() if isinstance(found, Tensor) else math.sqrt(found)


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
