"""Sources of several tensors: row i of each is of one and the same token, wherever it is drawn from and resumed."""

import itertools
import re

import numpy as np
import pytest
import torch
from batches import xs

from saefast import extension
from saefast.data.iterable_source import IterableSource
from saefast.data.live_buffer import LiveBuffer
from saefast.data.opening import open_source
from saefast.data.shard_buffer import ShardBuffer
from saefast.data.shard_writer import ShardWriter
from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.training.api import train
from saefast.training.feed import Feed, input_scale

N, HELD, D, D_OUT = 700, 60, 3, 5
BOTH = {"x": "in", "target": "out"}
needs_cpp = pytest.mark.skipif(not extension.available(), reason="needs the C++ extension")


def inputs(n, first=0):
    """Rows (n, 3) that carry their number, small enough for bfloat16 to keep it apart by column."""
    numbers = torch.arange(first, first + n)
    return torch.stack([numbers // 100, numbers % 100, torch.ones(n)], 1).float()


def outputs(x):
    """The target (n, 5) that belongs to rows x."""
    return torch.stack([-x[:, 1], x[:, 0], x[:, 2] * 3, x[:, 0] + x[:, 1], x[:, 1] + 1], 1)


def write(path, dtype="float32", cuts=(300, 400)):
    with ShardWriter(path, [{"name": n, "hf_name": f"m.{n}"} for n in ("in", "out")], dtype) as writer:
        done = 0
        for split, n in [("train", n) for n in cuts] + [("heldout", HELD)]:
            x = inputs(n, done)
            writer.add(split, {"in": x, "out": outputs(x)}, torch.full((n,), done), torch.arange(n))
            writer.commit({})
            done += n
    return path


def mapped(path, **options):
    return open_source(write(path, **options), hooks=BOTH, shuffle="mapped")


def buffered(path, **options):
    return ShardBuffer(mapped(path, **options), reservoir_rows=1)


def on_device(path, **options):
    return ShardBuffer(mapped(path, **options), reservoir_rows=1, on_device=True)


def pairs(sizes=(50, 7, 43), n=N):
    cuts = itertools.accumulate(itertools.cycle(sizes), initial=0)
    for start, stop in itertools.pairwise(itertools.takewhile(lambda cut: cut <= n, cuts)):
        x = inputs(n)[start:stop]
        yield {"target": outputs(x), "x": x}


KINDS = {
    "mapped": mapped,
    "buffered": pytest.param(buffered, marks=needs_cpp),
    "on device": pytest.param(on_device, marks=needs_cpp),
    "arrays": lambda path: open_source({"x": inputs(N), "target": outputs(inputs(N)).numpy()}),
    "iterable": lambda path: IterableSource(lambda: pairs()),
    "live": pytest.param(lambda path: LiveBuffer(IterableSource(lambda: pairs()), reservoir_rows=1), marks=needs_cpp),
}
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@each_kind
@pytest.mark.parametrize("batch_size", [1, 16])
def test_rows_of_all_tensors_belong_together(tmp_path, make, batch_size):
    source = make(tmp_path / "acts")
    assert dict(source.widths) == {"x": D, "target": D_OUT}
    # Held on to until the end: what was handed out is not written over.
    drawn = list(itertools.islice(source.batches(batch_size, 3), max(90, 800 // batch_size)))
    for batch in [*drawn, *source.heldout(batch_size)]:
        assert set(batch) == {"x", "target"}
        assert len(batch["x"])
        assert torch.equal(batch["target"], outputs(batch["x"]))
    once = torch.cat(xs(drawn))[:600]  # an epoch has more rows than that
    assert len(once.unique(dim=0)) == len(once)
    assert len(list(source.heldout(batch_size)))
    source.close()


@pytest.mark.parametrize("make", [mapped, *(pytest.param(kind, marks=needs_cpp) for kind in (buffered, on_device))])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_second_hook_changes_no_bit_of_the_first(tmp_path, make, dtype):
    both = make(tmp_path / "acts", dtype=dtype)
    for tensor, hook in BOTH.items():
        alone = open_source(tmp_path / "acts", hook=hook, shuffle="mapped")
        if make is not mapped:
            alone = ShardBuffer(alone, reservoir_rows=1, on_device=make is on_device)
        expected = xs(alone.batches(16, 7), 100)
        found = [batch[tensor] for batch in itertools.islice(both.batches(16, 7), 100)]
        assert torch.equal(torch.cat(found), torch.cat(expected))
        held = [batch[tensor] for batch in both.heldout(16)]
        assert torch.equal(torch.cat(held), torch.cat(xs(alone.heldout(16))))
        alone.close()
    both.close()


@each_kind
def test_resume_is_exact(tmp_path, make):
    first = make(tmp_path / "a")
    batches = first.batches(16, 3)
    states, drawn = [], []
    for _ in range(70):
        drawn.append(next(batches))
        states.append(first.state_dict())
    for place in (1, 33, 60):
        again = make(tmp_path / f"at {place}")
        again.load_state_dict(states[place - 1])
        rest = itertools.islice(again.batches(16, 3), 70 - place)
        assert all(torch.equal(a[name], b[name]) for a, b in zip(drawn[place:], rest, strict=True) for name in a)
        assert again.state_dict() == states[-1]
        again.close()
    first.close()


def test_a_position_of_one_tensor_is_not_one_of_two():
    x = inputs(N)
    one, two = open_source(x), open_source({"x": x, "target": outputs(x)})
    with pytest.raises(InputError, match="d_in = None, this source 3"):
        one.load_state_dict(two.state_dict())
    with pytest.raises(InputError, match="widths = None, this source"):
        two.load_state_dict(one.state_dict())


def test_arrays_draw_x_as_if_it_were_alone():
    x = inputs(N)
    two, one = open_source({"target": outputs(x), "x": x}), open_source(x)
    for a, b in zip(xs(two.batches(16, 5), 100), xs(one.batches(16, 5), 100), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(torch.cat(xs(two.heldout(9))), torch.cat(xs(one.heldout(9))))


def test_files_that_are_cut_otherwise_still_belong_together(tmp_path):
    x = inputs(N)
    for name, rows, cuts in (("in", x, (100, 650, N)), ("out", outputs(x), (333, 690, N))):
        (tmp_path / name).mkdir()
        for number, (start, stop) in enumerate(itertools.pairwise((0, *cuts))):
            np.save(tmp_path / name / f"{number}.npy", rows[start:stop].numpy())
    source = open_source({"x": tmp_path / "in", "target": tmp_path / "out"}, heldout=0.1)
    held = list(source.heldout(32))
    assert torch.equal(torch.cat(xs(held)), x[-70:])
    for batch in [*held, *itertools.islice(source.batches(32), 40)]:
        assert torch.equal(batch["target"], outputs(batch["x"]))
    next(source.batches(4))
    assert re.search(r"in/\d\.npy row \d+", source.describe_row(0))
    assert re.search(r"out/\d\.npy row \d+", source.describe_row(0, "target"))
    assert source.describe_heldout(69, "target").endswith("out/2.npy row 9")


def test_keys_of_one_file(tmp_path):
    x = inputs(N)
    torch.save({"acts": x, "mlp": outputs(x)}, tmp_path / "x.pt")
    batch = next(open_source(tmp_path / "x.pt", keys={"x": "acts", "target": "mlp"}).batches(32))
    assert torch.equal(batch["target"], outputs(batch["x"]))
    with pytest.raises(InputError, match=r"x.pt has no tensor 'mpl'; its tensors: acts \(700, 3\), mlp \(700, 5\)"):
        open_source(tmp_path / "x.pt", keys={"x": "acts", "target": "mpl"})


def test_a_list_of_hooks_leaves_them_their_names(tmp_path):
    source = open_source(write(tmp_path / "acts"), hooks=["out", "m.in"], shuffle="mapped")
    assert dict(source.widths) == {"out": D_OUT, "m.in": D}
    batch = next(source.batches(8))
    assert torch.equal(batch["out"], outputs(batch["m.in"]))
    with pytest.raises(InputError, match=r"has the tensors out, m\.in and none called 'x'"):
        _ = source.d_in
    with pytest.raises(InputError, match="none called 'x'"):
        open_source(tmp_path / "acts", hooks=["out", "in"], d_in=3)


@pytest.mark.parametrize("shuffle", ["mapped", pytest.param("buffer", marks=needs_cpp)])
def test_a_shard_that_is_bad_in_one_hook_is_left_out_of_both(tmp_path, shuffle):
    folder = write(tmp_path / "acts")
    bad = folder / "out" / "00000.safetensors"
    bad.write_bytes(bad.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"out/00000\.safetensors .*truncated"):
        open_source(folder, hooks=BOTH, shuffle=shuffle)
    source = open_source(folder, hooks=BOTH, shuffle=shuffle, skip_bad_shards=True)
    assert source.n_rows == 400
    for batch in itertools.islice(source.batches(16), 50):
        assert torch.equal(batch["target"], outputs(batch["x"]))
    source.close()


def test_what_does_not_fit_is_named(tmp_path):
    x = inputs(N)
    folder = write(tmp_path / "acts")
    for match, refused in {
        "the array 'x', the array 'target': 'target' has 699 rows, 'x' has 700: row i": lambda: open_source(
            {"x": x, "target": outputs(x)[1:]}
        ),
        r"columns in 'x', expected d_in = 4": lambda: open_source({"x": x, "target": x}, d_in=4),
        r"the array 'x', the array 'target' has rows of 5 columns in 'target', expected d_out = 6": lambda: open_source(
            {"x": x, "target": outputs(x)}, d_out=6
        ),
        r"hook 'mlp' is not in it; it holds in, out": lambda: open_source(folder, hooks={"x": "in", "target": "mlp"}),
        "hook is 'in' and hooks is given too": lambda: open_source(folder, hook="in", hooks=BOTH),
        "hooks is 'in': expected a list of hooks": lambda: open_source(folder, hooks="in"),
        r"hooks is \{\}: expected a list": lambda: open_source(folder, hooks={}),
        "has no hooks to choose from": lambda: open_source(x, hooks=BOTH),
        "has no keys to choose from": lambda: open_source(folder, hooks=BOTH, keys=["a"]),
        "target: .* is a shard folder": lambda: open_source({"x": x, "target": folder}),
        "target is a list: expected an array or a path": lambda: open_source({"x": x, "target": [x]}),
        r"a mapping with the keys \[1\]": lambda: open_source({1: x}),
        r"a mapping with the keys \[\]": lambda: open_source({}),
    }.items():
        with pytest.raises(InputError, match=match):
            refused()


@pytest.mark.parametrize(
    ("second", "match"),
    [
        ({"x": inputs(4)}, "batch 1 of the iterable has the tensors x, those before have target, x"),
        (inputs(4), "batch 1 of the iterable has the tensors x, those"),
        ({"x": inputs(4), "target": inputs(4)}, "batch 1 of the iterable: 'target' has 3 columns, those before have 5"),
        ({"x": inputs(4).double(), "target": outputs(inputs(4))}, r"'x' has dtype torch.float64, those .*\.float32"),
        ({"x": inputs(4), "target": outputs(inputs(3))}, r"different numbers of rows \('x' 4, 'target' 3\)"),
        ({"x": inputs(4), "target": None}, "batch 1 of the iterable: 'target' is a NoneType"),
        ({}, r"a mapping with the keys \[\]"),
        ({0: inputs(4)}, r"a mapping with the keys \[0\]"),
    ],
)
def test_batches_of_an_iterable_that_change_are_named(second, match):
    first = {"target": outputs(inputs(4)), "x": inputs(4)}
    source = IterableSource([first, second, first], heldout=0)
    with pytest.raises(InputError, match=match):
        list(itertools.islice(source.batches(4), 2))


def test_empty_batches_of_an_iterable_are_passed_over():
    x = inputs(8)
    empty = {"x": torch.zeros(0, 3), "target": torch.zeros(0, 5)}
    source = IterableSource([{"x": x, "target": outputs(x)}, empty], heldout=0)
    assert [len(batch["target"]) for batch in itertools.islice(source.batches(8), 3)] == [8, 8, 8]


CONFIG = TrainConfig(batch_size=32, n_tokens=32 * 20, device="cpu", engine="fused", seed=3)


def feed_of(source, **changes):
    return Feed(source, CONFIG, torch.device("cpu"), torch.float32, **changes)


def test_a_feed_scales_each_tensor_by_its_own_size():
    x = inputs(N) + 1
    feed = feed_of(open_source({"x": x, "target": outputs(x)}))
    first = feed.look_ahead(100)
    feed.fit_scales(first, "sqrt_d")
    assert feed.scale == input_scale(first.x, "sqrt_d")
    assert feed.target_scale == input_scale(first.target, "sqrt_d") != feed.scale
    for rows in [feed.next(0), next(feed.heldout())]:
        raw = rows.x / feed.scale
        assert torch.allclose(rows.target / feed.target_scale, outputs(raw), rtol=1e-5)


def test_a_feed_of_one_tensor_has_it_for_its_target():
    feed = feed_of(open_source(inputs(N)))
    feed.fit_scales(feed.look_ahead(64), "unit_mean_square")
    rows = feed.next(0)
    assert rows.target is rows.x
    assert not feed.has_target
    assert feed.target_scale == feed.scale


@pytest.mark.parametrize("deferred", [False, True])
def test_a_bad_row_of_a_target_is_named(deferred):
    x = inputs(N)
    target = outputs(x)
    probe = open_source({"x": x, "target": target})
    list(itertools.islice(probe.batches(32, 3), 5))
    row = int(probe.describe_row(7).split()[-1])
    target[row, 2] = torch.nan
    feed = feed_of(open_source({"x": x, "target": target}))
    feed.deferred = deferred

    def draw():
        for step in range(6):
            feed.next(step)
        feed.confirm()

    match = f"step 4: row 7 of the batch holds NaN or inf in 'target': the array 'target' row {row};"
    with pytest.raises(InputError, match=match):
        draw()


def test_a_bad_held_out_row_of_a_target_is_named():
    x = inputs(N)
    target = outputs(x)
    target[-3] = torch.inf
    feed = feed_of(open_source({"x": x, "target": target}))
    match = f"held-out row 32 holds NaN or inf in 'target': the array 'target' row {N - 3}"
    with pytest.raises(InputError, match=match):
        list(feed.heldout())


def test_a_feed_refuses_tensors_that_training_has_no_use_for():
    x = inputs(N)
    with pytest.raises(InputError, match="training makes no use of 'y'"):
        feed_of(open_source({"x": x, "y": x}))
    with pytest.raises(InputError, match="none called 'x'"):
        train({"a": x}, SAEConfig(d_in=3, n_latents=8, k=2), CONFIG)


def test_a_source_of_the_callers_own_that_gives_something_else_is_told():
    source = open_source(inputs(N))
    feed = feed_of(source)
    feed._batches = iter([inputs(32)])
    with pytest.raises(InputError, match="the array gave a batch of Tensor: expected a dict of x"):
        feed.next(0)
