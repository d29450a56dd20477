"""SAELens' SAEs, training SAEs and transcoders, accelerated (sae-lens 6.54).

Of `training_forward_pass`, `feature_acts` is a sparse COO tensor and `hidden_pre` is made when it is read. Where a hook
on the pre-activations or the activations wants them dense, SAELens' own code runs. Thresholds (standard, JumpReLU,
transcoders) are taken sparsely where few latents are on, and left to dense products where many are.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from saefast.errors import InputError
from saefast.integrations import accelerate_ops as ops
from saefast.integrations.accelerate_jumprelu import jump, step
from saefast.integrations.accelerate_ops import Encoder
from saefast.integrations.accelerate_state import Later, hooked, latents, state_of, with_late_field
from saefast.ops.code import Code

Losses = dict[str, Tensor]


# What an SAE is called with.


def encode(self: Any, x: Tensor) -> Tensor:
    """x (..., d_in) -> dense activations (..., d_sae); sparse COO where SAELens' own would be."""
    is_sparse = bool(getattr(self.activation_fn, "use_sparse_activations", False))
    if not _is_served(self, self.hook_sae_acts_pre) or (is_sparse and x.dim() != 2):
        return _own(self, "encode", x)
    sae_in = self.process_sae_in(x)
    code = _code(self, sae_in)
    if code is None:
        return _own(self, "encode", x)
    code, L = _measured(self, code), self.W_enc.shape[1]
    if is_sparse:
        return self.hook_sae_acts_post(ops.sparse(code, L))
    acts = ops.dense(code, L).view(*sae_in.shape[:-1], L)
    return self.hook_sae_acts_post(ops.marked(acts, code))


def decode(self: Any, feature_acts: Tensor) -> Tensor:
    """Dense activations (..., d_sae) -> (..., d_out): sparsely if they are as encode() has returned them."""
    code = None if feature_acts.is_sparse else ops.code_of(feature_acts)
    if code is None:
        return _own(self, "decode", feature_acts)
    return _decoded(self, _unmeasured(self, code), feature_acts.shape[:-1])


def forward(self: Any, x: Tensor) -> Tensor:
    if not _is_served(self, self.hook_sae_acts_pre, self.hook_sae_acts_post) or self.use_error_term:
        return _own(self, "forward", x)
    sae_in = self.process_sae_in(x)
    code = _code(self, sae_in)
    if code is None:
        return _own(self, "forward", x)
    sae_out = _decoded(self, code, sae_in.shape[:-1])
    if _is_transcoder(self):
        W_skip = getattr(self, "W_skip", None)
        return sae_out if W_skip is None else sae_out + x @ W_skip.T.to(x.device)
    return self.hook_sae_output(sae_out)


# What a training SAE is trained by.


def topk_training_forward_pass(self: Any, step_input: Any) -> Any:
    """TopK, BatchTopK and Matryoshka: reconstruction, AuxK, and the reconstructions from nested widths."""
    if _is_watched(self) or step_input.sae_in.dim() != 2:
        return _own(self, "training_forward_pass", step_input)
    encoder = _encoder(self, self.process_sae_in(step_input.sae_in))
    code = _chosen(self, encoder)
    widths = list(getattr(self.cfg, "matryoshka_widths", [])) or [self.cfg.d_sae]
    nested = ops.nested(code, self.W_dec, self.b_dec, widths)
    sae_out = self.reshape_fn_out(self.run_time_activation_norm_fn_out(self.hook_sae_recons(nested[-1])), self.d_head)
    losses = {"mse_loss": self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()}
    losses["auxiliary_reconstruction_loss"] = _auxk_loss(self, encoder, step_input, sae_out, nested, widths)
    for width, part in zip(widths[:-1], nested[:-1], strict=True):
        found = self.run_time_activation_norm_fn_out(part)
        losses[f"inner_mse_loss_{width}"] = self.mse_loss_fn(found, step_input.sae_in).sum(dim=-1).mean()
    output = _output(self, encoder, step_input, sae_out, _measured(self, code), losses)
    if hasattr(self, "topk_threshold"):
        self.update_topk_threshold(output.feature_acts.detach()._values())
        output.metrics["topk_threshold"] = self.topk_threshold
    return output


def standard_training_forward_pass(self: Any, step_input: Any) -> Any:
    """ReLU, and a norm of the activations as its price."""
    code, encoder = _above(self, step_input, 0.0, positive=True)
    if code is None:
        return _own(self, "training_forward_pass", step_input)
    sae_out = _decoded(self, code, step_input.sae_in.shape[:-1])
    losses = {"mse_loss": self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()}
    sparsity = ops.times(code, ops.norms_of(self.W_dec)).acts.norm(p=self.cfg.lp_norm, dim=-1)
    losses["l1_loss"] = (step_input.coefficients["l1"] * sparsity).mean()
    return _output(self, encoder, step_input, sae_out, code, losses)


