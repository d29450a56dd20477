"""stop_at_plateau: the decay begins where more tokens stop helping, and the run ends with it, resumed or not."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import train_job

from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.training.api import Stopped, train
from saefast.training.heldout import chosen_eval_every
from saefast.training.loop import decay_steps
from saefast.training.progress import read_metrics
from saefast.training.several import Member, train_many
from saefast.training.trend import PLATEAU

SMALL = SAEConfig(d_in=12, n_latents=4, k=1)
PLANNED = 500
CLOCKS = ("seconds", "tokens_per_second", "idle_share")


def settings(**changes: Any) -> TrainConfig:
    """A rate so high, and an SAE so small, that the held-out FVU soon falls no more."""
    base = train_job.CONFIG | dict(n_tokens=32 * PLANNED, eval_every=5, log_every=5, save_every=0, lr=3e-2)
    return TrainConfig(**(base | dict(stop_at_plateau=True) | changes))


def rows() -> torch.Tensor:
    return train_job.rows(2000)


def figures(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in read_metrics(folder)]


def same(one: SAE, other: SAE) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def stop_at(step: int) -> Callable[[dict[str, Any]], None]:
    def on_log(line: dict[str, Any]) -> None:
        if line["step"] >= step:
            os.kill(os.getpid(), 2)

    return on_log


def ends(lines: list[dict[str, Any]]) -> tuple[int, int]:
    """The step of the plateau, and the last one."""
    return lines[-1]["details/plateau_step"], lines[-1]["step"]


@pytest.mark.parametrize("engine", ["fused", "autograd"])
@pytest.mark.parametrize("changes", [{}, {"lr_decay_start": -1}, {"lr_decay_start": PLANNED // 2}])
def test_the_decay_begins_at_the_plateau_and_the_run_ends_with_it(
    tmp_path: Path, engine: str, changes: dict[str, Any]
) -> None:
    config = settings(engine=engine, **changes)
    train(rows(), SMALL, config, tmp_path / "run")
    lines = figures(tmp_path / "run")
    began, ended = ends(lines)
    assert began < ended < PLANNED
    assert ended == began + decay_steps(began, PLANNED, config)
    for line in lines:
        step = line["step"]
        assert line["details/total_steps"] == (PLANNED if step < began else ended)
        left = 1 if step <= began else (ended - step + 1) / (ended - began)
        if step > config.lr_warmup_steps:
            assert line["details/current_learning_rate"] == pytest.approx(config.lr * left)
    (found,) = [line for line in lines if line["step"] == began]
    assert found["heldout/fall_per_doubling"] < PLATEAU
    assert lines[-1]["heldout/fvu"] < found["heldout/fvu"]  # the decay was worth it


def test_it_is_the_run_that_ends_there_from_the_start(tmp_path: Path) -> None:
    sae = train(rows(), SMALL, settings(), tmp_path / "run")
    began, ended = ends(figures(tmp_path / "run"))
    planned = settings(stop_at_plateau=False, n_tokens=32 * ended, lr_decay_start=began)
    assert same(train(rows(), SMALL, planned), sae)


def test_off_by_default_and_a_falling_curve_is_left_alone(tmp_path: Path) -> None:
    assert not TrainConfig().stop_at_plateau
    train(rows(), SMALL, settings(stop_at_plateau=False, n_tokens=32 * 300), tmp_path / "off")
    assert figures(tmp_path / "off")[-1]["step"] == 300
    assert "details/plateau_step" not in figures(tmp_path / "off")[-1]
    slow = settings(lr=1e-3, n_tokens=32 * 200, lr_warmup_steps=0, lr_decay_share=0.0)
    whole = train(rows(), train_job.SAE, slow, tmp_path / "slow")
    last = figures(tmp_path / "slow")[-1]
    assert (last["step"], "details/plateau_step" in last) == (200, False)
    assert last["heldout/fall_per_doubling"] > 5 * last["heldout/fall_error"] > 0
    assert same(whole, train(rows(), train_job.SAE, settings(**vars(slow) | dict(stop_at_plateau=False))))


@pytest.mark.parametrize("engine", ["fused", "autograd"])
def test_resume_before_in_and_after_the_decay_is_exact(tmp_path: Path, engine: str) -> None:
    config = settings(engine=engine)
    sae = train(rows(), SMALL, config, tmp_path / "whole")
    lines = figures(tmp_path / "whole")
    began, ended = ends(lines)
    for number, step in enumerate((began - 7, began, (began + ended) // 2)):
        folder = tmp_path / f"parts{number}"
        with pytest.raises(Stopped):
            train(rows(), SMALL, config, folder, on_log=stop_at(step))
        assert same(train(rows(), SMALL, config, folder, resume=True), sae)
        assert figures(folder) == lines
    assert same(train(rows(), SMALL, config, tmp_path / "parts0", resume=True), sae)
    assert figures(tmp_path / "parts0") == lines


def test_a_run_that_ended_at_a_plateau_goes_on_where_that_is_asked_for(tmp_path: Path) -> None:
    config = settings(save_every=1000)
    train(rows(), SMALL, config, tmp_path / "run")
    ended = figures(tmp_path / "run")[-1]["step"]
    on = settings(save_every=1000, stop_at_plateau=False, n_tokens=32 * (ended + 50))
    with pytest.warns(RuntimeWarning, match=rf"by step {ended} of {ended}, and jumps back to"):
        train(rows(), SMALL, on, tmp_path / "run", resume=True)
    assert figures(tmp_path / "run")[-1]["step"] == ended + 50


def test_several_each_end_at_their_own_plateau(tmp_path: Path) -> None:
    members = {
        "soon": Member(rows(), SMALL, settings()),
        "late": Member(rows(), train_job.SAE, settings(lr=1e-3, n_tokens=32 * 200)),
    }
    with pytest.raises(Stopped):
        # Stopped while one is in its decay, or past its end, and the other is not.
        _many_stopped(members, tmp_path / "many", 115)
    saes = train_many(members, tmp_path / "many", resume=True)
    last = {name: figures(tmp_path / "many" / name)[-1] for name in members}
    assert last["soon"]["step"] != last["late"]["step"]
    for name, member in members.items():
        assert same(saes[name], train(*member, tmp_path / "alone" / name))
        assert figures(tmp_path / "alone" / name) == figures(tmp_path / "many" / name)


def _many_stopped(members: dict[str, Member], folder: Path, step: int) -> None:
    from saefast.training import several

    advance = several.advance

    def interrupting(run: Any, *rest: Any) -> bool:
        if run.step == step:
            os.kill(os.getpid(), 2)
        return advance(run, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(several, "advance", interrupting)
        train_many(members, folder)


def test_where_nothing_is_held_out_it_says_so(tmp_path: Path) -> None:
    from saefast.data.opening import open_source

    with pytest.warns(RuntimeWarning, match="stop_at_plateau needs held-out rows"):
        train(open_source(rows(), heldout=0), SMALL, settings(n_tokens=32 * 100), tmp_path / "run")
    assert figures(tmp_path / "run")[-1]["step"] == 100
    with pytest.raises(InputError, match="stop_at_plateau is True and eval_every is 0"):
        settings(eval_every=0)


def test_length_of_the_decay() -> None:
    assert decay_steps(800, 10_000, settings(lr_decay_share=0.2)) == 200  # 200 of 1000
    assert decay_steps(100, 1000, settings(lr_decay_share=0.5)) == 100
    assert decay_steps(100, 1000, settings(lr_decay_start=750)) == 33
    assert decay_steps(100, 1000, settings(lr_decay_start=-1, lr_decay_share=0.2)) == 25
    assert decay_steps(100, 1000, settings(lr_decay_share=0.0)) == 1


def test_the_curve_costs_few_rows(tmp_path: Path) -> None:
    """By default some 20 values, on lines that are there anyway, over 1 row for every 64 trained on."""
    config = settings(eval_every=None, stop_at_plateau=False, batch_size=1024, n_tokens=1024 * 200, log_every=10)
    chosen = [chosen_eval_every(config, total_steps) for total_steps in (1, 100, 390, 10**6)]
    assert chosen == [10, 10, 20, 50_000]
    assert chosen_eval_every(replace(config, log_every=7, stop_at_plateau=True), 10**4) == 24 * 7
    assert chosen_eval_every(replace(config, eval_every=3), 10**4) == 3
    assert chosen_eval_every(replace(config, eval_every=0), 10**4) == 0
    train(train_job.rows(60_000), SMALL, config, tmp_path / "run")
    found = [line for line in figures(tmp_path / "run") if "heldout/fvu" in line]
    assert [line["step"] for line in found] == [*range(10, 201, 10)]
    on_the_way = [line["heldout/rows"] for line in found[:-1]]
    assert sum(on_the_way) <= 1024 * 200 / 64
    assert min(on_the_way) >= 150
    assert found[-1]["heldout/rows"] == 3000
    assert "heldout/silent_share" in found[-1]
    assert "heldout/silent_share" not in found[0]


def test_the_bar_ends_where_the_run_does(capsys: pytest.CaptureFixture[str]) -> None:
    train(rows(), SMALL, settings(), progress=True)
    assert "100%" in capsys.readouterr().err.splitlines()[-1].split("\r")[-1]


def test_batches_smaller_than_the_stride_between_the_few_rows() -> None:
    lines: list[dict[str, Any]] = []
    config = settings(batch_size=4, n_tokens=4 * 100, eval_every=50, stop_at_plateau=False)
    train(train_job.rows(40_000), SMALL, config, on_log=lines.append)
    assert [line["heldout/rows"] for line in lines if "heldout/rows" in line] == [128, 2000]
    assert all(0 < line["heldout/fvu"] < 2 for line in lines if "heldout/rows" in line)
