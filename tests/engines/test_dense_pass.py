"""The chunked dense pass: the same step as by the list of entries and as dense autograd's, and when it is taken."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from allocations import Allocations
from classic import CLASSIC_TRAIN
from torch import Tensor

import saefast
from saefast.engines import dense_pass
from saefast.engines.autograd import AutogradEngine
from saefast.engines.fused import FusedEngine
from saefast.errors import InputError
from saefast.models import registry
from saefast.models.architecture import At
from saefast.models.config import SAEConfig
from saefast.models.pointwise import Own, Pointwise, warmed_up
from saefast.models.sae import SAE
from saefast.ops.code import Code, Number

D, L, K, B, STEPS = 12, 40, 4, 48, 12
ALWAYS, NEVER = -1.0, 2.0


class Rich(Pointwise):
    """Uses all that a pointwise architecture may: own vectors and a matrix, norms of two blocks, a second
    reconstruction, a limit below which it pays nothing, and state that follows the L0."""

    name = "rich"

    def parameters(self) -> dict[str, Tensor]:
        return {"offset": torch.full((L,), 0.1), "gain": torch.linspace(0.5, 1.5, L), "past": torch.zeros(D, D)}

    def state(self, train: Any) -> dict[str, Tensor]:
        return {"l0_before": torch.zeros((), dtype=torch.float64)}

    def wants_norms(self, train: Any) -> bool:
        return True

    def limit(self, own: Own, train: Any) -> Tensor | float:
        return own["offset"] - (0.5 if train is not None else 0.0)

    def activate(self, pre: Tensor, own: Own) -> Tensor:
        return own["gain"].abs() * (pre - own["offset"]).relu()

    def penalty(self, pre: Tensor, acts: Tensor, own: Own, norms: Tensor | None, train: Any) -> Tensor:
        assert norms is not None
        return acts.square() * norms + (pre - own["offset"] + 0.5).relu() * own["gain"]

    def frozen(self, pre: Tensor, own: Own) -> Tensor:
        return (pre - own["offset"] + own["b_enc"] * 0.3).relu()

    def norms(self, W_dec: Tensor, buffers: Any = None) -> Tensor:
        return W_dec.unflatten(1, (2, -1)).norm(dim=2)

    def coefficient(self, at: At, kept: dict[str, Tensor], l0: Number, train: Any) -> Number:
        return 0.07 * warmed_up(at, train) * (1 + kept["l0_before"] / L + 0.1 * l0)

    def counted(self, kept: dict[str, Tensor], l0: Number, at: At, train: Any) -> Any:
        return kept | {"l0_before": torch.as_tensor(l0, dtype=torch.float64)}

    def direct(self, x: Tensor, own: Any) -> Tensor:
        return x @ own["past"].T

    def rescaled(self, tensors: dict[str, Tensor], scale: float, target_scale: float) -> dict[str, Tensor]:
        found = super().rescaled(tensors, scale, target_scale)
        return found | {name: tensors[name] for name in ("gain", "past")}


class Plain(Pointwise):
    """ReLU and L1."""

    name = "plain"

    def limit(self, own: Own, train: Any) -> Tensor | float:
        return 0.0

    def activate(self, pre: Tensor, own: Own) -> Tensor:
        return pre.relu()

    def penalty(self, pre: Tensor, acts: Tensor, own: Own, norms: Tensor | None, train: Any) -> Tensor:
        return acts


class Particular(Plain):
    """Wants to see its code."""

    name = "particular"

    def observed(self, kept: dict[str, Tensor], code: Code, scale: Tensor | None, at: At, train: Any) -> Any:
        return kept


@pytest.fixture(autouse=True)
def named(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Rich, Plain, Particular):
        monkeypatch.setitem(registry.ACTIVATIONS, kind.name, kind)
    monkeypatch.setitem(SAEConfig.__annotations__, "activation", str)


@pytest.fixture(params=["kept", "made again"])
def small_chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of 7 latents, so that the last one is another size."""
    monkeypatch.setattr(dense_pass, "CHUNK", 7 * B)
    monkeypatch.setattr(dense_pass, "LEAST", 1)
    if request.param == "made again":
        monkeypatch.setattr(dense_pass, "KEPT", 0)
    return


