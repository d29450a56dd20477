"""AutogradEngine: the training step in plain torch. Dense gradients and torch's Adam; every recipe and every option.

It is what the fused step is held against, and the engine for what that one does not do.
"""

import torch
from torch import Tensor

from saefast import ambient
from saefast.engines.config import TrainConfig, lr_factor
from saefast.engines.engine import State, StepStats, check_batch, not_finite
from saefast.engines.losses import DeadLatents, Losses, inverse_variance, total_loss
from saefast.errors import InputError
from saefast.models.sae import SAE
from saefast.models.start import scale_encoder_, start_b_dec_

PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec")
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim.Adam's names


class AutogradEngine:
    """Engine "autograd"; see `saefast.engines.engine.Engine` for the interface.

    Order of a step: unit decoder rows (pre_forward) -> loss -> backward -> unit decoder rows (pre_step) -> gradient
    projection -> clipping -> moving average -> Adam -> unit decoder rows (post_step).

    Args:
        sae: trained in place; float32 or float64.
        config: the recipe.
        total_steps: length of the run, which the learning rate's decay ends at.

    Raises:
        InputError: the SAE's dtype, or a setting only the fused engine has.
    """

    @ambient.plainly(grad=True)
    def __init__(self, sae: SAE, config: TrainConfig, total_steps: int) -> None:
        if sae.dtype not in (torch.float32, torch.float64):
            raise InputError(f"dtype is {sae.dtype}: train in float32 and cast the result; halves lose Adam's steps")
        if config.optimizer != "adam":
            raise InputError(f"optimizer is {config.optimizer!r}: engine 'autograd' has 'adam'; use engine='fused'")
        self.sae, self.config, self.total_steps = sae, config, total_steps
        self.step_count = 0
        self.mse_scale = 1.0
        self.dead = DeadLatents(sae.config.n_latents, config, sae.device)
        self.parameters = {name: getattr(sae, name) for name in PARAMETERS}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.adam = torch.optim.Adam(
            self.parameters.values(), lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
        )
        self.ema: dict[str, Tensor] | None = None
        if config.ema_decay is not None:
            self.ema = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.parameters.items()}

    @ambient.plainly(grad=True)
    def initialise(self, rows: Tensor) -> None:
        """Sets b_dec, the encoder's scale and the loss's scale from rows (n, d_in), as the recipe says."""
        start_b_dec_(self.sae, rows, self.config.b_dec_init)
        if self.config.init_encoder_scale:
            scale_encoder_(self.sae, self.config.seed)
        if self.config.loss == "scaled_mse":
            self.mse_scale = inverse_variance(rows)

    @ambient.plainly(grad=True)
    def step(self, x: Tensor) -> StepStats:
        """One update from x (B, d_in).

        Raises:
            InputError: a loss or a gradient that is not finite, naming the step; weights and state stay as they were.
        """
        check_batch(x, self.sae)
        x = x.to(self.sae.dtype)
        before = self.sae.W_dec.detach().clone() if self.config.decoder_norm.startswith("pre") else None
        if self.config.decoder_norm == "pre_forward":
            self.sae.normalize_decoder_()
        losses = total_loss(self.sae, x, self.dead, self.config, self.mse_scale)
        if losses.total.isfinite():
            losses.total.backward()
            grad_norm = self._prepare_gradients()
            if grad_norm.isfinite():
                return self._update(losses, grad_norm)
            self.adam.zero_grad()
        if before is not None:
            self.sae.W_dec.data.copy_(before)
        raise not_finite(self.step_count, float(losses.total.detach()), x)

    @torch.no_grad()
    def _prepare_gradients(self) -> Tensor:
        """Projects the decoder's gradient, clips all; returns their global norm before clipping."""
        if self.config.decoder_norm == "pre_step":
            self.sae.normalize_decoder_()
        if self.config.project_decoder_grad:
            project_decoder_grad_(self.sae.W_dec)
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.max_grad_norm, norm)
        return norm

    @torch.no_grad()
    def _update(self, losses: Losses, grad_norm: Tensor) -> StepStats:
        """From gradients to new weights, counters and average."""
        self._average()
        lr = self.lr()
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.adam.zero_grad()
        if self.config.decoder_norm == "post_step":
            self.sae.normalize_decoder_()
        self.dead.since = losses.since
        self.step_count += 1
        l0 = (losses.acts > 0).sum(1).float().mean()
        return StepStats(losses.total.detach(), losses.fvu, l0, self.dead.share(), losses.auxk, grad_norm, lr)

    def lr(self) -> float:
        """The learning rate of the step to come."""
        factor = lr_factor(self.step_count, self.total_steps, self.config)
        return self.config.peak_lr(self.sae.config.n_latents) * factor

    def _average(self) -> None:
        """The moving average takes the weights of before this step's update, as OpenAI's does."""
        if self.ema is not None and self.config.ema_decay is not None:
            for name, average in self.ema.items():
                average.lerp_(self.parameters[name], 1 - self.config.ema_decay)

    def averaged(self) -> dict[str, Tensor] | None:
        """The bias-corrected moving average of the weights by name; None without ema_decay or before a step."""
        if self.ema is None or self.config.ema_decay is None or self.step_count == 0:
            return None
        correction = 1 - self.config.ema_decay**self.step_count
        return {name: average / correction for name, average in self.ema.items()}

    @ambient.plainly(grad=True)
    def finish(self) -> None:
        """Unit decoder rows where SAEConfig promises them: "pre_forward" and "pre_step" leave the last update raw."""
        if self.sae.config.unit_norm_decoder and self.config.decoder_norm != "never":
            self.sae.normalize_decoder_()

    def state_dict(self) -> State:
        """Everything a bit-exact continuation needs, except the SAE's own weights, which a checkpoint stores beside."""
        state: State = {"step_count": self.step_count, "mse_scale": self.mse_scale, "dead.since": self.dead.since}
        for name, parameter in self.parameters.items():
            moments = self.adam.state.get(parameter, {})
            state |= {f"adam.{name}.{moment}": moments[moment] for moment in MOMENTS if moment in moments}
        state |= {f"ema.{name}": average for name, average in (self.ema or {}).items()}
        return state

    @ambient.plainly(grad=False)
    def load_state_dict(self, state: State) -> None:
        """Continues where another AutogradEngine stood; the SAE's weights must be those of the same moment.

        Raises:
            InputError: an entry is missing or of another shape.
        """
        self.step_count, self.mse_scale = int(state["step_count"]), float(state["mse_scale"])
        self.dead.since = taken(state, "dead.since", self.dead.since)
        self.adam.state.clear()
        for name, parameter in self.parameters.items():
            if self.step_count:
                # Fused Adam keeps its count of steps as a float on the parameter's device.
                count = torch.tensor(float(self.step_count), dtype=torch.float32, device=parameter.device)
                moments = {moment: taken(state, f"adam.{name}.{moment}", parameter) for moment in MOMENTS}
                self.adam.state[parameter] = {"step": count, **moments}
            if self.ema is not None:
                self.ema[name] = taken(state, f"ema.{name}", parameter)


def project_decoder_grad_(W_dec: Tensor) -> None:
    """Takes out of W_dec's gradient what points along each row: the part that would only change the row's norm.

    grad ← grad - (grad · w / w · w) w, row by row (Bricken et al. 2023, "Towards Monosemanticity"; exact for any norm).
    """
    if W_dec.grad is not None:
        squares = W_dec.square().sum(1).clamp_min(torch.finfo(W_dec.dtype).tiny)
        along = (W_dec.grad * W_dec).sum(1) / squares
        W_dec.grad.addcmul_(along[:, None], W_dec, value=-1)


def taken(state: State, name: str, like: Tensor) -> Tensor:
    """A copy of a state's tensor on the device of the one it replaces."""
    value = state.get(name)
    if not isinstance(value, Tensor) or value.shape != like.shape or value.dtype != like.dtype:
        found = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise InputError(
            f"state of engine 'autograd': {name} is {found}, expected {like.dtype} {tuple(like.shape)}; "
            "it belongs to another config"
        )
    return value.detach().to(like.device, copy=True)
