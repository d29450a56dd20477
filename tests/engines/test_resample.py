"""Resampling: how latents that fire on nothing begin anew, alike in both engines, and what it leaves alone."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from saefast.engines.autograd import AutogradEngine
from saefast.engines.base import PARAMETERS
from saefast.engines.config import TrainConfig
from saefast.engines.fused import FusedEngine
from saefast.engines.recipe import choose
from saefast.engines.resample import MOST, due, fresh_latents
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.optim.state import LEAN_BLOCK, LeanMatrix, Matrix

D, L, K, B = 24, 96, 4, 64
TOTAL = 40
EVERY = 3
# Latents that the tests make silent at the start.
LOW = slice(0, None, 3)
BASE: dict[str, Any] = dict(
    lr=1e-3, lr_warmup_steps=0, dead_after=4 * B, resample_every=EVERY, resample_until=1.0, batch_size=B
)


def batches(n: int = 30, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    sources = torch.randn(60, D)
    code = torch.rand(n, B, 60) * (torch.rand(n, B, 60) < 0.08)
    return list((code @ sources + 0.1 * torch.randn(n, B, D) + torch.randn(D)).to(dtype))


def engine(kind: str, first: Tensor, sae: dict[str, Any] | None = None, **settings: Any) -> Any:
    """An initialised engine, a third of whose latents are far too low to fire. kind: "autograd", "fused" or "lean"."""
    lean = kind == "lean"
    dtype = "bfloat16" if lean else str(first.dtype).removeprefix("torch.")
    config = TrainConfig(**(BASE | dict(optimizer="adam-lean" if lean else "adam") | settings))
    made = AutogradEngine if kind == "autograd" else FusedEngine
    found = made(SAE(SAEConfig(D, L, K, dtype=dtype, **sae or {}), seed=1), config, TOTAL)
    found.initialise(first.float() if lean else first)
    silence(found, LOW)
    return found


def silence(engine: Any, which: Any) -> None:
    """These latents do not fire until they begin anew."""
    lean = engine.sae.dtype == torch.bfloat16
    biases = engine.weights.matrices["b_enc"].w[0] if lean else engine.sae.b_enc.data
    biases[which] -= 50.0
    if lean:
        engine.weights.copy_biases()


def weights(engine: Any) -> dict[str, Tensor]:
    return {name: getattr(engine.sae, name).detach().clone() for name in PARAMETERS}


def everything(engine: Any) -> dict[str, Any]:
    state = {name: value.clone() if isinstance(value, Tensor) else value for name, value in engine.state_dict().items()}
    return state | weights(engine)


def assert_identical(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name], name


def begun_anew(engine: Any, x: Tensor) -> Tensor:
    """A step; the ids of the latents that were resampled by it."""
    engine.step(x)
    return (engine.dead.age == 0).nonzero().flatten()


# Both engines.

RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ours": ({}, {}),
    "more momentum": (dict(beta1=0.9), {}),
    "AuxK too": (dict(auxk_coef=1 / 32), {}),
    "ranked by norms": (
        dict(decoder_norm="never", project_decoder_grad=False),
        dict(rescale_acts_by_decoder_norm=True, unit_norm_decoder=False),
    ),
    "not centred, clipped": (dict(max_grad_norm=0.05), dict(apply_b_dec_to_input=False)),
    "batchtopk": ({}, dict(activation="batchtopk")),
    "matryoshka": ({}, dict(matryoshka=(20, 50))),
    "dead in steps": (dict(dead_unit="steps", dead_after=3), {}),
    "unit norm before the step": (dict(decoder_norm="pre_step", ema_decay=0.9), {}),
}


def assert_alike(name: str, settle_every: int, dtype: torch.dtype, tolerance: float, **changes: Any) -> None:
    settings, sae = RUNS[name][0] | changes, RUNS[name][1]
    data = batches(dtype=dtype)
    ours = engine("fused", data[0], sae, settle_every=settle_every, **settings)
    dense = engine("autograd", data[0], sae, **settings)
    resampled = 0
    for x in data:
        a, b = ours.step(x), dense.step(x)
        for figure in ("loss", "fvu", "auxk_loss", "l0", "dead_share"):
            assert float(getattr(a, figure)) == pytest.approx(float(getattr(b, figure)), rel=tolerance), figure
        assert torch.equal(ours.dead.age, dense.dead.age)
        resampled += int((ours.dead.age == 0).sum())
    assert resampled >= L // 4, "hardly a latent was resampled, so nothing was tested"
    ours.finish(), dense.finish()
    for parameter, expected in weights(dense).items():
        found = getattr(ours.sae, parameter).detach()
        assert (found - expected).abs().max() <= tolerance * expected.abs().max(), parameter


@pytest.mark.parametrize("name", RUNS)
def test_engines_resample_alike_in_float64(name: str) -> None:
    """Every row in every update."""
    assert_alike(name, 1, torch.float64, 1e-9)


@pytest.mark.parametrize("name", RUNS)
def test_engines_resample_alike_where_rows_are_settled_late(name: str) -> None:
    """Without momentum rows that were left alone are where dense Adam has them: only second moments wait."""
    assert_alike(name, 7, torch.float64, 1e-9, beta1=0.0)


def test_engines_resample_alike_in_float32() -> None:
    assert_alike("ours", 1, torch.float32, 2e-4)


# Resume.


@pytest.mark.parametrize("kind", ["fused", "autograd", "lean"])
@pytest.mark.parametrize("settings", [{}, {"beta1": 0.9, "settle_every": 5, "auxk_coef": 1 / 32}], ids=str)
@pytest.mark.parametrize("cut", [8, 13])
def test_resume_in_the_middle_is_bit_exact(kind: str, settings: dict[str, Any], cut: int) -> None:
    data = batches(dtype=torch.float32)
    whole, first, second = (engine(kind, data[0], **settings) for _ in range(3))
    fresh = [len(begun_anew(whole, x)) for x in data]
    assert sum(fresh[:cut]) > 0 < sum(fresh[cut:]), "nothing was resampled on either side of the cut"
    for x in data[:cut]:
        first.step(x)
    saved = everything(first)
    second.sae.load_state_dict({name: saved[name] for name in PARAMETERS})
    second.load_state_dict({name: value for name, value in saved.items() if name not in PARAMETERS})
    assert [len(begun_anew(second, x)) for x in data[cut:]] == fresh[cut:]
    assert_identical(everything(second), everything(whole))


def test_the_draw_depends_on_the_seed_and_the_step_alone() -> None:
    """Not on torch's generators, which others use; another seed draws otherwise."""
    data = batches()
    ends = []
    for seed in (0, 0, 1):
        one = engine("fused", data[0], seed=seed)
        before = torch.get_rng_state()
        for x in data[:7]:
            one.step(x)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
        ends.append(everything(one))
    assert_identical(ends[0], ends[1])
    assert not torch.equal(ends[0]["W_dec"], ends[2]["W_dec"])