def rows(n: int = STEPS * B) -> Tensor:
    code = torch.rand(n, 30) * (torch.rand(n, 30) < 0.1)
    return (code @ torch.randn(30, D) + 0.01 * torch.randn(n, D)).double()


TRAIN: dict[str, Any] = CLASSIC_TRAIN | dict(
    lr=1e-3, auxk_coef=0.0, settle_every=1, decoder_norm="never", project_decoder_grad=False, lr_decay_share=0.0,
    sparsity_warmup_share=0.2, sparsity_coef=0.05, dead_after=3 * B,
)  # fmt: skip


OF_THE_SAE = ("matryoshka", "crosscode_widths", "apply_b_dec_to_input", "unit_norm_decoder")


def engine(kind: Any = FusedEngine, name: str = "rich", dtype: str = "float64", **settings: Any) -> Any:
    own = {key: settings.pop(key) for key in OF_THE_SAE if key in settings}
    options = {key: settings.pop(key) for key in ("dense_share",) if key in settings}
    config = SAEConfig(D, L, K, activation=name, dtype=dtype, init="tied", **{"unit_norm_decoder": False} | own)
    return kind(SAE(config, seed=3), saefast.TrainConfig(**TRAIN | settings), STEPS, **options)


SETTINGS: dict[str, dict[str, Any]] = {
    "rich": {},
    "rich, clipped, sum, averaged": dict(max_grad_norm=0.01, loss="sum", ema_decay=0.9, apply_b_dec_to_input=False),
    "rich, nested": dict(matryoshka=(5, 21)),
    "rich, two layers": dict(crosscode_widths=(6, 6), apply_b_dec_to_input=False),
    "plain": dict(name="plain", unit_norm_decoder=True, decoder_norm="post_step", project_decoder_grad=True),
    "plain, before the step": dict(name="plain", decoder_norm="pre_step", project_decoder_grad=True, fired_above=0.2),
    "plain, before the pass": dict(name="plain", decoder_norm="pre_forward", resample_every=4, dead_after=1),
}
FIGURES = ("loss", "fvu", "l0", "dead_share", "grad_norm", "sparsity_loss", "sparsity_coef")


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("name", SETTINGS)
def test_it_takes_the_steps_of_the_list_of_entries_and_of_dense_autograd(name: str) -> None:
    data = rows().split(B)
    dense = engine(dense_share=ALWAYS, **SETTINGS[name])
    others = [engine(dense_share=NEVER, **SETTINGS[name]), engine(AutogradEngine, **SETTINGS[name])]
    for one in (dense, *others):
        one.initialise(data[0])
    for x in data:
        found, *beside = (one.step(x) for one in (dense, *others))
        for figure in FIGURES:
            # The autograd engine divides counts in fp32.
            rel = 1e-6 if figure in ("l0", "dead_share") else 1e-8
            for other in beside:
                wanted = pytest.approx(float(getattr(other, figure)), rel=rel, abs=1e-12)
                assert float(getattr(found, figure)) == wanted, figure
        assert float(dense.share) == pytest.approx(float(others[0].share))
    for other in others:
        for key, value in other.sae.state_dict().items():
            assert torch.allclose(dense.sae.state_dict()[key], value, rtol=1e-7, atol=1e-10), key
        for key in ("since", "never", "age"):
            assert torch.equal(getattr(dense.dead, key), getattr(other.dead, key)), key
        for key, value in other.state.items():
            assert torch.allclose(dense.state[key], value), key
        for key, value in (other.ema or {}).items():
            assert torch.allclose(dense.ema[key], value, rtol=1e-7, atol=1e-10), key


