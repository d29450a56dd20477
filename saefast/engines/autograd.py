"""AutogradEngine: the training step in plain torch. Dense gradients and torch's Adam; every recipe and every option.

It states the maths readably, which the fused engine is tested against, and trains what that one does not.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from saefast import ambient
from saefast.engines.base import EngineBase
from saefast.engines.config import TrainConfig
from saefast.engines.dead import DeadLatents
from saefast.engines.engine import State, StepStats, checked, not_finite
from saefast.engines.losses import auxk_runs, auxk_wanted, auxk_weight, sum_squares, term_weights, total_variance
from saefast.engines.resample import due
from saefast.errors import InputError
from saefast.models.architecture import At
from saefast.models.pointwise import gathered
from saefast.models.sae import SAE
from saefast.ops import spmm
from saefast.ops.code import Code, Number, padded
from saefast.ops.encoder import Encoder
from saefast.ops.selected import selected

FIRST = At(0, 1)
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch.optim.Adam's names


class AutogradEngine(EngineBase):
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

    name = "autograd"

    @ambient.plainly(grad=True)
    def __init__(self, sae: SAE, config: TrainConfig, total_steps: int) -> None:
        if config.optimizer != "adam":
            raise InputError(f"optimizer is {config.optimizer!r}: engine 'autograd' has 'adam'; use engine='fused'")
        if sae.dtype not in (torch.float32, torch.float64):
            raise InputError(f"dtype is {sae.dtype}: train in float32 and cast the result; halves lose Adam's steps")
        super().__init__(sae, config, total_steps)
        self.parameters = {name: getattr(sae, name) for name in self.names}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        # Each in a group of its own, for a rate of its own.
        groups = [{"params": [parameter]} for parameter in self.parameters.values()]
        self.adam = torch.optim.Adam(groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)

    @ambient.plainly(grad=True)
    def step(
        self, x: Tensor, target: Tensor | None = None, objective: "Callable[[Losses], Tensor] | None" = None
    ) -> StepStats:
        """One update from x (B, d_in).

        Args:
            objective: makes of a batch's losses the one that is minimised, 0-d; None is their total.

        Raises:
            InputError: a loss or a gradient that is not finite, naming the step; weights and state stay as they were.
        """
        x, target = checked(x, target, self.sae, self.sae.dtype)
        before = self.sae.W_dec.detach().clone() if self.config.decoder_norm.startswith("pre") else None
        if self.config.decoder_norm == "pre_forward":
            self.sae.normalize_decoder_()
        moment = self.kept(), self.at()
        losses = total_loss(self.sae, x, self.dead, self.config, self.mse_scale, target, *moment)
        if objective is not None:
            losses = losses._replace(total=objective(losses))
        if losses.total.isfinite():
            losses.total.backward()
            grad_norm = self._prepare_gradients()
            if grad_norm.isfinite():
                self.consider(x, target, losses.residual)
                return self._update(x, losses, grad_norm)
            self.adam.zero_grad()
        if before is not None:
            self.sae.W_dec.data.copy_(before)
        raise not_finite(self.step_count, float(losses.total.detach()), x, target)

    @torch.no_grad()
    def _prepare_gradients(self) -> Tensor:
        """Projects the decoder's gradient, clips all; returns their global norm before clipping."""
        if self.config.decoder_norm == "pre_step":
            self.sae.normalize_decoder_()
        for latents, _, writes in self.architecture.blocks():
            if (grad := self.sae.W_dec.grad) is not None:
                grad[latents, : writes.start] = 0
                grad[latents, writes.stop :] = 0
        if self.config.project_decoder_grad:
            project_decoder_grad_(self.sae.W_dec)
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self.config.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.max_grad_norm, norm)
        return norm

    @torch.no_grad()
    def _update(self, x: Tensor, losses: "Losses", grad_norm: Tensor) -> StepStats:
        """From gradients to new weights, counters and average."""
        self.average()
        lr = self.lr()
        for name, group in zip(self.parameters, self.adam.param_groups, strict=True):
            group["lr"] = lr * self.rates.get(name, 1.0)
        self.adam.step()
        self.adam.zero_grad()
        if self.config.decoder_norm == "post_step":
            self.sae.normalize_decoder_()
        self.dead.take(losses.since, losses.fired, losses.code.rows)
        seen = losses.code, losses.norms, self.at(), self.config
        self.take_kept(self.architecture.observed(self.kept(), *seen))
        self.step_count += 1
        if due(self.step_count, self.total_steps, self.config):
            self._resample(x, losses.residual)
        l0 = (losses.served.acts > 0).sum() / losses.served.rows
        figures = losses.total.detach(), losses.fvu, l0, self.dead.share(), losses.auxk, grad_norm, lr
        return StepStats(*figures, losses.penalty, losses.coefficient)

    def _resample(self, x: Tensor, residual: Tensor) -> None:
        begun = self.begun_anew(x, residual)
        if begun is None:
            return
        fresh, alive = begun
        ids = fresh.latents
        values = {"W_enc": fresh.W_enc, "W_dec": fresh.W_dec, "b_enc": fresh.b_enc} | self.restarted(fresh, alive)
        for name, rows in values.items():
            parameter = self.parameters[name]
            moments = self.adam.state[parameter]
            parameter.data[ids] = rows.to(parameter.dtype)
            moments["exp_avg"][ids] = 0
            moments["exp_avg_sq"][ids] = 0.0 if fresh.zeroed else moments["exp_avg_sq"][alive].mean()

    @ambient.plainly(grad=True)
    def finish(self) -> None:
        """Unit decoder rows where SAEConfig asks for them: "pre_forward" and "pre_step" leave the last update raw."""
        if self.sae.config.unit_norm_decoder and self.config.decoder_norm != "never":
            self.sae.normalize_decoder_()

    def state_dict(self) -> State:
        """Everything a bit-exact continuation needs, except the SAE's own weights, which a checkpoint stores beside."""
        state: State = {"step_count": self.step_count, "mse_scale": self.mse_scale} | self.dead.tensors()
        for name, parameter in self.parameters.items():
            moments = self.adam.state.get(parameter, {})
            state |= {f"adam.{name}.{moment}": moments[moment] for moment in MOMENTS if moment in moments}
        state |= {f"ema.{name}": average for name, average in (self.ema or {}).items()}
        return state | {f"kept.{name}": value for name, value in self.state.items()} | self.draw.tensors()

    @ambient.plainly(grad=False)
    def load_state_dict(self, state: State) -> None:
        """Continues where another AutogradEngine stood; the SAE's weights must be those of the same moment.

        Raises:
            InputError: an entry is missing or of another shape.
        """
        self.step_count, self.mse_scale = int(state["step_count"]), float(state["mse_scale"])
        self.dead.since = self._copied(state, "dead.since", self.dead.since)
        self.dead.never = self._copied(state, "dead.never", self.dead.never)
        self.dead.age = self._copied(state, "dead.age", self.dead.age)
        self.state = {name: self._copied(state, f"kept.{name}", value) for name, value in self.state.items()}
        self.load_draw(state)
        self.adam.state.clear()
        for name, parameter in self.parameters.items():
            if self.step_count:
                # Fused Adam keeps its count of steps as a float on the parameter's device.
                count = torch.tensor(float(self.step_count), dtype=torch.float32, device=parameter.device)
                moments = {moment: self._copied(state, f"adam.{name}.{moment}", parameter) for moment in MOMENTS}
                self.adam.state[parameter] = {"step": count, **moments}
            if self.ema is not None:
                self.ema[name] = self._copied(state, f"ema.{name}", parameter)

    def _copied(self, state: State, name: str, like: Tensor) -> Tensor:
        """A copy of a state's tensor on the device of the one it replaces."""
        return self.taken(state, name, like).detach().to(like.device, copy=True)


