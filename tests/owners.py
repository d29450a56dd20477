"""What the tests of round trips with owners' packages share: an SAE of ours, and comparisons with objects of theirs."""

from collections.abc import Callable
from typing import Any

import torch
from their_files import D, K, L, Statement, drawn
from torch import Tensor, nn

from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

CLOSE: dict[str, float] = dict(rtol=1e-5, atol=1e-5)


def filled(theirs: nn.Module, scale: float = 0.3) -> Any:
    """Numbers in all biases and thresholds, and decoder rows of different norms where they are free."""
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "threshold" in name:
                parameter.copy_(torch.rand(parameter.shape))
            elif parameter.dim() == 1:
                parameter.copy_(drawn(*parameter.shape, scale=scale))
    return theirs.requires_grad_(False)


def ours(**changes: Any) -> SAE:
    """An SAE of ours with numbers in all biases."""
    sae = filled(SAE(SAEConfig(**(dict(d_in=D, n_latents=L, k=K) | changes)), seed=1))
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name in ("log_threshold", "W_skip"):
                parameter.copy_(drawn(*parameter.shape, scale=0.3) - 0.5)
        if not sae.config.unit_norm_decoder:
            sae.W_dec *= torch.rand(len(sae.W_dec), 1) + 0.5
    if sae.config.activation == "batchtopk":
        sae.get_buffer("threshold").fill_(0.4)
    return sae


def assert_alike(sae: SAE, encode: Callable[[Tensor], Tensor], decode: Callable[..., Tensor], x: Tensor) -> None:
    """Codes and reconstructions of ours and of a peer's own methods, both in fp32."""
    f, expected = sae.encode(x).detach(), encode(x)
    assert int((expected != 0).sum()) > len(x)
    torch.testing.assert_close(f, expected, **CLOSE)
    torch.testing.assert_close(sae.decode(f, x).detach(), decode(expected), **CLOSE)


def assert_stated(theirs: Statement, f: Tensor, x_hat: Tensor, x: Tensor) -> None:
    """The statement that `make test` holds us to is what the owner's own code computes."""
    code = theirs.encode(x.double())
    torch.testing.assert_close(f.double(), code, **CLOSE)
    torch.testing.assert_close(x_hat.double(), theirs.decode(code, x.double()), **CLOSE)
