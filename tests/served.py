"""SAEs of every kind that serves, in float64 with weights that differ in every entry, for tests of what uses them."""

from typing import Any

import torch

from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

D, L = 12, 48
_CONFIGS: dict[str, dict[str, Any]] = {
    "topk": dict(),
    "topk in norms": dict(rescale_acts_by_decoder_norm=True),
    "topk not centred": dict(apply_b_dec_to_input=False),
    "batchtopk without a threshold": dict(activation="batchtopk"),
    "batchtopk": dict(activation="batchtopk"),
    "batchtopk in norms": dict(activation="batchtopk", rescale_acts_by_decoder_norm=True),
    "groupmax": dict(activation="groupmax"),
    "jumprelu": dict(activation="jumprelu"),
    "gated": dict(activation="gated"),
    "relu": dict(activation="relu"),
    "matryoshka topk": dict(matryoshka=(8, 24)),
    "matryoshka jumprelu": dict(activation="jumprelu", matryoshka=(8, 24)),
    "hierarchical": dict(hierarchical=(2, 4)),
    "layer norm": dict(input_norm="layer_norm"),
    "layer norm relu": dict(input_norm="layer_norm", activation="relu"),
    "constant norm": dict(input_norm="constant_norm", activation="jumprelu"),
    "transcoder": dict(d_out=7),
    "transcoder relu with a skip": dict(d_out=7, skip=True, activation="relu"),
    "crosscoder": dict(crosscode_widths=(5, 7)),
    "crosscoder relu": dict(crosscode_widths=(5, 7), activation="relu"),
    "crosscoder batchtopk": dict(crosscode_widths=(5, 7), activation="batchtopk"),
    "cross-layer transcoder": dict(n_layers=2, d_out=8),
    "cross-layer transcoder, all positive": dict(n_layers=2, d_out=8, activation="relu"),
}
KINDS = tuple(_CONFIGS)
# Each latent is on by itself: the others' rows of W_enc are not needed.
ALONE = {kind for kind in KINDS if any(name in kind for name in ("relu", "gated", "constant")) or kind in (
    "batchtopk", "batchtopk in norms", "crosscoder batchtopk", "cross-layer transcoder, all positive")}  # fmt: skip


@torch.no_grad()
def sae(kind: str, **more: Any) -> SAE:
    """k = 4. more: fields of the config instead; d_in and n_latents are D and L."""
    made = SAE(SAEConfig(**{**dict(d_in=D, n_latents=L, k=4, dtype="float64"), **_CONFIGS[kind], **more}), seed=1)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in made.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if name in ("W_enc", "W_dec"):
            parameter.mul_(1 + 0.5 * noise)
        else:
            parameter.add_(0.3 * noise)
    if "threshold" in dict(made.named_buffers()) and "without" not in kind:
        made.threshold.fill_(0.4)
    return made


def rows(sae: SAE, *shape: int, seed: int = 0) -> torch.Tensor:
    """(*shape, d_in) of the SAE's dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, sae.config.d_in, generator=generator, dtype=torch.float64).to(sae.dtype)
