"""Iterables of tensors in training: shuffled, bounded in memory, resumed to the bit, in the forms people give them."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import train_job
from torch.utils.data import DataLoader, TensorDataset

import saefast
from saefast.data import iterable_source, shuffled_iterable
from saefast.data.iterable_source import IterableSource
from saefast.data.mapped_source import MappedSource
from saefast.data.opening import open_source
from saefast.data.shuffled_iterable import ShuffledIterable
from saefast.errors import InputError
from saefast.extension import available
from saefast.training.api import train

needs_cpp = pytest.mark.skipif(not available(), reason="the reservoir is C++")


def numbered(n: int, first: int = 0, d: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows that carry their own number in every column."""
    return torch.arange(first, first + n, dtype=dtype)[:, None].expand(n, d).contiguous()


def batches_of(n: int = 40, size: int = 10) -> list[torch.Tensor]:
    return [numbered(size, first=i * size) for i in range(n)]


def numbers(batches: Any, n: int | None = None) -> list[int]:
    return [int(x) for batch in itertools.islice(batches, n) for x in batch["x"][:, 0]]


# --- order --------------------------------------------------------------------------------------------------------


def topics(n: int = 6000, d: int = 16) -> torch.Tensor:
    """Rows of ten topics, each with directions of its own, one topic after the other."""
    generator = torch.Generator().manual_seed(0)
    topic = torch.randint(0, 10, (n,), generator=generator).sort().values
    directions = torch.randn(10, 8, d, generator=generator)
    code = (torch.rand(n, 8, generator=generator) < 0.25) * torch.rand(n, 8, generator=generator)
    return torch.einsum("nk,nkd->nd", code, directions[topic])


