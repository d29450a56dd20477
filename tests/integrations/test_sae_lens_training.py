"""SAELens' own trainer with our training SAEs, and with our step inside, against SAELens alone."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import recipes_plain as plain
import torch
from recipes_plain import B, D, K, L, clear_batches, distance
from torch import Tensor

from saefast.errors import InputError
from saefast.integrations import sae_lens_training as ours
from saefast.integrations.data_provider import DataProvider

sae_lens = pytest.importorskip("sae_lens")
from sae_lens.config import SAETrainerConfig  # noqa: E402

pytestmark = pytest.mark.peers
WARMUP, WINDOW, SEED = 4, 3, 2
# Two correct fp32 runs of 25 steps whose choices of latents are clear; see tests/test_peers.py.
TOLERANCE = 1e-5
KINDS = ["TopK", "BatchTopK", "MatryoshkaBatchTopK"]
kinds = pytest.mark.parametrize("kind", KINDS)
PARAMETERS = ("W_enc", "W_dec", "b_enc", "b_dec")


def new(kind: str, module: Any = sae_lens, **changes: Any) -> Any:
    """A training SAE with unequal decoder norms and latents that begin too low to be chosen."""
    torch.manual_seed(SEED)
    if kind.startswith("Matryoshka"):
        changes["matryoshka_widths"] = [32, 96, L]
    config = getattr(module, f"{kind}TrainingSAEConfig")(d_in=D, d_sae=L, k=K, **changes)
    sae = getattr(module, f"{kind}TrainingSAE")(config)
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.8, 1.2, L)[:, None]
        sae.b_enc[::5] -= 1.2 * sae.W_enc.norm(dim=0).mean()
    return sae


def trainer_for(sae: Any, data: list[Tensor], kind: Any = None, **changes: Any) -> Any:
    config = SAETrainerConfig(
        total_training_samples=len(data) * B, train_batch_size_samples=B, lr_end=3e-5, lr_warm_up_steps=WARMUP,
        dead_feature_window=WINDOW, **changes,
    )  # fmt: skip
    return (kind or sae_lens.SAETrainer)(config, sae, iter(data))


def clear(kind: str) -> list[Tensor]:
    """fp32 batches on which no two correct runs choose differently. b_dec begins at 0, and so do the rows' means."""
    start = {name: tensor.detach().double() for name, tensor in new(kind).named_parameters()}
    widths = (32, 96, L) if kind.startswith("Matryoshka") else ()

    def run(data: list[Tensor]) -> None:
        w = plain.Weights(start["W_enc"].T, start["W_dec"], start["b_enc"], start["b_dec"])
        plain.saelens(
            w, data, k=K, dead_passes=WINDOW, lr=3e-4, warmup=WARMUP, batch=kind != "TopK", widths=widths
        )  # fmt: skip

    return [x.float() for x in clear_batches(run, mean=0.1)]


def run(trainer: Any) -> list[Any]:
    """fit(), and what every step of it returned."""
    outputs, step = [], trainer.step
    trainer.step = lambda batch: outputs.append(step(batch)) or outputs[-1]
    trainer.fit()
    return outputs


def assert_same(mine: Any, own: Any, outputs: tuple[list[Any], list[Any]]) -> None:
    """Losses, what fired, counters, and weights at the end."""
    a, b = outputs
    assert [o.loss.item() for o in a] == pytest.approx([o.loss.item() for o in b], rel=TOLERANCE)
    for key in ("mse_loss", "auxiliary_reconstruction_loss"):
        assert [o.losses[key].item() for o in a] == pytest.approx([o.losses[key].item() for o in b], rel=TOLERANCE)
    assert sum(o.losses["auxiliary_reconstruction_loss"].item() > 0 for o in a) > 15
    for x, y in zip(a, b, strict=True):
        assert distance(x.feature_acts.to_dense(), y.feature_acts) < TOLERANCE
        assert distance(x.sae_out, y.sae_out) < TOLERANCE
    assert torch.equal(mine.n_forward_passes_since_fired, own.n_forward_passes_since_fired)
    assert torch.equal(mine.act_freq_scores, own.act_freq_scores)
    for name in PARAMETERS:
        assert distance(getattr(mine.sae, name), getattr(own.sae, name)) < TOLERANCE, name


