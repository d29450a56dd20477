"""EngineBase: what all engines have in common."""

import dataclasses

import torch
from torch import Tensor

from saefast import ambient
from saefast.engines.config import TrainConfig
from saefast.engines.dead import DeadLatents
from saefast.engines.draw import Draw
from saefast.engines.engine import normalised
from saefast.engines.losses import inverse_variance
from saefast.engines.recipe import choose, lr_factor
from saefast.engines.resample import Fresh, due, fresh_in_blocks, steps_to_draw
from saefast.errors import InputError
from saefast.models.architecture import At
from saefast.models.sae import SAE
from saefast.models.start import fit_encoder_, scale_encoder_, start_b_dec_, start_from_rows_, start_in_subspace_
from saefast.ops.reference import accumulate_dtype

PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec")
# SAEConfig.init -> what sets the weights from the first rows.
FROM_DATA = {"rows": start_from_rows_, "active_subspace": start_in_subspace_}


class EngineBase:
    """The recipe's bookkeeping: how an SAE begins, learning rates, counters of dead latents, averages.

    Attributes:
        name: what TrainConfig.engine calls it.
        sae: trained in place.
        architecture: of the SAE; terms: its reconstruction terms at the end of this recipe.
        names: of all trained parameters; rates: `Architecture.rates`.
        step_count: optimiser updates done.
        mse_scale: see `losses.reconstruction_weight`.
        dead: the counters of dead latents.
        draw: rows that latents may begin anew at.
        ema: moving averages of the parameters by name, or None.
        state: what the architecture keeps in training alone, by name.
    """

    name: str

    def __init__(self, sae: SAE, config: TrainConfig, total_steps: int) -> None:
        self.sae, self.config, self.total_steps = sae, choose(sae.config, config, total_steps=total_steps), total_steps
        self.architecture = sae.architecture
        if self.name not in self.architecture.engines:
            able = " or ".join(map(repr, self.architecture.engines))
            raise InputError(f"engine is {self.name!r}, which does not train {self.architecture.name!r}: use {able}")
        self.architecture.check_training(config)
        self.terms = self.architecture.terms(config, At(total_steps, total_steps))
        self.names = (*PARAMETERS, *self.architecture.parameters())
        self.rates = self.architecture.rates(self.config)
        self.step_count = 0
        self.mse_scale = 1.0
        self.dead = DeadLatents(sae.config.n_latents, self.config, sae.device)
        self.draw = Draw()
        self.ema: dict[str, Tensor] | None = None
        if config.ema_decay is not None:
            self.ema = {name: torch.zeros_like(getattr(sae, name).data) for name in self.names}
        self.state = {name: value.to(sae.device) for name, value in self.architecture.state(config).items()}

    @ambient.plainly(grad=False)
    def initialise(self, rows: Tensor, targets: Tensor | None = None) -> None:
        """Sets b_dec, the encoder's scale and the loss's scale from rows (n, d_in), as the recipe says.

        Args:
            targets: (n, d_out) what the rows are to be mapped to; None is the rows themselves.
        """
        rows, targets = normalised(rows, rows if targets is None else targets, self.sae)
        start_b_dec_(self.sae, targets, self.config.b_dec_init)
        if start := FROM_DATA.get(self.sae.config.init):
            start(self.sae, rows, targets, self.config.seed)
        if self.config.init_encoder_scale:
            scale_encoder_(self.sae, self.config.seed)
        if self.config.fit_encoder:
            fit_encoder_(self.sae, rows, targets, self.config)
        self.architecture.start(self.sae, rows, targets, self.config)
        if self.config.loss == "scaled_mse":
            self.mse_scale = inverse_variance(targets)

    def lr(self) -> float:
        """The learning rate of the step to come."""
        return self.config.lr * lr_factor(self.step_count, self.total_steps, self.config)

    def decay_from(self, step: int, total_steps: int) -> None:
        """From now on the rate falls from `step` to total_steps, whatever was planned."""
        self.config, self.total_steps = dataclasses.replace(self.config, lr_decay_start=step), total_steps

    def resamples(self) -> bool:
        """Whether the step under way needs its residual, for latents to be resampled at its end or at a later one's."""
        return due(self.step_count + 1, self.total_steps, self.config) or self._until_draw() is not None

    def _until_draw(self) -> int | None:
        return steps_to_draw(self.step_count, self.total_steps, self.config)

    def consider(self, x: Tensor, target: Tensor, residual: Tensor | None) -> None:
        """The batch of a step that is sure goes by, before its update: latents may begin anew at its rows."""
        left = self._until_draw()
        if left is None or residual is None:
            return
        # Those that can be dead when it comes to that.
        longer = self.dead.counted(max(len(x), self.config.batch_size)) * left
        most = int(self.dead.mask(self.dead.since + longer).sum())
        self.draw.add(x, target, residual, most, self.config.seed, self.step_count)

    def begun_anew(self, x: Tensor, residual: Tensor) -> tuple[Fresh, Tensor] | None:
        """What hopeless latents begin anew with after the step just taken, and (L,) bool which are alive.

        Args:
            x: (B, d_in) its batch. residual: (B, d_out) target - x_hat.
        """
        alive, matrices = ~self.dead.mask(self.dead.since), (self.sae.W_enc.data, self.sae.W_dec.data)
        blocks = self.architecture.blocks()
        if self.config.resample == "inputs":
            fresh = self.draw.take(blocks, self.dead.hopeless(), alive, matrices[0])
        else:
            seen = residual, self.dead.hopeless(), alive, *matrices, self.config.seed, self.step_count
            fresh = fresh_in_blocks(blocks, *seen, x if self.architecture.has_target else None)
        if fresh is None:
            return None
        self.dead.age[fresh.latents] = 0
        return fresh, alive

    def at(self) -> At:
        """The step to come."""
        return At(self.step_count, self.total_steps)

    def kept(self) -> dict[str, Tensor]:
        """What the architecture keeps besides the parameters, live."""
        return dict(self.sae.named_buffers()) | self.state

    def take_kept(self, new: dict[str, Tensor]) -> None:
        for name, value in self.kept().items():
            value.copy_(new[name])

    def restarted(self, fresh: Fresh, alive: Tensor) -> dict[str, Tensor]:
        """What the architecture's own parameters, and perhaps b_enc, are in latents that begin anew, by name."""
        own = {name: value.detach() for name, value in self.sae.own().items()}
        found = self.architecture.restarted(own | {"b_enc": self.sae.b_enc.detach()}, alive)
        return {name: value for name, value in found.items() if not (fresh.zeroed and name == "b_enc")}

    def average(self) -> None:
        """The moving average takes the weights of before this step's update, as OpenAI's does."""
        if self.ema is not None and self.config.ema_decay is not None:
            for name, average in self.ema.items():
                average.lerp_(getattr(self.sae, name).data, 1 - self.config.ema_decay)

    def averaged(self) -> dict[str, Tensor] | None:
        """The bias-corrected moving average of the weights by name; None without ema_decay or before a step."""
        if self.ema is None or self.config.ema_decay is None or self.step_count == 0:
            return None
        correction = 1 - self.config.ema_decay**self.step_count
        return {name: average / correction for name, average in self.ema.items()}

    def load_draw(self, state: dict[str, Tensor | int | float]) -> None:
        """Takes back the draw that a state holds."""
        x, target = (value.data.new_zeros((0, value.shape[-1])) for value in (self.sae.W_enc, self.sae.b_dec))
        self.draw.load(state, x.to(self.draw_dtype), target.to(self.draw_dtype))

    @property
    def draw_dtype(self) -> torch.dtype:
        """Of the rows that steps are given."""
        return accumulate_dtype(self.sae.dtype)

    def taken(self, state: dict[str, Tensor | int | float], name: str, like: Tensor) -> Tensor:
        """A state's tensor, checked against the one it replaces."""
        value = state.get(name)
        if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
            found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise InputError(
                f"state of engine {self.name!r}: {name} is {found}, expected {like.dtype} {tuple(like.shape)}; "
                "it belongs to another config"
            )
        return value
