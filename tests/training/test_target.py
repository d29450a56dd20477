"""Training that maps x to a target of its own: scales, the finished SAE for raw rows, resume, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
import train_job
from torch import Tensor

from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE, load
from saefast.training.api import train
from saefast.training.progress import read_metrics

CONFIG = SAEConfig(d_in=12, n_latents=48, k=8, apply_b_dec_to_input=False)
ENGINES = ["autograd", "fused"]


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


@pytest.mark.parametrize("name", ["apply_b_dec_to_input", "rescale_acts_by_decoder_norm"])
def test_what_ties_the_decoder_to_x_is_refused(name: str) -> None:
    x = train_job.rows()
    config = SAEConfig(d_in=12, n_latents=48, k=4, **({"apply_b_dec_to_input": False} | {name: True}))
    with pytest.raises(InputError, match=f"the array 'target' has a target besides x, and {name} is True"):
        train({"x": x, "target": target_of(x)}, config, settings())
