"""Advice before a run: one line for each setting that its length makes pointless, and none where all is well."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import train_job

from saefast.engines.config import TrainConfig, preset
from saefast.engines.recipe import Recipe, choose, lr_factor
from saefast.models.config import SAEConfig
from saefast.training.advice import FEW_STEPS, advice
from saefast.training.api import train
from saefast.training.progress import read_metrics
from saefast.training.several import Member, train_many

SAE = SAEConfig(d_in=12, n_latents=2**14, k=4)
GOOD: dict[str, Any] = dict(batch_size=100, lr=1e-3, lr_warmup_steps=0, dead_after=1000, auxk_coef=0.1, device="cpu")


def said(total_steps: int = 500, **changes: Any) -> dict[str, str]:
    config = recipe(total_steps, **changes)
    return advice(config, total_steps, total_steps * config.batch_size)


def recipe(total_steps: int = 500, **changes: Any) -> Recipe:
    return choose(SAE, TrainConfig(**(GOOD | changes)), total_steps=total_steps)


def test_nothing_is_said_where_all_is_well() -> None:
    assert said() == {}
    assert said(FEW_STEPS) == {}
    assert said(lr_warmup_steps=499) == {}
    assert said(dead_after=50_000) == {}
    assert said(dead_unit="steps", dead_after=500) == {}
    assert said(stop_at_plateau=True) == {}


def test_resampling_that_comes_too_late() -> None:
    assert said(resample_steps=(499, 1000)) == {}
    found = said(resample_steps=(500, 1000))
    assert list(found) == ["resample"]
    assert "resample_steps begin at 500, and the run has 500 steps: no latent is resampled" in found["resample"]
    assert "the first to 12 perhaps" in found["resample"]
    late = said(resample_every=0, resample_steps=(100,), dead_after=10**9, auxk_coef=0.0)
    assert "so none is resampled;" in late["dead"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            dict(lr_warmup_steps=1000),
            "lr_warmup_steps is 1,000, and the run has 500 steps: the learning rate reaches 0.0005 of 0.001; set "
            "lr_warmup_steps to 25, or train on more tokens",
        ),
        (dict(lr_warmup_steps=500, lr_warmup_from_zero=True), "reaches 0.001 of 0.001; set"),
        (
            dict(lr_warmup_steps=5000, lr_warmup_from_zero=True, lr=None, lr_rule="latents"),
            "reaches 2e-05 of 0.0002; set",
        ),
    ],
)
def test_a_warm_up_that_never_ends(changes: dict[str, Any], expected: str) -> None:
    found = said(**changes)
    assert list(found) == ["warmup"]
    assert expected in found["warmup"]
    config = recipe(**changes)
    highest = max(lr_factor(step, 500, config) for step in range(500)) * config.lr
    assert f"reaches {highest:.2g} of" in found["warmup"]


def test_a_single_step_at_rate_zero() -> None:
    found = said(1, lr_warmup_steps=10, lr_warmup_from_zero=True, dead_after=100)
    assert list(found) == ["warmup", "steps"]
    assert (
        "the run has 1 step: the learning rate is 0, so nothing is trained; set lr_warmup_steps to 0" in found["warmup"]
    )


def test_too_few_steps() -> None:
    found = said(40)
    assert found == {
        "steps": "the run has 40 steps of 100 tokens, and an SAE needs 100 or more updates to learn: set batch_size to "
        "40 or less, or train on more tokens"
    }
    assert said(1, batch_size=50, dead_after=10)["steps"].endswith(
        "updates to learn: lower batch_size, or train on more tokens"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (dict(dead_after=50_001), "dead_after is 50,001 tokens, and the run has 50,000: no latent can be called dead, "
            "so AuxK never runs and none is resampled; set dead_after to about 10,000"),
        (dict(dead_after=50_001, resample_every=0), "no latent can be called dead, so AuxK never runs; set"),
        (dict(dead_after=50_001, auxk_coef=0.0), "no latent can be called dead, so none is resampled; set"),
        (dict(dead_after=50_001, auxk_coef=0.0, resample_every=0), "no latent can be called dead; set dead_after to "),
        (dict(dead_after=501, dead_unit="steps"), "dead_after is 501 steps, and the run has 500: no latent"),
        (dict(dead_after=500, dead_unit="steps", dead_start=-1), "dead_after is 500 steps, and the run has 500"),
    ],
)  # fmt: skip
def test_dead_after_beyond_the_run(changes: dict[str, Any], expected: str) -> None:
    found = said(**changes)
    assert list(found) == ["dead"]
    assert expected in found["dead"]


def test_more_tokens_after_the_decay_had_ended() -> None:
    config = recipe()
    found = advice(config, 1000, 100_000, 500, (500, 1e-5))
    assert found == {
        "resume": "the learning rate had fallen to 1e-05 by step 500 of 500, and jumps back to 0.001 now that the run "
        "has 1,000: the loss rises before it falls again; to keep one smooth decay, train anew with all the tokens"
    }
    assert advice(config, 500, 50_000, 450, (500, 1e-3 * lr_factor(449, 500, config))) == {}
    never = recipe(lr_decay_start=-1)
    assert advice(never, 1000, 100_000, 500, (500, 1e-3)) == {}
    assert advice(config, 500, 50_000, 500, (500, 1e-5)) == {}  # nothing is left to do


def test_no_part_of_the_run_to_find_a_plateau_in() -> None:
    for changes in (dict(lr_decay_share=1.0), dict(lr_decay_start=0)):
        found = said(stop_at_plateau=True, **changes)
        assert list(found) == ["plateau"]
        assert "at its peak for no part of the run" in found["plateau"]
    assert said(stop_at_plateau=True, lr_decay_share=0.99, lr_warmup_steps=498).keys() == {"plateau"}


@pytest.mark.parametrize("name", ["openai", "sparsify", "dictionary_learning", "saelens"])
def test_presets_of_peers_are_advised_on_too(name: str) -> None:
    config = choose(*preset(name, 12, 48, 4, batch_size=32), total_steps=40)
    found = advice(config, 40, 40 * 32)
    assert {"steps", "dead"} <= found.keys()
    assert ("warmup" in found) == (name in ("sparsify", "dictionary_learning"))


def warned(caught: list[warnings.WarningMessage]) -> list[str]:
    assert all(warning.category is RuntimeWarning for warning in caught)
    return [str(warning.message).split()[0] for warning in caught]


def settings(**changes: Any) -> TrainConfig:
    return TrainConfig(**(train_job.CONFIG | dict(n_tokens=32 * 12, save_every=0, lr_warmup_steps=50) | changes))


def test_train_and_train_many_warn_once_each(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(train_job.rows(), train_job.SAE, settings(dead_after=5000), tmp_path / "one")
    assert warned(caught) == ["lr_warmup_steps", "the", "dead_after"]
    assert Path(caught[0].filename) == Path(__file__)  # the caller's line, not ours
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        members = {
            "a": Member(train_job.rows(), train_job.SAE, settings()),
            "b": Member(train_job.rows(), SAEConfig(12, 96, 4), settings(dead_after=5000)),
        }
        train_many(members, tmp_path / "two")
    assert sorted(warned(caught)) == ["dead_after", "lr_warmup_steps", "the"]


def test_a_run_that_is_made_longer_says_how_far_its_rate_jumps(tmp_path: Path) -> None:
    config = dict(lr_warmup_steps=0, dead_after=100, log_every=1, n_tokens=32 * 120, save_every=200)
    train(train_job.rows(), train_job.SAE, settings(**config), tmp_path / "run")
    last = read_metrics(tmp_path / "run")[-1]["details/current_learning_rate"]
    with pytest.warns(RuntimeWarning, match=rf"fallen to {last:.2g} by step 120 of 120, and jumps back to 0\.01 now"):
        train(
            train_job.rows(), train_job.SAE, settings(**config | dict(n_tokens=32 * 240)), tmp_path / "run", resume=True
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left to do, so nothing is said
        train(
            train_job.rows(), train_job.SAE, settings(**config | dict(n_tokens=32 * 240)), tmp_path / "run", resume=True
        )
