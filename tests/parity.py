"""An engine's run of a preset beside the independent statement of its recipe in recipes_plain, dead latents forced.

Used by the tests of the presets and by those of every architecture that a preset can train.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import recipes_plain as plain
import torch
from recipes_plain import STEPS, B, D, K, L, distance
from torch import Tensor

from saefast.engines.autograd import AutogradEngine
from saefast.engines.base import PARAMETERS
from saefast.engines.config import preset
from saefast.engines.engine import StepStats
from saefast.engines.fused import FusedEngine
from saefast.models.sae import SAE

TOTAL, WARMUP = 40, 4
# BatchTopK's threshold begins in the step after this one.
THRESHOLD_START = 5
# fp32: the bound. fp64: the same maths must agree to rounding, which no near miss in a formula does.
TOLERANCES = {"float32": 1e-5, "float64": 1e-11}
dtypes = pytest.mark.parametrize("dtype", TOLERANCES)

Engine = AutogradEngine | FusedEngine
# The fused engine is dense Adam's arithmetic where every row is in every update.
ENGINES: dict[str, Callable[..., Engine]] = {
    "autograd": AutogradEngine,
    "fused": lambda *args: FusedEngine(*args, settle_every=1, mixed=False),
    "fused mixed": lambda *args: FusedEngine(*args, settle_every=1, mixed=True),
}

# "fused mixed" differs from "fused" in fp32 alone.
engines_and_dtypes = pytest.mark.parametrize(
    ("engine", "dtype"),
    [(engine, dtype) for dtype in TOLERANCES for engine in ENGINES if (engine, dtype) != ("fused mixed", "float64")],
)

OVERRIDES: dict[str, dict[str, Any]] = {
    "openai": dict(dead_after=3, auxk_k=20, lr=1e-3),
    "sparsify": dict(dead_after=3 * B + 1, lr_warmup_steps=WARMUP),
    "dictionary_learning": dict(dead_after=3 * B, lr_warmup_steps=WARMUP, lr_decay_start=15),
    "saelens": dict(dead_after=6, lr_warmup_steps=WARMUP, lr=2e-4),
}


# One latent in so many starts low and dies: "few" stays below k_aux (AuxK takes all, and may be scaled down).
LOW = {"few": 30, "many": 2}
dead_counts = pytest.mark.parametrize("dead", LOW)


Statement = Callable[[plain.Weights, list[Tensor], Engine], list[plain.Record]]


def state_openai(w: plain.Weights, data: list[Tensor], engine: Engine) -> list[plain.Record]:
    scale = 1 / ((data[0] - data[0].mean(0)) ** 2).mean().item()
    return plain.openai(w, data, k=K, k_aux=20, dead_steps=3, lr=1e-3, mse_scale=scale)


def state_sparsify(w: plain.Weights, data: list[Tensor], engine: Engine) -> list[plain.Record]:
    c = engine.config
    return plain.sparsify(
        w, data, k=K, dead_tokens=3 * B, auxk_alpha=c.auxk_coef, multi_topk=c.multi_topk_coef > 0,
        lr=2e-4 / (L / 2**14) ** 0.5, warmup=WARMUP, total=TOTAL, buggy=c.reproduce_bugs,
    )  # fmt: skip


def kind(engine: Engine) -> dict[str, Any]:
    """What the SAE is, as the last two statements take it."""
    config = engine.sae.config
    return dict(batch=config.activation == "batchtopk", widths=config.matryoshka or ())


def state_dictionary_learning(w: plain.Weights, data: list[Tensor], engine: Engine) -> list[plain.Record]:
    return plain.dictionary_learning(
        w, data, k=K, dead_tokens=3 * B, lr=2e-4 / (L / 2**14) ** 0.5, warmup=WARMUP, decay_start=15, total=TOTAL,
        threshold_start=THRESHOLD_START, **kind(engine),
    )  # fmt: skip


def state_saelens(w: plain.Weights, data: list[Tensor], engine: Engine) -> list[plain.Record]:
    return plain.saelens(w, data, k=K, dead_passes=5, lr=2e-4, warmup=WARMUP, **kind(engine))


STATEMENTS: dict[str, Statement] = {
    "openai": state_openai,
    "sparsify": state_sparsify,
    "dictionary_learning": state_dictionary_learning,
    "saelens": state_saelens,
}


class Case(NamedTuple):
    """One setting of a recipe; hashable, so that its data is looked for once."""

    name: str
    dead: str = "many"
    low: float = 1.2
    """How far the low latents start below the others, in norms of an encoder row."""
    shift: float = 0.0
    """Added to every b_enc: far enough below 0, most rows have fewer than k positive pre-activations."""
    changes: tuple[tuple[str, Any], ...] = ()

    def start(self, dtype: str, data: list[Tensor], engine: str = "autograd") -> tuple[Engine, plain.Weights]:
        """An engine ready for its first step, and the same weights for the statement."""
        settings = OVERRIDES[self.name] | dict(self.changes)
        sae_config, config = preset(self.name, D, L, K, engine="autograd", dtype=dtype, **settings)
        sae = SAE(sae_config, seed=1)
        found = ENGINES[engine](sae, config, TOTAL)
        found.initialise(data[0])
        with torch.no_grad():
            # Some latents start too low to be chosen and too high to be silent, so AuxK has work to do.
            sae.b_enc[:: LOW[self.dead]] -= self.low * sae.W_enc.norm(dim=1).mean()
            sae.b_enc += self.shift
            if self.name == "saelens":
                # Unequal decoder norms, so that ranking by pre · norm is not ranking by pre.
                sae.W_dec *= torch.linspace(0.8, 1.2, L, dtype=sae.dtype)[:, None]
        return found, plain.Weights(*(getattr(sae, p) for p in PARAMETERS))


@cache
def data_for(case: Case) -> list[Tensor]:
    def run_statement(data: list[Tensor]) -> None:
        engine, w = case.start("float64", data)
        STATEMENTS[case.name](w, data, engine)

    # SAELens starts b_dec at 0, where off-centre data would leave most latents dead.
    return plain.clear_batches(run_statement, mean=0.1 if case.name == "saelens" else 1.0)


class Pair(NamedTuple):
    engine: Engine
    stats: list[StepStats]
    thresholds: list[float]
    """After each step; -1 where the SAE has none."""
    w: plain.Weights
    records: list[plain.Record]


def run_both(case: Case, dtype: str, engine: str = "autograd") -> Pair:
    data = [x.to(getattr(torch, dtype)) for x in data_for(case)]
    ours, w = case.start(dtype, data, engine)
    stats, thresholds = [], []
    for x in data:
        stats.append(ours.step(x))
        thresholds.append(float(getattr(ours.sae, "threshold", -1.0)))
    if engine != "autograd":
        # Rows of W_dec that nothing read lately are brought up to date.
        ours.finish()
    return Pair(ours, stats, thresholds, w, STATEMENTS[case.name](w, data, ours))


def assert_same(pair: Pair, tolerance: float) -> None:
    assert len(pair.stats) == len(pair.records) == STEPS
    for ours, theirs in zip(pair.stats, pair.records, strict=True):
        assert float(ours.loss) == pytest.approx(theirs.loss, rel=tolerance)
        assert float(ours.auxk_loss) == pytest.approx(theirs.auxk, rel=tolerance, abs=1e-12)
    for name, tensor in zip(PARAMETERS, pair.w.all(), strict=True):
        assert distance(getattr(pair.engine.sae, name), tensor) < tolerance, name
    # Thresholds are fp32 whatever the weights are, and activations some units large.
    assert pair.thresholds == pytest.approx([r.threshold for r in pair.records], rel=max(tolerance, 1e-6), abs=1e-6)


def assert_dead(records: list[plain.Record], alive_first: int, dead: str, k_aux: int = D // 2) -> None:
    """The forced dead latents were there, not from the start, in the wanted number, and AuxK measured something."""
    assert all(r.n_dead == 0 for r in records[:alive_first])
    active = [r for r in records if r.n_dead > 0]
    assert len(active) > 15
    assert all(r.n_dead < L and r.auxk > 0 for r in active)
    counts = [r.n_dead for r in active]
    assert min(counts) < k_aux if dead == "few" else max(counts) > k_aux
