"""A crosscoder's L1 penalty shrinks each side of a latent by λ/2: predicted, found, and absent in BatchTopK.

A latent that is on at about 1 costs λ (‖d_A‖ + ‖d_B‖), and leaves (s - ‖d‖)² on each side, s being that side's true
norm. So each side is soft-thresholded by itself, ‖d‖ = max(0, s - λ/2), and one with s < λ/2 vanishes: the latent looks
exclusive to the other model (Minder et al. 2025, arXiv 2504.02922, call it complete shrinkage).
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import saefast
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

# Width of each model; features that both have alike, that the second has at WEAK, and that one of them has alone.
WIDTH, SHARED, WEAKER, ALONE, WEAK = 32, 20, 10, 5, 0.3
N = SHARED + WEAKER + 2 * ALONE
B, STEPS = 256, 500
FREE: dict[str, Any] = dict(decoder_norm="never", project_decoder_grad=False, loss="sum")


class World(NamedTuple):
    directions: Tensor
    """(N, 2, WIDTH) unit rows, of each feature in each model."""
    norms: Tensor
    """(N, 2) how strongly each model has it."""
    rows: Tensor


@pytest.fixture(scope="module")
def world() -> World:
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(N, 2, WIDTH, generator=generator), dim=2)
    norms = torch.ones(N, 2)
    norms[SHARED : SHARED + WEAKER, 1] = WEAK
    norms[SHARED + WEAKER : SHARED + WEAKER + ALONE, 1] = 0
    norms[SHARED + WEAKER + ALONE :, 0] = 0
    on = torch.rand(B * STEPS, N, generator=generator) < 0.05
    acts = on * (0.75 + 0.5 * torch.rand(B * STEPS, N, generator=generator))
    return World(directions, norms, acts @ (directions * norms[:, :, None]).flatten(1))


def trained(world: World, activation: str, **settings: Any) -> SAE:
    free = activation == "relu"
    config = SAEConfig(
        2 * WIDTH, 48, 2, activation=activation, crosscode_widths=(WIDTH, WIDTH), unit_norm_decoder=not free
    )
    train = dict(n_tokens=B * STEPS, n_epochs=1, batch_size=B, lr=1e-2, normalize="none", eval_every=0, save_every=0)
    return saefast.train(world.rows, config, saefast.TrainConfig(**train | settings | (FREE if free else {})))


def relative_norms(sae: SAE, world: World) -> tuple[Tensor, Tensor]:
    """Of the latent that stands for each feature: ‖d_B‖ / (‖d_A‖ + ‖d_B‖), and whether there is one (cosine > 0.9)."""
    W_dec = sae.W_dec.detach().view(-1, 2, WIDTH)
    strong = world.norms.argmax(dim=1)
    unit = torch.nn.functional.normalize(W_dec, dim=2)
    cosines = torch.stack([unit[:, m] @ world.directions[i, m] for i, m in enumerate(strong.tolist())])
    best = cosines.max(dim=1)
    norms = W_dec.norm(dim=2)[best.indices]
    return norms[:, 1] / norms.sum(1), best.values > 0.9


def exclusive(relative: Tensor) -> float:
    return float(((relative < 0.05) | (relative > 0.95)).double().mean())


@pytest.mark.parametrize("coef", [0.4, 0.7])
def test_each_side_is_thresholded_by_half_the_penalty(world: World, coef: float) -> None:
    relative, found = relative_norms(trained(world, "relu", sparsity_coef=coef, lr=5e-3), world)
    assert float(found.double().mean()) > 0.85
    kept = (world.norms - coef / 2).clamp_min(0)
    predicted = kept[:, 1] / kept.sum(1)
    for begin, end in ((0, SHARED), (SHARED, SHARED + WEAKER)):
        there = relative[begin:end][found[begin:end]]
        assert float(there.median()) == pytest.approx(float(predicted[begin]), abs=0.02)
        assert float(((there - predicted[begin]).abs() < 0.03).double().mean()) >= 0.9
    weak = relative[SHARED : SHARED + WEAKER][found[SHARED : SHARED + WEAKER]]
    # Twice their norm is 0.6: less than one penalty and more than the other.
    assert exclusive(weak) >= 0.95 if coef == 0.7 else exclusive(weak) <= 0.05
    assert exclusive(relative[SHARED + WEAKER :][found[SHARED + WEAKER :]]) == 1


def test_batchtopk_shrinks_nothing(world: World) -> None:
    relative, found = relative_norms(trained(world, "batchtopk"), world)
    assert float(found.double().mean()) > 0.95
    assert float(relative[:SHARED].mean()) == pytest.approx(0.5, abs=0.02)
    weak = relative[SHARED : SHARED + WEAKER]
    assert float(weak.mean()) == pytest.approx(WEAK / (1 + WEAK), abs=0.02)
    assert exclusive(weak) <= 0.05
    assert exclusive(relative[SHARED + WEAKER :]) >= 0.95
