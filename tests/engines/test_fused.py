"""The fused engine against the autograd engine, its repeatability, its resume, and what it does with bad input."""

import signal
import threading
from typing import Any

import pytest
import torch
from classic import CLASSIC
from torch import Tensor

from saefast import extension, ops
from saefast.engines import auxk_block, fused, fused_pass
from saefast.engines.autograd import AutogradEngine
from saefast.engines.base import PARAMETERS
from saefast.engines.config import preset
from saefast.engines.engine import StepStats
from saefast.engines.fused import FusedEngine, uninterrupted
from saefast.errors import InputError
from saefast.models.sae import SAE
from saefast.ops import encoder, mixed
from saefast.optim import reference as rows
from saefast.optim.dispatch import row_ops

DEVICE = torch.device("cpu")
on_each_device = pytest.mark.usefixtures("on_each_device")
D, L, K, B, STEPS = 32, 256, 6, 128, 50
TOTAL = 60

# Every peer's recipe with dead latents forced, ours, and what no preset turns on.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "saefast": ("saefast", dict(dead_after=3 * B, lr=1e-3, lr_warmup_steps=0)),
    "saefast without momentum": ("saefast", dict(dead_after=3 * B, lr=1e-3, lr_warmup_steps=0, beta1=0.0)),
    "classic": ("saefast", CLASSIC | dict(dead_after=3 * B, lr=1e-3)),
    "openai": ("openai", dict(dead_after=3, auxk_k=20, lr=1e-3)),
    "sparsify": ("sparsify", dict(dead_after=3 * B + 1, lr_warmup_steps=4)),
    "sparsify, all losses": (
        "sparsify",
        dict(dead_after=3 * B + 1, lr_warmup_steps=4, auxk_coef=1 / 32, multi_topk_coef=1 / 8),
    ),
    "dictionary_learning": ("dictionary_learning", dict(dead_after=3 * B, lr_warmup_steps=4, lr_decay_start=15)),
    "saelens": ("saelens", dict(dead_after=3, lr_warmup_steps=4, lr=1e-3)),
    "not centred, clipped, all losses": (
        "saefast",
        CLASSIC | dict(apply_b_dec_to_input=False, max_grad_norm=0.01, multi_topk_coef=0.5, dead_after=2 * B, lr=1e-3),
    ),
    "a clip that never bites": (
        "saefast",
        CLASSIC | dict(max_grad_norm=1e3, lr=1e-3, auxk_coef=0.0, dead_after=10_000_000),
    ),
    "raw rows": (
        "saefast",
        CLASSIC | dict(decoder_norm="never", project_decoder_grad=False, auxk_coef=0.0, lr=1e-3, dead_after=10_000_000),
    ),
}


