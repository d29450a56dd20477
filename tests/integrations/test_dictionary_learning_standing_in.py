"""Our trainers without dictionary_learning: its object stands in, its recipe is stated in recipes_plain."""

import sys
from types import ModuleType
from typing import Any

import pytest
import recipes_plain as plain
import torch
from recipes_plain import STEPS, B, D, K, L, distance
from torch import Tensor, nn

from saefast.errors import InputError
from saefast.integrations.dictionary_learning_training import BatchTopKTrainer, TopKTrainer

WARMUP, DECAY, DEAD = 4, 15, 3 * B
DEVICE = torch.device("cpu")


class Object(nn.Module):
    """The names and layouts of dictionary_learning's tensors."""

    def __init__(self, activation_dim: int, dict_size: int, k: int) -> None:
        super().__init__()
        self.register_buffer("k", torch.tensor(k, dtype=torch.int))
        self.register_buffer("threshold", torch.tensor(-1.0))
        self.decoder = nn.Linear(dict_size, activation_dim, bias=False)
        self.decoder.weight.data /= self.decoder.weight.data.norm(dim=0)
        self.encoder = nn.Linear(activation_dim, dict_size)
        self.encoder.weight.data = self.decoder.weight.data.T.clone()
        self.encoder.bias.data.zero_()
        self.encoder.bias.data[::5] -= 1.2
        self.b_dec = nn.Parameter(torch.zeros(activation_dim))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dictionary_learning that has its two classes and nothing else."""
    names = {"top_k": "AutoEncoderTopK", "batch_top_k": "BatchTopKSAE"}
    for name in ("dictionary_learning", "dictionary_learning.trainers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for file, kind in names.items():
        module = ModuleType(f"dictionary_learning.trainers.{file}")
        setattr(module, kind, type(kind, (Object,), {}))
        monkeypatch.setitem(sys.modules, module.__name__, module)


def new(trainer: type[TopKTrainer], **changes: Any) -> TopKTrainer:
    settings: dict[str, Any] = dict(
        steps=STEPS, activation_dim=D, dict_size=L, k=K, layer=0, lm_name="none", warmup_steps=WARMUP,
        decay_start=DECAY, threshold_start_step=5, device=str(DEVICE), seed=2,
    )  # fmt: skip
    found = trainer(**settings | changes)
    found.dead_feature_threshold = DEAD
    return found


def state(trainer: TopKTrainer, data: list[Tensor], dtype: torch.dtype) -> tuple[plain.Weights, list[plain.Record]]:
    """The recipe's statement from the trainer's weights, b_dec where the trainer's first step puts it."""
    sae = trainer.sae
    w = plain.Weights(*(getattr(sae, name).to("cpu", dtype) for name in ("W_enc", "W_dec", "b_enc", "b_dec")))
    return w, plain.dictionary_learning(
        w, data, k=K, dead_tokens=DEAD, lr=2e-4 / (L / 2**14) ** 0.5, warmup=WARMUP, decay_start=DECAY, total=STEPS,
        batch=isinstance(trainer, BatchTopKTrainer), threshold_start=5,
    )  # fmt: skip


@pytest.mark.usefixtures("installed", "on_each_device")
@pytest.mark.parametrize("kind", [TopKTrainer, BatchTopKTrainer])
def test_the_recipe_is_dictionary_learnings(kind: type[TopKTrainer]) -> None:
    """Loss and weights of 25 steps, with dead latents, on batches without near ties."""

    def begun(data: list[Tensor]) -> TopKTrainer:
        trainer = new(kind)
        trainer.engine.initialise(data[0].float().to(DEVICE))
        return trainer

    data = plain.clear_batches(lambda rows: state(begun(rows), rows, torch.float64))
    data = [x.float() for x in data]
    w, records = state(begun(data), data, torch.float32)
    trainer = new(kind)
    losses, dead = [], []
    for step, x in enumerate(data):
        losses.append(trainer.update(step, x))
        dead.append(trainer.dead_features)
    assert losses == pytest.approx([record.loss for record in records], rel=1e-5)
    assert dead == [record.n_dead for record in records]
    assert dead[-1] > 0
    for name, tensor in zip(("W_enc", "W_dec", "b_enc", "b_dec"), w.all(), strict=True):
        assert distance(getattr(trainer.sae, name).cpu(), tensor) < 1e-5, name
    if kind is BatchTopKTrainer:
        assert float(trainer.ae.threshold) == pytest.approx(records[-1].threshold, rel=1e-5)


@pytest.mark.usefixtures("installed", "on_each_device")
def test_the_object_is_theirs_and_its_tensors_are_the_trained_ones() -> None:
    trainer = new(TopKTrainer)
    x = plain.batches(0)[0].float()
    before = trainer.ae.encoder.weight.detach().clone()
    trainer.update(0, x)
    assert torch.equal(trainer.ae.encoder.weight, before)  # the first step of a warm-up has rate 0
    trainer.update(1, x)
    state, ae = trainer.ae.state_dict(), trainer.ae
    assert not torch.equal(ae.encoder.weight, before)
    assert torch.equal(state["decoder.weight"], trainer.sae.W_dec.T)
    assert all(tensor.is_contiguous() for tensor in state.values())
    assert set(state) == {"k", "threshold", "b_dec", "decoder.weight", "encoder.weight", "encoder.bias"}
    assert trainer.config["dict_class"] == "AutoEncoderTopK"
    assert trainer.config["k"] == K


@pytest.mark.usefixtures("installed", "on_each_device")
def test_the_threshold_of_topk_is_a_mean_of_the_tokens_smallest() -> None:
    """And a token without a positive activation has no part in it."""
    trainer = new(TopKTrainer, threshold_start_step=0, threshold_beta=0.9)
    data = [x.float() for x in plain.batches(1, n=3)]
    data[1][0], expected = 0, -1.0
    for step, x in enumerate(data):
        if step == 1:
            # Far below: no latent is on for a row at the centre.
            trainer.ae.encoder.bias.data -= 0.5
            data[1][0] = trainer.ae.b_dec.detach().cpu()
        if step > 0:
            acts = trainer.sae.encode_sparse(x.to(DEVICE))[0].detach()
            lowest = torch.where(acts > 0, acts, torch.inf).amin(1)
            assert step != 1 or lowest.isinf().any()
            now = float(lowest[lowest.isfinite()].mean())
            expected = now if expected < 0 else 0.9 * expected + 0.1 * now
        trainer.update(step, x)
        assert float(trainer.ae.threshold) == pytest.approx(expected, rel=1e-5)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dictionary_learning", None)
    with pytest.raises(InputError, match="pip install dictionary-learning"):
        new(TopKTrainer)
