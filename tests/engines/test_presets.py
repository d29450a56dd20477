"""Every preset against the independent statement of its recipe in recipes_plain: 25 steps with dead latents forced."""

import pytest
from parity import TOLERANCES, Case, assert_dead, assert_same, data_for, dead_counts, dtypes, run_both
from recipes_plain import K, distance
from torch import Tensor

from saefast.engines.base import PARAMETERS


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