# What it does to a latent, and to no other.


@pytest.mark.parametrize("kind", ["fused", "autograd", "lean"])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_only_hopeless_latents_are_touched(kind: str, beta1: float) -> None:
    """A step that resamples, beside the same step of a run that never does."""
    data = batches(dtype=torch.float32)
    ours, never = (engine(kind, data[0], beta1=beta1, settle_every=4, resample_every=e) for e in (EVERY, 0))
    for x in data:
        before = ours.dead.age.clone()
        ids = begun_anew(ours, x)
        never.step(x)
        if len(ids):
            break
        assert_identical(everything(ours), everything(never))
    n_hopeless = int((ours.dead.mask(ours.dead.since) & (before + B >= 4 * B)).sum())
    assert 0 < len(ids) <= n_hopeless
    others = torch.ones(L, dtype=torch.bool)
    others[ids] = False
    a, b = everything(ours), everything(never)
    assert (a.pop("dead.age") != b.pop("dead.age")).nonzero().flatten().tolist() == ids.tolist()
    for name, value in a.items():
        if not isinstance(value, Tensor) or "b_dec" in name or name == "drift" or name.startswith("dead"):
            assert torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name], name
        elif value.shape[0] == L:
            assert torch.equal(value[others], b[name][others]), name
        elif value.shape[-1] == L:  # b_enc as a matrix of one row
            assert torch.equal(value[..., others], b[name][..., others]), name
        else:  # the step that b_enc stands at
            assert torch.equal(value, b[name]), name
    for name in ("W_enc", "W_dec"):
        assert (a[name][ids] != b[name][ids]).any(1).all(), name
    assert float(a["b_enc"][ids].abs().max()) == 0


