"""Sources: every row once an epoch, exact resume, a held-out share nobody trains on, and one line for bad input."""

import itertools

import numpy as np
import pytest
import torch
from batches import xs
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from saefast.data import permutation
from saefast.data.iterable_source import IterableSource
from saefast.data.mapped_source import MappedSource
from saefast.data.opening import open_source
from saefast.data.permutation import Permutation
from saefast.data.shard_buffer import ShardBuffer
from saefast.data.shard_writer import ShardWriter
from saefast.data.source import first_bad_row
from saefast.errors import InputError


def numbered(n, d=3, first=0, dtype=torch.float32):
    """Rows that carry their own number in every column."""
    return (torch.arange(first, first + n, dtype=dtype)[:, None]).expand(n, d).contiguous()


def take(iterator, n):
    return xs(iterator, n)


def numbers(batches):
    """Of tensors, or of batches with an x."""
    return [int(x) for batch in batches for x in (batch["x"] if isinstance(batch, dict) else batch)[:, 0]]


def shard_folder(path, train=(40, 25), held=(7, 3), hooks=("a", "b"), dtype="float32"):
    """Row numbers run through the train shards; held-out rows begin at 1000. Hook b holds the negatives."""
    with ShardWriter(path, [{"name": h, "hf_name": f"m.{h}"} for h in hooks], dtype) as writer:
        done, held_done = 0, 1000
        for n, h in zip(train, held, strict=True):
            for split, first, count in (("train", done, n), ("heldout", held_done, h)):
                rows = numbered(count, first=first)
                values = {hook: rows * (1 if hook == "a" else -1) for hook in hooks}
                writer.add(split, values, torch.full((count,), first), torch.arange(count))
            done, held_done = done + n, held_done + h
            writer.commit({})
    return path


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 5000), seed=st.integers(0, 2**63), epoch=st.integers(0, 9), big=st.booleans())
def test_order_is_a_permutation_readable_from_any_place(n, seed, epoch, big):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permutation, "SORTED_UP_TO", 0 if big else 1 << 20)
        rows = Permutation(n, seed).rows(epoch, 0, n)
        assert sorted(rows.tolist()) == list(range(n))
        cut = n // 3
        assert np.array_equal(Permutation(n, seed).rows(epoch, cut, n), rows[cut:])