def jumprelu_training_forward_pass(self: Any, step_input: Any) -> Any:
    """JumpReLU with its estimators: latents within half a bandwidth below their threshold have gradients too."""
    with torch.no_grad():
        self.threshold.data.clamp_(min=0.0)
    found, encoder = _above(self, step_input, self.threshold.detach() - self.bandwidth / 2, positive=False)
    if found is None or found.pre is None:
        return _own(self, "training_forward_pass", step_input)
    estimator = self.bandwidth, self.cfg.jumprelu_ste_to_input
    threshold, pre, there = self.threshold.to(found.acts.dtype)[found.idx.long()], found.acts, found.pre
    code = Code(there * jump(pre, threshold, *estimator), found.idx)
    sae_out = _decoded(self, code, step_input.sae_in.shape[:-1])
    losses = {"mse_loss": self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()}
    if self.cfg.jumprelu_sparsity_loss_mode == "tanh":
        scaled = self.cfg.jumprelu_tanh_scale * ops.times(code, ops.norms_of(self.W_dec)).acts
        price = torch.tanh(scaled).sum(dim=-1)
    else:
        price = (there * step(pre, threshold, *estimator)).sum(dim=-1)
        if self.cfg.jumprelu_sparsity_loss_mode == "quadratic":
            price = 2 / self.cfg.target_l0 * (price - self.cfg.target_l0) ** 2
    losses["l0_loss"] = (step_input.coefficients["l0"] * price).mean()
    if self.cfg.pre_act_loss_coefficient is not None:
        losses["pre_act_loss"] = _pre_act_loss(self, encoder, step_input.dead_neuron_mask)
    return _output(self, encoder, step_input, sae_out, code, losses)


def _pre_act_loss(self: Any, encoder: Encoder, dead: Tensor | None) -> Tensor:
    """Σ ReLU(threshold - pre) · ‖decoder row‖ over dead latents: dense products, over those alone."""
    ids = None if dead is None else dead.nonzero().squeeze(1)
    if ids is None or len(ids) == 0:
        return encoder.x.new_tensor(0.0)
    pre = encoder.x @ encoder.W_enc[ids].T + encoder.b_enc[ids]
    below = (self.threshold[ids].to(pre.dtype) - pre).relu() * ops.norms_of(self.W_dec)[ids]
    return self.cfg.pre_act_loss_coefficient * below.sum(dim=-1).mean()


def _auxk_loss(
    self: Any, encoder: Encoder, step_input: Any, sae_out: Tensor, nested: list[Tensor], widths: list[int]
) -> Tensor:
    """AuxK: dead latents reconstruct the residual; with use_matryoshka_aux_loss those of each width that of theirs."""
    dead = step_input.dead_neuron_mask
    if dead is None or int(dead.sum()) == 0:
        return sae_out.new_tensor(0.0)
    ids, sae_in = dead.nonzero().squeeze(1), step_input.sae_in
    if getattr(self.cfg, "use_matryoshka_aux_loss", False):
        residuals = [sae_in - self.run_time_activation_norm_fn_out(part) for part in nested]
        begins = [0, *widths[:-1]]
        parts = [ids[(ids >= begin) & (ids < end)] for begin, end in zip(begins, widths, strict=True)]
    else:
        if self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            raise InputError(
                f"normalize_activations is {self.cfg.normalize_activations!r}: SAELens' TopK auxiliary loss does not "
                "go with that, as dead latents would reconstruct a residual in other units; train without dead latents"
            )
        residuals, parts = [sae_in - sae_out], [ids]
    found = [
        _auxk_part(self, encoder, some, residual.detach())
        for some, residual in zip(parts, residuals, strict=True)
        if len(some)
    ]
    return self.cfg.aux_loss_coefficient * torch.stack(found).sum()


def _auxk_part(self: Any, encoder: Encoder, ids: Tensor, residual: Tensor) -> Tensor:
    """How badly the best of some dead latents, negative ones included, reconstruct a residual (B, D)."""
    k_aux = residual.shape[-1] // 2
    scale = min(len(ids) / k_aux, 1.0)
    code = encoder.topk(min(k_aux, len(ids)), ids, relu=False)
    recons = self.reshape_fn_out(ops.decode(code, self.W_dec), self.d_head)
    return scale * (recons - residual).pow(2).sum(dim=-1).mean()