@pytest.mark.parametrize("kind", ["fused", "autograd"])
def test_rows_are_residuals_at_usual_norms_with_usual_moments(kind: str) -> None:
    data = batches()
    one = engine(kind, data[0], settle_every=1, beta1=0.9)
    for x in data:
        with torch.no_grad():
            residual = x - one.sae(x).x_hat
        ids = begun_anew(one, x)
        if len(ids):
            break
    alive = ~one.dead.mask(one.dead.since)
    sae = one.sae
    cosine = normalize(sae.W_dec.detach()[ids], dim=1) @ normalize(residual, dim=1).T
    best = cosine.max(1)
    torch.testing.assert_close(best.values, torch.ones(len(ids), dtype=torch.float64), rtol=0, atol=1e-6)
    assert len(best.indices.unique()) == len(ids), "a token gave two latents their direction"
    torch.testing.assert_close(normalize(sae.W_enc.detach()[ids], dim=1), normalize(sae.W_dec.detach()[ids], dim=1))
    for W in (sae.W_enc.detach(), sae.W_dec.detach()):
        expected = W[alive].norm(dim=1).median().expand(len(ids))
        torch.testing.assert_close(W[ids].norm(dim=1), expected, rtol=1e-6, atol=0)
    state = one.state_dict()
    names = ("m", "v") if kind == "fused" else ("exp_avg", "exp_avg_sq")
    for parameter in ("W_enc", "W_dec", "b_enc"):
        m, v = (state[f"adam.{parameter}.{name}"] for name in names)
        m, v = (t[0] if parameter == "b_enc" and t.dim() == 2 else t for t in (m, v))
        assert (m[ids] == 0).all()
        torch.testing.assert_close(v[ids], v[alive].mean().expand_as(v[ids]), rtol=1e-9, atol=0)
        assert float(m[alive].abs().max()) > 0 < float(v[ids].min())


def test_a_lean_run_begins_latents_anew_in_bf16() -> None:
    data = batches(dtype=torch.float32)
    one = engine("lean", data[0])
    resampled = sum(len(begun_anew(one, x)) for x in data)
    assert resampled >= 5
    assert one.sae.dtype == torch.bfloat16
    assert all(bool(w.isfinite().all()) for w in weights(one).values())


@pytest.mark.parametrize("kind", ["fused", "autograd", "lean"])
def test_counters_go_on_and_only_the_age_begins_anew(kind: str) -> None:
    """A latent that begins anew stays dead until it fires, and is given dead_after tokens before it begins again."""
    data = batches(dtype=torch.float32)
    one = engine(kind, data[0])
    last: dict[int, int] = {}
    total = 0
    for step, x in enumerate(data):
        since, never = one.dead.since.clone(), one.dead.never.clone()
        ids = begun_anew(one, x)
        # Whatever was resampled, a counter goes up by the batch or back to 0 because its latent fired.
        assert ((one.dead.since == since + B) | (one.dead.since == 0)).all()
        assert (one.dead.never <= never).all()
        for i in ids.tolist():
            assert one.dead.since[i] == since[i] + B >= 4 * B
            assert step - last.get(i, -100) >= 4
            last[i] = step
        total += len(ids)
        assert round(float(one.dead.share()) * L) >= len(ids)
        silence(one, ids[::2])
    assert total > len(last) > 0, "no latent was resampled twice, so nothing was tested"


def test_it_brings_latents_back() -> None:
    data = batches(36)
    shares = []
    for every in (0, EVERY):
        one = engine("fused", data[0], resample_every=every)
        for x in data:
            one.step(x)
        shares.append(float(one.dead.share()))
    assert shares[1] < 0.5 * shares[0]


# When nothing happens.


def test_when_it_is_due() -> None:
    def steps(total: int, **changes: Any) -> list[int]:
        config = choose(SAEConfig(D, L, K), TrainConfig(**(BASE | changes)), total_steps=total)
        return [step for step in range(total + 1) if due(step, total, config)]

    assert steps(20, resample_every=4, resample_until=1.0) == [4, 8, 12, 16, 20]
    assert steps(20, resample_every=4, resample_until=0.8) == [4, 8, 12, 16]
    assert steps(20, resample_every=4, resample_until=0.79) == [4, 8, 12]
    assert steps(5, resample_every=1, resample_until=0.5) == [1, 2]
    assert steps(20, resample_every=0, resample_until=1.0) == []
    assert steps(20, resample_every=4, resample_until=0.0) == []
    assert steps(3, resample_every=4, resample_until=1.0) == []