@pytest.mark.parametrize("sorted_up_to", [0, 1 << 20])
def test_orders_of_epochs_and_seeds_look_random(monkeypatch, sorted_up_to):
    """First entries over many keys are uniform (chi-square), and no order resembles the next or the identity."""
    monkeypatch.setattr(permutation, "SORTED_UP_TO", sorted_up_to)
    n, keys = 10, 4000
    firsts = [int(Permutation(n, seed).rows(epoch, 0, 1)[0]) for seed in range(keys // 2) for epoch in range(2)]
    counts = np.bincount(firsts, minlength=n)
    # chi-square with 9 degrees of freedom exceeds 27.9 once in a thousand.
    assert ((counts - keys / n) ** 2 / (keys / n)).sum() < 27.9
    n = 3000
    orders = [Permutation(n, seed).rows(epoch, 0, n) for seed, epoch in ((0, 0), (0, 1), (1, 0))] + [np.arange(n)]
    for one, other in itertools.combinations(orders, 2):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4.5 / np.sqrt(n)
    # Neighbours in an order are as far apart as chance has it: n / 3 on average.
    assert abs(np.abs(np.diff(orders[0])).mean() - n / 3) < 0.05 * n


def test_order_is_pinned():
    """A resumed run needs the order of its first half: this one may never change."""
    assert Permutation(10, 7).rows(2, 0, 10).tolist() == ORDER_SORTED
    assert Permutation(1 << 21, 7).rows(2, 0, 4).tolist() == ORDER_FEISTEL


ORDER_SORTED = [7, 6, 1, 5, 3, 4, 0, 8, 2, 9]
ORDER_FEISTEL = [683495, 679106, 19118, 2015293]


@pytest.mark.parametrize("batch_size", [1, 7, 50, 95, 96, 300])
def test_each_row_once_an_epoch_and_batches_are_always_full(batch_size):
    source = open_source(numbered(100))
    assert (source.d_in, source.n_rows) == (3, 95)
    n_batches = -(-3 * 95 // batch_size)
    batches = take(source.batches(batch_size, seed=1), n_batches)
    assert all(b.shape == (batch_size, 3) and b.dtype == torch.float32 for b in batches)
    seen = numbers(batches)
    epochs = [seen[i : i + 95] for i in (0, 95, 190)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(95))
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("drawn", [0, 1, 9, 13, 14, 40])
def test_resume_anywhere_gives_the_same_batches(tmp_path, seed, drawn):
    data = torch.randn(100, 4)
    np.save(tmp_path / "x.npy", data.numpy())
    source = open_source(tmp_path / "x.npy")
    batches = source.batches(7, seed)
    take(batches, drawn)
    state = source.state_dict()
    expected = take(batches, 30)
    resumed = open_source(tmp_path / "x.npy")
    resumed.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(expected, take(resumed.batches(7, seed), 30), strict=True))
    # The position does not hang on the batch size.
    resumed.load_state_dict(state)
    assert torch.equal(torch.cat(take(resumed.batches(21, seed), 10)), torch.cat(expected))


def test_batches_starts_again_unless_a_position_was_loaded():
    source = open_source(numbered(50))
    first = take(source.batches(8, 3), 2)
    assert torch.equal(torch.cat(first), torch.cat(take(source.batches(8, 3), 2)))


def test_a_position_of_other_data_or_another_seed_is_refused():
    source = open_source(numbered(50))
    take(source.batches(8, 3), 2)
    state = source.state_dict()
    with pytest.raises(InputError, match="has n_rows = 48, this source 57"):
        open_source(numbered(60, d=3)).load_state_dict(state | {"n_rows": 48})
    with pytest.raises(InputError, match="has d_in = 3, this source 4"):
        open_source(numbered(50, d=4)).load_state_dict(state)
    with pytest.raises(InputError, match="has kind = 'rows', this source 'live'"):
        open_source(lambda: iter([numbered(4)])).load_state_dict(state)
    source.load_state_dict(state)
    with pytest.raises(InputError, match="reached with seed 3"):
        source.batches(8, 4)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.05, 0.5, 0.97])
