"""Presets, and the statements of recipes_plain, against the peers' own packages and training loops.

`make peers` runs this where they are installed.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import recipes_plain as plain
import torch
from recipes_plain import STEPS, B, D, K, L, clear_batches, distance
from torch import Tensor, nn

from saefast.engines.autograd import AutogradEngine
from saefast.engines.base import PARAMETERS
from saefast.engines.config import preset
from saefast.engines.engine import StepStats
from saefast.engines.fused import FusedEngine
from saefast.engines.recipe import choose, lr_factor
from saefast.models.sae import SAE

pytestmark = pytest.mark.peers
WARMUP, TOLERANCE = 4, 1e-5
LR = 2e-4 / (L / 2**14) ** 0.5


def engine_for(name: str, low: float = 1.2, **overrides: Any) -> AutogradEngine:
    """An engine whose SAE has some latents that start too low to be chosen, so that they die."""
    sae_config, config = preset(name, D, L, K, engine="autograd", lr_warmup_steps=WARMUP, **overrides)
    sae = SAE(sae_config, seed=1)
    with torch.no_grad():
        lower_some(sae.b_enc, sae.W_enc, low)
        if name == "saelens":
            # Unequal decoder norms, so that ranking by pre · norm is not ranking by pre.
            sae.W_dec *= torch.linspace(0.8, 1.2, L)[:, None]
    return AutogradEngine(sae, config, STEPS)


def data_for(
    make: Callable[[], AutogradEngine], state: Callable[..., Any], mean: float = 1.0, **settings: Any
) -> list[Tensor]:
    """fp32 batches on which no two correct runs choose differently, found by the recipe's statement."""

    def run_statement(data: list[Tensor]) -> None:
        engine = make()
        engine.initialise(data[0])
        w = plain.Weights(*(getattr(engine.sae, name).detach().double() for name in PARAMETERS))
        state(w, data, k=K, warmup=WARMUP, **settings)

    return [x.float() for x in clear_batches(run_statement, mean)]


def train(engine: AutogradEngine, data: list[Tensor]) -> list[StepStats]:
    engine.initialise(data[0])
    return [engine.step(x) for x in data]


def assert_same(sae: SAE, theirs: dict[str, Tensor], stats: list[StepStats], losses: list[float]) -> None:
    assert len(losses) == STEPS
    for ours, loss in zip(stats, losses, strict=True):
        assert float(ours.loss) == pytest.approx(loss, rel=TOLERANCE)
    for name in PARAMETERS:
        assert distance(getattr(sae, name), theirs[name]) < TOLERANCE, name


def assert_auxk_ran(stats: list[StepStats]) -> None:
    assert sum(float(s.auxk_loss) > 0 for s in stats) > 15


def weights_of(peer: nn.Module) -> dict[str, Tensor]:
    """A peer's four tensors as we lay them out, W_enc and W_dec (L, D)."""
    if hasattr(peer, "encoder"):
        return {
            "W_enc": peer.encoder.weight, "W_dec": peer.decoder.weight.T, "b_enc": peer.encoder.bias,
            "b_dec": peer.b_dec,
        }  # fmt: skip
    return {"W_enc": peer.W_enc.T, "W_dec": peer.W_dec, "b_enc": peer.b_enc, "b_dec": peer.b_dec}


def lower_some(b_enc: Tensor, W_enc: Tensor, low: float = 1.2) -> None:
    """Some latents start too low to be chosen, so that they die."""
    b_enc.data[::5] -= low * W_enc.detach().norm(dim=1).mean()


