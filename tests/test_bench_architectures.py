"""bench.architectures: that what it compares are the same maths, from the same start, at the sparsity it says."""

import pytest
import torch

from bench import architectures, architectures_child
from bench.architecture_kinds import Setting, dense, kinds, own_names
from bench.architectures import Settings, begin, recipe, synthetic

D, L, B, STEPS, K = 24, 64, 64, 6, 4
SETTINGS = Settings(L, B, STEPS, (K,), (K,), "cpu")
every_kind = pytest.mark.parametrize("name", kinds())


@every_kind
def test_both_sides_of_a_comparison_lose_the_same_at_every_step(name: str) -> None:
    kind = kinds()[name]
    x, target, *_ = synthetic(STEPS * B, D).of(kind)
    # Every row in every update, as dense Adam has it.
    exactly = kind._replace(train=dict(kind.train) | {"settle_every": 1})
    engine = begin(exactly, x.shape[1], K, SETTINGS)
    engine.initialise(x, target)
    start = {key: p.detach().clone() for key, p in engine.sae.named_parameters()}
    stats = [engine.step(*given) for given in zip(x.split(B), target.split(B), strict=True)]
    coefs = [float(one.sparsity_coef) for one in stats]
    statement = kind.dense(Setting(K, L, coefs.__getitem__, engine.config))
    trainer = dense.Trainer(own_names(kind, start), statement, recipe(engine, STEPS))
    losses = [float(trainer.step(*given)[0]) for given in zip(x.split(B), target.split(B), strict=True)]
    assert [float(one.loss) for one in stats] == pytest.approx(losses, rel=1e-4)
    engine.finish()
    for key, wanted in trainer.p.items():
        found, begun = (own_names(kind, named)[key] for named in (dict(engine.sae.named_parameters()), start))
        moved = (wanted - begun).abs().mean()
        assert moved > 0, key
        assert (found - wanted).abs().mean() < 0.02 * moved, key


@every_kind
@pytest.mark.parametrize("contender", architectures_child.CONTENDERS)
def test_what_is_timed_is_as_sparse_as_it_says(name: str, contender: str) -> None:
    step = architectures_child.CONTENDERS[contender](name, fresh=False, B=512, D=D, L=256, k=8, device="cpu")
    rows = architectures_child.step_child.batches(512, D, "cpu")[0]
    assert float(step(rows).l0) == pytest.approx(8, rel=0.15)


def test_a_fvu_is_judged_on_all_rows_and_against_the_target() -> None:
    target = torch.randn(architectures.BATCH + 7, 5)
    x = target * 2
    fvu, l0 = architectures.judged(lambda part: (part / 4, torch.tensor(float(len(part)))), x, target)
    centred = target - target.mean(0)
    assert fvu == pytest.approx(float((target / 2).square().sum() / centred.square().sum()), rel=1e-5)
    assert l0 == pytest.approx((architectures.BATCH**2 + 7**2) / (architectures.BATCH + 7))