def test_held_out_tail_is_disjoint_and_never_trained_on(share):
    source = open_source(numbered(101), heldout=share)
    held = numbers(source.heldout(16))
    trained = set(numbers(take(source.batches(10), 3 * source.n_rows // 10 + 3)))
    assert held == list(range(source.n_rows, 101))
    assert len(held) == int(np.ceil(share * 101))
    assert trained == set(range(source.n_rows))


def test_rows_say_where_they_came_from(tmp_path):
    for name, first in (("x0", 0), ("x1", 30)):
        np.save(tmp_path / f"{name}.npy", numbered(30, first=first).numpy())
    source = open_source(tmp_path, heldout=0.1)
    batch = next(source.batches(20, seed=5))["x"]
    for i, number in enumerate(batch[:, 0].int().tolist()):
        assert source.describe_row(i) == f"{tmp_path}/x{number // 30}.npy row {number % 30}"


def test_dtype_and_device():
    source = open_source(numbered(20, dtype=torch.float64))
    assert next(source.batches(4))["x"].dtype == torch.float32
    assert next(source.batches(4, dtype=torch.bfloat16))["x"].dtype == torch.bfloat16
    assert next(source.heldout(4, dtype=torch.float16))["x"].dtype == torch.float16
    assert next(source.batches(4, device="meta"))["x"].device.type == "meta"


def writers():
    x = numbered(40, d=5)
    return {
        "npy32": ("x.npy", lambda p: np.save(p, x.numpy())),
        "npy16": ("x.npy", lambda p: np.save(p, x.numpy().astype(np.float16))),
        "npy_fortran": ("x.npy", lambda p: np.save(p, np.asfortranarray(x.numpy()))),
        "npy_big_endian": ("x.npy", lambda p: np.save(p, x.numpy().astype(">f4"))),
        "npy_3d": ("x.npy", lambda p: np.save(p, x.numpy().reshape(8, 5, 5))),
        "pt": ("x.pt", lambda p: torch.save(x.bfloat16(), p)),
        "pt_legacy": ("x.pt", lambda p: torch.save(x, p, _use_new_zipfile_serialization=False)),
        "pt_dict": ("x.pth", lambda p: torch.save({"acts": x, "layer": 3, "mean": x.mean(0)}, p)),
        "safetensors": ("x.safetensors", lambda p: save_file({"acts": x.bfloat16(), "seq": torch.arange(40)}, p)),
        "safetensors_3d": ("x.safetensors", lambda p: save_file({"acts": x.reshape(8, 5, 5)}, p)),
    }


@pytest.mark.parametrize("kind", writers())
def test_every_file_format_gives_the_same_rows(tmp_path, kind):
    name, write = writers()[kind]
    write(tmp_path / name)
    source = open_source(tmp_path / name, d_in=5)
    rows = torch.cat([*take(source.batches(19, seed=2), 2), *xs(source.heldout(100))])
    assert torch.equal(rows[rows[:, 0].argsort()], numbered(40, d=5))


def test_key_picks_a_tensor(tmp_path):
    save_file({"a": numbered(10), "b": numbered(10, first=50)}, tmp_path / "x.safetensors")
    torch.save({"a": numbered(10), "b": numbered(10, first=50)}, tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        assert min(numbers(take(open_source(tmp_path / name, key="b").batches(9), 1))) == 50
        with pytest.raises(InputError, match=r"holds 2 2-D tensors, say which with key; its tensors: a \(10, 3\), b"):
            open_source(tmp_path / name)
        with pytest.raises(InputError, match="has no tensor 'c'; its tensors: a"):
            open_source(tmp_path / name, key="c")


def test_mapped_files_are_not_read_into_memory_nor_written_to(tmp_path):
    path = tmp_path / "x.npy"
    np.save(path, numbered(50).numpy())
    before = path.read_bytes()
    source = open_source(path, heldout=0)
    source.train["x"].segments[0].rows[0] = 99
    assert path.read_bytes() == before
    assert open_source(path, heldout=0).train["x"].segments[0].rows[0, 0] == 0


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


@pytest.mark.parametrize("kind", ["npy32", "pt", "pt_legacy", "safetensors"])
def test_truncated_files_are_named(tmp_path, kind):
    name, write = writers()[kind]
    write(tmp_path / name)
    cut(tmp_path / name)
    with pytest.raises(InputError, match=rf"{name} .*truncated") as error:
        open_source(tmp_path / name)
    assert "\n" not in str(error.value)


def bad_inputs():
    x = numbered(10)
    return {
        "missing": (lambda p: p / "no.npy", "no.npy does not exist"),
        "ending": (lambda p: made(p / "x.csv", b"1,2"), "unknown ending"),
        "no bytes": (lambda p: made(p / "x.npy", b""), r"is empty \(0 bytes\)"),
        "garbage npy": (lambda p: made(p / "x.npy", b"garbage" * 99), "cannot be read as .npy"),
        "garbage pt": (lambda p: made(p / "x.pt", b"garbage" * 99), "cannot be read by torch.load"),
        "garbage safetensors": (lambda p: made(p / "x.safetensors", b"garbage" * 99), "safetensors file"),
        "not JSON": (lambda p: made(p / "x.safetensors", b"\4" + bytes(7) + b"{{{{"), "its header is not valid JSON"),
        "pickled objects": (lambda p: saved(p / "x.npy", np.array([{}], dtype=object)), "cannot be read as .npy"),
        "empty folder": (lambda p: p, "holds no index.json"),
        "two kinds": (lambda p: (saved(p / "x.npy", x.numpy()), torch.save(x, p / "y.pt"), p)[-1], "several kinds"),
        "1-D": (lambda p: saved(p / "x.npy", np.zeros(7, np.float32)), r"shape \(7,\), expected \(rows, d_in\)"),
        "0 rows": (lambda p: saved(p / "x.npy", np.zeros((0, 7), np.float32)), "it is empty"),
        "integers": (lambda p: saved(p / "x.npy", np.zeros((3, 7), np.int32)), "has dtype int32, expected float16"),
        "booleans": (lambda p: torch.zeros(3, 7, dtype=torch.bool), "has dtype torch.bool"),
        "sparse": (lambda p: torch.eye(4).to_sparse(), "torch.sparse_coo"),
        "complex": (lambda p: np.zeros((2, 2), complex), "has dtype complex128"),
        "unequal widths": (
            lambda p: (saved(p / "a.npy", x.numpy()), saved(p / "b.npy", numbered(4, d=5).numpy()), p)[-1],
            "b.npy has 5 columns, .*a.npy has 3",
        ),
        "one row": (lambda p: numbered(1), "none is left to train on"),
        "number": (lambda p: 5, "a int is nothing to train on"),
        "empty list": (lambda p: [], "is empty: no batch"),
        "list of numbers": (lambda p: [1.0, 2.0], "batch 0 of the iterable is a float"),
        "list of vectors": (lambda p: [torch.zeros(4)], r"batch 0 of the iterable has shape \(4,\)"),
        "function of nothing": (lambda p: lambda: None, "the function returned a NoneType"),
    }


def made(path, content):
    path.write_bytes(content)
    return path


def saved(path, array):
    np.save(path, array, allow_pickle=True)
    return path


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_input_is_one_line(tmp_path, case):
    make, message = bad_inputs()[case]
    with pytest.raises(InputError, match=message) as error:
        open_source(make(tmp_path))
    assert "\n" not in str(error.value)


def test_wrong_width_and_impossible_share():
    with pytest.raises(InputError, match="the array has rows of 3 columns, expected d_in = 4"):
        open_source(numbered(10), d_in=4)
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(InputError, match="heldout is"):
            open_source(numbered(10), heldout=share)
    with pytest.raises(InputError, match="batch_size is 0"):
        open_source(numbered(10)).batches(0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_row_is_found_and_traced_to_its_file(tmp_path, bad):
    x = numbered(60)
    x[17, 2] = bad
    np.save(tmp_path / "x.npy", x.numpy())
    source = open_source(tmp_path / "x.npy")
    found = []
    for batch in take(source.batches(19), 3):
        row = first_bad_row(batch)
        if row is not None:
            found.append(source.describe_row(row))
    assert found == [f"{tmp_path / 'x.npy'} row 17"]


def test_first_bad_row_is_not_fooled_by_overflow_or_cancelling():
    big = torch.full((4, 3), 3e38)
    assert first_bad_row(big) is None
    big[2, 0], big[3, 0] = float("inf"), -float("inf")
    assert first_bad_row(big) == 2
    assert first_bad_row(torch.full((2, 2), 60000.0, dtype=torch.float16)) is None
    assert first_bad_row(torch.zeros(0, 3)) is None


def test_shards_give_their_own_splits(tmp_path):
    source = open_source(shard_folder(tmp_path / "acts"), hook="a", heldout=0.5)
    assert source.n_rows == 65
    assert sorted(numbers(take(source.batches(13), 5))) == list(range(65))
    assert sorted(numbers(source.heldout(4))) == list(range(1000, 1010))
    batch = next(source.batches(9, seed=4))["x"]
    for i, number in enumerate(batch[:, 0].int().tolist()):
        file, first = ("00000", 0) if number < 40 else ("00001", 40)
        text = source.describe_row(i)
        assert text.startswith(f"{tmp_path}/acts/a/{file}.safetensors row ")
        assert text.endswith(f"(sequence {first}, position {number - first})")


def test_shards_of_several_hooks_need_a_name(tmp_path):
    shard_folder(tmp_path / "acts")
    assert min(numbers(open_source(tmp_path / "acts", hook="m.b").heldout(4))) == -1009
    with pytest.raises(InputError, match="hook is not given; it holds a, b"):
        open_source(tmp_path / "acts")
    with pytest.raises(InputError, match="hook 'c' is not in it; it holds a, b"):
        open_source(tmp_path / "acts", hook="c")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_shards_of_every_dtype(tmp_path, dtype):
    source = open_source(shard_folder(tmp_path / "acts", hooks=("a",), dtype=dtype))
    seen = torch.cat(take(source.batches(65), 1))[:, 0].sort().values
    # Rows of equal elements are exact in int8 up to float32 rounding; these numbers are exact in the half types.
    assert torch.allclose(seen, torch.arange(65.0), rtol=1e-5)
    assert next(source.heldout(5))["x"].dtype == torch.float32


def test_bad_shard_raises_or_is_skipped(tmp_path):
    folder = shard_folder(tmp_path / "acts", hooks=("a",))
    cut(folder / "a" / "00001.safetensors")
    with pytest.raises(InputError, match=r"a/00001.safetensors is truncated at byte \d+"):
        open_source(folder)
    source = open_source(folder, skip_bad_shards=True)
    assert sorted(numbers(take(source.batches(40), 1))) == list(range(40))
    assert [bad.file.name for bad in source.folder.skipped] == ["00001.safetensors"]
    cut(folder / "a" / "00000.safetensors")
    with pytest.raises(InputError, match=r"holds no rows to train on .2 bad shards left out"):
        open_source(folder, skip_bad_shards=True)


def ragged(n_batches=23, seed=0):
    """Batches of 0 to 9 rows with numbered rows."""
    sizes = np.random.default_rng(seed).integers(0, 10, n_batches)
    sizes[0] = 5
    return [numbered(int(size), first=int(first)) for size, first in zip(sizes, np.cumsum(sizes) - sizes, strict=True)]


def held_numbers(batches, every):
    return [n for i, batch in enumerate(batches) if i % every == every - 1 for n in numbers([batch])]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("make", [lambda b: b, lambda b: lambda: iter(b), lambda b: lambda: (x.numpy() for x in b)])
def test_iterables_are_recut_in_order_and_every_nth_is_held_out(seed, make):
    data = ragged(seed=seed)
    held = held_numbers(data, 5)
    trained = [n for n in numbers(data) if n not in set(held)]
    source = IterableSource(make(data), heldout=0.2)
    batches = take(source.batches(6), -(-2 * len(trained) // 6))
    assert all(b.shape == (6, 3) for b in batches)
    assert numbers(batches)[: 2 * len(trained)] == trained * 2
    assert numbers(source.heldout(4)) == held
    assert source.n_rows is None


@pytest.mark.parametrize("seed", range(6))
def test_iterable_resume_at_any_point(seed):
    data = ragged(seed=seed)
    reference = IterableSource(data, heldout=0.2)
    batches = reference.batches(6, 1)
    states, drawn = [reference.state_dict()], []
    for _ in range(40):
        drawn.append(next(batches)["x"])
        states.append(reference.state_dict())
    for place in range(0, 40, 3):
        resumed = IterableSource(lambda: iter(data), heldout=0.2)
        resumed.load_state_dict(states[place])
        rest = take(resumed.batches(6, 1), 40 - place)
        assert all(torch.equal(a, b) for a, b in zip(drawn[place:], rest, strict=True))
        assert resumed.state_dict() == states[-1]
        assert numbers(resumed.heldout(4)) == held_numbers(data, 5)


def test_iterable_held_out_after_resume_in_a_later_epoch_is_whole():
    data = [numbered(4, first=4 * i) for i in range(10)]
    source = IterableSource(data, heldout=0.2)
    batches = source.batches(4)
    take(batches, 9)
    resumed = IterableSource(data, heldout=0.2)
    resumed.load_state_dict(source.state_dict())
    next(resumed.batches(4))
    assert numbers(resumed.heldout(3)) == numbers(source.heldout(3)) == held_numbers(data, 5)


def test_held_out_share_of_an_iterable_stops_at_the_cap(monkeypatch):
    monkeypatch.setattr("saefast.data.iterable_source.HELDOUT_ROWS", 10)
    data = [numbered(4, first=4 * i) for i in range(40)]
    source = IterableSource(data, heldout=0.25)
    trained = numbers(take(source.batches(4), 37 * 2))
    # Three batches of four rows reach the cap of ten; later ones are trained on, in every epoch.
    held = [12, 13, 14, 15, 28, 29, 30, 31, 44, 45, 46, 47]
    assert numbers(source.heldout(100)) == held
    assert sorted(trained) == sorted(2 * [n for n in range(160) if n not in held])


def test_short_lists_hold_out_their_last_batch():
    data = [numbered(4, first=4 * i) for i in range(3)]
    source = IterableSource(data)
    assert sorted(set(numbers(take(source.batches(4), 6)))) == list(range(8))
    assert numbers(source.heldout(8)) == [8, 9, 10, 11]
    assert not list(IterableSource(data[:1]).heldout(8))
    assert not list(IterableSource(data, heldout=0).heldout(8))


def test_a_generator_works_for_one_epoch_and_cannot_be_resumed():
    data = [numbered(4, first=4 * i) for i in range(10)]
    source = IterableSource((x for x in data), heldout=0.5)
    batches = xs(source.batches(3))
    assert [len(b) for b in batches] == [3] * 6 + [2]
    assert numbers(batches) == [n for i in range(0, 10, 2) for n in numbers([data[i]])]
    with pytest.raises(InputError, match="is a generator and cannot be resumed: pass a list"):
        IterableSource(x for x in data).load_state_dict(source.state_dict() | {"batches": 3})
    with pytest.raises(InputError, match="cannot be started a second time"):
        source.batches(3)


def test_iterable_names_the_batch_that_is_wrong():
    source = IterableSource([numbered(4), numbered(4, d=5)], heldout=0)
    with pytest.raises(InputError, match="batch 1 of the iterable has 5 columns, those before have 3"):
        take(source.batches(4), 2)
    source = IterableSource([numbered(4), torch.zeros(2, 3, dtype=torch.int64)], heldout=0)
    with pytest.raises(InputError, match=r"batch 1 of the iterable has dtype torch\.int64"):
        take(source.batches(4), 2)
    left = [1, 0, 0]
    empty = IterableSource(lambda: iter([numbered(4)] * left.pop(0)), heldout=0)
    with pytest.raises(InputError, match="gave nothing to train on in an epoch of 0 batches"):
        take(empty.batches(4), 3)


def test_iterable_that_shrank_cannot_be_resumed():
    source = IterableSource([numbered(4)] * 6, heldout=0)
    take(source.batches(4), 5)
    state = source.state_dict()
    short = IterableSource([numbered(4)] * 3, heldout=0)
    short.load_state_dict(state)
    with pytest.raises(InputError, match="ended after 3 batches, the run to resume had drawn 5"):
        next(short.batches(4))


def test_rows_of_an_iterable_say_their_batch():
    source = IterableSource([numbered(4), numbered(3), numbered(5)], heldout=0)
    batches = source.batches(6)
    next(batches)
    assert source.describe_row(0) == "batch 0 of the iterable, row 0"
    assert source.describe_row(5) == "batch 1 of the iterable, row 1"
    take(batches, 1)
    assert source.describe_row(1) == "batch 2 of the iterable, row 0"
    take(batches, 1)
    assert source.describe_row(5) == "batch 1 of the iterable, epoch 2, row 1"


def test_the_iterables_own_tensors_are_safe_and_keep_no_graph():
    weight = torch.ones(3, requires_grad=True)
    reused = numbered(4)

    def refilled():
        for i in range(6):
            reused.copy_(numbered(4, first=4 * i))
            yield reused * weight if i == 5 else reused

    source = IterableSource(refilled, heldout=0.25)
    batches = take(source.batches(4), 4) + take(source.batches(10), 2)
    assert numbers(batches[:4]) == [*range(12), *range(16, 20)]
    assert numbers(batches[4:]) == [*range(12), *range(16, 24)]
    assert not batches[-1].requires_grad
    assert numbers(source.heldout(9)) == [12, 13, 14, 15]


def test_a_source_passes_through():
    source = open_source(numbered(10))
    assert open_source(source, d_in=3) is source
    with pytest.raises(InputError, match="holds no tokens"):
        source.tokens(0)


def test_shard_folders_are_buffered_where_there_is_a_gpu_to_feed(tmp_path, monkeypatch):
    folder = shard_folder(tmp_path / "acts")
    assert isinstance(open_source(folder, hook="a"), MappedSource)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert isinstance(open_source(folder, hook="a"), ShardBuffer)
    assert isinstance(open_source(folder, hook="a", shuffle="mapped"), MappedSource)
