"""FusedEngine: the whole training step on the entries that fired, optimiser included. No autograd, no gradient tensors.

One stable sort groups the batch's entries by latent. Both weight matrices, b_enc and the gradient of b_dec come from
those runs: each latent's gradient row is summed, used by its Adam update and forgotten (saefast.optim.reference).
"""

import contextlib
import dataclasses
import math
import signal
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saefast import ambient
from saefast.engines.config import TrainConfig, lr_factor
from saefast.engines.engine import State, StepStats, check_batch, not_finite
from saefast.engines.fused_pass import Gradient, Model, Pass, fetched, serial_sum
from saefast.engines.hot import HotLatents, threshold
from saefast.engines.losses import DeadLatents, inverse_variance
from saefast.errors import InputError
from saefast.models.sae import SAE
from saefast.models.start import scale_encoder_, start_b_dec_
from saefast.ops.code import Number
from saefast.ops.mixed import pays_off
from saefast.ops.reference import accumulate_dtype
from saefast.optim.dispatch import row_ops
from saefast.optim.state import AdamStep, AnyMatrix, DriftTable, Job, LeanMatrix, Matrix, Norm, RowGradient

PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec")


class FusedEngine:
    """Engine "fused"; `saefast.engines.engine.Engine` is the interface, AutogradEngine the same maths in dense form.

    Rows without a gradient are left alone and settled later, in closed form (`saefast.optim.state.DriftTable`). A row
    of W_dec is settled before it is read. W_enc is read whole at every step, so a row left alone there lacks
    at most lr · |m| / √v · r / (1 - r), r = β1 / √β2 (9 learning rates at the defaults), until all of W_enc is
    settled, every `settle_every` steps. With settle_every = 1 every row is updated at every step, as dense Adam does,
    at dense Adam's cost.

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
        self.lean = config.optimizer == "adam-lean"
        wanted = (torch.float32, torch.bfloat16) if self.lean else (torch.float32, torch.float64)
        if sae.dtype not in wanted:
            raise InputError(f"dtype is {sae.dtype}: optimizer {config.optimizer!r} trains float32 weights")
        if self.lean and config.ema_decay is not None:
            raise InputError("ema_decay needs optimizer='adam': an average of bfloat16 weights would not move")
        if config.reproduce_bugs:
            raise InputError("reproduce_bugs needs engine='autograd': the fused step has no such mode")
        if config.eps <= 0:
            raise InputError(f"eps is {config.eps}: engine 'fused' needs more than 0")
        if settle_every is not None and settle_every < 1:
            raise InputError(f"settle_every is {settle_every}: expected at least 1")
        self.sae, self.config, self.total_steps = sae, config, total_steps
        self.settle_every = settle_every if settle_every is not None else config.settle_every
        self.step_count = 0
        self.mse_scale = 1.0
        self.dead = DeadLatents(sae.config.n_latents, config, sae.device)
        self.drift = DriftTable(config.beta1, config.beta2, config.eps, sae.device)
        self.matrices = self._new_state(mixed)
        self.hot = self._new_hot(hot_share)
        self.ema: dict[str, Tensor] | None = None
        if config.ema_decay is not None:
            self.ema = {name: torch.zeros_like(getattr(sae, name).data) for name in PARAMETERS}
        self._versions: tuple[int, ...] = ()
        self._scratch: dict[str, Tensor] = {}

    def _new_state(self, mixed: bool | None) -> dict[str, AnyMatrix]:
        sae, norms = self.sae, self.sae.config.rescale_acts_by_decoder_norm
        if self.lean:
            sae.to(torch.bfloat16)
            sae.config = dataclasses.replace(sae.config, dtype="bfloat16")
            W_enc, W_dec = sae.W_enc.data, sae.W_dec.data
            seeds = [2 * self.config.seed, 2 * self.config.seed + 1]
            state: dict[str, AnyMatrix] = {"W_enc": LeanMatrix.of(W_enc, seeds[0])}
            state["W_dec"] = LeanMatrix.of(W_dec, seeds[1], norms=norms)
            # Biases are few: they train in float32, and the SAE gets them rounded.
            return state | {name: Matrix.of(getattr(sae, name).detach().float()) for name in ("b_enc", "b_dec")}
        if mixed is None:
            mixed = pays_off(sae.W_enc.data)
        return {
            "W_enc": Matrix.of(sae.W_enc.data, shadow=mixed),
            "W_dec": Matrix.of(sae.W_dec.data, norms=norms),
            "b_enc": Matrix.of(sae.b_enc.data),
            "b_dec": Matrix.of(sae.b_dec.data),
        }

    def _new_hot(self, share: float | None) -> HotLatents | None:
        """Hot latents need one residual per token and an update of single rows."""
        if share is None:
            share = threshold(self.sae.device, self.sae.dtype)
        if share is None or self.dense or self.config.multi_topk_coef:
            return None
        return HotLatents(self.sae.config.n_latents, share, self.sae.device)

    @property
    def enc(self) -> AnyMatrix:
        return self.matrices["W_enc"]

    @property
    def dec(self) -> AnyMatrix:
        return self.matrices["W_dec"]

    @property
    def dtype(self) -> torch.dtype:
        """What sums are kept in."""
        return accumulate_dtype(self.sae.dtype)

    @property
    def dense(self) -> bool:
        """Whether every row takes part in every update."""
        return self.settle_every == 1

    @ambient.plainly(grad=False)
    def initialise(self, rows: Tensor) -> None:
        """Sets b_dec, the encoder's scale and the loss's scale from rows (n, d_in), as the recipe says."""
        start_b_dec_(self.sae, rows, self.config.b_dec_init)
        if self.config.init_encoder_scale:
            scale_encoder_(self.sae, self.config.seed)
        if self.config.loss == "scaled_mse":
            self.mse_scale = inverse_variance(rows)

    @ambient.plainly(grad=False)
    def step(self, x: Tensor) -> StepStats:
        """One update from x (B, d_in).

        Raises:
            InputError: a loss or a gradient that is not finite, naming the step; weights and state stay as they were.
        """
        check_batch(x, self.sae)
        self._bind()
        x = x.to(self.dtype).contiguous()
        gradient = self._gradient(x)
        lr, jobs = self.lr(), self._jobs(gradient)
        sure = self._look(gradient, jobs, x)
        if self.config.max_grad_norm is not None:
            scale = min(1.0, self.config.max_grad_norm / (sure.norm + 1e-6))
            jobs = [job._replace(step=job.step._replace(grad_scale=scale)) for job in jobs]
        with uninterrupted():
            self._commit(gradient, sure, jobs, lr)
        norm = total_norm(jobs)
        return StepStats(sure.loss, sure.fvu, sure.l0, self.dead.share(), sure.auxk, norm, lr)

    def lr(self) -> float:
        """The learning rate of the step to come."""
        factor = lr_factor(self.step_count, self.total_steps, self.config)
        return self.config.peak_lr(self.sae.config.n_latents) * factor

    def _bind(self) -> None:
        """Points at the SAE's weights of now, and renews copies of them if somebody else changed them."""
        parameters = [getattr(self.sae, name) for name in PARAMETERS]
        versions = tuple(number for p in parameters for number in (p.data_ptr(), p._version))
        if versions != self._versions:
            for p, matrix in zip(parameters, self.matrices.values(), strict=True):
                if p.dtype == matrix.w.dtype:
                    matrix.w = p.data.view(matrix.w.shape)
                elif not torch.equal(matrix.w[0].to(p.dtype), p.data):
                    matrix.w[0].copy_(p.data)  # a bias, which the SAE holds rounded
                matrix.copies_changed()
            self._versions = versions

    def _buffer(self, name: str, *shape: int) -> Tensor:
        """Memory kept from step to step: fresh pages cost more than what is written to them."""
        found = self._scratch.get(name)
        if found is None or found.shape != shape:
            found = self._scratch[name] = torch.empty(shape, dtype=self.dtype, device=self.sae.device)
        return found

    def _constants(self, step: int, **changes: Any) -> AdamStep:
        c, table = self.config, self.drift
        return AdamStep(step, c.beta1, c.beta2, self.lr(), c.eps, table.drift, table.drift_eps, **changes)

    def _sleep_norm(self) -> Norm:
        """How the decoder rows that are not updated keep their norm."""
        kinds = {"post_step": Norm.after_update, "never": Norm.never}
        return kinds.get(self.config.decoder_norm, Norm.before_update)

    def _wake_decoder(self, latents: Tensor) -> None:
        """Makes the decoder rows of latents (n,) what dense training would have by now. Changes no meaning."""
        backend = row_ops(self.dec.w)
        if not self.dense:
            backend.catch_up(self.dec, self._constants(self.step_count, norm=self._sleep_norm()), latents)
        if self.config.decoder_norm == "pre_forward":
            # Where all rows take part in the update, all have to be at unit norm before it.
            backend.normalise_rows(self.dec, self._constants(self.step_count), None if self.dense else latents)

    def _gradient(self, x: Tensor) -> Gradient:
        model = Model(
            self.sae.config, self.config, self.matrices, self.dead, self.hot, self.mse_scale, self.step_count,
            self.dense, self._wake_decoder, self._buffer,
        )  # fmt: skip
        return Pass(model, x).gradient()

    def _jobs(self, g: Gradient) -> list[Job]:
        """The update of the four parameters, to be done in one go."""
        norms = {"pre_step": Norm.before_update, "post_step": Norm.after_update}
        for_dec = self._constants(
            self.step_count + 1,
            project=self.config.project_decoder_grad,
            norm=norms.get(self.config.decoder_norm, Norm.never),
        )
        plain, none = self._constants(self.step_count + 1), g.b_dec.new_zeros(0)
        touched = None if self.dense else g.runs.latents
        jobs = [Job(self.dec, for_dec, g.for_dec, touched, none), Job(self.enc, plain, g.for_enc, touched, none)]
        for block in g.blocks:
            jobs.append(Job(self.dec, for_dec, given_rows(block.for_dec), block.ids, none))
            jobs.append(Job(self.enc, plain, given_rows(block.for_enc), block.ids, none))
        jobs += [
            Job(self.matrices["b_enc"], plain, given_rows(g.b_enc[None]), None, none),
            Job(self.matrices["b_dec"], plain, given_rows(g.b_dec[None]), None, none),
        ]
        return [j._replace(squares=g.b_dec.new_zeros(len(j.gradient.offsets) - 1)) for j in jobs]

    def _look(self, g: Gradient, jobs: list[Job], x: Tensor) -> "Sure":
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
            raise not_finite(self.step_count, sure.loss, x)
        return sure

    def _commit(self, g: Gradient, sure: "Sure", jobs: list[Job], lr: float) -> None:
        """From gradients to new weights, counters and average. Nothing here is expected to fail."""
        backend = row_ops(self.enc.w)
        if self.ema is not None and self.config.ema_decay is not None:
            # The average takes the weights of before this step's update, as OpenAI's does, decoder rows at unit norm.
            if self.config.decoder_norm == "pre_step":
                backend.normalise_rows(self.dec, self._constants(self.step_count))
            for name, average in self.ema.items():
                average.lerp_(getattr(self.sae, name).data, 1 - self.config.ema_decay)
        backend.update_rows(jobs)
        self.drift.add(lr)
        self.step_count += 1
        self.dead.since = g.since
        if self.hot is not None and sure.rate is not None:
            self.hot.take(sure.rate, int(sure.above), self.step_count - 1)
        if self.lean:
            self._round_biases()
        if not self.dense and self.step_count % self.settle_every == 0:
            backend.catch_up(self.enc, self._constants(self.step_count))
            if self.dec.norms is not None:
                backend.catch_up(self.dec, self._constants(self.step_count, norm=self._sleep_norm()))

    def _round_biases(self) -> None:
        """Hands the SAE its biases, whose float32 masters are here."""
        for name in ("b_enc", "b_dec"):
            getattr(self.sae, name).data.copy_(self.matrices[name].w[0])

    def averaged(self) -> dict[str, Tensor] | None:
        """The bias-corrected moving average of the weights by name; None without ema_decay or before a step."""
        if self.ema is None or self.config.ema_decay is None or self.step_count == 0:
            return None
        correction = 1 - self.config.ema_decay**self.step_count
        return {name: average / correction for name, average in self.ema.items()}

    @ambient.plainly(grad=False)
    def finish(self) -> None:
        """Settles all sleeping rows, and gives decoder rows the unit norm that SAEConfig promises."""
        self._bind()
        backend = row_ops(self.enc.w)
        with uninterrupted():
            backend.catch_up(self.enc, self._constants(self.step_count))
            backend.catch_up(self.dec, self._constants(self.step_count, norm=self._sleep_norm()))
            if self.sae.config.unit_norm_decoder and self.config.decoder_norm != "never":
                backend.normalise_rows(self.dec, self._constants(self.step_count))

    def state_dict(self) -> State:
        """Everything a bit-exact continuation needs, except the SAE's own weights, which a checkpoint stores beside."""
        state: State = {"step_count": self.step_count, "mse_scale": self.mse_scale}
        return state | {"drift": self.drift.state()} | self._tensors()

    def _tensors(self) -> dict[str, Tensor]:
        """The state's tensors by name, live."""
        tensors = {"dead.since": self.dead.since} | (self.hot.state() if self.hot is not None else {})
        for name, matrix in self.matrices.items():
            tensors |= {f"adam.{name}.{key}": tensor for key, tensor in matrix.state().items()}
        if self.lean:
            tensors |= {f"master.{name}": self.matrices[name].w for name in ("b_enc", "b_dec")}
        return tensors | {f"ema.{name}": average for name, average in (self.ema or {}).items()}

    @ambient.plainly(grad=False)
    def load_state_dict(self, state: State) -> None:
        """Continues where another FusedEngine stood; the SAE's weights must be those of the same moment.

        Raises:
            InputError: an entry is missing or of another shape; nothing is changed then.
        """
        wanted = self._tensors()
        found = {name: _taken(state, name, like) for name, like in wanted.items()}
        table = DriftTable(self.config.beta1, self.config.beta2, self.config.eps, self.sae.device)
        drift = state.get("drift")
        if not isinstance(drift, Tensor):
            raise InputError("state of engine 'fused': drift is missing; it belongs to another engine")
        table.load(drift)
        self.drift, self.step_count, self.mse_scale = table, int(state["step_count"]), float(state["mse_scale"])
        for name, like in wanted.items():
            like.copy_(found[name])
        if self.hot is not None:
            self.hot.loaded()
        self._versions = ()


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
    """Gradient rows (n, D) that exist already, as runs of one entry."""
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


def _taken(state: State, name: str, like: Tensor) -> Tensor:
    """A state's tensor, checked against the one it replaces."""
    value = state.get(name)
    if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise InputError(
            f"state of engine 'fused': {name} is {found}, expected {like.dtype} {tuple(like.shape)}; "
            "it belongs to another config"
        )
    return value
