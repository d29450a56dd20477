"""What the recipe chooses: every number, nothing that was given, the same for all engines, and once for a run."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import train_job

from saefast.engines import recipe as rules
from saefast.engines.autograd import AutogradEngine
from saefast.engines.config import PRESETS, TrainConfig, preset
from saefast.engines.fused import FusedEngine
from saefast.engines.recipe import CHOSEN, Recipe, as_begun, choose, described
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.models.sae import SAE
from saefast.training.api import train
from saefast.training.progress import read_metrics
from saefast.training.run_folder import read_config

SAES = [SAEConfig(d, L, k) for d, L, k in ((1, 1, 1), (12, 48, 4), (384, 8192, 32), (768, 131_072, 64))]
SMALL = train_job.SAE
GIVEN: dict[str, Any] = dict(
    n_tokens=5000, n_epochs=3, batch_size=17, lr=0.125, lr_warmup_steps=7, dead_after=321, resample_every=13,
    init_rows=19,
)  # fmt: skip


def numbers(config: TrainConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in CHOSEN}


@pytest.mark.parametrize("sae", SAES, ids=str)
@pytest.mark.parametrize("n_rows", [1, 2, 1000, 399_999, 10**7, 10**12])
def test_every_number_is_chosen_and_makes_sense(sae: SAEConfig, n_rows: int) -> None:
    for loose in (TrainConfig(), TrainConfig(dead_unit="steps"), TrainConfig(batch_size=1000), TrainConfig(n_epochs=1)):
        found = choose(sae, loose, n_rows)
        assert all(getattr(found, name) is not None for name in CHOSEN)
        # A config file, and whoever checks its values, takes them.
        assert TrainConfig.from_dict(json.loads(json.dumps(found.to_dict()))).to_dict() == found.to_dict()
        assert found.n_tokens == found.n_epochs * n_rows
        assert loose.batch_size is not None or found.batch_size <= found.n_tokens
        assert found.steps == max(found.n_tokens // found.batch_size, 1)
        assert 0 < found.lr < math.inf
        assert found.lr_warmup_steps <= found.steps
        # A batch in which it does not fire kills no latent, and rows that begin a run are at least a batch.
        assert found.dead_after >= (1 if found.dead_unit == "steps" else found.batch_size)
        assert found.init_rows >= found.batch_size


def test_both_units_of_dead_after_are_the_same_time() -> None:
    by_token, by_step = (choose(SAES[2], TrainConfig(dead_unit=unit), 10**6) for unit in ("tokens", "steps"))
    assert by_step.dead_after == pytest.approx(by_token.dead_after / by_token.batch_size, abs=0.5)


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_given_is_kept(name: str) -> None:
    assert set(GIVEN) == set(CHOSEN), "a number that is chosen is missing here"
    config = TrainConfig(**{name: GIVEN[name]})
    assert getattr(choose(SMALL, config, 1000), name) == GIVEN[name]
    every = choose(SMALL, TrainConfig(**GIVEN))
    assert numbers(every) == GIVEN
    rest = {field.name: getattr(every, field.name) for field in dataclasses.fields(every) if field.name not in CHOSEN}
    assert rest == {name: value for name, value in TrainConfig().to_dict().items() if name not in CHOSEN}


def test_what_is_given_decides_what_is_chosen() -> None:
    """Warm-up follows from the batch that was given, dead_after from the tokens."""
    small, large = (choose(SMALL, TrainConfig(n_tokens=10**6, batch_size=size)) for size in (10, 1000))
    assert small.lr_warmup_steps == pytest.approx(100 * large.lr_warmup_steps, rel=0.2)
    assert choose(SMALL, TrainConfig(n_tokens=10**9)).dead_after > choose(SMALL, TrainConfig(n_tokens=10**6)).dead_after


@pytest.mark.parametrize("n_rows", [5, 700, 10**6])
def test_choosing_again_changes_nothing(n_rows: int) -> None:
    found = choose(SMALL, TrainConfig(), n_rows)
    assert isinstance(found, Recipe)
    for other in (None, 1, 10**9):
        assert choose(SMALL, found, other) == found
    loose = TrainConfig.from_dict(found.to_dict())
    assert choose(SMALL, loose, 10 * n_rows) == found
    assert choose(SAES[3], found, total_steps=3) == found


@pytest.mark.parametrize("name", CHOSEN)
def test_a_recipe_lacks_no_number(name: str) -> None:
    found = choose(SMALL, TrainConfig(), 10_000)
    with pytest.raises(InputError, match=f"{name} is None: expected"):
        dataclasses.replace(found, **{name: None})


def test_a_run_without_a_length_is_refused() -> None:
    with pytest.raises(InputError, match="set n_tokens") as error:
        choose(SMALL, TrainConfig())
    assert "n_tokens is None" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="set n_tokens"):
        choose(SMALL, TrainConfig(n_epochs=2))
    assert choose(SMALL, TrainConfig(n_tokens=100)).n_tokens == 100
    assert choose(SMALL, TrainConfig(batch_size=10), total_steps=7).steps == 7


def test_small_data_is_gone_through_again() -> None:
    sae = SAES[2]
    per_epoch = [choose(sae, TrainConfig(), n) for n in (100, 10_000, 100_000, 10**6, 10**8)]
    epochs = [found.n_epochs for found in per_epoch]
    assert epochs == sorted(epochs, reverse=True)
    assert (epochs[0], epochs[-1]) == (rules.MOST_EPOCHS, 1)
    assert rules.MOST_EPOCHS > 1
    # As many passes as give an average latent its firings, and no more.
    n_rows = math.ceil(rules.FIRINGS * sae.n_latents / sae.k)
    assert choose(sae, TrainConfig(), n_rows).n_epochs == 1
    assert choose(sae, TrainConfig(), n_rows - 1).n_epochs == 2
    # Who names the tokens or the passes is taken at their word.
    assert choose(sae, TrainConfig(n_tokens=5000), 100).n_tokens == 5000
    assert choose(sae, TrainConfig(n_epochs=7), 100).n_tokens == 700


def test_batches_grow_with_the_run() -> None:
    found = [choose(SMALL, TrainConfig(n_tokens=10**power)) for power in range(2, 10)]
    sizes = [one.batch_size for one in found]
    assert sizes == sorted(sizes)
    assert sizes[0] < rules.SMALLEST_BATCH < rules.LARGEST_BATCH == sizes[-1]
    for one in found:
        assert one.steps >= rules.STEPS or one.batch_size <= rules.SMALLEST_BATCH


PEERS = ("openai", "sparsify", "dictionary_learning", "saelens")


@pytest.mark.parametrize("name", PEERS)
def test_peers_get_what_their_owners_wrote(name: str) -> None:
    """No number of theirs is chosen, but for what depends on the data and, where they say so, on the dictionary."""
    for n_latents in (4096, 2**16):
        sae, config = preset(name, 32, n_latents, 8)
        owners = PRESETS[name] | {"n_epochs": 1}
        found = choose(sae, config, 123_456)
        for field in ("batch_size", "lr_warmup_steps", "dead_after", "resample_every", "n_epochs"):
            assert getattr(found, field) == getattr(config, field) == owners[field], field
        assert found.n_tokens == 123_456
        assert found.lr == (owners.get("lr") or pytest.approx(2e-4 / math.sqrt(n_latents / 2**14), rel=1e-12))
        assert (found.resample_every, found.fit_encoder, sae.init) == (0, False, owners["init"])
        unchosen = {key: value for key, value in config.to_dict().items() if key not in CHOSEN}
        assert {key: found.to_dict()[key] for key in unchosen} == unchosen
        assert found.auxk_coef == {"sparsify": 0.0, "saelens": 1.0}.get(name, 1 / 32)
        assert (found.beta1, found.beta2) == (0.9, 0.999)
        assert found.init_rows == owners.get("init_rows", found.init_rows)


@pytest.mark.parametrize("change", [{}, {"optimizer": "adam-lean"}, {"engine": "autograd"}], ids=str)
def test_every_engine_and_optimiser_gets_the_same_choice(change: dict[str, Any]) -> None:
    plain = choose(SMALL, TrainConfig(), 10**6)
    assert numbers(choose(SMALL, TrainConfig(**change), 10**6)) == numbers(plain)


def test_engines_choose_by_themselves() -> None:
    config = TrainConfig(n_tokens=4000)
    expected = choose(SMALL, config)
    for kind in (FusedEngine, AutogradEngine):
        engine = kind(SAE(SMALL, seed=0), config, expected.steps)
        assert engine.config == expected
        assert engine.dead.config == expected
        assert numbers(kind(SAE(SMALL, seed=0), expected, 77).config) == numbers(expected)


def test_the_line_for_people_names_the_choice() -> None:
    found = choose(SMALL, TrainConfig(n_tokens=1_000_000))
    said = described(found)
    assert "\n" not in said
    for number in (found.n_tokens, found.steps, found.batch_size, found.lr_warmup_steps, found.dead_after):
        assert f"{number:,}" in said
    assert f"{found.lr:.2g}" in said


# A run keeps what was chosen when it began.


def test_what_is_left_open_stays_as_the_run_began() -> None:
    begun = choose(SMALL, TrainConfig(), 10_000)
    recorded = json.loads(json.dumps(begun.to_dict()))
    assert choose(SMALL, as_begun(TrainConfig(), recorded), 999) == begun
    longer = choose(SMALL, as_begun(TrainConfig(n_tokens=10**7), recorded), 10_000)
    assert numbers(longer) == numbers(begun) | {"n_tokens": 10**7}
    passes = choose(SMALL, as_begun(TrainConfig(n_epochs=9), recorded), 10_000)
    assert numbers(passes) == numbers(begun) | {"n_tokens": 90_000, "n_epochs": 9}
    other = as_begun(TrainConfig(lr=0.5, batch_size=3), recorded)
    assert (other.lr, other.batch_size, other.dead_after) == (0.5, 3, begun.dead_after)


class Stop(Exception):
    pass


def stop_at(step: int) -> Any:
    def on_log(line: dict[str, Any]) -> None:
        if line["step"] >= step:
            raise Stop

    return on_log


def test_a_bare_run_resumes_to_the_bit_by_the_numbers_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another version would choose otherwise."""
    x, config = train_job.rows(3000), TrainConfig(log_every=1, save_every=3, device="cpu")
    whole = train(x, SMALL, config, tmp_path / "whole")
    with pytest.raises(Stop):
        train(x, SMALL, config, tmp_path / "run", on_log=stop_at(8))
    for rule, number in (("_lr", 0.777), ("_batch_size", 10), ("_dead_after", 11)):
        monkeypatch.setattr(rules, rule, lambda *_, n=number: n)
    assert numbers(choose(SMALL, config, 2850)) != numbers(read_config(tmp_path / "run")[1])
    resumed = train(x, SMALL, config, tmp_path / "run", resume=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert read_config(tmp_path / "run") == read_config(tmp_path / "whole")


def test_more_tokens_go_on_with_the_numbers_of_before(tmp_path: Path) -> None:
    x = train_job.rows(3000)
    train(x, SMALL, TrainConfig(n_tokens=3000, device="cpu"), tmp_path / "run")
    before = read_config(tmp_path / "run")[1]
    # Of a run twenty times as long another batch would be chosen, and another warm-up.
    fresh = choose(SMALL, TrainConfig(n_tokens=60_000))
    assert fresh.lr_warmup_steps != before.lr_warmup_steps
    with pytest.warns(RuntimeWarning, match="jumps back"):
        train(x, SMALL, TrainConfig(n_tokens=60_000, device="cpu"), tmp_path / "run", resume=True)
    after = read_config(tmp_path / "run")[1]
    assert numbers(after) == numbers(before) | {"n_tokens": 60_000}
    assert read_metrics(tmp_path / "run")[-1]["step"] == 60_000 // before.batch_size


def test_another_number_than_the_runs_own_is_refused_by_name(tmp_path: Path) -> None:
    x, config = train_job.rows(), TrainConfig(n_tokens=2000, device="cpu")
    train(x, SMALL, config, tmp_path / "run")
    with pytest.raises(InputError, match=r"lr was .*, is 0\.5"):
        train(x, SMALL, dataclasses.replace(config, lr=0.5), tmp_path / "run", resume=True)


@pytest.mark.parametrize("change", [{}, {"optimizer": "adam-lean"}, {"engine": "autograd"}], ids=str)
def test_config_json_holds_the_numbers_and_they_give_the_run_again(tmp_path: Path, change: dict[str, Any]) -> None:
    x = train_job.rows(1500)
    sae = train(x, SMALL, TrainConfig(device="cpu", **change), tmp_path / "run")
    written = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["train"]
    assert {name: type(written[name]) for name in CHOSEN} == dict.fromkeys(CHOSEN, int) | {"lr": float}
    # A twentieth of the rows is held out.
    expected = choose(SMALL, TrainConfig(**change), 1500 - 75)
    assert {name: written[name] for name in CHOSEN} == numbers(expected)
    again = train(x, *read_config(tmp_path / "run"))
    for (name, a), b in zip(sae.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