def batches(n: int = STEPS, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Rows with structure to learn and a mean that is not zero."""
    sources = torch.randn(100, D)
    code = torch.rand(n, B, 100) * (torch.rand(n, B, 100) < 0.05)
    return list((code @ sources + 0.1 * torch.randn(n, B, D) + torch.randn(D)).to(DEVICE, dtype))


def engine(
    recipe: str, data: list[Tensor], kind: type = FusedEngine, resample_every: int | None = None, **options: Any
) -> Any:
    name, settings = RECIPES[recipe]
    if resample_every is not None:
        settings = settings | {"resample_every": resample_every}
    dtype = str(data[0].dtype).removeprefix("torch.")
    sae_config, config = preset(name, D, L, K, engine="autograd", dtype=dtype, **settings)
    found = kind(SAE(sae_config, seed=1, device=DEVICE), config, TOTAL, **options)
    found.initialise(data[0])
    with torch.no_grad():
        # A third of the latents starts too low to be chosen and too high to be silent, so AuxK has work to do.
        found.sae.b_enc[::3] -= 0.6 if name != "saelens" else 0.06
    return found


def weights(sae: SAE) -> list[Tensor]:
    return [getattr(sae, name).detach().clone() for name in PARAMETERS]


def everything(engine: FusedEngine) -> dict[str, Any]:
    """All that a step may change, copied."""
    state = {name: value.clone() if isinstance(value, Tensor) else value for name, value in engine.state_dict().items()}
    return state | dict(zip(PARAMETERS, weights(engine.sae), strict=True))


def assert_identical(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, Tensor) else value == b[name]
        assert same, name


def worst(ours: list[StepStats], theirs: list[StepStats], name: str) -> float:
    """The largest relative difference of a figure over a run."""
    pairs = [(float(getattr(a, name)), float(getattr(b, name))) for a, b in zip(ours, theirs, strict=True)]
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)


def decided(dense: AutogradEngine, data: list[Tensor]) -> int:
    """Steps of a dense run before the first in which a token's last chosen latent and the next one are all but equal.

    On a CPU this data has none on which the engines differ. A GPU's sums round otherwise, from library to library.
    """
    for n, x in enumerate(data):
        sae = dense.sae
        centred = x - sae.b_dec if sae.config.apply_b_dec_to_input else x
        pre, size = centred @ sae.W_enc.T + sae.b_enc, centred.abs() @ sae.W_enc.abs().T + sae.b_enc.abs()
        scale = sae.W_dec.norm(dim=1) if sae.config.rescale_acts_by_decoder_norm else torch.ones_like(sae.b_enc)
        rank, order = (pre * scale).detach().sort(dim=1, descending=True)
        rounding = (size * scale).detach().gather(1, order)[:, K - 1] * torch.finfo(x.dtype).eps
        if bool(((rank[:, K - 1] - rank[:, K] < rounding) & (rank[:, K - 1] > 0)).any()):
            assert n >= 5, "hardly a step without a tie: nothing would be tested"
            return n
        dense.step(x)
    return len(data)


@on_each_device
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("dtype", "mixed"), [(torch.float32, False), (torch.float32, True), (torch.float64, False)])
def test_loss_curves_are_the_autograd_engines(recipe: str, dtype: torch.dtype, mixed: bool) -> None:
    """Every row in every update: dense Adam's maths, 50 steps, in fp32 the C++ path and in fp64 plain torch.

    The data is the same for all recipes. An entry of a gradient that cancels to its rounding is a whole step of Adam to
    either side, and some data has one such entry in 8192 after 50 steps: this has none.
    """
    torch.manual_seed(2)
    data = batches(STEPS if dtype == torch.float32 else 20, dtype=dtype)
    ours = engine(recipe, data, settle_every=1, mixed=mixed)
    dense = engine(recipe, data, AutogradEngine)
    if DEVICE.type == "cuda":
        data = data[: decided(dense, data)]
        dense = engine(recipe, data, AutogradEngine)
    stats, expected = [ours.step(x) for x in data], [dense.step(x) for x in data]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for figure in ("loss", "fvu", "auxk_loss", "grad_norm", "l0", "dead_share", "lr"):
        assert worst(stats, expected, figure) <= tolerance, figure
    ours.finish()
    dense.finish()
    for name, a, b in zip(PARAMETERS, weights(ours.sae), weights(dense.sae), strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max(), name
    if dense.averaged() is not None:
        for name, b in dense.averaged().items():
            assert (ours.averaged()[name] - b).abs().max() <= tolerance * b.abs().max()
    if dense.config.auxk_coef and len(data) >= 20:
        assert sum(float(s.auxk_loss) > 0 for s in stats) >= 15, "AuxK never ran, so nothing was tested"
    if recipe.startswith("saefast") and len(data) >= 20:
        begun = [(e.dead.age < len(data) * B).nonzero().flatten().tolist() for e in (ours, dense)]
        assert begun[0] == begun[1]
        assert len(begun[0]) >= L // 10, "no latent was resampled, so nothing was tested"


@on_each_device
@pytest.mark.parametrize("recipe", ["saefast", "classic", "openai", "dictionary_learning"])
@pytest.mark.parametrize("settle_every", [2, 16])
def test_what_settling_late_costs(recipe: str, settle_every: int) -> None:
    """The distance from dense Adam: rows of W_enc lack up to 9 learning rates of drift (with the default's beta1 one).

    Without resampling, which is all or nothing: a latent that fires once in one of the runs and not in the other.
    """
    data = batches()
    ours, dense = (
        engine(recipe, data, kind, resample_every=0, **options)
        for kind, options in ((FusedEngine, dict(settle_every=settle_every)), (AutogradEngine, {}))
    )
    stats, expected = [ours.step(x) for x in data], [dense.step(x) for x in data]
    assert worst(stats, expected, "loss") <= 0.02
    assert abs(float(stats[-1].dead_share) - float(expected[-1].dead_share)) <= 0.03


@on_each_device
@pytest.mark.parametrize("settle_every", [2, 16])
def test_what_settling_late_costs_where_latents_begin_anew(settle_every: int) -> None:
    """A residual drawn otherwise changes single losses, so their mean is compared, over the steps with such latents."""
    data = batches()
    ours, dense = engine("saefast", data, settle_every=settle_every), engine("saefast", data, AutogradEngine)
    stats, expected = [ours.step(x) for x in data], [dense.step(x) for x in data]
    means = [sum(float(s.loss) for s in found[10:]) / (STEPS - 10) for found in (stats, expected)]
    assert means[0] == pytest.approx(means[1], rel=0.02)
    assert abs(float(stats[-1].dead_share) - float(expected[-1].dead_share)) <= 0.03
    assert (dense.dead.age < STEPS * B).sum() >= L // 10


@on_each_device
def test_one_step_of_drift_is_all_that_is_missing() -> None:
    """Right after settling, rows are where dense Adam has them, but for the one step that they missed when read."""
    data = batches(6, torch.float64)
    ours, dense = (
        engine("raw rows", data, kind, **o) for kind, o in ((FusedEngine, dict(settle_every=2)), (AutogradEngine, {}))
    )
    for x in data[:2]:
        ours.step(x), dense.step(x)
    assert (ours.weights.enc.last_step == 2).all()
    assert (ours.sae.W_enc - dense.sae.W_enc).abs().max() <= 1e-12


@on_each_device
@pytest.mark.parametrize(("recipe", "tolerance"), [("raw rows", 1e-9), ("classic", 1e-5)])
def test_decoder_rows_are_settled_before_they_are_read(recipe: str, tolerance: float) -> None:
    """With the encoder settled after every step, only decoder rows are left alone: each is settled before it is read.

    Rows set to unit norm after each step are scaled once after several steps: that is second order in the drift.
    """
    data = batches(30, torch.float64)
    ours, dense = engine(recipe, data, settle_every=1000), engine(recipe, data, AutogradEngine)
    unsettled = 0
    for x in data:
        assert abs(float(ours.step(x).loss) / float(dense.step(x).loss) - 1) <= tolerance
        rows.catch_up(ours.weights.enc, ours.weights.constants(ours.step_count, 0.0))
        unsettled += int((ours.weights.dec.last_step < ours.step_count).sum())
    assert unsettled > 100


@on_each_device
@pytest.mark.parametrize("recipe", ["saefast", "classic", "sparsify, all losses"])
def test_bitwise_repeatable_on_any_number_of_threads(recipe: str) -> None:
    data, before, runs = batches(20), torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            one = engine(recipe, data, settle_every=4)
            stats = [one.step(x) for x in data]
            one.finish()
            runs.append(everything(one) | {"loss": [s.loss for s in stats], "norm": [s.grad_norm for s in stats]})
    finally:
        torch.set_num_threads(before)
    assert_identical(runs[0], runs[1])
    assert_identical(runs[0], runs[2])


@on_each_device
@pytest.mark.parametrize("recipe", ["saefast", "classic", "openai", "saelens"])
@pytest.mark.parametrize("cut", [1, 13])
def test_resume_is_bit_exact(recipe: str, cut: int) -> None:
    """Stopped while rows are unsettled, saved, loaded into a new engine."""
    data = batches(25)
    whole = engine(recipe, data, settle_every=8)
    first = engine(recipe, data, settle_every=8)
    curve = [whole.step(x).loss for x in data]
    for x in data[:cut]:
        first.step(x)
    saved = everything(first)
    second = engine(recipe, data, settle_every=8)
    second.sae.load_state_dict({name: saved[name] for name in PARAMETERS})
    second.load_state_dict({name: value for name, value in saved.items() if name not in PARAMETERS})
    assert [second.step(x).loss for x in data[cut:]] == curve[cut:]
    assert_identical(everything(second), everything(whole))


@on_each_device
def test_finish_settles_every_row() -> None:
    data = batches(9)
    ours = engine("openai", data, settle_every=100)
    for x in data:
        ours.step(x)
    assert (ours.weights.enc.last_step < 9).any()
    ours.finish()
    assert (ours.weights.enc.last_step == 9).all()
    assert (ours.weights.dec.last_step == 9).all()
    torch.testing.assert_close(ours.sae.W_dec.norm(dim=1), torch.ones(L, device=DEVICE))


@on_each_device
def test_weights_changed_from_outside_are_seen() -> None:
    data = batches(4)
    ours, other = (engine("saefast", data, mixed=True, settle_every=1) for _ in range(2))
    ours.step(data[0]), other.step(data[0])
    with torch.no_grad():
        for sae in (ours.sae, other.sae):
            sae.W_enc += 0.1
    other.weights.enc.shadow.copy_(other.sae.W_enc)
    assert ours.step(data[1]).loss == other.step(data[1]).loss


@on_each_device
def test_nothing_dead_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One encode a step while nothing is dead, two once something is; only dead rows are looked at then."""
    calls: list[Tensor | None] = []
    original = encoder.encode_topk

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs.get("latents"))
        return original(*args, **kwargs)

    monkeypatch.setattr(encoder, "encode_topk", counting)
    # By matrix products, as a GPU does AuxK where few are dead, nothing would be encoded.
    monkeypatch.setattr(auxk_block, "pays_off", lambda *_: False)
    data = batches(5)
    ours = engine("classic", data, mixed=False)
    calls.clear()  # initialising may encode
    for n, x in enumerate(data, 1):
        dead_before = int((ours.dead.since >= 3 * B).sum())
        ours.step(x)
        assert len(calls) == (1 if n < 3 else 2), f"step {n}, {dead_before} dead"
        if n >= 3:
            assert torch.equal(calls[-1], (ours.dead.since >= 3 * B).nonzero().squeeze(1))
        calls.clear()


def poisoned(x: Tensor, value: float) -> Tensor:
    bad = x.clone()
    bad[5, 3] = value
    return bad


@on_each_device
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e25, 3e38])
@pytest.mark.parametrize("recipe", RECIPES)
def test_bad_rows_are_refused_and_change_nothing(recipe: str, value: float) -> None:
    data = batches(9)
    ours = engine(recipe, data, settle_every=100)
    for x in data[:8]:
        ours.step(x)
    before = everything(ours)
    with pytest.raises(InputError, match="at step 8") as error:
        ours.step(poisoned(data[8], value))
    if not abs(value) < float("inf"):
        assert "row 5" in str(error.value)
    assert_identical(everything(ours), before)
    ours.step(data[8])


