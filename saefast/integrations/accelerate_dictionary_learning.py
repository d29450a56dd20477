"""dictionary_learning's dictionaries, and the loss of its trainers, accelerated (dictionary-learning 0.1.0).

A trainer's loss takes the dictionary's activations as dense (B, dict_size) tensors, so it is replaced with them. What a
trainer does after the backward pass stays its own.
"""

from collections import namedtuple
from typing import Any

import torch
from torch import Tensor, nn

from saefast.integrations import accelerate_ops as ops
from saefast.integrations.accelerate_jumprelu import jump, step
from saefast.integrations.accelerate_ops import Encoder
from saefast.integrations.accelerate_state import hooked, latents, state_of
from saefast.ops.code import Code

LossLog = namedtuple("LossLog", ["x", "x_hat", "f", "losses"])
JumpReLULossLog = namedtuple("JumpReLULossLog", ["x", "recon", "f", "losses"])


# A dictionary's weights, of either naming.


def _encoder(ae: Any, x: Tensor, *, centred: bool = True) -> Encoder:
    """x (..., activation_dim)."""
    if hasattr(ae, "encoder"):
        W_enc, b_enc = latents(ae, "encoder.weight", is_turned=False), ae.encoder.bias
    else:
        W_enc, b_enc = latents(ae, "W_enc", is_turned=True), ae.b_enc
    flat = x.reshape(-1, x.shape[-1]).to(W_enc.dtype)
    return Encoder.of(flat - ae.b_dec if centred else flat, W_enc, b_enc, mixed=state_of(ae).mixed)


def _W_dec(ae: Any) -> Tensor:
    """(dict_size, activation_dim)."""
    return latents(ae, "decoder.weight", is_turned=True) if hasattr(ae, "decoder") else ae.W_dec


def _is_watched(ae: Any) -> bool:
    """Whether hooks on the linear layers want what goes through them."""
    return hooked(*(getattr(ae, name) for name in ("encoder", "decoder") if hasattr(ae, name)))


def _own(thing: Any, method: str, *args: Any, **kwargs: Any) -> Any:
    """dictionary_learning's own method."""
    return getattr(type(thing), method)(thing, *args, **kwargs)


def _served(ae: Any, x: Tensor, *, by_threshold: bool | None = None) -> Code | None:
    """The code of x; None where many latents are on.

    Args:
        by_threshold: whether all above the dictionary's threshold are on; None: what its encode() does by itself.
    """
    if isinstance(getattr(ae, "threshold", None), nn.Parameter):  # JumpReLU
        return _encoder(ae, x, centred=ae.apply_b_dec_to_input).above(ae.threshold.detach().clamp_min(0))
    by_rows = type(ae).__name__ == "AutoEncoderTopK"
    if not by_rows if by_threshold is None else by_threshold:
        return _active(ae, _encoder(ae, x).above(max(float(ae.threshold), 0.0)))
    encoder = _encoder(ae, x)
    if by_rows:
        return encoder.topk(int(ae.k))
    # The first dimension alone is the batch's size here, as in dictionary_learning.
    return _active(ae, encoder.batch_topk(int(ae.k) * len(x)))


def _active(ae: Any, code: Code | None) -> Code | None:
    """Matryoshka: latents of groups that are not active yet are off."""
    if code is None or not hasattr(ae, "active_groups"):
        return code
    return ops.between(code, 0, int(ae.group_indices[ae.active_groups]))


def _shaped(rows: Tensor, x: Tensor) -> Tensor:
    """rows (B, n) as (..., n), x being (..., D)."""
    return rows.view(*x.shape[:-1], rows.shape[-1])


# What a dictionary is called with.


