"""TrainConfig: what it refuses, its learning rates against torch's schedulers, and the presets' facts."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from saefast.engines.config import PRESETS, TrainConfig, preset
from saefast.engines.recipe import choose, lr_factor
from saefast.errors import InputError
from saefast.models.config import SAEConfig


def scheduled(make: Callable[[torch.optim.Optimizer], Any], steps: int) -> list[float]:
    """The rates a torch scheduler gives a peak rate of 1."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, found = make(optimizer), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def ours(total: int, steps: int | None = None, **changes: Any) -> list[float]:
    settings: dict[str, Any] = {"lr_warmup_steps": 0} | changes
    config = choose(SAEConfig(d_in=8, n_latents=32, k=4), TrainConfig(**settings), total_steps=total)
    return [lr_factor(step, total, config) for step in range(steps or total)]


@pytest.mark.parametrize("decay_start", [5, 11])
def test_warm_up_from_zero_and_decay_is_dictionary_learnings_lambda(decay_start: int) -> None:
    def factor(step: int) -> float:
        if step < 5:
            return step / 5
        return (20 - step) / (20 - decay_start) if step >= decay_start else 1.0

    found = ours(20, lr_warmup_steps=5, lr_warmup_from_zero=True, lr_decay_start=decay_start)
    assert found == pytest.approx(scheduled(lambda o: lr_scheduler.LambdaLR(o, factor), 20))
    assert found[0] == 0


@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_sparsify_is_huggingfaces_linear_schedule(warmup: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = choose(*preset("sparsify", 32, 256, lr_warmup_steps=warmup), total_steps=20)
    found = [lr_factor(step, 20, config) for step in range(22)]
    assert found == pytest.approx(scheduled(lambda o: transformers.get_linear_schedule_with_warmup(o, warmup, 20), 22))


@pytest.mark.parametrize("warmup", [1, 2, 6])
def test_warm_up_to_the_peak_is_saelens_linear_lr(warmup: int) -> None:
    def make(optimizer: torch.optim.Optimizer) -> lr_scheduler.SequentialLR:
        rise = lr_scheduler.LinearLR(optimizer, 1 / warmup, 1.0, total_iters=warmup - 1)
        rest = lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        return lr_scheduler.SequentialLR(optimizer, [rise, rest], milestones=[warmup])

    assert ours(20, lr_warmup_steps=warmup, lr_decay_start=-1) == pytest.approx(scheduled(make, 20))


def test_decay_over_the_last_share_of_the_steps() -> None:
    assert ours(10, lr_decay_share=0.4, lr_end=0.1) == pytest.approx([1, 1, 1, 1, 1, 1, 1, 0.775, 0.55, 0.325])
    assert ours(10, steps=12, lr_decay_share=0.4)[10:] == [0, 0]  # past the end
    assert ours(10, lr_decay_share=0.0) == [1] * 10
    assert ours(4, lr_decay_share=1.0) == pytest.approx([1, 0.75, 0.5, 0.25])


def test_decay_waits_for_the_warm_up() -> None:
    assert ours(8, lr_warmup_steps=4, lr_decay_start=0) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25])
    assert ours(4, lr_warmup_steps=8) == pytest.approx([0.125, 0.25, 0.375, 0.5])


@pytest.mark.parametrize("name", ["sparsify", "dictionary_learning"])
def test_their_peak_rate_follows_the_dictionary_size(name: str) -> None:
    def rate(n_latents: int, **settings: Any) -> float:
        return choose(*preset(name, 32, n_latents, **settings), n_rows=1000).lr

    assert rate(2**14) == pytest.approx(2e-4)
    assert rate(2**16) == pytest.approx(1e-4)
    assert rate(2**16, lr=3e-4) == 3e-4


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0), ("batch_size", 12.5), ("batch_size", "12"), ("batch_size", True), ("n_tokens", -1),
        ("lr", -1e-4), ("lr", float("nan")), ("lr", float("inf")), ("lr", "fast"), ("eps", -1.0), ("beta1", 1.0),
        ("beta2", 1.5), ("ema_decay", 1.0), ("lr_decay_share", 1.1), ("max_grad_norm", 0.0), ("loss", "mse"),
        ("engine", "dense"), ("optimizer", "sgd"), ("dead_unit", "rows"), ("dead_after", 0), ("auxk_k", 0),
        ("auxk_coef", -1.0), ("reproduce_bugs", "yes"), ("b_dec_init", "median"), ("normalize", None), ("device", 0),
    ],
)  # fmt: skip
def test_bad_settings_are_named(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=field) as error:
        TrainConfig(**{field: value})
    assert "\n" not in str(error.value)
    assert "expected" in str(error.value)


def test_reproducing_bugs_needs_the_autograd_engine() -> None:
    with pytest.raises(InputError, match="autograd"):
        TrainConfig(reproduce_bugs=True, engine="fused")
    assert TrainConfig(reproduce_bugs=True, engine="autograd").reproduce_bugs


def test_configs_survive_json() -> None:
    for name in PRESETS:
        sae_config, config = preset(name, 32, 256, 6)
        assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert SAEConfig.from_dict(json.loads(json.dumps(sae_config.to_dict()))) == sae_config
    with pytest.raises(InputError, match="learning_rate"):
        TrainConfig.from_dict({"learning_rate": 1.0})


def test_preset_takes_overrides_of_both_configs() -> None:
    sae_config, config = preset("saelens", 32, 256, 6, lr=1e-3, dtype="float64", batch_size=8)
    assert (sae_config.d_in, sae_config.n_latents, sae_config.k, sae_config.dtype) == (32, 256, 6, "float64")
    assert (config.lr, config.batch_size, config.auxk_coef) == (1e-3, 8, 1.0)
    with pytest.raises(InputError, match="gpt"):
        preset("gpt", 32, 256)
    with pytest.raises(InputError, match="lerning_rate"):
        preset("openai", 32, 256, lerning_rate=1.0)
    assert config.decoder_norm == PRESETS["saelens"]["decoder_norm"]


def test_presets_hold_the_published_settings() -> None:
    """The figures each peer ships with, which the parity tests override to be short."""
    openai = preset("openai", 768, 32768)[1]
    # 10M tokens in steps of 131072; the counter runs one behind, see dead_start.
    assert (openai.dead_after, openai.dead_start, openai.dead_unit) == (10_000_000 // 131072, -1, "steps")
    assert (openai.lr, openai.eps, openai.auxk_k, openai.auxk_coef, openai.ema_decay) == (
        1e-4,
        6.25e-10,
        256,
        1 / 32,
        0.999,
    )
    sparsify = preset("sparsify", 768, 32768)[1]
    assert (sparsify.auxk_coef, sparsify.multi_topk_coef, sparsify.dead_after) == (0.0, 0.0, 10_000_001)
    assert (sparsify.lr_warmup_steps, sparsify.max_grad_norm, sparsify.b_dec_init) == (1000, None, "mean")
    dl = preset("dictionary_learning", 768, 32768)[1]
    assert (dl.auxk_coef, dl.dead_after, dl.max_grad_norm, dl.lr_warmup_steps) == (1 / 32, 10_000_000, 1.0, 1000)
    saelens_sae, saelens = preset("saelens", 768, 32768)
    assert (saelens.lr, saelens.auxk_coef, saelens.dead_after, saelens.max_grad_norm) == (3e-4, 1.0, 1001, 1.0)
    assert saelens_sae.rescale_acts_by_decoder_norm
    assert not saelens_sae.unit_norm_decoder
