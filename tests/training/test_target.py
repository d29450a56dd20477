"""Training that maps x to a target of its own: scales, the finished SAE for raw rows, resume, refusals."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import train_job
from torch import Tensor

from saefast.data.shard_writer import ShardWriter
from saefast.engines.autograd import AutogradEngine
from saefast.engines.config import TrainConfig
from saefast.engines.fused import FusedEngine
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, load
from saefast.training.api import train
from saefast.training.progress import read_metrics

CONFIG = SAEConfig(d_in=12, n_latents=48, k=8, apply_b_dec_to_input=False)
ENGINES = ["autograd", "fused"]
# All that brings latents back.
BOTH: dict[str, Any] = dict(auxk_coef=1 / 32, resample_every=4)


def target_of(x: Tensor) -> Tensor:
    """Something else than x, a thousand times as large."""
    turn = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(5)))[0]
    return 1000 * (x @ turn + 2)


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**(train_job.CONFIG | {"n_tokens": 32 * 300, "save_every": 0} | changes))


def same(a: SAE, b: SAE) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def fvu(sae: SAE, x: Tensor, target: Tensor) -> float:
    with torch.no_grad():
        error = (sae(x).x_hat - target).square().sum() / (target - target.mean(0)).square().sum()
    return float(error)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_finished_sae_maps_raw_x_to_raw_target(tmp_path: Path, engine: str) -> None:
    x = train_job.rows(2000)
    data = {"x": x, "target": target_of(x)}
    sae = train(data, CONFIG, settings(engine=engine), tmp_path / "run")
    found = fvu(sae, x[-100:], target_of(x[-100:]))
    assert found < 0.3
    assert fvu(sae, x[-100:], x[-100:]) > 10
    # The run measured the same on scaled rows, before it was folded.
    assert read_metrics(tmp_path / "run")[-1]["heldout/fvu"] == pytest.approx(found, rel=1e-3)
    assert same(load(tmp_path / "run"), sae)
    torch.testing.assert_close(sae.decoder_norms(), torch.ones(48))


@pytest.mark.parametrize("engine", ENGINES)
def test_x_as_its_own_target_trains_the_same_bits(engine: str) -> None:
    x = train_job.rows()
    config = settings(engine=engine, n_tokens=32 * 20)
    assert same(train({"x": x, "target": x.clone()}, CONFIG, config), train(x, CONFIG, config))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_on_a_target_resumes_to_the_bit(tmp_path: Path, engine: str) -> None:
    x = train_job.rows()
    data = {"x": x, "target": target_of(x)}
    config = settings(engine=engine, n_tokens=32 * 20, save_every=6, log_every=1)

    def breaks(line: dict[str, Any]) -> None:
        if line["step"] == 9:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(data, CONFIG, config, tmp_path / "run", on_log=breaks)
    assert (tmp_path / "run" / "checkpoints" / "step_00000006").is_dir()
    resumed = train(data, CONFIG, config, tmp_path / "run", resume=True)
    assert same(resumed, train(data, CONFIG, config))


@pytest.mark.parametrize("tied", [{}, {"rescale_acts_by_decoder_norm": True}], ids=str)
def test_engines_agree_on_a_target(tied: dict[str, Any]) -> None:
    x = train_job.rows(30 * 32).double()
    data = {"x": x, "target": target_of(x.float()).double()}
    config = dataclasses.replace(CONFIG, dtype="float64", **tied)
    recipe = TrainConfig(lr=1e-3, dead_after=2 * 32, settle_every=1, auxk_b_dec_grad=True, **BOTH)
    stats = []
    for kind in (FusedEngine, AutogradEngine):
        engine = kind(SAE(config, seed=1), recipe, 60)
        engine.initialise(data["x"], data["target"])
        stats.append([engine.step(x, y) for x, y in zip(*(rows.split(32) for rows in data.values()), strict=True)])
    for ours, dense in zip(*stats, strict=True):
        assert float(ours.loss) == pytest.approx(float(dense.loss), rel=1e-9)
        assert float(ours.grad_norm) == pytest.approx(float(dense.grad_norm), rel=1e-8)


def test_decoder_norms_measure_activations_of_a_target_too() -> None:
    x = train_job.rows(2000)
    config = dataclasses.replace(CONFIG, rescale_acts_by_decoder_norm=True)
    sae = train({"x": x, "target": target_of(x)}, config, settings())
    assert fvu(sae, x[-100:], target_of(x[-100:])) < 0.3


def test_what_cannot_be_a_target() -> None:
    x = train_job.rows()
    with pytest.raises(InputError, match="the array 'target' has a target besides x, and apply_b_dec_to_input is True"):
        train({"x": x, "target": target_of(x)}, SAEConfig(d_in=12, n_latents=48, k=4), settings())
    with pytest.raises(InputError, match="target is 5 wide, d_in is 12"):
        train({"x": x, "target": target_of(x)[:, :5]}, CONFIG, settings())


def test_two_hooks_of_a_folder_are_x_and_target(tmp_path: Path) -> None:
    x = train_job.rows(2000)
    hooks = [{"name": name, "hf_name": name} for name in ("into", "out")]
    with ShardWriter(tmp_path / "acts", hooks, "float32") as writer:
        writer.add_sequences(0, [0], [list(range(len(x)))])
        rows = {"into": x, "out": target_of(x)}
        writer.add("train", rows, torch.zeros(len(x), dtype=torch.int64), torch.arange(len(x)))
        writer.commit({}, complete=True)
    sae = train(tmp_path / "acts", CONFIG, settings(), tmp_path / "run", hooks={"x": "into", "target": "out"})
    assert fvu(sae, x, target_of(x)) < 0.3
    assert sae.config.metadata["data"]["hooks"] == {"x": "into", "target": "out"}