@pytest.mark.parametrize("kind", ["fused", "autograd", "lean"])
@pytest.mark.parametrize(
    "settings",
    [{"resample_every": 0}, {"resample_until": 0.0}, {"dead_after": 10**6}, {"dead_after": 1}],
    ids=["never", "at no time", "nothing is dead", "everything is dead"],
)
def test_nothing_happens(kind: str, settings: dict[str, Any]) -> None:
    data = batches(20, torch.float32)
    one = engine(kind, data[0], **settings)
    off = engine(kind, data[0], **settings | dict(resample_every=0))
    everything_dead = settings == {"dead_after": 1}
    if everything_dead:
        # Nothing is left that others could begin like.
        silence(one, slice(None)), silence(off, slice(None))
    for x in data:
        assert (float(one.step(x).dead_share) == 1) == everything_dead
        off.step(x)
    assert_identical(everything(one), everything(off))


def test_not_at_the_end_of_a_run() -> None:
    data = batches(TOTAL)
    one = engine("fused", data[0], resample_until=0.5, lr=0.0, dead_after=B)
    fresh = [len(begun_anew(one, x)) for x in data]
    assert sum(fresh[: TOTAL // 2]) > 0
    assert sum(fresh[TOTAL // 2 :]) == 0


# The draw.


def draw(residual: Tensor, hopeless: list[int], seed: int = 0, step: int = 1, n_latents: int = 40) -> Any:
    W = normalize(torch.randn(n_latents, residual.shape[1], generator=torch.Generator().manual_seed(3)), dim=1)
    mask = torch.zeros(n_latents, dtype=torch.bool)
    mask[hopeless] = True
    return fresh_latents(residual, mask, ~mask, 3 * W, W, seed, step)


def tokens(fresh: Any, residual: Tensor) -> list[int]:
    return (normalize(fresh.W_dec, dim=1) @ normalize(residual, dim=1).T).argmax(1).tolist()


def test_tokens_are_drawn_by_the_square_of_their_residual() -> None:
    residual = torch.linalg.qr(torch.randn(8, 8))[0] * torch.arange(8.0)[:, None]
    expected = residual.square().sum(1) / residual.square().sum()
    n = 4000
    found = Counter(
        tokens(draw(residual, [7], seed, step), residual)[0] for seed in range(40) for step in range(1, 101)
    )
    for token, share in enumerate(expected.tolist()):
        # Five standard deviations of a binomial.
        assert abs(found[token] / n - share) <= 5 * (share * (1 - share) / n) ** 0.5 + 1e-12, token


def test_each_token_at_most_once_and_a_share_of_the_batch_at_most() -> None:
    residual = torch.linalg.qr(torch.randn(16, 16))[0] * torch.rand(16, 1)
    for step in range(1, 50):
        fresh = draw(residual, list(range(30)), step=step)
        found = tokens(fresh, residual)
        assert len(set(found)) == len(found) == int(MOST * 16) == len(fresh.latents)
        assert len(set(fresh.latents.tolist())) == len(found)
        assert set(fresh.latents.tolist()) <= set(range(30))
    # Which of the hopeless is drawn as well, so that none waits for ever.
    seen = {i for step in range(1, 50) for i in draw(residual, list(range(30)), step=step).latents.tolist()}
    assert seen == set(range(30))


def test_tokens_without_a_residual_give_no_direction() -> None:
    residual = torch.zeros(16, 5)
    residual[[3, 9]] = torch.randn(2, 5)
    fresh = draw(residual, list(range(30)))
    assert sorted(tokens(fresh, residual)) == [3, 9]
    assert fresh.W_enc.isfinite().all()
    assert draw(torch.zeros(16, 5), [1, 2]) is None


def test_nothing_to_draw_for_or_to_measure_by() -> None:
    residual = torch.randn(16, 5)
    assert draw(residual, []) is None
    assert draw(residual, list(range(40))) is None
    assert draw(residual[:1], [3]) is None, "a share of one token is none"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_have_the_median_norm_of_those_alive(dtype: torch.dtype) -> None:
    residual = torch.randn(64, 9)
    W_enc, W_dec = (torch.randn(40, 9).to(dtype) for _ in range(2))
    hopeless = torch.arange(40) < 9
    W_enc[hopeless] *= 1e4
    fresh = fresh_latents(residual, hopeless, ~hopeless, W_enc, W_dec, 0, 1)
    assert fresh is not None
    assert sorted(fresh.latents.tolist()) == list(range(9))
    for rows, W in ((fresh.W_enc, W_enc), (fresh.W_dec, W_dec)):
        usual = W[~hopeless].double().norm(dim=1).sort().values[15]  # the lower of the two in the middle of 31
        torch.testing.assert_close(rows.double().norm(dim=1), usual.expand(9), rtol=1e-2, atol=0)


# The optimiser's state.


@pytest.mark.parametrize("copies", [False, True])
def test_a_matrix_begins_rows_anew(copies: bool) -> None:
    matrix = Matrix.of(torch.randn(6, 4), shadow=copies, norms=copies)
    matrix.m.normal_(), matrix.v.uniform_(1, 2)
    matrix.last_step.copy_(torch.tensor([9, 10, 4, 10, 10, 7]))
    kept = {name: tensor.clone() for name, tensor in matrix.state().items()} | {"w": matrix.w.clone()}
    rows, fresh = torch.tensor([5, 1]), torch.randn(2, 4)
    alive = torch.tensor([True, False, True, True, False, False])
    matrix.restart(rows, fresh, alive, 10, 0.9)
    assert torch.equal(matrix.w[rows], fresh)
    assert (matrix.m[rows] == 0).all()
    assert matrix.last_step[rows].tolist() == [10, 10]
    # Rows that stand at an earlier step have a second moment that is less by now.
    means = kept["v"].mean(1) * torch.tensor([0.9, 1, 0.9**6, 1, 1, 0.9**3])
    torch.testing.assert_close(matrix.v[rows], means[alive].mean().expand(2, 4))
    others = torch.tensor([0, 2, 3, 4])
    for name, tensor in (matrix.state() | {"w": matrix.w}).items():
        assert torch.equal(tensor[others], kept[name][others]), name
    if copies:
        assert matrix.shadow is not None
        assert matrix.norms is not None
        assert torch.equal(matrix.shadow, matrix.w.bfloat16())
        torch.testing.assert_close(matrix.norms, matrix.w.norm(dim=1))


def test_a_double_matrix_loses_nothing() -> None:
    matrix = Matrix.of(torch.randn(3, 4, dtype=torch.float64))
    matrix.v.uniform_(1, 2)
    expected = float(matrix.v[1].mean()) * 0.999**37
    matrix.restart(torch.tensor([0]), torch.ones(1, 4), torch.tensor([False, True, False]), 37, 0.999)
    assert float(matrix.v[0, 0]) == pytest.approx(expected, rel=1e-14)


def test_a_lean_matrix_begins_rows_anew() -> None:
    width = LEAN_BLOCK + 8
    matrix = LeanMatrix.of(torch.randn(4, width).bfloat16(), seed=1, norms=True)
    matrix.m.random_(-100, 100), matrix.scale.uniform_(1, 2), matrix.v.uniform_(1, 2)
    matrix.last_step.copy_(torch.tensor([3, 5, 5, 5]))
    kept = {name: tensor.clone() for name, tensor in matrix.state().items()} | {"w": matrix.w.clone()}
    fresh = torch.randn(1, width)
    matrix.restart(torch.tensor([2]), fresh, torch.tensor([True, True, False, False]), 5, 0.5)
    assert torch.equal(matrix.w[2], fresh[0].bfloat16())
    assert (matrix.m[2] == 0).all()
    assert float(matrix.v[2]) == pytest.approx(float(kept["v"][0] / 4 + kept["v"][1]) / 2)
    assert int(matrix.last_step[2]) == 5
    assert matrix.norms is not None
    torch.testing.assert_close(matrix.norms, matrix.w.float().norm(dim=1))
    others = torch.tensor([0, 1, 3])
    for name, tensor in (matrix.state() | {"w": matrix.w}).items():
        assert torch.equal(tensor[others], kept[name][others]), name
