"""Ugly rows: means far from zero, attention sinks, odd sizes, dead and copied dimensions, duplicates."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saefast.data.opening import open_source
from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.metrics.ordinary import Ordinary
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.training.api import Stopped, train
from saefast.training.feed import Feed
from saefast.training.left_out import LeftOut
from saefast.training.progress import read_metrics

D = 24
RECIPE: dict[str, Any] = dict(
    n_tokens=60_000,
    batch_size=256,
    lr=2e-3,
    lr_warmup_steps=20,
    lr_decay_share=0.5,
    device="cpu",
    save_every=0,
    dead_after=50_000,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def features(n: int = 20_000, seed: int = 0) -> Tensor:
    """(n, D): sums of about six of 96 directions."""
    directions = torch.nn.functional.normalize(torch.randn(4 * D, D, generator=torch.Generator().manual_seed(1)), dim=1)
    drawn = torch.Generator().manual_seed(seed)
    code = (torch.rand(n, 4 * D, generator=drawn) < 6 / (4 * D)) * torch.rand(n, 4 * D, generator=drawn)
    return code @ directions


def with_sinks(x: Tensor, times: float, every: int = 128) -> Tensor:
    """Every so many rows one that lies `times` the median norm away, all in nearly one direction."""
    drawn = torch.Generator().manual_seed(2)
    towards = torch.randn(x.shape[1], generator=drawn)
    x = x.clone()
    size = times * float(x.norm(dim=1).median()) / float(towards.norm())
    x[::every] = towards * size * (1 + 0.01 * torch.randn(len(x[::every]), 1, generator=drawn))
    return x


def trained(x: Any, *args: Any, d_in: int = D, **changes: Any) -> SAE:
    return train(x, SAEConfig(d_in=d_in, n_latents=96, k=6), TrainConfig(**(RECIPE | changes)), *args, progress=False)


def of_variance(x: Tensor, **changes: Any) -> list[str]:
    """The warnings of a run that say something of the variance of its first rows; so short a run has others too."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trained(x, **changes)
    return [str(warning.message) for warning in seen if "variance" in str(warning.message)]


def fvu(sae: SAE, x: Tensor) -> float:
    with torch.no_grad():
        error = (x - sae(x).x_hat).double()
    return float(error.square().sum() / (x.double() - x.double().mean(0)).square().sum())


def unused(sae: SAE, x: Tensor) -> float:
    _, idx = sae.encode_sparse(x)
    return 1 - len(idx.unique()) / sae.config.n_latents


def looked_at(x: Tensor, multiple: Any = "auto") -> LeftOut:
    found = LeftOut(multiple)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found.look_at({"x": x})
    return found


# What is left out of a batch.


def test_other_rows_take_the_places_and_nothing_else_changes() -> None:
    x = with_sinks(features(1024), 100)
    left_out = looked_at(x)
    batch = x[100:400]  # holds the sinks 128, 256 and 384
    (rows,), n_kept = left_out.trained_on({"x": batch})[0].values(), left_out.trained_on({"x": batch})[1]
    others = [i for i in range(300) if i not in (28, 156, 284)]
    assert torch.equal(rows, torch.cat([batch[others], batch[:3]]))
    assert n_kept == 297
    assert left_out.n_left_out == 6
    clean = {"x": x[130:200]}
    assert left_out.trained_on(clean)[0] is clean
    assert left_out.n_left_out == 6


def test_nothing_is_left_out_where_nothing_is_to_be() -> None:
    x = with_sinks(features(1024), 100)
    for left_out in (looked_at(x, None), looked_at(with_sinks(x, 100, every=20))):
        assert left_out.trained_on({"x": x}) == ({"x": x}, None)
        assert left_out.n_left_out == 0
    given = looked_at(x, 1000.0)
    assert given.trained_on({"x": x})[0]["x"] is x
    assert given.ordinary["x"].multiple == 1000.0


def test_a_row_is_left_out_for_its_target_as_well() -> None:
    x, target = features(1024), with_sinks(features(1024, seed=3), 100)
    left_out = LeftOut("auto")
    with pytest.warns(RuntimeWarning, match="in 'target' hold"):
        kept = left_out.look_at({"x": x, "target": target})
    assert len(kept["x"]) == len(kept["target"]) == 1024 - 8
    batch, n_kept = left_out.trained_on({"x": x[:4], "target": target[:4]})
    assert n_kept == 3
    assert torch.equal(batch["x"], x[[1, 2, 3, 1]])
    assert torch.equal(batch["target"], target[[1, 2, 3, 1]])


