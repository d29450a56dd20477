"""Every architecture in both engines against the statement of a peer's recipe in recipes_plain: 25 steps, dead latents.

dictionary_learning and SAELens have BatchTopK, and Matryoshka over it; over TopK it is their prefix loss on their TopK.
"""

from typing import Any

import pytest
from parity import (
    THRESHOLD_START,
    TOLERANCES,
    Case,
    assert_dead,
    assert_same,
    data_for,
    engines_and_dtypes,
    run_both,
)
from recipes_plain import STEPS, K, L, distance

WIDTHS = (32, 96, L)
KINDS: dict[str, dict[str, Any]] = {
    "batchtopk": dict(activation="batchtopk"),
    "matryoshka": dict(matryoshka=WIDTHS),
    "matryoshka of batchtopk": dict(activation="batchtopk", matryoshka=WIDTHS),
}
# Steps in which nothing can be dead yet.
ALIVE_FIRST = {"dictionary_learning": 2, "saelens": 6}
recipes = pytest.mark.parametrize("name", ALIVE_FIRST)


def case(name: str, dead: str = "many", shift: float = 0.0, **kind: Any) -> Case:
    if name == "dictionary_learning" and "activation" in kind:
        # The package's rule is "step > start", our setting the steps without a threshold.
        kind["threshold_start"] = THRESHOLD_START + 1
    return Case(name, dead, shift=shift, changes=tuple(kind.items()))


@engines_and_dtypes
@pytest.mark.parametrize("dead", ["few", "many"])
@pytest.mark.parametrize("kind", KINDS)
@recipes
def test_parity(name: str, kind: str, dead: str, engine: str, dtype: str) -> None:
    pair = run_both(case(name, dead, **KINDS[kind]), dtype, engine)
    assert_same(pair, TOLERANCES[dtype])
    assert_dead(pair.records, ALIVE_FIRST[name], dead)
    assert all(float(s.l0) == K for s in pair.stats)
    if "activation" in KINDS[kind]:
        first = THRESHOLD_START + 1 if name == "dictionary_learning" else 0
        assert [t < 0 for t in pair.thresholds] == [step < first for step in range(STEPS)]
        assert len(set(pair.thresholds[first:])) == STEPS - first


@engines_and_dtypes
@pytest.mark.parametrize("kind", KINDS)
def test_parity_where_fewer_than_k_a_token_are_positive(kind: str, engine: str, dtype: str) -> None:
    pair = run_both(case("dictionary_learning", shift=-3.0, **KINDS[kind]), dtype, engine)
    assert_same(pair, TOLERANCES[dtype])
    assert float(pair.stats[0].l0) < K


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_one_dictionary_is_no_matryoshka(activation: str) -> None:
    """To the bit: the loss is then the recipe's own."""
    nested, plain = (case("saelens", activation=activation, matryoshka=widths) for widths in ((L,), None))
    data = data_for(nested)
    engines = [one.start("float64", data)[0] for one in (nested, plain)]
    for engine in engines:
        for x in data[:5]:
            engine.step(x)
    assert distance(engines[0].sae.W_enc, engines[1].sae.W_enc) == 0