class Lookup(nn.Module):
    """A "language model" whose module `site` puts out chosen rows, so that sparsify's trainer can hook it."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows, self.site = rows, nn.Identity()
        self.device = rows.device
        self.dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.site(self.rows[input_ids])


def run_sparsify(sae: SAE, data: list[Tensor], folder: Path, **settings: Any) -> tuple[dict[str, Tensor], list[float]]:
    """sparsify's own Trainer.fit from this SAE's encoder and decoder; it sets b_dec itself."""
    sparsify = pytest.importorskip("sparsify")
    dataset = [{"input_ids": torch.arange(i * B, (i + 1) * B)} for i in range(STEPS)]
    coder = sparsify.SparseCoderConfig(num_latents=L, k=K, multi_topk=settings.pop("multi_topk"))
    config = sparsify.TrainConfig(
        coder, batch_size=1, optimizer="adam", hookpoints=["site"], lr_warmup_steps=WARMUP, log_to_wandb=False,
        save_dir=str(folder), **settings,
    )  # fmt: skip
    trainer = sparsify.Trainer(config, dataset, Lookup(torch.cat(data)))
    peer = trainer.saes["site"]
    peer.encoder.weight.data, peer.W_dec.data = sae.W_enc.detach().clone(), sae.W_dec.detach().clone()
    peer.encoder.bias.data = sae.b_enc.detach().clone()
    losses: list[float] = []

    def note(_module: nn.Module, _inputs: Any, out: Any) -> None:
        losses.append(float((out.fvu + config.auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8).detach()))

    peer.register_forward_hook(note)
    trainer.fit()
    weights = {"W_enc": peer.encoder.weight, "W_dec": peer.W_dec, "b_enc": peer.encoder.bias, "b_dec": peer.b_dec}
    return weights, losses


@pytest.fixture
def exact_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """sparsify lowers the precision of matmuls for the whole process; not in this one."""
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)


@pytest.mark.usefixtures("exact_matmul")
def test_sparsify(tmp_path: Path) -> None:
    engine = engine_for("sparsify")
    data = data_for(
        lambda: engine_for("sparsify"), plain.sparsify, dead_tokens=3 * B, auxk_alpha=0.0, multi_topk=False, lr=LR,
        total=STEPS,
    )  # fmt: skip
    theirs, losses = run_sparsify(engine.sae, data, tmp_path, multi_topk=False)
    assert_same(engine.sae, theirs, train(engine, data), losses)


@pytest.mark.usefixtures("exact_matmul")
def test_sparsify_with_its_bugs_and_without(tmp_path: Path) -> None:
    """AuxK and MultiTopK on: equal under reproduce_bugs, and nowhere near with the gradients that belong there."""
    # So low that some latents are not even among the top 4k, which sparsify counts as fired.
    changes: dict[str, Any] = dict(low=2.4, auxk_coef=1 / 32, multi_topk_coef=1 / 8, dead_after=3 * B + 1)
    buggy, right = engine_for("sparsify", reproduce_bugs=True, **changes), engine_for("sparsify", **changes)
    data = data_for(
        lambda: engine_for("sparsify", reproduce_bugs=True, **changes), plain.sparsify, dead_tokens=3 * B,
        auxk_alpha=1 / 32, multi_topk=True, lr=LR, total=STEPS, buggy=True,
    )  # fmt: skip
    theirs, losses = run_sparsify(
        buggy.sae, data, tmp_path, multi_topk=True, auxk_alpha=1 / 32, dead_feature_threshold=3 * B
    )
    stats = train(buggy, data)
    assert_auxk_ran(stats)
    assert_same(buggy.sae, theirs, stats, losses)
    train(right, data)
    assert distance(right.sae.W_enc, theirs["W_enc"]) > 1e-3


def test_dictionary_learning() -> None:
    top_k = pytest.importorskip("dictionary_learning.trainers.top_k")
    changes: dict[str, Any] = dict(dead_after=3 * B, lr_decay_start=15)
    engine = engine_for("dictionary_learning", **changes)
    data = data_for(
        lambda: engine_for("dictionary_learning", **changes), plain.dictionary_learning, dead_tokens=3 * B, lr=LR,
        decay_start=15, total=STEPS,
    )  # fmt: skip
    peer = top_k.TopKTrainer(
        steps=STEPS, activation_dim=D, dict_size=L, k=K, layer=0, lm_name="none", warmup_steps=WARMUP, decay_start=15,
        device="cpu",
    )  # fmt: skip
    peer.dead_feature_threshold = 3 * B
    sae, ae = engine.sae, peer.ae
    ae.encoder.weight.data, ae.decoder.weight.data = sae.W_enc.detach().clone(), sae.W_dec.detach().T.clone()
    ae.encoder.bias.data = sae.b_enc.detach().clone()
    losses = [peer.update(step, x) for step, x in enumerate(data)]

    stats = train(engine, data)
    assert_auxk_ran(stats)
    assert max(float(s.grad_norm) for s in stats) > 1  # so clipping was at work
    assert_same(sae, weights_of(ae), stats, losses)


def saelens_trainer(peer: nn.Module) -> Any:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    config = SAETrainerConfig(
        total_training_samples=STEPS * B, train_batch_size_samples=B, lr_end=3e-5, lr_warm_up_steps=WARMUP,
        dead_feature_window=3,
    )  # fmt: skip
    return SAETrainer(cfg=config, sae=peer, data_provider=iter(()))


def test_saelens() -> None:
    sae_lens = pytest.importorskip("sae_lens")
    engine = engine_for("saelens", dead_after=4)
    # b_dec starts at 0 here, and off-centre data would leave most latents dead.
    data = data_for(lambda: engine_for("saelens", dead_after=4), plain.saelens, mean=0.1, dead_passes=3, lr=3e-4)
    peer = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(d_in=D, d_sae=L, k=K))
    sae = engine.sae
    with torch.no_grad():
        peer.W_enc.copy_(sae.W_enc.T)
        peer.W_dec.copy_(sae.W_dec)
        peer.b_enc.copy_(sae.b_enc)
    trainer = saelens_trainer(peer)
    losses = [float(trainer.step(x).loss.detach()) for x in data]

    stats = train(engine, data)
    assert_auxk_ran(stats)
    assert_same(sae, weights_of(peer), stats, losses)


# Prefixes of the dictionary that Matryoshka reconstructs from; () is BatchTopK alone.
architectures = pytest.mark.parametrize("widths", [(), (32, 96, L)], ids=["batchtopk", "matryoshka"])
THRESHOLD_START = 5
# With 1 one latent's first gradient cancels to 7e-10, below Adam's eps, and what Adam makes of it is rounding.
SEED = 2


class Trained(NamedTuple):
    """What a peer's trainer did with fp32 batches: loss and threshold after each step, and the weights at the end."""

    data: list[Tensor]
    losses: list[float]
    thresholds: list[float]
    weights: dict[str, Tensor]