# The run.


def test_sinks_do_not_reach_the_sae_which_serves_them_all_the_same(tmp_path: Path) -> None:
    x, held = features(), features(4000, seed=5)
    clean = fvu(trained(x), held)
    with pytest.warns(RuntimeWarning, match=r"hold .* of their variance: rows beyond 5 times .* are left out") as seen:
        sae = trained(with_sinks(x, 1000), tmp_path / "run", log_every=1)
    assert len([warning for warning in seen if "variance" in str(warning.message)]) == 1
    assert fvu(sae, held) < 1.03 * clean
    assert unused(sae, held) < 0.02
    lines = read_metrics(tmp_path / "run")
    n_out = [line["rows_left_out"] for line in lines]
    assert n_out == sorted(n_out)
    assert n_out[-1] == pytest.approx(60_000 / 128, rel=0.15)
    assert lines[-1]["tokens"] == 60_000 // 256 * 256
    # Held-out rows are as they are: the plain figure is about sinks, the two others are about the rest.
    assert lines[-1]["heldout/fvu"] != lines[-1]["heldout/fvu_ordinary"]
    assert lines[-1]["heldout/fvu_ordinary"] == pytest.approx(fvu(sae, held), rel=0.05)
    assert lines[-1]["heldout/fvu_median"] == pytest.approx(fvu(sae, held), rel=0.25)
    sinks = with_sinks(held, 1000)[::128]
    assert sae(sinks).x_hat.isfinite().all()


def test_they_reach_it_where_nothing_is_left_out() -> None:
    """What the filter is for: without it the same rows give a far worse SAE."""
    x, held = features(), features(4000, seed=5)
    with pytest.warns(RuntimeWarning, match="max_norm_multiple='auto' leaves such rows out"):
        sae = trained(with_sinks(x, 1000), max_norm_multiple=None)
    assert fvu(sae, held) > 1.03 * fvu(trained(x), held)


def test_many_far_rows_are_warned_of_and_kept() -> None:
    with pytest.warns(RuntimeWarning, match=r"leaves out 2% of rows at most, beyond 5 times .* set a number"):
        trained(with_sinks(features(4000), 1000, every=16), n_tokens=512)


def test_no_warning_without_a_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(features(4000), n_tokens=25_600, dead_after=20_000)