class Batch(NamedTuple):
    """What the loss is of."""

    centred: Tensor
    """(B, d_in) what the encoder sees."""
    target: Tensor
    """(B, d_out) what the decoder is to give."""
    variance: Tensor
    """`total_variance` of what is to be reconstructed."""
    kept: dict[str, Tensor]
    """What the architecture keeps."""
    at: At


class Losses(NamedTuple):
    """The loss with its autograd graph, and what the counters and the log need."""

    total: Tensor
    reconstruction: Tensor
    """The architecture's terms alone."""
    x_hat: Tensor
    """(B, D) what the main prefix decodes to."""
    auxk: Tensor | float
    """Without its coefficient; 0 where AuxK did not run."""
    fvu: Tensor
    """Σe² / Σ(target - mean)², detached."""
    code: Code
    """The whole code, detached."""
    served: Code
    """Its main prefix."""
    residual: Tensor
    """(B, D) target - x_hat of the main prefix, detached."""
    norms: Tensor | None
    """What it was ranked by."""
    since: Tensor
    """(n_latents,) the dead-latent counters after this batch."""
    fired: Tensor
    """(n_latents,) bool, the latents that fired in it."""
    penalty: Tensor | float = 0.0
    """The sparsity penalty with its coefficient, detached."""
    coefficient: Number = 0.0


