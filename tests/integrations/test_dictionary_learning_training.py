"""Our trainers for dictionary_learning's loop against its own, in its own `trainSAE`, and on the files it reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import recipes_plain as plain
import torch
from recipes_plain import STEPS, B, D, K, L, clear_batches, distance
from torch import Tensor

from saefast.errors import InputError
from saefast.integrations import dictionary_learning_training as ours

pytestmark = pytest.mark.peers
KINDS = {
    "top_k": "TopKTrainer",
    "batch_top_k": "BatchTopKTrainer",
    "matryoshka_batch_top_k": "MatryoshkaBatchTopKTrainer",
}
kinds = pytest.mark.parametrize("kind", KINDS)
WARMUP, DECAY, DEAD, THRESHOLD_START = 4, 15, 3 * B, 5
WIDTHS = (32, 96, L)
LR = 2e-4 / (L / 2**14) ** 0.5
# Two correct fp32 runs of 25 steps whose choices of latents are clear; see tests/test_peers.py.
TOLERANCE = 1e-5
SETTINGS: dict[str, Any] = dict(
    steps=STEPS, activation_dim=D, dict_size=L, k=K, layer=0, lm_name="none", warmup_steps=WARMUP, decay_start=DECAY,
    threshold_start_step=THRESHOLD_START, device="cpu", seed=2,
)  # fmt: skip


def theirs(kind: str) -> type:
    module = pytest.importorskip(f"dictionary_learning.trainers.{kind}")
    return getattr(module, KINDS[kind])


def settings(kind: str, **changes: Any) -> dict[str, Any]:
    shares = {"group_fractions": [32 / L, 64 / L, 1 - 96 / L]} if kind.startswith("matryoshka") else {}
    return SETTINGS | shares | changes


def weights(ae: Any) -> dict[str, Tensor]:
    """Its four tensors in saefast's layout."""
    if hasattr(ae, "encoder"):
        found = {"W_enc": ae.encoder.weight, "W_dec": ae.decoder.weight.T, "b_enc": ae.encoder.bias, "b_dec": ae.b_dec}
    else:
        found = {"W_enc": ae.W_enc.T, "W_dec": ae.W_dec, "b_enc": ae.b_enc, "b_dec": ae.b_dec}
    return {name: tensor.detach() for name, tensor in found.items()}


def noting(trainer: type, losses: list[float]) -> type:
    """The trainer class, with latents that die soon and some that start too low, writing down every loss."""

    class Noting(trainer):  # type: ignore[misc]
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            self.dead_feature_threshold = DEAD
            w = weights(self.ae)
            w["b_enc"][::5] -= 1.2 * w["W_enc"].norm(dim=1).mean()

        def update(self, step: int, x: Tensor) -> float:
            losses.append(super().update(step, x))
            return losses[-1]

    return Noting


def clear(kind: str) -> list[Tensor]:
    """fp32 batches on which no two correct runs choose differently, found by the statement of the recipe."""
    start = weights(noting(theirs(kind), [])(**settings(kind)).ae)
    batch = kind != "top_k"
    median: Callable[[Tensor], Tensor] = plain_median(kind)

    def run(data: list[Tensor]) -> None:
        begun = start | {"b_dec": median(data[0])}
        w = plain.Weights(*(begun[name].double() for name in ("W_enc", "W_dec", "b_enc", "b_dec")))
        plain.dictionary_learning(
            w, data, k=K, dead_tokens=DEAD, lr=LR, warmup=WARMUP, decay_start=DECAY, total=STEPS, batch=batch,
            widths=WIDTHS if kind.startswith("matryoshka") else (), threshold_start=THRESHOLD_START,
        )  # fmt: skip

    return [x.float() for x in clear_batches(run)]


def plain_median(kind: str) -> Callable[[Tensor], Tensor]:
    trainer = theirs(kind)
    if hasattr(trainer, "geometric_median"):
        return trainer.geometric_median
    return pytest.importorskip("dictionary_learning.trainers.top_k").geometric_median


def run(trainer: type, kind: str, data: list[Tensor], folder: Path, **changes: Any) -> list[float]:
    """Their trainSAE with this trainer class -> the loss of every step. Its files go to folder/trainer_0."""
    train = pytest.importorskip("dictionary_learning.training").trainSAE
    losses: list[float] = []
    config = settings(kind, trainer=noting(trainer, losses), **changes)
    train(data=iter(data), trainer_configs=[config], steps=STEPS, save_dir=str(folder), device="cpu", save_steps=[10])
    return losses


@kinds
def test_the_same_curve_and_the_same_file(kind: str, tmp_path: Path) -> None:
    """Every loss of their loop, the weights it saves, and what the saved SAE encodes: as with their own trainer."""
    load = pytest.importorskip("dictionary_learning.utils").load_dictionary
    data = clear(kind)
    here, there = tmp_path / "ours", tmp_path / "theirs"
    losses = run(getattr(ours, KINDS[kind]), kind, data, here)
    assert losses == pytest.approx(run(theirs(kind), kind, data, there), rel=TOLERANCE)
    assert losses[-1] < losses[0]
    saved = {folder: load(str(folder / "trainer_0"), "cpu")[0] for folder in (here, there)}
    for name, tensor in weights(saved[here]).items():
        assert distance(tensor, weights(saved[there])[name]) < TOLERANCE, name
    assert float(saved[here].threshold) == pytest.approx(float(saved[there].threshold), rel=TOLERANCE)
    x = data[-1]
    assert distance(saved[here].encode(x), saved[there].encode(x)) < 1e-4
    early = [torch.load(folder / "trainer_0/checkpoints/ae_10.pt") for folder in (here, there)]
    assert early[0].keys() == early[1].keys()
    for name, tensor in early[1].items():
        assert distance(early[0][name].float(), tensor.float()) < TOLERANCE, name
        assert early[0][name].is_contiguous()


