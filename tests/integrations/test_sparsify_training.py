"""sparsify's own loop with our step inside, against sparsify alone."""

from pathlib import Path
from typing import Any

import pytest
import recipes_plain as plain
import torch
from recipes_plain import STEPS, B, D, K, L, clear_batches, distance
from torch import Tensor, nn

from saefast.errors import InputError
from saefast.integrations import sparsify_training as ours

sparsify = pytest.importorskip("sparsify")

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("exact_matmul")]
WARMUP, DEAD = 4, 3 * B
LR = 2e-4 / (L / 2**14) ** 0.5
# Two correct fp32 runs of 25 steps whose choices of latents are clear; see tests/test_peers.py.
TOLERANCE = 1e-5
PARAMETERS = ("encoder.weight", "encoder.bias", "W_dec", "b_dec")


@pytest.fixture
def exact_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """sparsify lowers the precision of matmuls for the whole process; not in this one."""
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)


class Rows(nn.Module):
    """A "language model" whose modules put out the row of a table that each token names."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table, self.site, self.other, self.device = table, nn.Identity(), nn.Identity(), table.device
        self.dummy_inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.other(self.site(self.table[input_ids]))


class Dataset(list):
    """Sequences of token ids, one a step."""

    def select(self, indices: Any) -> "Dataset":
        return Dataset(self[i] for i in indices)


def settings(folder: Path, **changes: Any) -> Any:
    coder = sparsify.SparseCoderConfig(num_latents=L, k=K, **changes.pop("sae", {}))
    return sparsify.TrainConfig(
        coder, batch_size=1, lr_warmup_steps=WARMUP, log_to_wandb=False, save_dir=str(folder),
        **dict(optimizer="adam", hookpoints=["site"]) | changes,
    )  # fmt: skip


def new(kind: Any, data: list[Tensor], config: Any, low: float = 1.2, shift: float = 0.0, **options: Any) -> Any:
    """A trainer whose SAEs have latents that begin too low to be chosen."""
    dataset = Dataset({"input_ids": torch.arange(i * B, (i + 1) * B)} for i in range(len(data)))
    trainer = kind(config, dataset, Rows(torch.cat(data)), **options)
    for coder in trainer.saes.values():
        with torch.no_grad():
            coder.encoder.bias[::5] -= low * coder.encoder.weight.norm(dim=1).mean()
            coder.encoder.bias += shift
    return trainer


def run(trainer: Any) -> list[float]:
    """fit(), and the loss of every step."""
    losses: list[float] = []

    def note(_module: nn.Module, _inputs: Any, out: Any) -> None:
        losses.append(float((out.fvu + trainer.cfg.auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8).detach()))

    handles = [coder.register_forward_hook(note) for coder in trainer.saes.values()]
    trainer.fit()
    for handle in handles:
        handle.remove()
    return losses


def clear(folder: Path, **state: Any) -> list[Tensor]:
    """fp32 batches on which no two correct runs choose differently."""
    coder = new(sparsify.Trainer, [torch.zeros(B, D)], settings(folder)).saes["site"]
    start = {name: tensor.detach().double() for name, tensor in coder.named_parameters()}

    def run_statement(data: list[Tensor]) -> None:
        weights = start["encoder.weight"], start["W_dec"], start["encoder.bias"], data[0].mean(0)
        options = dict(auxk_alpha=0.0, multi_topk=False) | state
        plain.sparsify(
            plain.Weights(*weights), data, k=K, dead_tokens=DEAD, lr=LR, warmup=WARMUP, total=STEPS, **options
        )  # fmt: skip

    return [x.float() for x in clear_batches(run_statement)]


def assert_same(a: Any, b: Any, tolerance: float = TOLERANCE) -> None:
    for name in PARAMETERS:
        assert distance(a.get_parameter(name), b.get_parameter(name)) < tolerance, name


def test_the_same_curve_and_the_same_files(tmp_path: Path) -> None:
    data = clear(tmp_path)
    mine = new(ours.Trainer, data, settings(tmp_path / "mine"))
    own = new(sparsify.Trainer, data, settings(tmp_path / "own"))
    parameters = dict(mine.saes["site"].named_parameters())
    assert run(mine) == pytest.approx(run(own), rel=TOLERANCE)
    assert_same(mine.saes["site"], own.saes["site"])
    assert torch.equal(mine.num_tokens_since_fired["site"], own.num_tokens_since_fired["site"])
    assert all(p is parameters[name] and p.grad is None for name, p in mine.saes["site"].named_parameters())
    saved = [sparsify.SparseCoder.load_from_disk(tmp_path / who / "unnamed/site") for who in ("mine", "own")]
    assert_same(*saved)
    assert saved[0].cfg == saved[1].cfg
    # After the run the object is sparsify's own.
    x = data[-1]
    found, expected = mine.saes["site"](x), own.saes["site"](x)
    assert distance(found.sae_out, expected.sae_out) < 1e-4
    assert found.fvu.requires_grad


def test_auxk_and_multi_topk_with_the_gradients_of_the_loss(tmp_path: Path) -> None:
    """As stated in recipes_plain with `buggy` off; sparsify's own run goes elsewhere."""
    options: dict[str, Any] = dict(auxk_alpha=1 / 32, multi_topk=True)
    data = clear(tmp_path, **options)
    config = dict(auxk_alpha=1 / 32, dead_feature_threshold=DEAD, sae=dict(multi_topk=True))
    mine = new(ours.Trainer, data, settings(tmp_path / "mine", **config))
    own = new(sparsify.Trainer, data, settings(tmp_path / "own", **config))
    coder = own.saes["site"]
    w = plain.Weights(coder.encoder.weight, coder.W_dec, coder.encoder.bias, data[0].mean(0))
    records = plain.sparsify(
        w, data, k=K, dead_tokens=DEAD, lr=LR, warmup=WARMUP, total=STEPS, **options
    )  # fmt: skip
    losses = run(mine)
    assert losses == pytest.approx([record.loss for record in records], rel=TOLERANCE)
    assert sum(record.auxk > 0 for record in records) > 15
    for name, tensor in zip(("encoder.weight", "W_dec", "encoder.bias", "b_dec"), w.all(), strict=True):
        assert distance(mine.saes["site"].get_parameter(name), tensor) < TOLERANCE, name
    assert max(abs(a - b) / b for a, b in zip(losses, run(own), strict=True)) > 1e-3