def total_loss(
    sae: SAE,
    x: Tensor,
    dead: DeadLatents,
    config: TrainConfig,
    mse_scale: float = 1.0,
    target: Tensor | None = None,
    kept: dict[str, Tensor] | None = None,
    at: At = FIRST,
) -> Losses:
    """The whole loss of a batch x (B, d_in), differentiable in the SAE's parameters. `dead` is only read.

    Args:
        target: (B, d_out) what the code is to reconstruct; None is x.
        kept: what the architecture keeps; None is nothing.
        at: which step of the run this is.
    """
    target = x if target is None else target
    variance = total_variance(target)
    if (direct := sae.architecture.direct(x, sae.own())) is not None:
        target = target - direct
    centred = x - sae.b_dec if sae.config.apply_b_dec_to_input else x
    batch = Batch(centred, target, variance, kept or {}, at)
    kind = chosen_loss if sae.architecture.pointwise is None else pointwise_loss
    losses = kind(sae, batch, dead, config, mse_scale)
    return losses if direct is None else losses._replace(x_hat=losses.x_hat + direct)


def chosen_loss(sae: SAE, batch: Batch, dead: DeadLatents, config: TrainConfig, mse_scale: float) -> Losses:
    """Where latents compete: the loss on the entries that were chosen."""
    architecture, terms = sae.architecture, sae.architecture.terms(config, batch.at)
    centred, target, variance = batch.centred, batch.target, batch.variance
    encoder = _encoder(sae, centred)
    raw = architecture.code(encoder, config, batch.at)
    chosen = padded(raw, sae.config.n_latents)
    code = chosen._replace(acts=selected(centred, sae.W_enc, sae.b_enc, chosen, clip=not config.reproduce_bugs))

    total = centred.new_zeros(())
    for p, weight in enumerate(term_weights(terms, target.shape, variance, config, mse_scale)):
        part = terms.part(code, p)
        # In sparsify's MultiTopK the encoder gets no gradient from the longer prefix.
        acts = part.acts.detach() if config.reproduce_bugs and p != terms.main else part.acts
        x_hat = _decode(sae, acts, part.idx)
        error = target - x_hat
        total = total + weight * sum_squares(error)
        if p == terms.main:
            main, e = x_hat, error.detach()
    reconstruction = total

    # sparsify reports MultiTopK's indices as those of the top k, so its counters take all 4k for fired.
    fired = dead.fired(raw if config.reproduce_bugs else terms.part(raw, terms.main))
    since = dead.unless(fired, raw.rows)
    auxk: Tensor | float = 0.0
    if config.auxk_coef:
        dead_ids = dead.ids(since if config.dead_update_first else dead.since)
        auxk = auxk_loss(sae, centred, e, variance, dead_ids, config)
        total = total + config.auxk_coef * auxk
    auxk = auxk.detach() if isinstance(auxk, Tensor) else auxk
    fvu = sum_squares(e) / variance
    served = terms.part(chosen, terms.main)
    return Losses(total, reconstruction, main, auxk, fvu, chosen, served, e, encoder.scale, since, fired)


def pointwise_loss(sae: SAE, batch: Batch, dead: DeadLatents, config: TrainConfig, mse_scale: float) -> Losses:
    """Where each latent is for itself: the loss on all (B, n_latents) of them, as the papers state it."""
    rule, terms = sae.architecture.pointwise, sae.architecture.terms(config, batch.at)
    assert rule is not None
    centred, target, variance = batch.centred, batch.target, batch.variance
    pre = centred @ sae.W_enc.T + sae.b_enc
    own = gathered(sae.own() | {"b_enc": sae.b_enc}, slice(None))
    acts = rule.activate(pre, own)
    weights = term_weights(terms, target.shape, variance, config, mse_scale)
    total = centred.new_zeros(())
    for p, (weight, bound) in enumerate(zip(weights, terms.bounds, strict=True)):
        x_hat = acts[:, :bound] @ sae.W_dec[:bound] + sae.b_dec
        error = target - x_hat
        total = total + weight * sum_squares(error)
        if p == terms.main:
            main, e = x_hat, error.detach()
    reconstruction = total
    if (frozen := rule.frozen(pre, own)) is not None:
        x_hat = frozen @ sae.W_dec.detach() + sae.b_dec.detach()
        total = total + weights[terms.main] * sum_squares(target.detach() - x_hat)

    norms = sae.architecture.norms(sae.W_dec).sum(1) if rule.wants_norms(config) else None
    code = _as_csr(acts.detach())
    l0 = len(code.acts) / len(acts)
    coefficient = rule.coefficient(batch.at, batch.kept, l0, config)
    spent = rule.penalty(pre, acts, own, norms, config).sum(1).mean()
    # Worth what is charged, with the coefficient for a derivative.
    penalty = rule.charged(coefficient, spent.detach(), config) + coefficient * (spent - spent.detach())
    if (everywhere := rule.everywhere(pre, own, norms, config)) is not None:
        penalty = penalty + everywhere.sum(1).mean()
    fired = dead.fired(code)
    fvu = sum_squares(e) / variance
    seen = code, code, e, None, dead.unless(fired, len(acts)), fired
    return Losses(total + penalty, reconstruction, main, 0.0, fvu, *seen, penalty.detach(), coefficient)