def encode(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """x (..., activation_dim) -> dense activations (..., dict_size); with other options, what their own code gives."""
    by_threshold = kwargs.get("use_threshold")
    others = {name: value for name, value in kwargs.items() if name != "use_threshold"}
    if _is_watched(self) or args or any(others.values()):
        return _own(self, "encode", x, *args, **kwargs)
    code = _served(self, x, by_threshold=by_threshold)
    if code is None:
        return _own(self, "encode", x, **kwargs)
    return ops.marked(_shaped(ops.dense(code, len(_W_dec(self))), x), code)


def decode(self: Any, f: Tensor) -> Tensor:
    """Dense activations (..., dict_size) -> (..., activation_dim): sparsely if they are as encode() returned them."""
    code = None if _is_watched(self) else ops.code_of(f)
    if code is None:
        return _own(self, "decode", f)
    return _shaped(ops.decode(code, _W_dec(self), self.b_dec), f)


def forward(self: Any, x: Tensor, output_features: bool = False) -> Any:
    code = None if _is_watched(self) else _served(self, x)
    if code is None:
        return _own(self, "forward", x, output_features=output_features)
    W_dec = _W_dec(self)
    x_hat = _shaped(ops.decode(code, W_dec, self.b_dec), x)
    return (x_hat, _shaped(ops.dense(code, len(W_dec)), x)) if output_features else x_hat


# What a trainer asks of it.


def topk_loss(self: Any, x: Tensor, step: Any = None, logging: bool = False) -> Any:
    """TopKTrainer's loss: Σ e² a token, and AuxK."""
    ae = self.ae
    if _is_watched(ae) or x.dim() != 2:
        return _own(self, "loss", x, step=step, logging=logging)
    encoder = _encoder(ae, x)
    code = encoder.topk(int(ae.k))
    if step > self.threshold_start_step:
        self.update_threshold(code.acts)
    x_hat = ops.decode(code, _W_dec(ae), ae.b_dec)
    self.effective_l0 = code.acts.shape[1]
    _count(self, code.idx.flatten(), len(x))
    e = x - x_hat
    l2_loss = e.pow(2).sum(dim=-1).mean()
    auxk_loss = _auxk_loss(self, encoder, e.detach()) if self.auxk_alpha > 0 else l2_loss.new_tensor(0.0)
    loss = l2_loss + self.auxk_alpha * auxk_loss
    if not logging:
        return loss
    return _log(LossLog, (x, x_hat, code), len(_W_dec(ae)), l2_loss=l2_loss, auxk_loss=auxk_loss, loss=loss)


def batch_topk_loss(self: Any, x: Tensor, step: Any = None, logging: bool = False) -> Any:
    """BatchTopKTrainer's loss: the same for the k · B best of a batch."""
    if _is_watched(self.ae) or x.dim() != 2:
        return _own(self, "loss", x, step=step, logging=logging)
    encoder = _encoder(self.ae, x)
    code = _of_batch(self, encoder, step)
    x_hat = ops.decode(code, _W_dec(self.ae), self.ae.b_dec)
    e = x - x_hat
    l2_loss = e.pow(2).sum(dim=-1).mean()
    auxk_loss = _auxk_loss(self, encoder, e.detach())
    loss = l2_loss + self.auxk_alpha * auxk_loss
    if not logging:
        return loss
    return _log(LossLog, (x, x_hat, code), len(_W_dec(self.ae)), l2_loss=l2_loss, auxk_loss=auxk_loss, loss=loss)


def matryoshka_loss(self: Any, x: Tensor, step: Any = None, logging: bool = False) -> Any:
    """MatryoshkaBatchTopKTrainer's loss: the mean over groups of each prefix's weighted Σ e², and AuxK on the last."""
    ae = self.ae
    if x.dim() != 2:
        return _own(self, "loss", x, step=step, logging=logging)
    encoder = _encoder(ae, x)
    code = _of_batch(self, encoder, step)
    widths = [int(end) for end in ae.group_indices[1 : ae.active_groups + 1]]
    nested = ops.nested(code, ae.W_dec, ae.b_dec, widths)
    weights = self.group_weights[: ae.active_groups]
    l2_losses = torch.stack(
        [(x - part).pow(2).sum(dim=-1).mean() * weight for part, weight in zip(nested, weights, strict=True)]
    )
    auxk_loss = _auxk_loss(self, encoder, (x - nested[-1]).detach())
    l2_loss = l2_losses.mean()
    loss = l2_loss + self.auxk_alpha * auxk_loss
    if not logging:
        return loss
    losses = dict(l2_loss=l2_loss, auxk_loss=auxk_loss, loss=loss)
    losses |= dict(min_l2_loss=l2_losses.min(), max_l2_loss=l2_losses.max())
    return _log(LossLog, (x, nested[-1], code), len(ae.W_dec), **losses)


def jumprelu_loss(self: Any, x: Tensor, step: Any, logging: bool = False, **_: Any) -> Any:
    """JumpReluTrainer's loss: Σ e² a token, and how far L0 is from its target. Dense while many latents are on."""
    ae, given = self.ae, x
    x = x.to(ae.W_enc.dtype)
    limit = ae.threshold.detach() - self.bandwidth / 2
    # A threshold below 0 has all latents count as on.
    is_served = x.dim() == 2 and not bool((ae.threshold < 0).any())
    encoder = _encoder(ae, x, centred=False) if is_served else None
    found = None if encoder is None else encoder.above(limit, positive=False)
    if found is None or found.pre is None:
        return _own(self, "loss", given, step, logging=logging)
    code, l0 = _jumped(self, found)
    with torch.no_grad():
        _count(self, code.idx[code.acts > 0], len(x))
        self.dead_features = (self.num_tokens_since_fired > self.dead_feature_threshold).sum().item()
    recon = ops.decode(code, ae.W_dec, ae.b_dec)
    recon_loss = (x - recon).pow(2).sum(dim=-1).mean()
    scale = self.sparsity_coefficient * self.sparsity_warmup_fn(step)
    loss = recon_loss + scale * ((l0 / self.target_l0) - 1).pow(2)
    if not logging:
        return loss
    return _log(JumpReLULossLog, (x, recon, code), len(ae.W_dec), l2_loss=recon_loss, loss=loss)


def _jumped(self: Any, found: Code) -> tuple[Code, Tensor]:
    """The code of all entries above their threshold or just below it, and L0 as the trainer differentiates it.

    The trainer asks of an activation, not of a pre-activation, whether it is near the threshold. One that is off is 0:
    near every threshold below half a bandwidth. All of a latent's count alike, so they need not be looked at singly.
    """
    threshold, there = self.ae.threshold, found.pre
    assert there is not None
    at = threshold.to(found.acts.dtype)[found.idx.long()]
    acts = there * jump(found.acts, at, self.bandwidth)
    on = there * step(acts.detach(), at, self.bandwidth)
    B = len(acts)
    in_code = threshold.new_zeros(len(threshold)).index_add_(0, found.idx.flatten().long(), there.flatten())
    silent = (B - in_code) * ((threshold.detach() / self.bandwidth).abs() < 0.5)
    # Its value is 0: an estimated derivative alone.
    slope = -(silent / self.bandwidth) * (threshold - threshold.detach())
    return Code(acts, found.idx), (on.sum() + slope.sum()) / B


def _of_batch(self: Any, encoder: Encoder, step: Any) -> Code:
    """BatchTopK's code of a training batch; the trainer's counts and threshold follow it."""
    code = _active(self.ae, encoder.batch_topk(int(self.ae.k) * len(encoder.x)))
    assert code is not None
    if step > self.threshold_start_step:
        self.update_threshold(code.acts)
    self.effective_l0 = self.k
    _count(self, code.idx[code.acts > 0], len(encoder.x))
    return code


def _count(self: Any, fired: Tensor, n_tokens: int) -> None:
    self.num_tokens_since_fired += n_tokens
    self.num_tokens_since_fired[fired.long()] = 0


def _auxk_loss(self: Any, encoder: Encoder, residual: Tensor) -> Tensor:
    """AuxK over the variance of the residual (B, D)."""
    dead = self.num_tokens_since_fired >= self.dead_feature_threshold
    self.dead_features = int(dead.sum())
    if self.dead_features == 0:
        self.pre_norm_auxk_loss = -1
        return torch.tensor(0, dtype=residual.dtype, device=residual.device)
    code = encoder.topk(min(self.top_k_aux, self.dead_features), dead.nonzero().squeeze(1))
    left = residual.float() - ops.decode(code, _W_dec(self.ae)).float()
    self.pre_norm_auxk_loss = left.pow(2).sum(dim=-1).mean()
    spread = (residual.float() - residual.mean(dim=0).float()).pow(2).sum(dim=-1).mean()
    return (self.pre_norm_auxk_loss / spread).nan_to_num(0.0)


def _log(kind: Any, found: tuple[Tensor, Tensor, Code], n_latents: int, **losses: Tensor) -> Any:
    """What a trainer logs: x, the reconstruction, dense activations, and its losses as numbers."""
    x, x_hat, code = found
    return kind(x, x_hat, ops.dense(code, n_latents), {name: value.item() for name, value in losses.items()})