@kinds
def test_rows_brought_up_to_date_every_fourth_step_change_little(kind: str, tmp_path: Path) -> None:
    """An encoder row at rest lacks, for at most 3 steps, what is left of its momentum: r + r² + r³ = 2.44 times its
    last step, which Adam keeps below some lr a number. That is lr / (1 / √D) = 0.9 % of a unit row here, in rows that
    do not fire: the losses stay within that of each other."""
    data = clear(kind)
    exact = run(getattr(ours, KINDS[kind]), kind, data, tmp_path / "exact")
    fast = run(getattr(ours, KINDS[kind]), kind, data, tmp_path / "fast", settle_every=4)
    assert fast == pytest.approx(exact, rel=LR * D**0.5)


@kinds
def test_looking_at_a_batch_changes_nothing_and_says_what_a_step_would(kind: str) -> None:
    """`loss(logging=True)`, which their loop calls for its logs, against the object's own encode and decode."""
    data = clear(kind)
    trainers = [noting(getattr(ours, KINDS[kind]), [])(**settings(kind)) for _ in range(2)]
    for step, x in enumerate(data[:8]):
        if step:
            log = trainers[0].loss(x, step=step, logging=True)
            ae = trainers[0].ae
            f = ae.encode(x, use_threshold=False)
            assert distance(log.f, f) < 1e-5
            assert distance(log.x_hat, ae.decode(f)) < 1e-5
            assert trainers[0].loss(x, step=step) == pytest.approx(log.losses["loss"], rel=1e-6)
        updates = [trainer.update(step, x) for trainer in trainers]
        if step:
            assert log.losses["loss"] == pytest.approx(updates[0], rel=1e-6)
            assert log.losses["l2_loss"] + log.losses["auxk_loss"] / 32 == pytest.approx(updates[0], rel=1e-6)
        assert torch.equal(trainers[0].num_tokens_since_fired, trainers[1].num_tokens_since_fired)
        assert trainers[0].get_logging_parameters() == trainers[1].get_logging_parameters()
    assert float(trainers[0].ae.threshold) == float(trainers[1].ae.threshold)
    assert trainers[0].get_logging_parameters()["dead_features"] > 0


def test_weights_of_nested_dictionaries(tmp_path: Path) -> None:
    kind, changes = "matryoshka_batch_top_k", {"group_weights": [0.5, 0.3, 0.2]}
    data = clear(kind)
    losses = run(ours.MatryoshkaBatchTopKTrainer, kind, data, tmp_path / "ours", **changes)
    assert losses[:5] == pytest.approx(run(theirs(kind), kind, data, tmp_path / "theirs", **changes)[:5], rel=TOLERANCE)


@kinds
def test_scaled_activations(kind: str, tmp_path: Path) -> None:
    """normalize_activations scales the object's biases in place before it is saved, and threshold with them."""
    train = pytest.importorskip("dictionary_learning.training").trainSAE
    found = []
    for trainer in (getattr(ours, KINDS[kind]), theirs(kind)):
        config = settings(kind, trainer=noting(trainer, []))
        folder = tmp_path / trainer.__module__
        data = [10 * x for x in plain_rows()]
        train(
            data=data, trainer_configs=[config], steps=8, save_dir=str(folder), device="cpu",
            normalize_activations=True,
        )  # fmt: skip
        found.append(torch.load(folder / "trainer_0/ae.pt"))
    for name, tensor in found[1].items():
        assert distance(found[0][name].float(), tensor.float()) < 1e-3, name


def plain_rows() -> list[Tensor]:
    return [x.float() for x in plain.batches(3, n=8)]


def test_our_own_sae_shares_the_weights() -> None:
    trainer = ours.TopKTrainer(**settings("top_k"))
    x = plain_rows()[0]
    trainer.update(0, x)
    sae, ae = trainer.sae, trainer.ae
    assert sae.W_enc.data_ptr() == ae.encoder.weight.data_ptr()
    assert sae.W_dec.data_ptr() == ae.decoder.weight.data_ptr()
    assert distance(sae.encode(x), ae.encode(x)) < 1e-6
    assert not set(sae.state_dict()) - {"W_enc", "W_dec", "b_enc", "b_dec"}
    # Weights that are loaded into the object are the ones that are trained on.
    ae.load_state_dict(ae.state_dict() | {"encoder.weight": 2 * ae.encoder.weight.detach()})
    loaded = float((x - ae(x)).square().sum(1).mean().detach())
    assert trainer.update(1, x) == pytest.approx(loaded, rel=1e-5)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    with pytest.raises(InputError, match="dict_class is <class 'torch"):
        ours.TopKTrainer(**settings("top_k", dict_class=torch.nn.Linear))
    with pytest.raises(InputError, match="k is 0"):
        ours.TopKTrainer(**settings("top_k", k=0))
    shares = settings("matryoshka_batch_top_k", group_fractions=[0.5, 0.4])
    with pytest.raises(InputError, match="group_fractions"):
        ours.MatryoshkaBatchTopKTrainer(**shares)
    trainer = ours.TopKTrainer(**settings("top_k"))
    x = plain_rows()[0]
    trainer.update(0, x)
    x[3, 4] = torch.nan
    before = {name: tensor.clone() for name, tensor in trainer.ae.state_dict().items()}
    with pytest.raises(InputError, match="row 3 of the batch holds NaN"):
        trainer.update(1, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.ae.state_dict().items())