def _as_csr(acts: Tensor) -> Code:
    """What is on in dense activations (B, n_latents)."""
    row, latent = acts.nonzero(as_tuple=True)
    row_ptr = torch.nn.functional.pad(torch.bincount(row, minlength=len(acts)).cumsum(0), (1, 0))
    return Code(acts[row, latent], latent.int(), row_ptr.int())


def auxk_loss(
    sae: SAE, centred: Tensor, residual: Tensor, variance: Tensor, dead_ids: Tensor, config: TrainConfig
) -> Tensor | float:
    """AuxK: the top dead latents of each token reconstruct the residual (Gao et al. 2024, arXiv 2406.04093, A.2).

    Args:
        centred: (B, D) what the encoder sees of the batch.
        residual: (B, D) target - x_hat, detached.
        variance: `total_variance` of the target.
        dead_ids: (n_dead,) ascending int64; only their rows of W_enc are read.

    Returns:
        A 0-d tensor, or 0.0 where the loss does not run.
    """
    n_dead = len(dead_ids)
    if not auxk_runs(n_dead, config):
        return 0.0
    e_hat = torch.zeros_like(residual)
    if n_dead:
        k = min(auxk_wanted(residual.shape[1], config), n_dead)
        code = _encoder(sae, centred).topk(k, dead_ids, config.auxk_relu)
        acts = selected(centred, sae.W_enc, sae.b_enc, code, clip=config.auxk_relu)
        e_hat = spmm(acts.detach() if config.reproduce_bugs else acts, code.idx, sae.W_dec)
    if config.auxk_b_dec_grad:
        # Worth 0, with gradient: b_dec is on both sides of OpenAI's AuxK, detached in the target.
        e_hat = e_hat + (sae.b_dec - sae.b_dec.detach())
    weight = auxk_weight(residual.shape, n_dead, variance, total_variance(residual), config)
    return weight * sum_squares(e_hat - residual)


def _encoder(sae: SAE, centred: Tensor) -> Encoder:
    """Chooses without a graph; `selected` puts what was chosen into it.

    Where activations are measured in decoder norms (SAELens), these matter to the ranking alone: an activation
    pre · ‖w‖ decodes as (pre · ‖w‖) · w / ‖w‖, so the norm cancels in the reconstruction and in its derivative, and
    training works on pre.
    """
    ranks = sae.architecture.ranks_by_norm
    norms = sae.architecture.norms(sae.W_dec.detach()).sum(1) if ranks else None
    own = {name: value.detach() for name, value in sae.own().items()}
    return Encoder(centred.detach(), sae.W_enc.detach(), sae.b_enc.detach(), norms, own=own)


def _decode(sae: SAE, acts: Tensor, idx: Tensor) -> Tensor:
    return spmm(acts, idx, sae.W_dec) + sae.b_dec


def project_decoder_grad_(W_dec: Tensor) -> None:
    """Takes out of W_dec's gradient what points along each row: the part that would only change the row's norm.

    grad ← grad - (grad · w / w · w) w, row by row (Bricken et al. 2023, "Towards Monosemanticity"; exact for any norm).
    """
    if W_dec.grad is not None:
        squares = W_dec.square().sum(1).clamp_min(torch.finfo(W_dec.dtype).tiny)
        along = (W_dec.grad * W_dec).sum(1) / squares
        W_dec.grad.addcmul_(along[:, None], W_dec, value=-1)