@on_each_device
def test_a_batch_of_equal_rows_is_refused() -> None:
    data = batches(2)
    ours = engine("saefast", data)
    with pytest.raises(InputError, match="all rows of the batch are equal"):
        ours.step(data[0][:1].expand(B, D))


@on_each_device
def test_diverged_weights_are_refused() -> None:
    data = batches(2)
    ours = engine("saefast", data)
    ours.step(data[0])
    with torch.no_grad():
        ours.sae.W_enc[3] = 1e30
    before = everything(ours)
    with pytest.raises(InputError, match="training diverged"):
        ours.step(data[1])
    assert_identical(everything(ours), before)


@pytest.mark.parametrize("x", [torch.zeros(4, D + 1), torch.zeros(0, D), torch.zeros(D), torch.zeros(4, D).long()])
def test_wrong_shapes_are_refused(x: Tensor) -> None:
    with pytest.raises(InputError, match=rf"expected floats of shape \(batch >= 1, d_in = {D}\)"):
        engine("saefast", batches(1)).step(x)


@pytest.mark.parametrize(
    "name", ["adam.W_dec.m", "adam.W_enc.last_step", "adam.b_dec.v", "dead.since", "dead.age", "drift"]
)
@pytest.mark.parametrize("damage", ["missing", "shape", "dtype"])
def test_state_of_another_shape_is_refused_whole(name: str, damage: str) -> None:
    data = batches(3)
    giver, taker = (engine("saefast", data) for _ in range(2))
    giver.step(data[0])
    state = giver.state_dict()
    value = state[name]
    assert isinstance(value, Tensor)
    state[name] = {"missing": None, "shape": torch.cat([value, value]), "dtype": value.to(torch.float16)}[damage]
    before = everything(taker)
    with pytest.raises(InputError, match=name):
        taker.load_state_dict(state)
    assert_identical(everything(taker), before)


