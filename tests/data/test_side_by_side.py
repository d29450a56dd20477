"""Several hooks or arrays side by side in the columns of one tensor: the rows of a crosscoder."""

import itertools

import numpy as np
import pytest
import torch

from saefast import extension
from saefast.data.opening import open_source
from saefast.data.shard_buffer import ShardBuffer
from saefast.data.shard_writer import ShardWriter
from saefast.errors import InputError

# Rows of two hooks: of a first shard, of a second one, and held out.
CUTS, HELD, D, D_OUT = (300, 400), 60, 3, 5
N = sum(CUTS)
JOINED = {"x": ["in", "m.out"]}
needs_cpp = pytest.mark.skipif(not extension.available(), reason="needs the C++ extension")


def inputs(n, first=0):
    """Rows (n, 3) that carry their number, small enough for bfloat16 to keep it apart by column."""
    numbers = torch.arange(first, first + n)
    return torch.stack([numbers // 100, numbers % 100, torch.ones(n)], 1).float()


def number_of(x):
    return (100 * x[:, 0] + x[:, 1]).long()


def outputs(x):
    """Rows (n, 5) of the other hook at the tokens of x."""
    return torch.stack([-x[:, 1], x[:, 0], x[:, 2] * 3, x[:, 0] + x[:, 1], x[:, 1] + 1], 1)


def write(path, dtype="float32"):
    with ShardWriter(path, [{"name": n, "hf_name": f"m.{n}"} for n in ("in", "out")], dtype) as writer:
        done = 0
        for split, n in (("train", CUTS[0]), ("train", CUTS[1]), ("heldout", HELD)):
            x = inputs(n, done)
            writer.add(split, {"in": x, "out": outputs(x)}, torch.full((n,), done), torch.arange(n))
            writer.commit({})
            done += n
    return path


def whole(x):
    """Rows of both hooks of `write` side by side, from those of the first."""
    return torch.cat([x, outputs(x)], dim=1)


def mapped(path, **options):
    return open_source(write(path, **options), hooks=JOINED, shuffle="mapped")


def buffered(path, **options):
    return ShardBuffer(mapped(path, **options), reservoir_rows=1)


def on_device(path, **options):
    return ShardBuffer(mapped(path, **options), reservoir_rows=1, on_device=True)


def arrays(path):
    x = inputs(N)
    return open_source({"x": (x, outputs(x).numpy())})


KINDS = {
    "mapped": mapped,
    "buffered": pytest.param(buffered, marks=needs_cpp),
    "on device": pytest.param(on_device, marks=needs_cpp),
    "arrays": arrays,
}
each_kind = pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)


@each_kind
def test_rows_lie_side_by_side_and_resume_exactly(tmp_path, make):
    source = make(tmp_path / "acts")
    assert dict(source.widths) == {"x": D + D_OUT}
    assert source.part_widths() == (D, D_OUT)
    batches, drawn, states = source.batches(16, 3), [], []
    for _ in range(60):
        drawn.append(next(batches)["x"])
        states.append(source.state_dict())
    held = [batch["x"] for batch in source.heldout(16)]
    assert sum(map(len, held)) >= 35
    for x in [*drawn, *held]:
        assert torch.equal(x, whole(x[:, :D]))
    again = make(tmp_path / "again")
    again.load_state_dict(states[20])
    for x, expected in zip(again.batches(16, 3), drawn[21:], strict=False):
        assert torch.equal(x["x"], expected)
    source.close()
    again.close()


@pytest.mark.parametrize("make", [mapped, *(pytest.param(kind, marks=needs_cpp) for kind in (buffered, on_device))])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_hook_beside_it_changes_no_bit_of_the_first(tmp_path, make, dtype):
    joined = make(tmp_path / "acts", dtype=dtype)
    alone = open_source(tmp_path / "acts", hook="in", shuffle="mapped")
    if make is not mapped:
        alone = ShardBuffer(alone, reservoir_rows=1, on_device=make is on_device)
    for a, b in itertools.islice(zip(joined.batches(16, 7), alone.batches(16, 7), strict=True), 50):
        assert torch.equal(a["x"][:, :D], b["x"])
    for a, b in zip(joined.heldout(16), alone.heldout(16), strict=True):
        assert torch.equal(a["x"][:, :D], b["x"])
    joined.close()
    alone.close()


def test_x_and_target_of_several_hooks_each(tmp_path):
    source = open_source(write(tmp_path), hooks={"x": ["in", "out"], "target": ["out", "in"]}, shuffle="mapped")
    batch = next(source.batches(32))
    assert torch.equal(batch["target"], torch.cat([batch["x"][:, D:], batch["x"][:, :D]], dim=1))
    assert (source.part_widths("x"), source.part_widths("target")) == ((D, D_OUT), (D_OUT, D))


def test_sequences_and_places_are_those_of_the_token(tmp_path):
    source = mapped(tmp_path)
    for part in source.located("heldout", 16):
        assert torch.equal(part.x, whole(part.x[:, :D]))
        assert torch.equal(part.pos.long(), number_of(part.x) - N)
        assert part.seq.unique().tolist() == [N]
    number = int(number_of(next(source.batches(4))["x"])[2])
    seq = 0 if number < CUTS[0] else CUTS[0]
    first, second = source.describe_row(2).split(" beside ")
    assert "/in/" in first
    assert "/out/" in second
    for place in (first, second):
        assert place.endswith(f"(sequence {seq}, position {number - seq})")


def test_keys_of_one_file_and_files_of_a_folder(tmp_path):
    x = inputs(N)
    torch.save({"a": x, "b": outputs(x)}, tmp_path / "x.pt")
    batch = next(open_source(tmp_path / "x.pt", keys={"x": ("a", "b")}).batches(32))["x"]
    assert torch.equal(batch, whole(batch[:, :D]))
    np.save(tmp_path / "a.npy", x.numpy())
    batch = next(open_source({"x": (tmp_path / "a.npy", outputs(x))}).batches(32))["x"]
    assert torch.equal(batch, whole(batch[:, :D]))


def test_what_cannot_lie_side_by_side_is_named(tmp_path):
    x = inputs(N)
    with pytest.raises(InputError, match="'x' has 699 rows, 'x' has 700: row i of each must be of one token"):
        open_source({"x": (x, x[1:])})
    with pytest.raises(InputError, match=r"x is a tuple: expected an array or a path"):
        open_source({"x": ()})
    with pytest.raises(InputError, match=r"hooks is \{'x': \[\]\}: expected a list of hooks"):
        open_source(write(tmp_path), hooks={"x": []})
    with pytest.raises(InputError, match=r"hook 'mlp' is not in it; it holds in, out"):
        open_source(tmp_path, hooks={"x": ["in", "mlp"]})