def assert_stated(peer: Trained, w: plain.Weights, records: list[plain.Record]) -> None:
    """Our statement says the same, and AuxK was at work."""
    assert len(peer.losses) == len(records) == STEPS
    assert [r.loss for r in records] == pytest.approx(peer.losses, rel=TOLERANCE)
    assert [r.threshold for r in records] == pytest.approx(peer.thresholds, rel=TOLERANCE)
    for name, tensor in zip(PARAMETERS, w.all(), strict=True):
        assert distance(tensor, peer.weights[name]) < TOLERANCE, name
    assert sum(r.auxk > 0 for r in records) > 15


def assert_trained(peer: Trained, start: dict[str, Tensor], recipe: str, widths: Sequence[int], **changes: Any) -> None:
    """Both engines do the same from the same weights. The fused one is dense Adam where it settles all rows at once."""
    kind: dict[str, Any] = dict(activation="batchtopk") | (dict(matryoshka=widths) if widths else {})
    sae_config, config = preset(recipe, D, L, K, engine="autograd", lr_warmup_steps=WARMUP, **kind, **changes)
    dense = AutogradEngine(SAE(sae_config), config, STEPS)
    for engine in (dense, FusedEngine(SAE(sae_config), config, STEPS, settle_every=1)):
        for name, tensor in start.items():
            getattr(engine.sae, name).data.copy_(tensor)
        engine.initialise(peer.data[0])
        stats, thresholds = [], []
        for x in peer.data:
            stats.append(engine.step(x))
            thresholds.append(float(engine.sae.threshold))
        engine.finish()
        assert_same(engine.sae, peer.weights, stats, peer.losses)
        assert thresholds == pytest.approx(peer.thresholds, rel=TOLERANCE)


def new_trainer(widths: Sequence[int]) -> Any:
    """dictionary_learning's own, its dead threshold and its latents' biases lowered."""
    settings = dict(
        steps=STEPS, activation_dim=D, dict_size=L, k=K, layer=0, lm_name="none", warmup_steps=WARMUP, decay_start=15,
        threshold_start_step=THRESHOLD_START, device="cpu", seed=SEED,
    )  # fmt: skip
    if widths:
        module = pytest.importorskip("dictionary_learning.trainers.matryoshka_batch_top_k")
        shares = [(b - a) / L for a, b in pairwise([0, *widths])]
        trainer = module.MatryoshkaBatchTopKTrainer(group_fractions=shares, **settings)
    else:
        trainer = pytest.importorskip("dictionary_learning.trainers.batch_top_k").BatchTopKTrainer(**settings)
    trainer.dead_feature_threshold = 3 * B
    w = weights_of(trainer.ae)
    lower_some(w["b_enc"], w["W_enc"])
    return trainer