def trained_on(data: Any) -> float:
    """The share of the variance of `topics` that an SAE does not explain after some passes over it."""
    x = topics()
    config = saefast.TrainConfig(n_tokens=18_000, batch_size=200, lr=4e-3, device="cpu", log_every=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = train(data, saefast.SAEConfig(d_in=16, n_latents=96, k=2), config, progress=False)
    with torch.no_grad():
        return float((x - sae(x).x_hat).square().sum() / (x - x.mean(0)).square().sum())


@needs_cpp
def test_batches_of_one_topic_after_another_train_as_well_as_an_array() -> None:
    x = topics()
    array, ordered = trained_on(x), trained_on(open_source(lambda: iter(x.split(200)), shuffle_rows=0))
    assert ordered > 1.05 * array
    for data in (list(x.split(200)), lambda: iter(x.split(200)), DataLoader(TensorDataset(x), batch_size=200)):
        assert abs(trained_on(data) - array) < (ordered - array) / 2


@needs_cpp
@pytest.mark.parametrize(
    "make", [lambda b: lambda: iter(b), lambda b: DataLoader(TensorDataset(torch.cat(b)), 7), iter]
)
def test_rows_are_shuffled_and_none_is_lost(make: Callable[[list[torch.Tensor]], Any]) -> None:
    data = batches_of()
    for shuffle_rows in (400, 100):
        first, second, other = (
            numbers(open_source(make(data), heldout=0, shuffle_rows=shuffle_rows).batches(10, seed), 40)
            for seed in (1, 1, 2)
        )
        assert first == second != other
        assert first != sorted(first)
        assert len(first) == 400
        if make is iter:
            assert sorted(first) == sorted(other) == list(range(400))
        assert max(abs(place - number % 400) for place, number in enumerate(first)) > 50
    assert numbers(open_source(make(data), heldout=0, shuffle_rows=0).batches(10, 1), 40) == list(range(400))


def test_a_list_of_batches_is_the_array_that_they_make() -> None:
    data = batches_of(7)
    whole, parts = open_source(torch.cat(data), heldout=0.1), open_source(data, heldout=0.1)
    assert isinstance(parts, MappedSource)
    for tuples in (
        parts,
        open_source([(batch,) for batch in data], heldout=0.1),
        open_source(tuple(data), heldout=0.1),
    ):
        assert numbers(tuples.heldout(100)) == numbers(whole.heldout(100)) == list(range(63, 70))
        assert numbers(tuples.batches(9, 3), 20) == numbers(whole.batches(9, 3), 20)
    pairs = open_source([{"x": batch, "target": -batch} for batch in data])
    assert all(torch.equal(batch["x"], -batch["target"]) for batch in itertools.islice(pairs.batches(9), 9))
    next(iter(parts.batches(70, 0)))
    assert parts.describe_row(0).startswith("batch ")
    for bad in ([data[0], numbered(3, d=4)], [data[0], "x"], [data[0], torch.zeros(2, 3, dtype=torch.int64)]):
        with pytest.raises(InputError, match="batch 1 of the iterable"):
            open_source(bad)


@needs_cpp
def test_float64_rows_stay_exact_on_their_way() -> None:
    x = torch.rand(300, 3, dtype=torch.float64)
    source = open_source(lambda: iter(x.split(30)), heldout=0)
    (batch,) = itertools.islice(source.batches(100, dtype=torch.float64), 1)
    assert all(bool((x == row).all(1).any()) for row in batch["x"])
    source.close()


@needs_cpp
def test_the_reservoir_is_bounded_by_bytes_and_by_the_runs_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def counted() -> Iterator[torch.Tensor]:
        while True:
            drawn.append(10)
            yield torch.rand(10, 4)

    monkeypatch.setattr(shuffled_iterable, "SHUFFLE_BYTES", 16 * 500)
    source = open_source(counted, heldout=0)
    next(source.batches(10))
    assert source.state_dict()["reservoir_rows"] == 500
    source.close()
    monkeypatch.undo()
    drawn.clear()
    config = saefast.TrainConfig(n_tokens=1000, batch_size=20, device="cpu", log_every=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(counted, saefast.SAEConfig(d_in=4, n_latents=16, k=2), config, progress=False)
    # What is trained on, the reservoir, the ring, the queue, and the held-out twentieth.
    assert sum(drawn) < 1.2 * (1000 + 1000 + 20 * 20)


def test_without_the_extension_rows_come_in_order_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shuffled_iterable, "available", lambda: False)
    source = open_source(lambda: iter(batches_of()), heldout=0.1)
    with pytest.warns(RuntimeWarning, match="in the order in which they come: to shuffle them"):
        batches = source.batches(10)
    assert numbers(batches, 20) == [*range(90), *range(100, 190), *range(200, 220)]
    assert source.describe_row(3) == "batch 21 of the iterable, row 3"
    assert numbers(source.heldout(99)) == [*range(90, 100), *range(190, 200)]
    assert source.state_dict()["kind"] == "iterable"


# --- held-out rows ------------------------------------------------------------------------------------------------


def test_held_out_rows_are_bounded_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    # A row of d float32 numbers takes 4 · d bytes; every fourth batch of ten is held out.
    for d, fit in ((3, 50), (30, 5)):
        monkeypatch.setattr(iterable_source, "HELDOUT_BYTES", 600)
        data = [numbered(10, first=10 * i, d=d) for i in range(40)]
        source = IterableSource(data, heldout=0.25)
        trained = numbers(source.batches(10), 60)
        held = numbers(source.heldout(100))
        assert len(held) == fit
        assert held[:5] == [30, 31, 32, 33, 34]
        assert not set(held) & set(trained)
    half = IterableSource([batch.to(torch.bfloat16) for batch in data], heldout=0.25)
    numbers(half.batches(10), 60)
    assert len(numbers(half.heldout(100))) == 10


@needs_cpp
@pytest.mark.parametrize("size", [3, 10])
def test_held_out_rows_are_those_of_rows_drawn_whatever_is_read_ahead(size: int) -> None:
    data = batches_of(200)
    seen = []
    for rows in (30, 100, 1000):
        source = open_source(lambda: iter(data), heldout=0.1, shuffle_rows=rows)
        batches = source.batches(size)
        held = []
        for _ in range(60):
            next(batches)
            held.append(numbers(source.heldout(99)))
        source.close()
        seen.append(held)
        drawn = 60 * size
        assert held[-1] == [n for n in range(2000) if n % 100 >= 90 and 90 * (n // 100 + 1) < drawn]
    assert seen[0] == seen[1] == seen[2]


@needs_cpp
def test_held_out_rows_are_never_trained_on() -> None:
    source = open_source(lambda: iter(batches_of()), heldout=0.1, shuffle_rows=50)
    trained = numbers(source.batches(5), 300)
    held = numbers(source.heldout(99))
    assert len(held) == 40
    assert not set(trained) & set(held)
    assert set(trained) | set(held) == set(range(400))


# --- going on -----------------------------------------------------------------------------------------------------


@needs_cpp
@pytest.mark.parametrize("place", [0, 1, 17, 50])
def test_a_shuffled_iterable_goes_on_to_the_bit(place: int) -> None:
    def opened(rows: int = 300) -> ShuffledIterable:
        source = open_source(lambda: iter(batches_of(23)), heldout=0.1, shuffle_rows=rows)
        assert isinstance(source, ShuffledIterable)
        return source

    whole = opened()
    batches = whole.batches(8, 5)
    numbers(batches, place)
    state = whole.state_dict()
    rest, held = numbers(batches, 20), numbers(whole.heldout(9))
    # A run of more tokens would begin with a larger reservoir: the one it began with stays.
    resumed = opened(rows=999)
    resumed.load_state_dict(state)
    assert numbers(resumed.batches(8, 5), 20) == rest
    assert numbers(resumed.heldout(9)) == held
    assert resumed.state_dict() == whole.state_dict()


@needs_cpp
def test_a_position_of_before_there_was_a_reservoir_goes_on_in_order() -> None:
    old = IterableSource(batches_of(), heldout=0.1)
    batches = old.batches(7)
    numbers(batches, 20)
    state = old.state_dict()
    del state["first"]
    source = open_source(lambda: iter(batches_of()), heldout=0.1)
    source.load_state_dict(state)
    assert numbers(source.batches(7), 30) == numbers(batches, 30)
    assert numbers(source.heldout(9)) == numbers(old.heldout(9))


@needs_cpp
def test_other_rows_in_a_later_pass_or_after_a_resume_are_said() -> None:
    data = TensorDataset(torch.cat(batches_of()))
    torch.manual_seed(0)
    source = open_source(DataLoader(data, batch_size=10, shuffle=True), heldout=0.1, shuffle_rows=50)
    with pytest.warns(RuntimeWarning, match="gives other rows than the first time, as a DataLoader with shuffle=True"):
        numbers(source.batches(10), 90)
    state = source.state_dict()
    source.close()
    again = open_source(DataLoader(data, batch_size=10, shuffle=True), heldout=0.1, shuffle_rows=50)
    with pytest.warns(RuntimeWarning, match="a run that goes on is not to the bit one that was never stopped"):
        again.load_state_dict(state)
    same = open_source(DataLoader(data, batch_size=10), heldout=0.1, shuffle_rows=50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        numbers(same.batches(10), 120)
        state = same.state_dict()
        same.load_state_dict(state)
        numbers(same.batches(10), 3)


@needs_cpp
def test_a_generator_cannot_go_on() -> None:
    source = open_source(iter(batches_of()), shuffle_rows=50)
    numbers(source.batches(10), 3)
    state = source.state_dict()
    with pytest.raises(InputError, match="is a generator and cannot be resumed"):
        open_source(iter(batches_of())).load_state_dict(state)


# --- forms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_data_loader_over_a_tensor_dataset_trains(shuffle: bool) -> None:
    loader = DataLoader(TensorDataset(train_job.rows()), batch_size=64, shuffle=shuffle)
    assert isinstance(next(iter(loader)), list)
    config = saefast.TrainConfig(n_tokens=500, batch_size=50, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = train(loader, saefast.SAEConfig(d_in=12, n_latents=24, k=3), config, progress=False)
    assert torch.isfinite(sae.W_enc).all()


@pytest.mark.parametrize("wrap", [lambda x: (x,), lambda x: [x], lambda x: ({"x": x},), lambda x: (x.numpy(),)])
def test_a_tuple_or_list_of_one_tensor_is_that_tensor(wrap: Callable[[torch.Tensor], Any]) -> None:
    source = IterableSource(lambda: map(wrap, [*batches_of(3), torch.zeros(0, 3)]), heldout=0)
    assert numbers(source.batches(10), 3) == list(range(30))


def test_a_tuple_of_several_is_named_with_what_would_do() -> None:
    labelled = DataLoader(TensorDataset(numbered(30), torch.zeros(30)), batch_size=10)
    with pytest.raises(
        InputError, match=r"batch 0 of the iterable is a list of 2: expected a tensor .* \{'x': \.\.\., 'tar"
    ):
        open_source(labelled)
    for nothing in ({}, ({},)):
        with pytest.raises(InputError, match=r"batch 0 of the iterable is a mapping with the keys \[\]"):
            open_source(lambda: iter([nothing]))  # noqa: B023
    with pytest.raises(InputError, match="the iterable is empty: no batch with rows is in it"):
        open_source([torch.zeros(0, 3)] * 2)
    assert open_source(lambda: iter([torch._neg_view(numbered(4))] * 2), heldout=0).d_in == 3
    with pytest.raises(InputError, match="shuffle_rows is -1, expected at least 0"):
        open_source(labelled, shuffle_rows=-1)


@needs_cpp
def test_a_row_says_its_batch_through_the_reservoir() -> None:
    source = open_source(lambda: iter(batches_of(20)), heldout=0.1, shuffle_rows=50)
    epochs = set()
    for batch in itertools.islice(source.batches(10), 40):
        for i, number in enumerate(batch["x"][:, 0].int().tolist()):
            said = source.describe_row(i)
            epoch = ", epoch 2" if "epoch 2" in said else ", epoch 3" if "epoch 3" in said else ""
            assert said == f"batch {number // 10} of the iterable{epoch}, row {number % 10}"
            epochs.add(epoch)
    assert len(epochs) >= 2
    assert source.describe_heldout(12) == "batch 19 of the iterable, row 2"
    source.close()


def test_numbers_of_numpy_are_rows_of_data_too() -> None:
    assert saefast.SAEConfig(d_in=np.int64(3), n_latents=np.int64(8), k=np.int64(2)).d_in == 3