@kinds
def test_the_registered_sae_trains_as_saelens_own(kind: str, tmp_path: Path) -> None:
    """In SAELens' trainer with SAELens' Adam; activations are sparse, and what is saved is SAELens' own."""
    data = clear(kind)
    trainers = [trainer_for(new(kind, module), data) for module in (ours, sae_lens)]
    mine, own = trainers
    outputs = run(mine), run(own)
    assert all(output.feature_acts.is_sparse for output in outputs[0])
    assert_same(mine, own, outputs)
    for trainer, folder in zip(trainers, ("mine", "own"), strict=True):
        trainer.sae.save_inference_model(tmp_path / folder)
        trainer.sae.save_model(tmp_path / folder / "training")
    served = [sae_lens.SAE.load_from_disk(tmp_path / folder) for folder in ("mine", "own")]
    assert type(served[0]) is type(served[1])
    assert distance(served[0].encode(data[-1]), served[1].encode(data[-1])) < 1e-4
    assert served[0].cfg.metadata.training_architecture == ours.PREFIX + served[1].cfg.metadata.training_architecture
    again = sae_lens.TrainingSAE.load_from_disk(tmp_path / "mine/training")
    assert type(again) is type(own.sae)
    assert torch.equal(again.W_enc, mine.sae.W_enc)


@kinds
def test_the_name_is_what_saelens_makes_the_sae_by(kind: str) -> None:
    """A runner's way: from a config's dict to the class."""
    config = new(kind, ours).cfg
    made = sae_lens.TrainingSAE.from_dict(sae_lens.TrainingSAEConfig.from_dict(config.to_dict()).to_dict())
    assert type(made) is getattr(ours, f"{kind}TrainingSAE")
    assert config.architecture().startswith("saefast_")


@pytest.mark.parametrize("module", [sae_lens, ours], ids=["saelens", "saefast"])
@pytest.mark.parametrize("kind", ["TopK", "BatchTopK"])
def test_the_fused_step_in_saelens_loop(kind: str, module: Any) -> None:
    data = clear(kind)
    mine, own = trainer_for(new(kind, module), data, ours.SAETrainer), trainer_for(new(kind), data)
    parameters = dict(mine.sae.named_parameters())
    outputs = run(mine), run(own)
    assert_same(mine, own, outputs)
    assert all(parameter is parameters[name] for name, parameter in mine.sae.named_parameters())
    assert all(parameter.grad is None for parameter in parameters.values())
    assert not mine.optimizer.state_dict()["state"]
    if kind == "BatchTopK":
        assert float(mine.sae.topk_threshold) == pytest.approx(float(own.sae.topk_threshold), rel=TOLERANCE)
    x = data[-1]
    assert distance(mine.sae.encode(x), own.sae.encode(x)) < 1e-4
    log = mine.build_train_step_log_dict(outputs[0][-1], 1)
    expected = own.build_train_step_log_dict(outputs[1][-1], 1)
    assert log == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", ["TopK", "BatchTopK"])