@pytest.mark.parametrize("kind", ["array", "iterable"])
def test_a_resumed_run_leaves_out_the_same_rows(tmp_path: Path, kind: str) -> None:
    x = with_sinks(features(4000), 1000)

    def data() -> Any:
        return x if kind == "array" else lambda: iter(x.split(300))

    changes: dict[str, Any] = dict(n_tokens=256 * 12, save_every=5, log_every=1, init_rows=700)
    seen: list[dict[str, Any]] = []

    def stop_at_7(line: dict[str, Any]) -> None:
        if line["step"] == 7:
            raise KeyboardInterrupt

    config, sae = TrainConfig(**(RECIPE | changes)), SAEConfig(d_in=D, n_latents=96, k=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = train(data(), sae, config, on_log=seen.append)
        with pytest.raises((KeyboardInterrupt, Stopped)):
            train(data(), sae, config, tmp_path / "run", on_log=stop_at_7)
        resumed = train(data(), sae, config, tmp_path / "run", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    lines = read_metrics(tmp_path / "run")
    for name in ("rows_left_out", "heldout/fvu_ordinary", "heldout/fvu_median", "losses/overall_loss"):
        assert [line.get(name) for line in lines] == [line.get(name) for line in seen]
    assert lines[-1]["rows_left_out"] > 10


@pytest.mark.parametrize("deferred", [False, True])
def test_a_batch_of_nothing_but_far_rows_is_named(deferred: bool) -> None:
    x = torch.cat([features(2000), 1000 + features(2000)])
    source = open_source(lambda: iter(x.split(250)), shuffle_rows=0)
    feed = Feed(source, TrainConfig(batch_size=250), torch.device("cpu"), torch.float32)
    feed.deferred = deferred
    feed.look_at(feed.look_ahead(250))

    def go_on() -> None:
        for step in range(15):
            feed.next(step)
            feed.confirm()

    with pytest.raises(InputError, match=r"^step \d+: all rows of the batch lie beyond max_norm_multiple"):
        go_on()


def test_data_that_changes_is_warned_of() -> None:
    x = torch.cat([features(500), with_sinks(features(4000), 100, every=5)])
    with pytest.warns(RuntimeWarning, match=r"rows so far are left out of training, 2% at most .* shuffle it"):
        trained(open_source(lambda: iter(x.split(250)), shuffle_rows=0), batch_size=250, n_tokens=3000, init_rows=250)


# Rows that are ugly in other ways.


@pytest.mark.parametrize("engine", ["fused", "autograd"])
@pytest.mark.parametrize("times", [300, 3000])
def test_a_mean_far_from_zero_costs_nothing(times: int, engine: str) -> None:
    x, held = features(), features(4000, seed=5)
    spread = float(x.std(0).norm())
    everywhere = torch.randn(D, generator=torch.Generator().manual_seed(4))
    offsets = [times * spread * everywhere / everywhere.norm(), torch.zeros(D)]
    offsets[1][[3, 17]] = times * spread
    clean = fvu(trained(x, engine=engine), held)
    for offset in offsets:
        sae = trained(x + offset, engine=engine)
        assert fvu(sae, held + offset) < 1.03 * clean
        assert unused(sae, held + offset) < 0.02


def test_a_mean_that_bfloat16_cannot_hold_is_warned_of() -> None:
    x = features(2000)
    far = x + 1000 * float(x.std(0).norm()) * torch.nn.functional.normalize(torch.ones(D), dim=0)
    with pytest.warns(
        RuntimeWarning, match=r"bfloat16 rounds away \d+% of .* whose mean is 1\d\d\d times their spread"
    ):
        trained(far, n_tokens=512, optimizer="adam-lean")
    assert of_variance(x + 3, n_tokens=512, optimizer="adam-lean") == []
    assert of_variance(far, n_tokens=512) == []


@pytest.mark.parametrize("size", [2.0**-10, 2.0**10, 1e-3, 1e3])
def test_the_size_of_rows_is_folded_away(size: float) -> None:
    x = features()
    plain, scaled = trained(x), trained(x * size)
    if math.log2(size).is_integer():  # then no rounding differs either
        assert torch.equal(plain.W_enc, scaled.W_enc)
        assert torch.equal(plain.W_dec, scaled.W_dec)
        assert torch.equal(plain.b_enc * size, scaled.b_enc)
        assert torch.equal(plain.b_dec * size, scaled.b_dec)
    held = features(4000, seed=5)
    assert fvu(scaled, held * size) == pytest.approx(fvu(plain, held), rel=0.02)


def test_constant_and_copied_dimensions_and_duplicates() -> None:
    x, held = features(), features(4000, seed=5)
    clean = fvu(trained(x), held)

    def constant(rows: Tensor) -> Tensor:
        return torch.cat([rows, torch.full((len(rows), 1), 5.0), torch.zeros(len(rows), 2)], 1)

    assert fvu(trained(constant(x), d_in=D + 3), constant(held)) < 1.03 * clean
    copied = x[:, [*range(D), 0, 0]]
    assert fvu(trained(copied, d_in=D + 2), held[:, [*range(D), 0, 0]]) < 1.03 * clean
    assert fvu(trained(torch.cat([x, x[:200].repeat(20, 1)])), held) < 1.03 * clean


def test_which_rows_are_ordinary_survives_a_checkpoint() -> None:
    x = with_sinks(features(1024), 100)
    before, after = looked_at(x), LeftOut("auto")
    before.trained_on({"x": x})
    after.load_state_dict(before.state_dict(), torch.device("cpu"))
    assert after.n_left_out == before.n_left_out == 8
    assert after.ordinary["x"].usual == before.ordinary["x"].usual
    assert torch.equal(after.ordinary["x"].centre, before.ordinary["x"].centre)
    assert isinstance(after.ordinary["x"], Ordinary)
    every = looked_at(features(1024), None)
    after.load_state_dict(every.state_dict(), torch.device("cpu"))
    assert after.ordinary["x"].multiple == every.ordinary["x"].multiple
