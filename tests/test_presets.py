"""Every preset against the independent statement of its recipe in recipes_plain: 25 steps with dead latents forced."""

from typing import Any

import pytest
import recipes_plain as plain
import torch
from recipes_plain import STEPS, B, D, K, L, batches, distance
from torch import Tensor

from saefast.autograd_step import PARAMETERS, AutogradStep
from saefast.engine import StepStats
from saefast.recipe import preset
from saefast.sae import SAE

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


def start(
    name: str, dtype: str, data: list[Tensor], dead: str, *, low: float = 1.2, **overrides: Any
) -> tuple[AutogradStep, plain.Weights]:
    """An engine ready for its first step, and the same weights for the statement."""
    settings = OVERRIDES[name] | overrides
    sae_config, config = preset(name, D, L, K, engine="autograd", dtype=dtype, **settings)
    sae = SAE(sae_config, seed=1)
    engine = AutogradStep(sae, config, TOTAL)
    engine.initialise(data[0])
    with torch.no_grad():
        # Some latents start too low to be chosen and too high to be silent, so AuxK has work to do.
        sae.b_enc[:: LOW[dead]] -= low * sae.W_enc.norm(dim=1).mean()
    return engine, plain.Weights(*(getattr(sae, p) for p in PARAMETERS))


def assert_same(
    engine: AutogradStep, stats: list[StepStats], w: plain.Weights, records: list[plain.Record], tolerance: float
) -> None:
    assert len(stats) == len(records) == STEPS
    for ours, theirs in zip(stats, records, strict=True):
        assert float(ours.loss) == pytest.approx(theirs.loss, rel=tolerance)
        assert float(ours.auxk_loss) == pytest.approx(theirs.auxk, rel=tolerance, abs=1e-12)
    for name, theirs in zip(PARAMETERS, w.all(), strict=True):
        assert distance(getattr(engine.sae, name), theirs) < tolerance, name