def test_a_checkpoint_goes_on_to_the_bit(kind: str, tmp_path: Path) -> None:
    data = clear(kind)
    whole = trainer_for(new(kind), data, ours.SAETrainer)
    run(whole)
    first = trainer_for(new(kind), data, ours.SAETrainer, checkpoint_path=str(tmp_path))
    first.sae.to("cpu")
    for x in data[:10]:
        first.step(x)
        first.n_training_steps += 1
    first.save_checkpoint("half")
    second = trainer_for(new(kind), data[10:], ours.SAETrainer)
    second.sae.load_weights_from_checkpoint(tmp_path / "half")
    second.load_trainer_state(tmp_path / "half")
    for x in data[10:]:
        second.step(x)
        second.n_training_steps += 1
    for name in PARAMETERS:
        assert torch.equal(getattr(second.sae, name), getattr(whole.sae, name)), name
    if kind == "BatchTopK":
        assert float(second.sae.topk_threshold) == pytest.approx(float(whole.sae.topk_threshold), rel=1e-6)
    (tmp_path / "half" / ours.ENGINE).unlink()
    with pytest.raises(InputError, match="is of SAELens' own trainer"):
        second.load_trainer_state(tmp_path / "half")


def test_our_source_is_a_data_provider() -> None:
    """SAELens' fit() draws from it, and goes on beyond the end of an epoch."""
    data = [x.float() for x in plain.batches(0, 0.1, n=4)]
    batches = DataProvider(torch.cat(data), B, heldout=0.0)
    trainer = trainer_for(new("TopK"), data * 3, ours.SAETrainer)
    trainer.data_provider = batches
    outputs = run(trainer)
    assert len(outputs) == 12
    expected = DataProvider(torch.cat(data), B, heldout=0.0)
    assert all(torch.equal(output.sae_in, next(expected)) for output in outputs)


def test_scaled_activations_are_folded_in_the_end() -> None:
    """normalize_activations="expected_average_only_in": SAELens' scaler, and its folding after the last step."""
    data = [10 * x for x in clear("TopK")]
    saes = []
    for kind in (ours.SAETrainer, sae_lens.SAETrainer):
        sae = new("TopK", normalize_activations="expected_average_only_in")
        trainer = trainer_for(sae, data, kind, n_batches_for_norm_estimate=2)
        trainer.cfg.total_training_samples = 10 * B
        trainer.fit()
        saes.append(sae)
    for name in PARAMETERS:
        assert distance(getattr(saes[0], name), getattr(saes[1], name)) < TOLERANCE, name


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: new("MatryoshkaBatchTopK"), "not MatryoshkaBatchTopKTrainingSAE"),
        (lambda: new("TopK", normalize_activations="layer_norm"), "'layer_norm'"),
        (lambda: new("TopK", dtype="bfloat16"), "bfloat16"),
        (lambda: new_with_half_a_latent(), "k is 6.5"),
    ],
)
def test_what_the_fused_step_does_not_train_says_so(make: Any, reason: str) -> None:
    data = [x.float() for x in plain.batches(0, 0.1, n=2)]
    with pytest.warns(RuntimeWarning, match=reason):
        trainer = trainer_for(make(), data, ours.SAETrainer)
    assert trainer.step(data[0].to(trainer.sae.dtype)).loss.item() > 0
    assert trainer.fused is None
    assert trainer.optimizer.state_dict()["state"]


def new_with_half_a_latent() -> Any:
    return sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(d_in=D, d_sae=L, k=6.5))


def test_misuse_is_said_in_one_line() -> None:
    data = [x.float() for x in plain.batches(0, 0.1, n=3)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer = trainer_for(new("TopK"), data, ours.SAETrainer)
    trainer.step(data[0])
    before = trainer.sae.W_dec.detach().clone()
    bad = data[1].clone()
    bad[3, 4] = torch.nan
    with pytest.raises(InputError, match="row 3 of the batch holds NaN"):
        trainer.step(bad)
    assert torch.equal(trainer.sae.W_dec, before)
    trainer.step(data[1])
    handle = trainer.sae.hook_sae_acts_post.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="the SAE has hooks"):
        trainer.step(data[2])
    handle.remove()
    trainer.sae.W_dec.data = trainer.sae.W_dec.data.clone()
    with pytest.raises(InputError, match="exchanged or moved"):
        trainer.step(data[2])
