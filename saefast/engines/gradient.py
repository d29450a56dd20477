"""What a pass over a batch reads, what it finds, and the sums and waits that it takes on the way."""

from dataclasses import dataclass

import torch
from torch import Tensor

from saefast.engines.config import TrainConfig
from saefast.engines.dead import DeadLatents
from saefast.engines.hot import HotLatents
from saefast.engines.weights import Scratch, Weights
from saefast.models.architecture import Architecture, At
from saefast.ops.code import Number
from saefast.ops.groups import Groups
from saefast.optim.state import RowGradient

# Sums of squares that fp32 holds with room to spare. Beyond them a batch is refused before anything else is done.
OVERFLOW = 1e30


@dataclass
class Model:
    """What a pass reads."""

    architecture: Architecture
    config: TrainConfig
    weights: Weights
    dead: DeadLatents
    hot: HotLatents | None
    mse_scale: float
    scratch: Scratch
    kept: dict[str, Tensor]
    """What the architecture keeps besides the parameters."""
    at: At
    wants_error: bool = False
    """Whether the step needs the residual, AuxK or not."""


@dataclass
class BlockGradient:
    """Dense gradient rows of latents that a block did: the hot ones, or AuxK's."""

    ids: Tensor
    """(H,) int32."""
    for_dec: Tensor
    """(H, D)."""
    for_enc: Tensor


@dataclass
class Gradient:
    """A batch's gradient, and what its step reports. The caller checks the loss before anything is written.

    Numbers stay on the device that computed them, so that the host waits once for all of them.
    """

    groups: Groups
    """Of the entries below; latents of a block have none."""
    for_dec: RowGradient
    for_enc: RowGradient
    blocks: list[BlockGradient]
    """No latent is in two of them."""
    b_enc: Tensor
    """(L,)."""
    b_dec: Tensor
    """(D,)."""
    since: Tensor
    """(L,) the dead-latent counters after the batch."""
    fired: Tensor
    """(L,) bool, the latents that fired in it."""
    kept: dict[str, Tensor]
    """The architecture's, after the batch."""
    code: Groups
    """Of the batch's whole code, AuxK's entries left out."""
    rows: int
    """Of the batch."""
    error: Tensor | None
    """(B, D) target - x_hat, where AuxK ran or the model wants it. Scratch: good until the next pass."""
    loss: Number
    fvu: Number
    auxk: Number
    l0: Number
    own: dict[str, Tensor]
    """Of the architecture's own parameters, by name."""
    penalty: Number = 0.0
    """The sparsity penalty with its coefficient."""
    coefficient: Number = 0.0


def serial_sum(values: Tensor) -> Number:
    """Σ values in float64 and in an order that does not depend on the number of threads."""
    if values.device.type != "cpu":
        return values.double().sum()
    return float(values.double().numpy().sum())


def fetched(*values: Number) -> list[float]:
    """The numbers, on the host, which waits once for those that lie on a GPU."""
    away = [v for v in values if isinstance(v, Tensor) and v.device.type != "cpu"]
    if not away:
        return [float(v) for v in values]
    # One after the other they would cost a wait each. In float64, which holds counts below 2**53 too.
    found = iter(torch.stack([v.double() for v in away]).tolist())
    return [next(found) if any(v is a for a in away) else float(v) for v in values]


def placed(mask: Tensor, n: int) -> Tensor:
    """(n,) ascending int64: where the n true values of mask (L,) are."""
    if mask.device.type == "cpu":
        return mask.nonzero().squeeze(1)
    # Their number is known, so the host need not wait for it again.
    return torch.searchsorted(mask.cumsum(0), torch.arange(1, n + 1, dtype=torch.int64, device=mask.device))