@pytest.mark.parametrize("optimizer", ["adam", "adam-lean"])
def test_in_fp32_it_trains_as_well_by_chunks_as_by_entries(optimizer: str) -> None:
    data = rows(30 * B).float().split(B)
    losses = {}
    for share in (ALWAYS, NEVER):
        one = engine(name="plain", dtype="float32", dense_share=share, settle_every=4, optimizer=optimizer, beta1=0.5)
        one.initialise(data[0])
        losses[share] = torch.tensor([float(one.step(x).loss) for x in data])
    assert losses[ALWAYS][-5:].mean() < 0.9 * losses[ALWAYS][:5].mean()
    assert torch.allclose(losses[ALWAYS], losses[NEVER], rtol=1e-4 if optimizer == "adam" else 5e-3)


def becomes_sparse(**settings: Any) -> Any:
    """A ReLU that begins with half of its entries on, and soon has fewer than the share that counts as many."""
    one = engine(name="plain", dtype="float32", settle_every=4, sparsity_coef=3.0, dense_share=0.3, lr=2e-2, **settings)
    one.initialise(rows(B).float())
    return one


def test_the_share_of_the_step_before_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    whole = dense_pass.DensePass.forward
    monkeypatch.setattr(dense_pass.DensePass, "forward", lambda self: (taken.append(one.step_count), whole(self))[1])
    one, shares = becomes_sparse(), [1.0]
    for x in rows().float().split(B):
        pre = (x - one.sae.b_dec) @ one.sae.W_enc.T + one.sae.b_enc
        one.step(x)
        # Rows that wait to be settled are not read by a dense step alone.
        assert float(one.share) == pytest.approx(float((pre > 0).double().mean()), abs=1e-12)
        shares.append(float(one.share))
    assert taken == [step for step in range(STEPS) if shares[step] > 0.3]
    assert 2 <= len(taken) <= STEPS - 3, shares


def test_a_run_goes_on_bit_for_bit_from_any_step() -> None:
    data = rows().float().split(B)
    whole, states = becomes_sparse(), []
    for x in data:
        states.append((copy.deepcopy(whole.state_dict()), {k: v.clone() for k, v in whole.sae.state_dict().items()}))
        whole.step(x)
    for begin in range(0, STEPS, 3):
        state, weights = states[begin]
        again = becomes_sparse()
        again.sae.load_state_dict(weights)
        again.load_state_dict(state)
        for x in data[begin:]:
            again.step(x)
        for (key, a), b in zip(again.sae.state_dict().items(), whole.sae.state_dict().values(), strict=True):
            assert torch.equal(a, b), (begin, key)


def test_a_state_without_the_share_is_of_another_config() -> None:
    one = becomes_sparse()
    state = one.state_dict()
    del state["share"]
    with pytest.raises(InputError, match="share is None"):
        one.load_state_dict(state)


BAD = {"nan": float("nan"), "inf": float("inf"), "beyond squares": 1e25, "beyond fp32's squares": 3e38}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("side", ["x", "target"])
@pytest.mark.parametrize("begun", ["dense", "sparse"])
def test_bad_rows_change_nothing(bad: str, side: str, begun: str) -> None:
    data = rows().float().split(B)
    one = engine(name="plain", dtype="float32", settle_every=4, dense_share=ALWAYS if begun == "dense" else NEVER)
    one.initialise(data[0])
    for x in data[:3]:
        one.step(x)
    # After sparse steps decoder rows wait to be settled.
    one.dense_share = ALWAYS
    before = {k: v.clone() for k, v in (one.state_dict() | one.sae.state_dict()).items() if isinstance(v, Tensor)}
    given = {"x": data[3].clone(), "target": data[3].clone()}
    given[side][7, 2] = BAD[bad]
    with pytest.raises(InputError, match="step 3"):
        one.step(given["x"], given["target"])
    for key, value in (one.state_dict() | one.sae.state_dict()).items():
        assert not isinstance(value, Tensor) or torch.equal(value, before[key]), key
    one.step(data[3])