def test_settings_it_cannot_serve() -> None:
    data = batches(1)
    sae_config, config = preset("saefast", D, L, K, dtype="float16")
    with pytest.raises(InputError, match=r"dtype is torch\.float16"):
        FusedEngine(SAE(sae_config, seed=0), config, TOTAL)
    with pytest.raises(InputError, match="settle_every is 0"):
        engine("saefast", data, settle_every=0)
    sae_config, config = preset("saefast", D, L, K, eps=0.0)
    with pytest.raises(InputError, match="eps is 0"):
        FusedEngine(SAE(sae_config, seed=0), config, TOTAL)


class Flaky:
    """A backend whose functions fail, or see a signal, when told to."""

    def __init__(self, real: Any, **replaced: Any) -> None:
        self.real, self.replaced = real, replaced

    def __getattr__(self, name: str) -> Any:
        return self.replaced.get(name) or getattr(self.real, name)


FALLIBLE = ("batch_sums", "group_entries", "decode_loss", "weighted_row_sum", "gradient_squares")


@on_each_device
@pytest.mark.parametrize("where", FALLIBLE)
def test_running_out_of_memory_half_way_changes_nothing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that allocates comes before the first write. (Rows that were due may be settled: same meaning.)"""
    data = batches(4)
    recipe = "not centred, clipped, all losses"
    ours, undisturbed = (engine(recipe, data, settle_every=1) for _ in range(2))
    for x in data[:3]:
        ours.step(x), undisturbed.step(x)
    real = row_ops(ours.weights.enc.w)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    before = everything(ours)
    with monkeypatch.context() as patch:
        for module in (fused, fused_pass):
            patch.setattr(module, "row_ops", lambda w: Flaky(real, **{where: fail}))
        with pytest.raises(MemoryError):
            ours.step(data[3])
    assert_identical(everything(ours), before)
    assert ours.step(data[3]).loss == undisturbed.step(data[3]).loss


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_half_way_waits_for_the_step(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two weight matrices' updates, as it were: the signal comes while rows are written."""

    class Stop(Exception):
        pass

    def handler(*_: Any) -> None:
        raise Stop

    data = batches(4)
    ours, undisturbed = (engine("saefast", data) for _ in range(2))
    real = row_ops(ours.weights.enc.w)

    def interrupted(jobs: Any) -> None:
        for job in jobs:
            # In this thread: a signal to the process may reach another one, and wait there until the handler is gone.
            signal.raise_signal(number)
            real.update_rows([job])

    previous = signal.signal(number, handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(fused, "row_ops", lambda w: Flaky(real, update_rows=interrupted))
            with pytest.raises(Stop):
                ours.step(data[0])
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, previous)
    undisturbed.step(data[0])
    assert_identical(everything(ours), everything(undisturbed))


