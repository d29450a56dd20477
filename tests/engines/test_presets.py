"""Every preset against the independent statement of its recipe in recipes_plain: 25 steps with dead latents forced."""

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
from saefast.models.sae import SAE

TOTAL, WARMUP = 40, 4
# fp32: the bound. fp64: the same maths must agree to rounding, which no near miss in a formula does.
TOLERANCES = {"float32": 1e-5, "float64": 1e-11}
dtypes = pytest.mark.parametrize("dtype", TOLERANCES)

OVERRIDES: dict[str, dict[str, Any]] = {
    "openai": dict(dead_after=3, auxk_k=20, lr=1e-3),
    "sparsify": dict(dead_after=3 * B + 1, lr_warmup_steps=WARMUP),
    "dictionary_learning": dict(dead_after=3 * B, lr_warmup_steps=WARMUP, lr_decay_start=15),
    "saelens": dict(dead_after=6, lr_warmup_steps=WARMUP, lr=2e-4),
}


# One latent in so many starts low and dies: "few" stays below k_aux (AuxK takes all, and may be scaled down).
LOW = {"few": 30, "many": 2}
dead_counts = pytest.mark.parametrize("dead", LOW)


Statement = Callable[[plain.Weights, list[Tensor], AutogradEngine], list[plain.Record]]


def state_openai(w: plain.Weights, data: list[Tensor], engine: AutogradEngine) -> list[plain.Record]:
    scale = 1 / ((data[0] - data[0].mean(0)) ** 2).mean().item()
    return plain.openai(w, data, k=K, k_aux=20, dead_steps=3, lr=1e-3, mse_scale=scale)


def state_sparsify(w: plain.Weights, data: list[Tensor], engine: AutogradEngine) -> list[plain.Record]:
    c = engine.config
    return plain.sparsify(
        w, data, k=K, dead_tokens=3 * B, auxk_alpha=c.auxk_coef, multi_topk=c.multi_topk_coef > 0,
        lr=2e-4 / (L / 2**14) ** 0.5, warmup=WARMUP, total=TOTAL, buggy=c.reproduce_bugs,
    )  # fmt: skip


def state_dictionary_learning(w: plain.Weights, data: list[Tensor], engine: AutogradEngine) -> list[plain.Record]:
    lr = 2e-4 / (L / 2**14) ** 0.5
    return plain.dictionary_learning(w, data, k=K, dead_tokens=3 * B, lr=lr, warmup=WARMUP, decay_start=15, total=TOTAL)


def state_saelens(w: plain.Weights, data: list[Tensor], engine: AutogradEngine) -> list[plain.Record]:
    return plain.saelens(w, data, k=K, dead_passes=5, lr=2e-4, warmup=WARMUP)


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

    def start(self, dtype: str, data: list[Tensor]) -> tuple[AutogradEngine, plain.Weights]:
        """An engine ready for its first step, and the same weights for the statement."""
        settings = OVERRIDES[self.name] | dict(self.changes)
        sae_config, config = preset(self.name, D, L, K, engine="autograd", dtype=dtype, **settings)
        sae = SAE(sae_config, seed=1)
        engine = AutogradEngine(sae, config, TOTAL)
        engine.initialise(data[0])
        with torch.no_grad():
            # Some latents start too low to be chosen and too high to be silent, so AuxK has work to do.
            sae.b_enc[:: LOW[self.dead]] -= self.low * sae.W_enc.norm(dim=1).mean()
            sae.b_enc += self.shift
            if self.name == "saelens":
                # Unequal decoder norms, so that ranking by pre · norm is not ranking by pre.
                sae.W_dec *= torch.linspace(0.8, 1.2, L, dtype=sae.dtype)[:, None]
        return engine, plain.Weights(*(getattr(sae, p) for p in PARAMETERS))


@cache
def data_for(case: Case) -> list[Tensor]:
    def run_statement(data: list[Tensor]) -> None:
        engine, w = case.start("float64", data)
        STATEMENTS[case.name](w, data, engine)

    # SAELens starts b_dec at 0, where off-centre data would leave most latents dead.
    return plain.clear_batches(run_statement, mean=0.1 if case.name == "saelens" else 1.0)


class Pair(NamedTuple):
    engine: AutogradEngine
    stats: list[StepStats]
    w: plain.Weights
    records: list[plain.Record]


def run_both(case: Case, dtype: str) -> Pair:
    data = [x.to(getattr(torch, dtype)) for x in data_for(case)]
    engine, w = case.start(dtype, data)
    return Pair(engine, [engine.step(x) for x in data], w, STATEMENTS[case.name](w, data, engine))


