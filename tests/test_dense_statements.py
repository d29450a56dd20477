"""The dense statements themselves: against definitions written as loops, against derivatives that are known in another
form, and their training loop against both engines."""

import math
from typing import Any

import dense_statements as dense
import pytest
import torch
from dense_statements import Recipe, Statement
from torch import Tensor

from saefast.engines.autograd import AutogradEngine
from saefast.engines.config import TrainConfig
from saefast.engines.fused import FusedEngine
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

D, L, K, B = 10, 24, 3, 30
BANDWIDTH = 0.6
WINDOW = dense.Window(BANDWIDTH)


def parameters(own: tuple[str, ...] = (), seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (L, D), "W_dec": (L, D), "b_enc": (L,), "b_dec": (D,)} | dict.fromkeys(own, (L,))
    found = {name: torch.randn(shape, generator=g, dtype=torch.float64) / 3 for name, shape in shapes.items()}
    dense.unit_rows_(found["W_dec"])
    return found


def rows(seed: int = 1, n: int = B, width: int = D) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_codes_are_those_of_the_definitions_token_by_token() -> None:
    pre = rows(width=L)
    per_row, of_batch, per_group = (f(pre, K) for f in (dense.best_of_row, dense.best_of_batch, dense.best_of_group))
    order = sorted(((float(v), b, i) for b, row in enumerate(pre) for i, v in enumerate(row)), reverse=True)
    in_batch = {(b, i) for v, b, i in order[: K * B] if v > 0}
    for b, row in enumerate(pre):
        values = [float(v) for v in row]
        best = sorted(range(L), key=lambda i: -values[i])[:K]
        groups = [range(g * L // K, (g + 1) * L // K) for g in range(K)]
        largest = [max(group, key=lambda i: values[i]) for group in groups]
        for i, value in enumerate(values):
            assert per_row[b, i] == (max(value, 0.0) if i in best else 0.0)
            assert of_batch[b, i] == (value if (b, i) in in_batch else 0.0)
            assert per_group[b, i] == (max(value, 0.0) if i in largest else 0.0)


def test_ranking_by_another_number_leaves_the_activations_as_they_are() -> None:
    pre, scale = rows(width=L), torch.linspace(0.1, 3, L, dtype=torch.float64)
    for choose in (dense.best_of_row, dense.best_of_batch):
        ranked = choose(pre * scale, K)
        found = choose(pre, K, pre * scale)
        assert torch.equal(found != 0, ranked != 0)
        torch.testing.assert_close(found * scale, ranked)


def test_a_layer_writes_nothing_into_earlier_ones() -> None:
    p, x = parameters(), rows()
    p["W_enc"] = p["W_enc"][:, : D // 2]
    found = dense.cross_layer_topk(4, 2)(p, x, 0)
    for b, row in enumerate(x):
        half = L // 2
        pres = [p["W_enc"][m * half : (m + 1) * half] @ row[m * D // 2 : (m + 1) * D // 2] for m in range(2)]
        expected = p["b_dec"].clone()
        for m, pre in enumerate(pres):
            pre = pre + p["b_enc"][m * half : (m + 1) * half]
            for i in sorted(range(half), key=lambda i: -float(pre[i]))[:2]:
                written = p["W_dec"][m * half + i].clone()
                written[: m * D // 2] = 0
                expected += pre[i].clamp_min(0) * written
        torch.testing.assert_close(found.x_hat[b], expected)
    # What is written nowhere gets no gradient.
    gradient = dense.gradients(p, dense.cross_layer_topk(4, 2), x)[1]["W_dec"]
    assert not gradient[L // 2 :, : D // 2].any()
    assert gradient[: L // 2, D // 2 :].any()


def ramp(pre: Tensor, threshold: Tensor) -> Tensor:
    """0 half a bandwidth below the threshold, 1 half a bandwidth above it: its derivative is the rectangle kernel."""
    return ((pre - threshold) / BANDWIDTH + 0.5).clamp(0, 1)


def test_straight_through_derivatives_are_those_of_a_ramp_at_the_threshold() -> None:
    pre = rows(width=L).requires_grad_(True)
    threshold = torch.linspace(0.2, 0.9, L, dtype=torch.float64, requires_grad=True)
    weight, width = rows(seed=2, width=L), [torch.full_like(threshold, BANDWIDTH)]

    def derivatives(value: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((weight * value).sum(), (pre, threshold), allow_unused=True, materialize_grads=True)

    to_pre, to_threshold = derivatives(dense.StraightThroughStep.apply(pre, threshold, *width, False))
    assert not to_pre.any()
    torch.testing.assert_close(to_threshold, derivatives(ramp(pre.detach(), threshold))[1])

    to_pre, to_threshold = derivatives(dense.StraightThroughJumpReLU.apply(pre, threshold, *width, False))
    torch.testing.assert_close(to_pre, weight * (pre > threshold))
    # The jump is as high as the threshold.
    torch.testing.assert_close(to_threshold, derivatives(threshold.detach() * ramp(pre.detach(), threshold))[1])
    assert (to_threshold != 0).sum() > L / 2

    # What pre-activations get where they get the estimate too: the ramp's, beside what passes.
    to_pre, _ = derivatives(dense.StraightThroughStep.apply(pre, threshold, *width, True))
    torch.testing.assert_close(to_pre, derivatives(ramp(pre, threshold.detach()))[0])
    to_pre, _ = derivatives(dense.StraightThroughJumpReLU.apply(pre, threshold, *width, True))
    jump = derivatives(threshold.detach() * ramp(pre, threshold.detach()))[0]
    torch.testing.assert_close(to_pre, weight * (pre > threshold) + jump)


def test_a_relative_window_is_as_wide_as_a_share_of_its_threshold() -> None:
    threshold = torch.tensor([0.5, 2.0], requires_grad=True)
    (wide, to_pre), (fixed, _) = dense.Window(0.3, relative=True).of(threshold), dense.Window(0.3).of(threshold)
    assert wide.tolist() == pytest.approx([0.15, 0.6])
    assert fixed.tolist() == pytest.approx([0.3, 0.3])
    assert not wide.requires_grad
    assert to_pre is False


def test_the_target_of_l0_pulls_with_the_derivative_of_its_square() -> None:
    p, x, target = parameters(("log_threshold",)), rows(), 2.0
    plain, aimed = (dense.jump_relu_l0(0.7, WINDOW, target_l0=goal) for goal in (None, target))
    with_penalty, without = (
        dense.gradients(p, s, x)[1]["log_threshold"] for s in (plain, dense.jump_relu_l0(0, WINDOW))
    )
    l0 = float(plain(p, x, 0).l0)
    assert float(aimed(p, x, 0).penalty) == pytest.approx(0.7 * (l0 / target - 1) ** 2)
    pull = dense.gradients(p, aimed, x)[1]["log_threshold"] - without
    torch.testing.assert_close(pull, (with_penalty - without) * 2 * (l0 / target - 1) / target)


SMOOTH: dict[str, tuple[Statement, tuple[str, ...]]] = {
    "topk": (dense.topk(K, multi=0.5), ()),
    "topk, not centred": (dense.topk(K, centred=False), ()),
    "batch_topk": (dense.batch_topk(K), ()),
    "group_max": (dense.group_max(K), ()),
    "matryoshka": (dense.matryoshka(K, (4, 11, L), batch=True, weights=(0.2, 0.3, 0.5)), ()),
    "hierarchical_topk": (dense.hierarchical_topk((1, 3, 8)), ()),
    "relu_l1": (dense.relu_l1(0.3, by_norm=False), ()),
    "relu_l1, by norm": (dense.relu_l1(0.3, by_norm=True, blocks=2), ()),
    "crosscoder_topk": (dense.crosscoder_topk(K, 2, batch=True), ()),
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("loss", ["sum", "fvu"])
def test_gradients_are_the_slopes_of_the_loss(name: str, loss: str) -> None:
    statement, own = SMOOTH[name]
    start, x = parameters(own), rows()
    direction = parameters(own, seed=5)
    _, found = dense.gradients(start, statement, x, loss=loss)

    def value(h: float) -> float:
        return float(dense.total(statement({n: start[n] + h * direction[n] for n in start}, x, 0), x, loss))

    slope = (value(1e-6) - value(-1e-6)) / 2e-6
    assert sum(float((found[n] * direction[n]).sum()) for n in start) == pytest.approx(slope, rel=1e-6)


def test_the_frozen_decoder_of_gated_gets_no_gradient_from_what_it_decodes() -> None:
    own = ("r_mag", "b_mag")
    start, x, coef = parameters(own), rows(), 0.2
    statement = dense.gated(coef)
    value, found = dense.gradients(start, statement, x)
    p = {name: t.clone().requires_grad_(True) for name, t in start.items()}
    shared = (x - p["b_dec"]) @ p["W_enc"].T
    gate = shared + p["b_enc"]
    acts = torch.where(gate > 0, (p["r_mag"].exp() * shared + p["b_mag"]).relu(), 0)
    served = (x - acts @ p["W_dec"] - p["b_dec"]).square().sum(1).mean()
    frozen = (x - gate.relu() @ start["W_dec"] - start["b_dec"]).square().sum(1).mean()
    loss = served + coef * gate.relu().sum(1).mean() + frozen
    loss.backward()
    assert float(value) == pytest.approx(float(loss.detach()))
    for name, tensor in p.items():
        torch.testing.assert_close(found[name], tensor.grad)
    # The decoder learns from what is served alone, the gate only from the other two.
    alone = torch.autograd.grad(dense.reconstruction(x, statement(p, x, 0).x_hat, "sum"), [p["W_dec"], p["b_enc"]])
    torch.testing.assert_close(found["W_dec"], alone[0])
    assert not torch.allclose(found["b_enc"], alone[1])


def test_the_tanh_penalty_reaches_what_the_pre_activation_loss_alone_revives() -> None:
    """A latent far below its threshold on every token has a gradient from the pre-activation loss and no other."""
    p, x = parameters(("log_threshold",)), rows()
    p["log_threshold"][:] = math.log(0.1)
    p["b_enc"][0] = -100.0
    for coef, moves in ((0.0, False), (3e-2, True)):
        statement = dense.jump_relu_tanh(1.0, WINDOW, slope=4.0, pre_act_coef=coef)
        _, found = dense.gradients(p, statement, x)
        assert bool(found["b_enc"][0] != 0) is moves
        norm = float(p["W_dec"][0].norm())
        assert float(found["b_enc"][0]) == pytest.approx(-coef * norm)
        assert float(found["log_threshold"][0]) == pytest.approx(coef * 0.1 * norm)


def test_a_skip_adds_a_linear_map_of_the_input_to_every_part() -> None:
    p, x, y = parameters(), rows(), rows(seed=7)
    p["W_skip"] = rows(seed=8, n=D)
    plain = dense.topk(K, multi=0.5, centred=False)
    for (w, with_skip), (v, without) in zip(dense.with_skip(plain)(p, x, 0).parts, plain(p, x, 0).parts, strict=True):
        assert w == v
        torch.testing.assert_close(with_skip - without, torch.einsum("bd,od->bo", x, p["W_skip"]))
    _, found = dense.gradients(p, dense.with_skip(plain), x, y)
    error = sum(w * (y - x_hat) for w, x_hat in dense.with_skip(plain)(p, x, 0).parts)
    torch.testing.assert_close(found["W_skip"], -2 / B * error.T @ x)


ENGINES = {"fused": FusedEngine, "autograd": AutogradEngine}
PLAIN: dict[str, Any] = dict(
    beta1=0.9, lr=3e-3, lr_warmup_steps=3, lr_decay_share=0.4, fit_encoder=False, resample_every=0, settle_every=1
)
TRAINED: dict[str, tuple[dict[str, Any], dict[str, Any], Statement, str]] = {
    "topk": ({}, {}, dense.topk(K), "fvu"),
    "topk, multi": ({}, dict(multi_topk_coef=0.5), dense.topk(K, multi=0.5), "fvu"),
    "topk, sum": ({}, dict(loss="sum"), dense.topk(K), "sum"),
    "batchtopk": (dict(activation="batchtopk"), {}, dense.batch_topk(K), "fvu"),
    "matryoshka": (dict(matryoshka=(4, 11)), {}, dense.matryoshka(K, (4, 11, L)), "fvu"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", TRAINED)
def test_the_loop_trains_as_the_engines_do(name: str, engine: str) -> None:
    steps = 10
    sae_fields, train_fields, statement, loss = TRAINED[name]
    sae = SAE(SAEConfig(D, L, K, init="tied", dtype="float64", **sae_fields), seed=0)
    ours = ENGINES[engine](sae, TrainConfig(**PLAIN | train_fields), steps)
    data = [rows(seed) for seed in range(steps)]
    ours.initialise(data[0])
    start = {name: tensor.detach().clone() for name, tensor in sae.named_parameters()}
    recipe = Recipe(lr=3e-3, steps=steps, warmup=3, decay_from=6, loss=loss)
    found, losses = dense.train(start, data, statement, recipe)
    assert [float(ours.step(x).loss) for x in data] == pytest.approx(losses, rel=1e-10)
    ours.finish()
    assert losses[-1] < losses[0]
    for key, tensor in found.items():
        torch.testing.assert_close(getattr(sae, key).detach(), tensor, rtol=1e-9, atol=1e-11)
