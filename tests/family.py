"""What tests of the TopK family share: rows, training beside a dense statement, runs that are cut and go on."""

from pathlib import Path
from typing import Any

import dense_statements as dense
import pytest
import torch
from dense_statements import Recipe, Statement
from torch import Tensor

import saefast
from saefast.engines.autograd import AutogradEngine
from saefast.engines.fused import FusedEngine
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE

ENGINES: dict[str, Any] = {"fused": FusedEngine, "autograd": AutogradEngine}
PLAIN: dict[str, Any] = dict(
    beta1=0.9, lr=3e-3, lr_warmup_steps=3, lr_decay_share=0.4, fit_encoder=False, resample_every=0, settle_every=1
)


def rows(n: int, D: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sources of very different frequency, and a mean that is not 0."""
    code = torch.rand(n, 30) * (torch.rand(n, 30) < torch.linspace(0.02, 0.3, 30))
    return (code @ torch.randn(30, D) + 0.01 * torch.randn(n, D) + 0.3).to(dtype)


def assert_trains_as_stated(
    config: SAEConfig, settings: dict[str, Any], statement: Statement, engine: str, *, B: int = 40, steps: int = 20
) -> None:
    """Losses of every step and the parameters after all, in float64, against dense tensors and torch's Adam."""
    ours = ENGINES[engine](SAE(config, seed=3), saefast.TrainConfig(**PLAIN | settings), steps)
    data = rows(steps * B, config.d_in, torch.float64).split(B)
    ours.initialise(data[0])
    start = {name: tensor.detach().clone() for name, tensor in ours.sae.named_parameters()}
    recipe = Recipe(lr=3e-3, steps=steps, warmup=3, decay_from=round(0.6 * steps), loss="fvu")
    found, losses = dense.train(start, data, statement, recipe)
    assert [float(ours.step(x).loss) for x in data] == pytest.approx(losses, rel=1e-10)
    ours.finish()
    for key, tensor in found.items():
        torch.testing.assert_close(getattr(ours.sae, key).detach(), tensor, rtol=1e-9, atol=1e-11)


def assert_both_engines_agree(config: SAEConfig, settings: dict[str, Any], *, B: int = 40, steps: int = 30) -> None:
    """Figures of every step, AuxK among them, which has to run."""
    engines = [kind(SAE(config, seed=3), saefast.TrainConfig(**PLAIN | settings), steps) for kind in ENGINES.values()]
    data = rows(steps * B, config.d_in, torch.float64).split(B)
    auxk = 0
    for one in engines:
        one.initialise(data[0])
    for x in data:
        a, b = (one.step(x) for one in engines)
        for figure in ("loss", "fvu", "l0", "auxk_loss", "dead_share", "grad_norm"):
            assert float(getattr(a, figure)) == pytest.approx(float(getattr(b, figure)), rel=1e-9), figure
        auxk += float(a.auxk_loss) > 0
    assert auxk >= 3, "AuxK never ran, so nothing was tested"


class Stopped(Exception):
    pass


def assert_goes_on_bit_for_bit(config: SAEConfig, settings: dict[str, Any], folder: Path, *, cut_at: int = 20) -> SAE:
    """A run that is cut and resumed ends as one that was not; what was saved is loaded as it was. -> the SAE."""
    data = rows(2000, config.d_in)
    train = saefast.TrainConfig(**dict(n_tokens=2000, batch_size=40, lr=3e-3, save_every=6) | settings)

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == cut_at:
            raise Stopped

    whole = saefast.train(data, config, train, folder / "whole")
    with pytest.raises(Stopped):
        saefast.train(data, config, train, folder / "cut", on_log=stop)
    resumed = saefast.train(data, config, train, folder / "cut", resume=True)
    loaded = saefast.load(folder / "whole")
    assert loaded.config == whole.config
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
        assert torch.equal(value, loaded.state_dict()[name]), name
    torch.testing.assert_close(loaded.encode(data[:50]), whole.encode(data[:50]))
    return whole