def test_several_saes_have_each_their_own_step(tmp_path: Path) -> None:
    data = clear(tmp_path)
    changes: dict[str, Any] = dict(hookpoints=["site", "other"])
    mine = new(ours.Trainer, data, settings(tmp_path / "mine", **changes))
    own = new(sparsify.Trainer, data, settings(tmp_path / "own", **changes))
    assert run(mine) == pytest.approx(run(own), rel=TOLERANCE)
    for name in ("site", "other"):
        assert_same(mine.saes[name], own.saes[name])


def test_a_checkpoint_goes_on_to_the_bit(tmp_path: Path) -> None:
    data = clear(tmp_path)
    whole = new(ours.Trainer, data, settings(tmp_path / "whole", save_every=10))
    run(whole)
    # Of a run that ends after the tenth step, with the schedule of the whole.
    first = new(ours.Trainer, data, settings(tmp_path / "first"))
    first.dataset = first.dataset.select(range(10))
    run(first)
    second = new(ours.Trainer, data, settings(tmp_path / "second"))
    second.load_state(str(tmp_path / "first/unnamed"))
    assert second.global_step == 10
    run(second)
    for name in PARAMETERS:
        assert torch.equal(second.saes["site"].get_parameter(name), whole.saes["site"].get_parameter(name)), name
    (tmp_path / "first/unnamed" / ours.ENGINES).unlink()
    with pytest.raises(InputError, match="is of sparsify's own trainer"):
        second.load_state(str(tmp_path / "first/unnamed"))


def test_free_decoder_norms(tmp_path: Path) -> None:
    data = clear(tmp_path)[:6]
    changes: dict[str, Any] = dict(sae=dict(normalize_decoder=False))
    mine = new(ours.Trainer, data, settings(tmp_path / "mine", **changes))
    own = new(sparsify.Trainer, data, settings(tmp_path / "own", **changes))
    assert run(mine) == pytest.approx(run(own), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(optimizer="signum"), "not 'adam'"),
        (dict(grad_acc_steps=2), "accumulated"),
        (dict(k_decay_steps=5), "k decays"),
        (dict(sae=dict(transcode=True)), "transcode"),
        (dict(sae=dict(activation="groupmax", k=8)), "activation"),
        ({}, "reproduce_bugs"),
    ],
)
def test_what_the_fused_step_does_not_have_is_accelerated(changes: Any, reason: str, tmp_path: Path) -> None:
    """And trains as sparsify does, where its gradients are asked for. While k decays, more latents are chosen than are
    above 0, and which of the zeros sparsify chooses is left to chance: the first steps are those without gradients."""
    data = clear(tmp_path)[:8]
    with pytest.warns(RuntimeWarning, match=reason):
        mine = new(ours.Trainer, data, config(tmp_path / "mine", changes), reproduce_bugs=True)
    own = new(sparsify.Trainer, data, config(tmp_path / "own", changes))
    assert not mine.fused
    n = 2 if "k_decay_steps" in changes else None
    assert run(mine)[:n] == pytest.approx(run(own)[:n], rel=1e-4)


def config(folder: Path, changes: Any) -> Any:
    given = dict(changes)
    sae = dict(given.pop("sae", {}))
    found = settings(folder, sae={name: value for name, value in sae.items() if name != "k"}, **given)
    found.sae.k = sae.get("k", K)
    return found


def test_misuse_is_said_in_one_line(tmp_path: Path) -> None:
    data = clear(tmp_path)[:2]
    trainer = new(ours.Trainer, data, settings(tmp_path))
    step = trainer.fused["site"]
    seen = step.look(data[0])
    with pytest.raises(InputError, match=r"the loss was multiplied by 0\.5"):
        (step.noted(seen, 1.0) / 2).backward()
    step.noted(seen, 1.0).backward()
    with pytest.raises(InputError, match="knows no accumulation"):
        step.look(data[1])
    trainer.optimizers[0].step()
    other = step.look(data[1])
    step.look(data[0])
    with pytest.raises(InputError, match="not the last one"):
        step.noted(other, 1.0).backward()