def assert_dead(records: list[plain.Record], alive_first: int, dead: str, k_aux: int = D // 2) -> None:
    """The forced dead latents were there, not from the start, in the wanted number, and AuxK measured something."""
    assert all(r.n_dead == 0 for r in records[:alive_first])
    active = [r for r in records if r.n_dead > 0]
    assert len(active) > 15
    assert all(r.n_dead < L and r.auxk > 0 for r in active)
    counts = [r.n_dead for r in active]
    assert min(counts) < k_aux if dead == "few" else max(counts) > k_aux


def run(engine: AutogradStep, data: list[Tensor]) -> list[StepStats]:
    return [engine.step(x) for x in data]


@dtypes
@dead_counts
def test_openai(dtype: str, dead: str) -> None:
    data = batches(dtype)
    engine, w = start("openai", dtype, data, dead)
    mse_scale = 1 / ((data[0] - data[0].mean(0)) ** 2).mean().item()
    averages = [torch.zeros_like(t, requires_grad=False) for t in w.all()]
    records = plain.openai(w, data, k=K, k_aux=20, dead_steps=3, lr=1e-3, mse_scale=mse_scale, averages=averages)
    assert_same(engine, run(engine, data), w, records, TOLERANCES[dtype])
    assert_dead(records, 3, dead, k_aux=20)
    ema = engine.averaged()
    assert ema is not None
    for name, average in zip(PARAMETERS, averages, strict=True):
        assert distance(ema[name], average) < TOLERANCES[dtype], name


def sparsify_pair(
    dtype: str, *, auxk: float, multi: bool, buggy: bool, clipped: bool = False, dead: str = "many"
) -> tuple[AutogradStep, list[StepStats], plain.Weights, list[plain.Record]]:
    data = batches(dtype)
    changes: dict[str, Any] = dict(auxk_coef=auxk, multi_topk_coef=0.125 if multi else 0.0, reproduce_bugs=buggy)
    # With the bugs a latent is only dead when it is not even among the top 4k.
    engine, w = start("sparsify", dtype, data, dead, low=2.4, **changes)
    if clipped:
        # So low that most rows have fewer than k positive pre-activations.
        for b_enc in (engine.sae.b_enc, w.b_enc):
            b_enc.data -= 2.0
    lr = engine.config.peak_lr(L)
    assert lr == pytest.approx(2e-4 / (L / 2**14) ** 0.5)
    records = plain.sparsify(
        w, data, k=K, dead_tokens=3 * B, auxk_alpha=auxk, multi_topk=multi, lr=lr, warmup=WARMUP, total=TOTAL,
        buggy=buggy,
    )  # fmt: skip
    return engine, run(engine, data), w, records


@dtypes
def test_sparsify(dtype: str) -> None:
    engine, stats, w, records = sparsify_pair(dtype, auxk=0.0, multi=False, buggy=False)
    assert_same(engine, stats, w, records, TOLERANCES[dtype])


@dtypes
@dead_counts
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("buggy", [False, True])
def test_sparsify_with_auxk_and_multi_topk(dtype: str, buggy: bool, clipped: bool, dead: str) -> None:
    engine, stats, w, records = sparsify_pair(dtype, auxk=1 / 32, multi=True, buggy=buggy, clipped=clipped, dead=dead)
    assert_same(engine, stats, w, records, TOLERANCES[dtype])
    assert_dead(records, 4, dead)
    assert (float(stats[0].l0) < K) == clipped


@pytest.mark.parametrize("clipped", [False, True])
def test_the_bugs_of_sparsify_change_the_result(clipped: bool, seed: int) -> None:
    """MultiTopK and AuxK are on; the encoder ends elsewhere when it does not hear of them."""
    ends = []
    for buggy in (False, True):
        torch.manual_seed(seed)
        ends.append(sparsify_pair("float64", auxk=1 / 32, multi=True, buggy=buggy, clipped=clipped)[0].sae.W_enc)
    assert distance(*ends) > 1e-3


def test_a_missing_relu_derivative_alone_changes_the_result() -> None:
    """Without AuxK and MultiTopK the bugs show only where a latent is clipped."""
    ends = {}
    for clipped in (False, True):
        for buggy in (False, True):
            torch.manual_seed(3)
            ends[clipped, buggy] = sparsify_pair("float64", auxk=0.0, multi=False, buggy=buggy, clipped=clipped)[0].sae
    assert distance(ends[False, True].W_enc, ends[False, False].W_enc) == 0
    assert distance(ends[True, True].W_enc, ends[True, False].W_enc) > 1e-3


@dtypes
@dead_counts
def test_dictionary_learning(dtype: str, dead: str) -> None:
    data = batches(dtype)
    engine, w = start("dictionary_learning", dtype, data, dead)
    records = plain.dictionary_learning(
        w, data, k=K, dead_tokens=3 * B, lr=engine.config.peak_lr(L), warmup=WARMUP, decay_start=15, total=TOTAL
    )
    stats = run(engine, data)
    assert_same(engine, stats, w, records, TOLERANCES[dtype])
    assert_dead(records, 2, dead)
    assert max(float(s.grad_norm) for s in stats) > 1  # so clipping was at work


@dtypes
@dead_counts
def test_saelens(dtype: str, dead: str) -> None:
    # b_dec starts at 0 here, and off-centre data would leave most latents dead.
    data = batches(dtype, mean=0.1)
    engine, w = start("saelens", dtype, data, dead)
    with torch.no_grad():
        # Unequal decoder norms, so that ranking by pre · norm is not ranking by pre.
        scale = torch.linspace(0.8, 1.2, L, dtype=w.W_dec.dtype)[:, None]
        engine.sae.W_dec *= scale
        w.W_dec *= scale
    records = plain.saelens(w, data, k=K, dead_passes=5, lr=2e-4, warmup=WARMUP)
    stats = run(engine, data)
    assert_same(engine, stats, w, records, TOLERANCES[dtype])
    assert_dead(records, 6, dead)
    assert max(float(s.grad_norm) for s in stats) > 1