def test_an_activation_beyond_all_bounds_is_refused_before_a_row_is_settled() -> None:
    data = rows().float().split(B)
    one = engine(name="rich", dtype="float32", settle_every=4, dense_share=NEVER)
    one.initialise(data[0])
    for x in data[:3]:
        one.step(x)
    one.dense_share = ALWAYS
    with torch.no_grad():
        one.sae.gain[3] = 1e30
    before = {k: v.clone() for k, v in one.sae.state_dict().items()}
    with pytest.raises(InputError, match="step 3"):
        one.step(data[3])
    assert all(torch.equal(value, before[key]) for key, value in one.sae.state_dict().items())


@pytest.mark.parametrize("max_grad_norm", [None, 1e-3])
def test_it_never_holds_all_entries(monkeypatch: pytest.MonkeyPatch, max_grad_norm: float | None) -> None:
    n, width = 4096, 512
    monkeypatch.setattr(dense_pass, "CHUNK", 256 * width)
    config = SAEConfig(D, n, K, activation="plain", init="tied")
    train = saefast.TrainConfig(**TRAIN | dict(max_grad_norm=max_grad_norm))
    monkeypatch.setattr(dense_pass, "KEPT", 0)
    one = FusedEngine(SAE(config, seed=0), train, STEPS, dense_share=ALWAYS)
    x = rows(width).float()
    one.initialise(x)
    with Allocations(x, *one.sae.parameters()) as seen:
        one.step(x)
    everything = width * n * 4
    assert seen.peak < 0.75 * everything
    # Kept where that is allowed: what was counted is what there is.
    monkeypatch.setattr(dense_pass, "KEPT", everything)
    other = FusedEngine(SAE(config, seed=0), train, STEPS, dense_share=ALWAYS)
    with Allocations(x, *other.sae.parameters()) as seen:
        other.step(x)
    assert seen.peak > everything


def test_a_list_that_would_be_too_long_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(B).float()
    one = engine(name="plain", dtype="float32", dense_share=NEVER)
    one.initialise(x)
    one.step(x)
    assert one.share < 0.9, "the step before was by its entries"
    n = round(float(one.share) * B * L)
    monkeypatch.setattr(dense_pass.DensePass, "forward", lambda self: pytest.fail("dense"))
    monkeypatch.setattr(dense_pass, "ENTRIES", n)
    one.step(x)
    monkeypatch.setattr(dense_pass, "ENTRIES", round(0.5 * n))
    with pytest.raises(pytest.fail.Exception, match="dense"):
        one.step(x)


def test_every_pointwise_architecture_there_is_can_be_trained_so() -> None:
    """One that asked for its code would hold a list of half of all entries where it begins with so many."""
    found = [SAEConfig(D, L, K, activation=name).architecture() for name in registry.ACTIVATIONS]
    pointwise = [one for one in found if one.pointwise is not None and one.name != "particular"]
    assert {"plain", "rich", "relu", "jumprelu"} <= {one.name for one in pointwise}
    assert all(dense_pass.serves(one) for one in pointwise)


def test_what_wants_to_see_its_code_is_not_trained_so() -> None:
    assert engine(name="particular").share is None
    assert "share" not in engine(name="particular").state_dict()
    topk = FusedEngine(SAE(SAEConfig(D, L, K), seed=0), saefast.TrainConfig(), STEPS)
    assert topk.share is None


def test_what_is_paid_on_all_entries_needs_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pointwise, "pays_everywhere", lambda self, train: True)
    with pytest.raises(InputError, match=r"'particular' pays for all latents .* use engine='autograd'"):
        engine(name="particular")
    assert engine(name="plain", dense_share=NEVER).dense_share < 0


@pytest.mark.parametrize("bounds", [[40], [3, 3 + 7, 40]])
@pytest.mark.parametrize("n", [1, 48, 10_000_000])
def test_chunks_are_all_latents_once_and_none_lies_across_a_bound(n: int, bounds: list[int]) -> None:
    found = dense_pass.chunks(n, 40, bounds)
    assert [i for c in found for i in range(c.begin, c.end)] == list(range(40))
    for c in found:
        assert c.end <= bounds[c.prefix]
        assert c.prefix == 0 or c.begin >= bounds[c.prefix - 1]