def test_uninterrupted_outside_the_main_thread() -> None:
    done: list[int] = []

    def work() -> None:
        with uninterrupted():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]


@pytest.mark.parametrize("k", [1, 8, 60])
@pytest.mark.parametrize("scaled", [False, True])
def test_mixed_encode_is_the_exact_one(k: int, scaled: bool) -> None:
    x, W, b = torch.randn(200, 48), torch.randn(700, 48), torch.randn(700)
    scale = torch.rand(700) + 0.5 if scaled else None
    latents = torch.arange(0, 700, 2)
    for chosen in (None, latents):
        acts, idx = mixed.encode_topk_mixed(x, W.bfloat16(), W, b, k, scale=scale, latents=chosen)
        exact_acts, exact_idx = ops.encode_topk(x.double(), W.double(), b.double(), k, scale=scale, latents=chosen)
        assert torch.equal(idx, exact_idx)
        torch.testing.assert_close(acts.double(), exact_acts, rtol=1e-4, atol=1e-4)


def test_mixed_ties_go_to_the_lower_latent() -> None:
    W = torch.randn(1, 16).expand(50, 16).contiguous()
    x = torch.randn(30, 16)
    _, idx = mixed.encode_topk_mixed(x, W.bfloat16(), W, torch.zeros(50), 7)
    assert (idx == torch.arange(7)).all()


@pytest.fixture(autouse=True)
def _native_is_there() -> None:
    """The fp32 tests are about the C++ path where it exists; without a compiler they run in plain torch."""
    assert row_ops(torch.empty(0)).__name__.endswith("native") == extension.available()
