"""numpy's numbers and torch's devices and dtypes in configs: as good as plain values, and saved as those."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch

from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.harvest.config import HarvestConfig
from saefast.models.config import SAEConfig
from saefast.schema import for_json

CASES: list[tuple[type, dict[str, Any], dict[str, Any]]] = [
    (SAEConfig, dict(d_in=np.int64(64), n_latents=np.int32(64), k=np.uint8(4)), dict(d_in=64, n_latents=64, k=4)),
    (
        SAEConfig,
        dict(d_in=64, n_latents=64, k=4, dtype=torch.bfloat16),
        dict(d_in=64, n_latents=64, k=4, dtype="bfloat16"),
    ),
    (TrainConfig, dict(device=torch.device("cuda", 1)), dict(device="cuda:1")),
    (TrainConfig, dict(device=torch.device("cpu"), lr=np.float64(1e-3)), dict(device="cpu", lr=1e-3)),
    (
        TrainConfig,
        dict(n_tokens=np.int64(5), lr=np.float32(0.5), resample_every=None),
        dict(n_tokens=5, lr=0.5, resample_every=None),
    ),
    (
        HarvestConfig,
        dict(device=torch.device("cpu"), ctx_len=np.int16(9), heldout=np.float32(0.25), dtype=torch.float16),
        dict(device="cpu", ctx_len=9, heldout=0.25, dtype="float16"),
    ),
    (HarvestConfig, dict(forward=torch.float32, prepend_bos=np.bool_(True)), dict(forward="float32", prepend_bos=True)),
    (HarvestConfig, dict(hooks=(np.str_("layers.1"),)), dict(hooks=("layers.1",))),
]


@pytest.mark.parametrize(("kind", "given", "meant"), CASES)
def test_configs_take_them_and_hold_plain_values(kind: type, given: dict[str, Any], meant: dict[str, Any]) -> None:
    config, expected = kind(**given), kind(**meant)
    assert config == expected
    assert json.dumps(dataclasses.asdict(config)) == json.dumps(dataclasses.asdict(expected))
    for name, value in meant.items():
        assert type(getattr(config, name)) is type(value)
    assert dataclasses.replace(expected, **given) == expected


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (TrainConfig, dict(n_tokens=np.float64(5))),
        (TrainConfig, dict(n_tokens=np.bool_(True))),
        (TrainConfig, dict(n_tokens=np.array([5]))),
        (TrainConfig, dict(seed=np.int64(-1))),
        (TrainConfig, dict(device=np.int64(1))),
        (HarvestConfig, dict(dtype=torch.float64)),
        (HarvestConfig, dict(hooks=(np.int64(1),))),
    ],
)
def test_what_would_not_fit_as_a_plain_value_does_not(kind: type, given: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"{next(iter(given))} is .*: expected "):
        kind(**given)


def test_other_values_are_left_as_they_are() -> None:
    for value in (3, 0.5, "x", None, True, (1, "a"), {"a": np.int64(1)}, [np.int64(1)]):
        assert for_json(value) is value or for_json(value) == value
