"""The autograd engine: exact continuation, refusals that change nothing, and what it leaves behind."""

import math
from typing import Any

import pytest
import torch
from classic import CLASSIC
from recipes_plain import STEPS, B, D, K, L, batches
from torch import Tensor

from saefast.engines.autograd import AutogradEngine, project_decoder_grad_
from saefast.engines.base import PARAMETERS
from saefast.engines.config import PRESETS, preset
from saefast.engines.engine import State
from saefast.errors import InputError
from saefast.models.sae import SAE

presets = pytest.mark.parametrize("name", PRESETS)


def make(name: str, rows: Tensor | None = None, **changes: Any) -> AutogradEngine:
    """An engine with short counters, so that latents die; initialised if rows are given."""
    steps = PRESETS[name].get("dead_unit") == "steps"
    settings = dict(engine="autograd", lr_warmup_steps=4, dead_after=3 if steps else 3 * B) | changes
    if "activation" not in PRESETS[name]:
        settings = dict(auxk_coef=1 / 32) | settings
    sae_config, config = preset(name, D, L, K, **settings)
    engine = AutogradEngine(SAE(sae_config, seed=1), config, 40)
    if rows is not None:
        engine.initialise(rows)
        engine.sae.b_enc.data[::3] -= 0.5
    return engine


def weights(engine: AutogradEngine) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in engine.sae.state_dict().items()}


def copied(state: State) -> State:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}


def assert_equal(a: State, b: State) -> None:
    """Same keys, same bits."""
    assert a.keys() == b.keys()
    for name, value in a.items():
        other = b[name]
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, name  # type: ignore[arg-type]


@presets
@pytest.mark.parametrize("stop", [0, 7])
def test_continuing_from_a_state_is_bit_exact(name: str, stop: int) -> None:
    data = [x.float() for x in batches(0)]
    straight = make(name, data[0])
    for x in data[:stop]:
        straight.step(x)
    saved, saved_weights = copied(straight.state_dict()), weights(straight)
    for x in data[stop:]:
        last = straight.step(x)
    if straight.config.auxk_coef:
        assert float(last.auxk_loss) > 0

    again = make(name)
    again.sae.load_state_dict(saved_weights)
    again.load_state_dict(saved)
    for x in data[stop:]:
        stats = again.step(x)
    assert again.step_count == STEPS
    assert_equal(weights(again), weights(straight))
    assert_equal(again.state_dict(), straight.state_dict())
    assert [float(v) for v in stats] == [float(v) for v in last]


REFUSED = [(name, bad) for name in PRESETS for bad in ("nan", "inf", "overflow")]
# Only the FVU divides by the batch's variance.
REFUSED += [(name, "constant") for name in ("saefast", "sparsify")]


@pytest.mark.parametrize(("name", "bad"), REFUSED)
def test_a_loss_that_is_not_finite_changes_nothing(name: str, bad: str) -> None:
    """The step is refused by name, and training goes on as if the batch had never been seen."""
    data = [x.float() for x in batches(0)]
    engine, undisturbed = make(name, data[0]), make(name, data[0])
    for x in data[:6]:
        engine.step(x)
        undisturbed.step(x)
    before, before_weights = copied(engine.state_dict()), weights(engine)
    x = data[6].clone()
    if bad == "overflow":
        x *= 1e30
    elif bad == "constant":
        x[:] = 2.0  # a mean without rounding, so the variance is 0
    else:
        x[5, 3] = float(bad)
    with pytest.raises(InputError, match="step 6") as error:
        engine.step(x)
    assert {"nan": "row 5", "inf": "row 5", "overflow": "too large", "constant": "equal"}[bad] in str(error.value)
    assert_equal(weights(engine), before_weights)
    assert_equal(engine.state_dict(), before)
    engine.step(data[7])
    undisturbed.step(data[7])
    assert_equal(weights(engine), weights(undisturbed))


def test_a_gradient_that_is_not_finite_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [x.float() for x in batches(0)]
    for name in PRESETS:
        engine = make(name, data[0])
        engine.step(data[0])
        before, before_weights = copied(engine.state_dict()), weights(engine)
        handle = engine.sae.W_enc.register_hook(lambda grad: grad * math.inf)
        with pytest.raises(InputError, match="a gradient is not finite at step 1"):
            engine.step(data[1])
        handle.remove()
        assert_equal(weights(engine), before_weights)
        assert_equal(engine.state_dict(), before)
        assert all(getattr(engine.sae, p).grad is None for p in PARAMETERS)


