"""sparsify's SparseCoder, accelerated (eai-sparsify 1.3.3): autoencoders and transcoders, skip, MultiTopK, AuxK.

sparsify drops the gradients that AuxK and MultiTopK have for the encoder, and lets gradients through where ReLU
clipped. Here they are those of the loss, unless `reproduce_bugs` asks for sparsify's.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from saefast.integrations.accelerate_ops import Encoder, decode
from saefast.integrations.accelerate_state import Later, state_of, with_late_item
from saefast.ops.code import Code

ROWS = 512


def encode(self: Any, x: Tensor) -> Any:
    """x (..., d_in) -> EncoderOutput: top_acts, top_indices (..., k), and pre_acts, which is made when it is read."""
    encoder = _encoder(self, x)
    code = _chosen(self, encoder)
    pre = Later(
        "pre_acts",
        lambda: encoder.dense().relu().view(*x.shape[:-1], self.num_latents),
        *(encoder.x, self.encoder.weight, self.encoder.bias),
    )
    acts, idx = (t.reshape(*x.shape[:-1], t.shape[-1]) for t in (code.acts, code.idx.long()))
    return with_late_item(_theirs(self, "EncoderOutput"), "pre_acts")(acts, idx, pre)


def decode_topk(self: Any, top_acts: Tensor, top_indices: Tensor) -> Tensor:
    """top_acts, top_indices (B, k) -> (B, d_in)."""
    assert self.W_dec is not None, "Decoder weight was not initialized."
    return decode(Code(top_acts.to(self.dtype), top_indices), self.W_dec, self.b_dec)


def forward(
    self: Any,
    x: Tensor,
    y: Tensor | None = None,
    *,
    dead_mask: Tensor | None = None,
    total_variance: Tensor | None = None,
) -> Any:
    """As SparseCoder.forward, in the weights' dtype: sparsify's own runs under bf16 autocast on a GPU."""
    assert self.W_dec is not None, "Decoder weight was not initialized."
    state, encoder = state_of(self), _encoder(self, x)
    many = _many(self, encoder) if self.cfg.multi_topk else None
    if many is not None and self.cfg.activation == "topk":
        code = Code(many.acts[:, : self.cfg.k], many.idx[:, : self.cfg.k])
    else:
        code = _chosen(self, encoder)
    target = x if y is None else y
    sae_out = decode(code, self.W_dec, self.b_dec)
    if self.W_skip is not None:
        sae_out = sae_out + x.to(self.dtype) @ self.W_skip.mT
    e = target - sae_out
    if total_variance is None:
        total_variance = (target - target.mean(0)).pow(2).sum()
    auxk_loss = _auxk_loss(self, encoder, e.detach(), dead_mask, total_variance)
    multi_topk_fvu = sae_out.new_tensor(0.0)
    if many is not None:
        if state.reproduce_bugs:
            many = many._replace(acts=many.acts.detach())
        # As in sparsify, what is returned then is MultiTopK's choice, and the reconstruction from that.
        code, sae_out = many, decode(many, self.W_dec, self.b_dec)
        multi_topk_fvu = (sae_out - target).pow(2).sum() / total_variance
    fvu = e.pow(2).sum() / total_variance
    return _theirs(self, "ForwardOutput")(sae_out, code.acts, code.idx.long(), fvu, auxk_loss, multi_topk_fvu)


@torch.no_grad()
def remove_parallel_gradient(self: Any) -> None:
    """Takes from W_dec's gradient what would change the norms of its rows, in place and without a matrix beside it."""
    assert self.W_dec is not None, "Decoder weight was not initialized."
    assert self.W_dec.grad is not None
    # Rows that stay in the caches between the two passes over them.
    for grad, W in zip(self.W_dec.grad.split(ROWS), self.W_dec.data.split(ROWS), strict=True):
        grad.addcmul_(W, (grad * W).sum(1, keepdim=True), value=-1)


def _theirs(self: Any, name: str) -> Any:
    """One of the names beside the class, which may be that of a subclass."""
    home = next(base for base in type(self).__mro__ if base.__name__ == state_of(self).kind)
    return getattr(sys.modules[home.__module__], name)


def _encoder(self: Any, x: Tensor) -> Encoder:
    flat = x.reshape(-1, x.shape[-1]).to(self.dtype)
    if not self.cfg.transcode:
        flat = flat - self.b_dec
    linear: nn.Linear = self.encoder
    return Encoder.of(flat, linear.weight, linear.bias, mixed=state_of(self).mixed)


def _chosen(self: Any, encoder: Encoder) -> Code:
    clip = not state_of(self).reproduce_bugs
    if self.cfg.activation == "groupmax":
        return encoder.group_max(self.cfg.k, clip=clip)
    return encoder.topk(self.cfg.k, clip=clip)


def _many(self: Any, encoder: Encoder) -> Code:
    """MultiTopK's choice."""
    return encoder.topk(4 * self.cfg.k, clip=not state_of(self).reproduce_bugs)


def _auxk_loss(self: Any, encoder: Encoder, e: Tensor, dead_mask: Tensor | None, total_variance: Tensor) -> Tensor:
    """AuxK: the best dead latents reconstruct the residual e (B, D)."""
    n_dead = 0 if dead_mask is None else int(dead_mask.sum())
    if dead_mask is None or n_dead == 0:
        return e.new_tensor(0.0)
    k_aux = e.shape[-1] // 2
    scale = min(n_dead / k_aux, 1.0)
    code = encoder.topk(min(k_aux, n_dead), dead_mask.nonzero().squeeze(1))
    if state_of(self).reproduce_bugs:
        code = code._replace(acts=code.acts.detach())
    return scale * (decode(code, self.W_dec) - e).pow(2).sum() / total_variance