@architectures
def test_batchtopk_of_dictionary_learning(widths: tuple[int, ...]) -> None:
    peer = new_trainer(widths)
    start = {name: tensor.detach().clone() for name, tensor in weights_of(peer.ae).items()}

    def run_statement(data: list[Tensor]) -> tuple[plain.Weights, list[plain.Record]]:
        start["b_dec"] = peer.geometric_median(data[0])
        w = plain.Weights(*(start[name].to(data[0].dtype) for name in PARAMETERS))
        return w, plain.dictionary_learning(
            w, data, k=K, dead_tokens=3 * B, lr=LR, warmup=WARMUP, decay_start=15, total=STEPS, batch=True,
            widths=widths, threshold_start=THRESHOLD_START,
        )  # fmt: skip

    data = [x.float() for x in clear_batches(run_statement)]
    losses, thresholds = [], []
    for step, x in enumerate(data):
        losses.append(peer.update(step, x))
        thresholds.append(float(peer.ae.threshold))
    assert [t < 0 for t in thresholds] == [step <= THRESHOLD_START for step in range(STEPS)]
    found = Trained(data, losses, thresholds, weights_of(peer.ae))
    assert_stated(found, *run_statement(data))
    assert_trained(
        found, start, "dictionary_learning", widths, dead_after=3 * B, lr_decay_start=15,
        threshold_start=THRESHOLD_START + 1,
    )  # fmt: skip


def new_saelens(widths: Sequence[int]) -> Any:
    """SAELens' own SAE, with unequal decoder norms, so that ranking by pre · norm is not ranking by pre."""
    sae_lens = pytest.importorskip("sae_lens")
    torch.manual_seed(SEED)
    if widths:
        config = sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(d_in=D, d_sae=L, k=K, matryoshka_widths=list(widths))
        peer = sae_lens.MatryoshkaBatchTopKTrainingSAE(config)
    else:
        peer = sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=L, k=K))
    peer.W_dec.data *= torch.linspace(0.8, 1.2, L)[:, None]
    lower_some(peer.b_enc, peer.W_enc.T)
    return peer


@architectures
def test_batchtopk_of_saelens(widths: tuple[int, ...]) -> None:
    peer = new_saelens(widths)
    start = {name: tensor.detach().clone() for name, tensor in weights_of(peer).items()}

    def run_statement(data: list[Tensor]) -> tuple[plain.Weights, list[plain.Record]]:
        w = plain.Weights(*(start[name].to(data[0].dtype) for name in PARAMETERS))
        return w, plain.saelens(w, data, k=K, dead_passes=3, lr=3e-4, warmup=WARMUP, batch=True, widths=widths)

    # b_dec starts at 0 here, and off-centre data would leave most latents dead.
    data = [x.float() for x in clear_batches(run_statement, mean=0.1)]
    trainer = saelens_trainer(peer)
    losses, thresholds = [], []
    for x in data:
        losses.append(float(trainer.step(x).loss.detach()))
        thresholds.append(float(peer.topk_threshold))
    found = Trained(data, losses, thresholds, weights_of(peer))
    assert_stated(found, *run_statement(data))
    assert_trained(found, start, "saelens", widths, dead_after=4)


def rates(scheduler: Callable[[torch.optim.Optimizer], Any], steps: int) -> list[float]:
    """The rates a torch scheduler gives a peak rate of 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, found = scheduler(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def ours(name: str, steps: int, **overrides: Any) -> list[float]:
    config = choose(*preset(name, D, L, K, engine="autograd", **overrides), total_steps=steps)
    return [lr_factor(step, steps, config) for step in range(steps)]


@pytest.mark.parametrize("decay_start", [None, 12])
def test_learning_rates_of_dictionary_learning(decay_start: int | None) -> None:
    trainer = pytest.importorskip("dictionary_learning.trainers.trainer")
    factor = trainer.get_lr_schedule(30, 5, decay_start=decay_start)
    start = -1 if decay_start is None else decay_start
    assert ours("dictionary_learning", 30, lr_warmup_steps=5, lr_decay_start=start) == pytest.approx(
        rates(lambda o: torch.optim.lr_scheduler.LambdaLR(o, factor), 30)
    )


def test_learning_rates_of_sparsify() -> None:
    get = pytest.importorskip("transformers").get_linear_schedule_with_warmup
    assert ours("sparsify", 30, lr_warmup_steps=7) == pytest.approx(rates(lambda o: get(o, 7, 30), 30))


@pytest.mark.parametrize(("warmup", "decay"), [(0, 0), (1, 0), (6, 0), (6, 9)])
def test_learning_rates_of_saelens(warmup: int, decay: int) -> None:
    optim = pytest.importorskip("sae_lens.training.optim")
    theirs = rates(
        lambda o: optim.get_lr_scheduler(
            "constant", o, training_steps=30, lr=1.0, warm_up_steps=warmup, decay_steps=decay, lr_end=0.1, num_cycles=1
        ),
        30,
    )
    start = 30 - decay if decay else -1
    assert ours("saelens", 30, lr_warmup_steps=warmup, lr_decay_start=start) == pytest.approx(theirs)