@presets
def test_finish_leaves_the_decoder_as_promised(name: str) -> None:
    data = [x.float() for x in batches(0)]
    engine = make(name, data[0], lr=1e-2)
    for x in data[:5]:
        engine.step(x)
    off = float((engine.sae.decoder_norms() - 1).abs().max().detach())
    before = weights(engine)
    engine.finish()
    if engine.sae.config.unit_norm_decoder:
        torch.testing.assert_close(engine.sae.decoder_norms().detach(), torch.ones(L))
        assert (off < 1e-5) == (engine.config.decoder_norm == "post_step")
    else:
        assert_equal(weights(engine), before)
        assert off > 0.1
    after = weights(engine)
    engine.finish()
    for parameter, value in weights(engine).items():
        torch.testing.assert_close(value, after[parameter], rtol=1e-6, atol=1e-7)


def test_projection_leaves_nothing_along_a_row() -> None:
    W = torch.nn.Parameter(torch.randn(9, 5, dtype=torch.float64) * torch.logspace(-3, 3, 9)[:, None])
    W.grad = torch.randn_like(W)
    W.data[4] = 0  # a row without a direction keeps its gradient
    kept = W.grad.clone()
    project_decoder_grad_(W)
    along = (W.grad * W).sum(1) / W.norm(dim=1).clamp_min(1e-300)
    assert float(along.abs().max().detach()) < 1e-12
    assert torch.equal(W.grad[4], kept[4])
    # What was taken out points along the row.
    removed = kept - W.grad
    cross = removed - (removed * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True).clamp_min(1e-300) * W
    assert float(cross.abs().max().detach()) < 1e-12


def test_clipping_scales_all_gradients_by_their_common_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    data = [x.float() for x in batches(0)]
    seen: list[float] = []

    def note(engine: AutogradEngine) -> None:
        grads = [getattr(engine.sae, p).grad for p in PARAMETERS]
        seen.append(math.sqrt(sum(float(g.double().square().sum()) for g in grads)))

    for limit in (None, 1e-3, 1e6):
        engine = make("saefast", data[0], max_grad_norm=limit)
        original = engine.adam.step
        monkeypatch.setattr(engine.adam, "step", lambda e=engine, step=original: (note(e), step()))
        reported = float(engine.step(data[0]).grad_norm)
        assert reported > 1e-2
        assert seen.pop() == pytest.approx(reported if limit != 1e-3 else 1e-3, rel=1e-3)


def test_training_learns_and_auxk_revives_dead_latents() -> None:
    data = [x.float() for x in batches(0)]
    shares = {}
    for coef in (0.0, 1.0):
        settings = CLASSIC | dict(auxk_coef=coef, dead_after=10 * B, lr=3e-3, lr_decay_start=-1)
        engine = make("saefast", data[0], **settings)
        engine.sae.b_enc.data[::2] -= 3.0
        fvu = [float(engine.step(data[i % STEPS]).fvu) for i in range(150)]
        assert fvu[-1] < 0.6 * fvu[0]
        shares[coef] = float(engine.dead.share())
    assert shares[0.0] > 0.3
    assert shares[1.0] < 0.5 * shares[0.0]


def test_stats_describe_the_step() -> None:
    data = [x.float() for x in batches(0)]
    engine = make("dictionary_learning", data[0], lr=1e-3)
    found = [engine.step(x) for x in data[:6]]
    assert [s.lr for s in found] == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    x, sae = data[6], engine.sae
    with torch.no_grad():
        out = sae(x)
        fvu = ((x - out.x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    stats = engine.step(x)
    assert float(stats.fvu) == pytest.approx(float(fvu), rel=1e-5)
    assert float(stats.l0) == pytest.approx(float((out.acts > 0).sum(1).float().mean()))
    assert float(stats.dead_share) == float((engine.dead.since >= 3 * B).float().mean())


def test_bad_input() -> None:
    data = [x.float() for x in batches(0)]
    engine = make("saefast", data[0])
    for x in (data[0][:, :5], data[0][0], data[0][:0], data[0].int()):
        with pytest.raises(InputError, match="x is"):
            engine.step(x)
    with pytest.raises(InputError, match="dtype"):
        make("saefast", dtype="bfloat16")
    with pytest.raises(InputError, match="adam-lean"):
        make("saefast", optimizer="adam-lean")


def test_a_state_of_another_shape_is_named() -> None:
    data = [x.float() for x in batches(0)]
    engine = make("openai", data[0])
    engine.step(data[0])
    for name in ("dead.since", "dead.age", "adam.W_dec.exp_avg_sq", "ema.b_enc"):
        state = copied(engine.state_dict())
        state[name] = torch.zeros(3)
        with pytest.raises(InputError, match=name):
            make("openai").load_state_dict(state)
        del state[name]
        with pytest.raises(InputError, match=name):
            make("openai").load_state_dict(state)