def _output(self: Any, encoder: Encoder, step_input: Any, sae_out: Tensor, code: Code, losses: Losses) -> Any:
    """A TrainStepOutput."""
    kind = with_late_field(_training_names(self).TrainStepOutput, "hidden_pre")
    made_of = encoder.x, self.W_enc, self.b_enc, self.W_dec
    return kind(
        sae_in=step_input.sae_in,
        sae_out=sae_out,
        feature_acts=ops.sparse(code, self.W_enc.shape[1]),
        hidden_pre=Later("hidden_pre", lambda: _hidden_pre(self, encoder), *made_of),
        loss=sum(losses.values()),
        losses=losses,
    )


def _hidden_pre(self: Any, encoder: Encoder) -> Tensor:
    pre = encoder.dense()
    return pre * ops.norms_of(self.W_dec) if _by_norm(self) else pre


# The code of a batch.


def _own(self: Any, method: str, *args: Any) -> Any:
    """SAELens' own method."""
    return getattr(type(self), method)(self, *args)


def _training_names(self: Any) -> Any:
    """The module of TrainStepOutput, which is that of the class that training SAEs are made from."""
    return next(
        sys.modules[base.__module__]
        for base in type(self).__mro__
        if hasattr(sys.modules[base.__module__], "TrainStepOutput")
    )


def _is_watched(self: Any) -> bool:
    """Whether hooks want tensors (B, L)."""
    return hooked(self.hook_sae_acts_pre, self.hook_sae_acts_post)


def _is_served(self: Any, *hooks: nn.Module) -> bool:
    """Whether the activation function is one that is known, and nobody waits for a tensor at these hooks."""
    if hooked(*hooks):
        return False
    if _ranks(self):
        return True
    if type(self.activation_fn) is not nn.ReLU or hooked(self.hook_sae_input):
        # Where many latents are on SAELens' own code begins anew, and would call that hook twice.
        return False
    # Of a training JumpReLU only the values are known here, and only with thresholds that training lets be.
    return not hasattr(self, "bandwidth") or not (torch.is_grad_enabled() or bool((self.threshold < 0).any()))


def _ranks(self: Any) -> bool:
    return type(self.activation_fn).__name__ in ("TopK", "BatchTopK")


def _is_transcoder(self: Any) -> bool:
    return hasattr(self.cfg, "d_out")


def _by_norm(self: Any) -> bool:
    """Whether activations are measured, and ranked, in units of the decoder's norms."""
    return bool(getattr(self.cfg, "rescale_acts_by_decoder_norm", False))


def _measured(self: Any, code: Code) -> Code:
    """Activations in SAELens' units."""
    return ops.times(code, ops.norms_of(self.W_dec)) if _by_norm(self) else code


def _unmeasured(self: Any, code: Code) -> Code:
    return ops.times(code, 1 / ops.norms_of(self.W_dec)) if _by_norm(self) else code


def _encoder(self: Any, sae_in: Tensor) -> Encoder:
    scale = ops.norms_of(self.W_dec.detach()) if _by_norm(self) else None
    flat = sae_in.reshape(-1, sae_in.shape[-1])
    return Encoder.of(flat, latents(self, "W_enc", is_turned=True), self.b_enc, scale, mixed=state_of(self).mixed)


def _code(self: Any, sae_in: Tensor) -> Code | None:
    """The code of sae_in (..., d_in), in units of 1; None where many latents are on."""
    if _ranks(self):
        return _chosen(self, _encoder(self, sae_in))
    threshold = getattr(self, "threshold", None)
    return _encoder(self, sae_in).above(0.0 if threshold is None else threshold.detach().clamp_min(0))


def _chosen(self: Any, encoder: Encoder) -> Code:
    activation = self.activation_fn
    if type(activation).__name__ == "BatchTopK":
        return encoder.batch_topk(int(activation.k * len(encoder.x)))
    return encoder.topk(activation.k)


def _above(self: Any, step_input: Any, limit: Tensor | float, *, positive: bool) -> tuple[Code | None, Encoder]:
    """All above a limit; None where hooks want tensors (B, L), or many latents are on."""
    sae_in = step_input.sae_in
    if _is_watched(self) or hooked(self.hook_sae_input) or sae_in.dim() != 2:
        return None, _encoder(self, sae_in)
    encoder = _encoder(self, self.process_sae_in(sae_in))
    return encoder.above(limit, positive=positive), encoder


def _decoded(self: Any, code: Code, rows: torch.Size) -> Tensor:
    """A code in units of 1 -> (..., d_out), through the hooks and what undoes the normalisation."""
    sae_out = ops.decode(code, self.W_dec, self.b_dec)
    sae_out = self.hook_sae_recons(sae_out.view(*rows, sae_out.shape[-1]))
    if _is_transcoder(self):
        return sae_out
    return self.reshape_fn_out(self.run_time_activation_norm_fn_out(sae_out), self.d_head)
