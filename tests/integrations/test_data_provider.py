"""saefast's sources as other people's data providers: the same batches, facts, positions, and errors."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import D, N, rows_of, write_folder

from saefast import extension
from saefast.data.opening import open_source
from saefast.errors import InputError
from saefast.integrations.data_provider import DataProvider

SHUFFLES = ["mapped", pytest.param("buffer", marks=pytest.mark.skipif(not extension.available(), reason="needs C++"))]


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_batches_are_the_sources_own(shuffle: str, tmp_path: Path) -> None:
    """Every row of an epoch once, in the order that train() would draw it in; and a batch may be written to."""
    folder = write_folder(tmp_path / "acts", "bfloat16")
    provider = DataProvider(folder, 50, seed=3, shuffle=shuffle)
    assert iter(provider) is provider
    own: Any = open_source(folder, shuffle=shuffle)
    expected = [batch["x"] for batch in itertools.islice(own.batches(50, 3), 2 * N // 50)]
    for x in expected:
        drawn = next(provider)
        assert torch.equal(drawn, x)
        assert drawn.dtype == torch.float32
        drawn /= 7.0  # as trainSAE does where it scales activations
    if shuffle == "mapped":
        numbers = torch.cat(expected[: N // 50])[:, 0].long().sort().values
        assert torch.equal(numbers, rows_of(N).bfloat16()[:, 0].long().sort().values)
    provider.close()
    own.close()


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_a_position_goes_through_json(shuffle: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "acts")
    provider = DataProvider(folder, 64, shuffle=shuffle)
    for _ in range(5):
        next(provider)
    state = json.loads(json.dumps(provider.state_dict()))
    rest = [next(provider) for _ in range(3)]
    other = DataProvider(folder, 64, shuffle=shuffle)
    other.load_state_dict(state)
    assert all(torch.equal(next(other), x) for x in rest)
    provider.load_state_dict(state)
    assert torch.equal(next(provider), rest[0])
    for one in (provider, other):
        one.close()


def test_config_is_json_and_says_what_the_rows_are(tmp_path: Path) -> None:
    provider = DataProvider(write_folder(tmp_path / "acts"), 64, hook="h", shuffle="mapped")
    config = json.loads(json.dumps(provider.config))
    assert config["d_submodule"] == provider.d_in == D
    assert config["out_batch_size"] == 64
    assert config["hook_name"] == "h"
    assert config["n_rows"] == N
    assert DataProvider([torch.zeros(4, 3)], 2).config["n_rows"]


def test_heldout_rows_are_not_drawn() -> None:
    provider = DataProvider(rows_of(100), 16, heldout=0.2)
    held = torch.cat(list(provider.heldout()))[:, 0]
    assert len(held) == 20
    drawn = torch.cat([next(provider) for _ in range(10)])[:, 0]
    assert not set(held.tolist()) & set(drawn.tolist())


def test_a_generator_ends() -> None:
    provider = DataProvider((rows_of(10) for _ in range(3)), 10, heldout=0.0, shuffle_rows=0)
    assert [len(x) for x in provider] == [10, 10, 10]


def test_bad_rows_and_arguments_are_named(tmp_path: Path) -> None:
    rows = rows_of(40)
    rows[7, 2] = torch.nan
    provider = DataProvider(rows, 40, heldout=0.0)
    with pytest.raises(InputError, match=r"holds NaN or inf: .*row 7"):
        next(provider)
    with pytest.raises(InputError, match="batch_size is 0"):
        DataProvider(rows, 0)
    with pytest.raises(InputError, match="batch_size is '64'"):
        DataProvider(rows, "64")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="GB"):
        DataProvider(rows, 1 << 50)
    with pytest.raises(InputError, match=r"dtype is torch\.int64"):
        DataProvider(rows, 4, dtype=torch.int64)
    with pytest.raises(InputError, match="seed"):
        DataProvider(rows, 4, seed=-1)
    for device in ("nowhere", "meta"):
        with pytest.raises(InputError, match=f"device is '{device}'"):
            DataProvider(rows, 4, device=device)
    with pytest.raises(InputError, match="none"):
        DataProvider(tmp_path / "none", 4)
