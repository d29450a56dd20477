"""Three whole steps of the fused engine against the autograd engine in float64: the same weights, the same batches."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.step_child import batches
from saefast.engines.autograd import AutogradEngine
from saefast.engines.base import PARAMETERS
from saefast.engines.config import preset
from saefast.engines.fused import FusedEngine
from saefast.models.sae import SAE

# Weight of AuxK in the steps that have it; the preset has not.
AUXK = 1 / 32
# Figures of a step that are held against the other engine's, relative to it.
FIGURES = ("loss", "fvu", "l0", "dead_share", "auxk_loss", "grad_norm")
TOTAL = 100


class Kind(NamedTuple):
    """What differs between the fused engines, and how far their losses may be from dense Adam's."""

    tolerance: float
    settle_every: int = 1
    optimizer: str = "adam"
    hot: bool = False
    auxk: bool = False
    clip: float | None = None


# With every row in every update it is dense Adam's arithmetic in fp32. tests/engines/test_fused.py and
# tests/optim/test_lean.py bound what rows settled late and 8-bit moments cost in fifty steps, so in these three.
STEPS = {
    "dense": Kind(1e-4),
    "clipped": Kind(1e-4, clip=0.01),
    "settled": Kind(0.02, settle_every=2),
    "lean": Kind(0.1, settle_every=2, optimizer="adam-lean"),
    "hot": Kind(1e-4, settle_every=2, hot=True),
    "AuxK": Kind(1e-4, auxk=True),
}


def three_steps(name: str, size: tuple[int, int, int, int], device: str) -> dict[str, Any]:
    kind = STEPS[name]
    B, D, L, k = size
    data = batches(B, D, device)[:3]
    ours = fused(kind, D, L, k, device)
    dense: FusedEngine | AutogradEngine = autograd(kind, D, L, k, device)
    if kind.hot:
        # Hot latents need rows that are settled late, so it is compared with the same engine that has none hot.
        dense = fused(kind, D, L, k, device)
        make_hot(ours, data[0], max(8, L // 16))
    dense.sae.load_state_dict(ours.sae.state_dict())
    found = []
    for x in data:
        if kind.auxk:
            for engine in (ours, dense):
                make_dead(engine)
        found.append((ours.step(x), dense.step(x)))
    errors = {figure: max(apart(getattr(a, figure), getattr(b, figure)) for a, b in found) for figure in FIGURES}
    worst = max(errors["loss"], errors["fvu"])
    if kind.auxk and not float(found[0][1].auxk_loss) > 0:
        return {"outcome": "failed", "message": "AuxK did not run, so nothing was compared"}
    weights = {n: apart(getattr(ours.sae, n), getattr(dense.sae, n)) for n in PARAMETERS}
    return {
        "outcome": "ok" if worst <= kind.tolerance else "failed",
        "tolerance": kind.tolerance,
        "relative errors": errors,
        "weights": weights,
        "losses": [[float(a.loss), float(b.loss)] for a, b in found],
    }


def fused(kind: Kind, D: int, L: int, k: int, device: str, **settings: Any) -> FusedEngine:
    dtype = "bfloat16" if kind.optimizer == "adam-lean" else "float32"
    settings |= dict(optimizer=kind.optimizer, dtype=dtype, max_grad_norm=kind.clip, auxk_coef=AUXK * kind.auxk)
    sae_config, config = preset("saefast", D, L, k, **settings)
    # No latent fires so often that it becomes hot by itself: make_hot says which ones are.
    share = 1.0 if kind.hot else None
    return FusedEngine(
        SAE(sae_config, seed=0, device=device), config, TOTAL, settle_every=kind.settle_every, hot_share=share
    )


def autograd(kind: Kind, D: int, L: int, k: int, device: str) -> AutogradEngine:
    settings: dict[str, Any] = dict(max_grad_norm=kind.clip, auxk_coef=AUXK * kind.auxk)
    sae_config, config = preset("saefast", D, L, k, engine="autograd", dtype="float64", **settings)
    return AutogradEngine(SAE(sae_config, seed=0, device=device), config, TOTAL)


def make_hot(engine: FusedEngine, x: Tensor, n: int) -> None:
    """Puts the n latents that fire most on x (B, D) into the dense block, as if they had been counted for long."""
    assert engine.hot is not None
    _, idx = engine.sae.encode_sparse(x)
    counts = torch.bincount(idx.flatten().long(), minlength=len(engine.hot.slot))
    ids = counts.argsort(descending=True, stable=True)[:n].sort().values
    engine.hot.slot.fill_(-1)
    engine.hot.slot[ids] = torch.arange(n, dtype=torch.int32, device=ids.device)
    engine.hot.loaded()


def make_dead(engine: FusedEngine | AutogradEngine, every: int = 2) -> None:
    """Every second latent has not fired for so long that AuxK takes it up, unless it fires in the batch to come."""
    engine.dead.since[::every] = engine.config.dead_after


def apart(found: Any, expected: Any) -> float:
    a, b = (torch.as_tensor(value).detach().double() for value in (found, expected))
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