def assert_same(pair: Pair, tolerance: float) -> None:
    assert len(pair.stats) == len(pair.records) == STEPS
    for ours, theirs in zip(pair.stats, pair.records, strict=True):
        assert float(ours.loss) == pytest.approx(theirs.loss, rel=tolerance)
        assert float(ours.auxk_loss) == pytest.approx(theirs.auxk, rel=tolerance, abs=1e-12)
    for name, tensor in zip(PARAMETERS, pair.w.all(), strict=True):
        assert distance(getattr(pair.engine.sae, name), tensor) < tolerance, name


def assert_dead(records: list[plain.Record], alive_first: int, dead: str, k_aux: int = D // 2) -> None:
    """The forced dead latents were there, not from the start, in the wanted number, and AuxK measured something."""
    assert all(r.n_dead == 0 for r in records[:alive_first])
    active = [r for r in records if r.n_dead > 0]
    assert len(active) > 15
    assert all(r.n_dead < L and r.auxk > 0 for r in active)
    counts = [r.n_dead for r in active]
    assert min(counts) < k_aux if dead == "few" else max(counts) > k_aux


@dtypes
@dead_counts
def test_openai(dtype: str, dead: str) -> None:
    pair = run_both(Case("openai", dead), dtype)
    assert_same(pair, TOLERANCES[dtype])
    assert_dead(pair.records, 3, dead, k_aux=20)
    ema = pair.engine.averaged()
    assert ema is not None
    for name, average in zip(PARAMETERS, pair.w.averages, strict=True):
        assert distance(ema[name], average) < TOLERANCES[dtype], name


@dtypes
def test_sparsify(dtype: str) -> None:
    assert_same(run_both(Case("sparsify"), dtype), TOLERANCES[dtype])


def sparsify_case(*, auxk: bool, buggy: bool, clipped: bool, dead: str = "many") -> Case:
    """With its bugs a latent is only dead when it is not even among the top 4k, so the low ones start far down."""
    changes = dict(auxk_coef=1 / 32, multi_topk_coef=1 / 8) if auxk else {}
    changes |= dict(reproduce_bugs=buggy)
    return Case("sparsify", dead, low=2.4, shift=-2.0 if clipped else 0.0, changes=tuple(changes.items()))


@dtypes
@dead_counts
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("buggy", [False, True])
def test_sparsify_with_auxk_and_multi_topk(dtype: str, buggy: bool, clipped: bool, dead: str) -> None:
    pair = run_both(sparsify_case(auxk=True, buggy=buggy, clipped=clipped, dead=dead), dtype)
    assert_same(pair, TOLERANCES[dtype])
    assert_dead(pair.records, 4, dead)
    assert (float(pair.stats[0].l0) < K) == clipped


def encoders_with_and_without_bugs(auxk: bool, clipped: bool) -> list[Tensor]:
    """W_enc after the same data, with the right gradients and with sparsify's."""
    cases = [sparsify_case(auxk=auxk, buggy=buggy, clipped=clipped) for buggy in (False, True)]
    data = data_for(cases[0])
    engines = [case.start("float64", data)[0] for case in cases]
    for engine in engines:
        for x in data:
            engine.step(x)
    return [engine.sae.W_enc for engine in engines]


@pytest.mark.parametrize("clipped", [False, True])
def test_the_bugs_of_sparsify_change_the_result(clipped: bool) -> None:
    """MultiTopK and AuxK are on; the encoder ends elsewhere when it gets no gradient from them."""
    assert distance(*encoders_with_and_without_bugs(auxk=True, clipped=clipped)) > 1e-3


def test_a_missing_relu_derivative_alone_changes_the_result() -> None:
    """Without AuxK and MultiTopK the bugs show only where a latent is clipped."""
    assert distance(*encoders_with_and_without_bugs(auxk=False, clipped=False)) == 0
    assert distance(*encoders_with_and_without_bugs(auxk=False, clipped=True)) > 1e-3


@dtypes
@dead_counts
def test_dictionary_learning(dtype: str, dead: str) -> None:
    pair = run_both(Case("dictionary_learning", dead), dtype)
    assert_same(pair, TOLERANCES[dtype])
    assert_dead(pair.records, 2, dead)
    assert max(float(s.grad_norm) for s in pair.stats) > 1  # so clipping was at work


@dtypes
@dead_counts
def test_saelens(dtype: str, dead: str) -> None:
    pair = run_both(Case("saelens", dead), dtype)
    assert_same(pair, TOLERANCES[dtype])
    assert_dead(pair.records, 6, dead)
    assert max(float(s.grad_norm) for s in pair.stats) > 1
