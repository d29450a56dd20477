"""Masks: what they leave out is as if it had never been there, in batches, held-out rows and runs that go on."""

import itertools
import math

import numpy as np
import pytest
import torch
from batches import xs

from saefast.data.iterable_source import IterableSource
from saefast.data.opening import open_source
from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.training.api import train
from saefast.training.progress import read_metrics

B, T, D = 12, 40, 6


def activations(n=B, seed=0):
    """x (n, T, D) as a model gives them, with NaN where nothing stands, and a tokenizer's attention_mask (n, T)."""
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(n, T, D, generator=draws)
    lengths = torch.randint(1, T + 1, (n, 1), generator=draws)
    mask = torch.arange(T) < lengths
    x[~mask] = math.nan
    return x, mask


def first_batches(source, n=8):
    return [batch["x"] for batch in itertools.islice(source.batches(32, seed=1), n)]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


SCATTERED = torch.arange(B * T).reshape(B, T) % 3 != 1


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32, "numpy"], ids=str)
@pytest.mark.parametrize("scattered", [False, True], ids=["stretches", "scattered"])
def test_arrays(kind, scattered):
    x, mask = activations()
    mask = mask & SCATTERED if scattered else mask
    given = mask.numpy() if kind == "numpy" else mask.to(kind)
    source = open_source({"x": x, "target": 2 * x, "mask": given}, heldout=0.2)
    plain = open_source({"x": x[mask], "target": 2 * x[mask]}, heldout=0.2)
    assert source.widths == {"x": D, "target": D}
    assert source.n_rows == plain.n_rows
    assert source.rows_masked == int((~mask).sum())
    for ours, theirs in itertools.islice(zip(source.batches(16, 3), plain.batches(16, 3), strict=True), 30):
        assert torch.equal(ours["x"], theirs["x"])
        assert torch.equal(ours["target"], 2 * ours["x"])
    held, expected = (torch.cat([batch["x"] for batch in s.heldout(7)]) for s in (source, plain))
    assert torch.equal(held, expected)
    if not scattered:
        # Stretches stay where they are, and know their place in the array.
        row = int(mask.flatten().nonzero()[50])
        assert source.describe_number(50).endswith(f" row {row}")


def test_side_by_side():
    x, mask = activations()
    y = x[..., :3].double()
    source = open_source({"x": (x, y.float()), "mask": mask}, heldout=0)
    both = torch.cat([x, y.float()], -1)[mask]
    assert same(first_batches(source), first_batches(open_source(both, heldout=0)))


@pytest.mark.parametrize("shuffle_rows", [0, 64], ids=["in order", "shuffled"])
def test_iterables(shuffle_rows):
    items = [activations(3, seed) for seed in range(30)]
    # All of a batch is masked: one in the middle, one that is held out, and the last one.
    items = [(x, mask & (number not in (5, 9, 29))) for number, (x, mask) in enumerate(items)]
    source = open_source(lambda: ({"x": x, "mask": mask} for x, mask in items), heldout=0.1, shuffle_rows=shuffle_rows)
    plain = open_source(lambda: (x[mask] for x, mask in items), heldout=0.1, shuffle_rows=shuffle_rows)
    assert same(first_batches(source, 45), first_batches(plain, 45))
    assert same(xs(source.heldout(50)), xs(plain.heldout(50)))
    assert xs(source.heldout(50))
    assert plain.rows_masked == 0
    assert source.rows_masked > 0
    for each in (source, plain):
        each.close()


def test_a_first_batch_of_which_nothing_counts():
    x, mask = activations()
    source = open_source(lambda: ({"x": x, "mask": m} for m in (mask & False, mask)), heldout=0, shuffle_rows=0)
    plain = open_source(lambda: iter([x[mask]]), heldout=0, shuffle_rows=0)
    assert same(first_batches(source), first_batches(plain))


def test_a_list_of_batches():
    items = [activations(3, seed) for seed in range(6)]
    items[2] = items[2][0], items[2][1] & False
    source = open_source([{"x": x, "mask": mask} for x, mask in items], heldout=0.1)
    rows = torch.cat([x[mask] for x, mask in items])
    assert same(first_batches(source), first_batches(open_source(rows, heldout=0.1)))
    assert source.rows_masked == sum(int((~mask).sum()) for _, mask in items)


def test_what_is_masked_is_counted_as_it_is_drawn():
    items = [{"x": torch.randn(10, D), "mask": torch.arange(10) >= number} for number in range(10)]
    source = IterableSource(items, heldout=0)
    seen = [source.rows_masked for _ in itertools.islice(source.batches(5), 4)]
    # Batches give 10, 9, 8 ... rows.
    assert seen == [0, 0, 1, 3]
    assert [source.masked_before(n) for n in (0, 1, 10, 11, 19, 20)] == [0, 0, 0, 1, 1, 3]


class Stopper:
    def __init__(self, step):
        self.step = step

    def __call__(self, line):
        if line["step"] == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("shuffle_rows", [0, 128], ids=["in order", "shuffled"])
def test_a_run_goes_on_to_the_bit(tmp_path, shuffle_rows):
    items = [activations(4, seed) for seed in range(12)]
    items[3] = items[3][0], items[3][1] & False

    def source():
        return open_source(lambda: ({"x": x, "mask": mask} for x, mask in items), shuffle_rows=shuffle_rows)

    config = TrainConfig(
        n_tokens=32 * 60,
        batch_size=32,
        device="cpu",
        log_every=5,
        save_every=20,
        eval_every=0,
        lr_warmup_steps=2,
        init_rows=64,
    )
    sae = SAEConfig(d_in=D, n_latents=24, k=3)
    whole = train(source(), sae, config, tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(source(), sae, config, tmp_path / "run", progress=False, on_log=Stopper(45))
    again = train(source(), sae, config, tmp_path / "run", progress=False, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    ours, theirs = (
        [{k: v for k, v in line.items() if "second" not in k and "idle" not in k} for line in read_metrics(folder)]
        for folder in (tmp_path / "whole", tmp_path / "run")
    )
    assert ours == theirs
    masked = [line["rows_masked"] for line in ours]
    assert masked == sorted(masked)
    # Several passes, and each leaves out the same rows again.
    assert masked[-1] > 2 * masked[len(masked) // 4] > 0


def test_training_never_sees_what_is_masked():
    x, mask = activations(60)
    config = TrainConfig(n_tokens=32 * 20, batch_size=32, device="cpu", save_every=0, eval_every=0, lr_warmup_steps=2)
    sae, lines = SAEConfig(d_in=D, n_latents=24, k=3), []
    ours = train({"x": x, "mask": mask}, sae, config, progress=False, on_log=lines.append)
    theirs = train(x[mask], sae, config, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert lines[-1]["rows_masked"] == int((~mask).sum())
    assert lines[-1]["rows_left_out"] == 0


def test_a_position_is_not_taken_for_that_of_another_mask():
    x, mask = activations()
    source, other = open_source({"x": x, "mask": mask}), open_source(x[mask])
    next(source.batches(8))
    next(other.batches(8))
    with pytest.raises(InputError, match="rows_masked"):
        source.load_state_dict(other.state_dict())


def test_masks_that_are_none():
    x, mask = activations()

    def refused(match, data):
        with pytest.raises(InputError, match=match) as error:
            next(open_source(data, shuffle_rows=4 * isinstance(data, list)).batches(4))
        assert "\n" not in str(error.value)

    refused("'mask' has 40 places for 480 rows: expected the shape of x without its last", {"x": x, "mask": mask[0]})
    refused("the mask leaves out all 480 rows", {"x": x, "mask": mask & False})
    refused("mask holds 2: expected True, or 1, where a row counts", {"x": x, "mask": mask.long() + 1})
    refused("mask is a str: expected a tensor or array of booleans", {"x": x, "mask": "mask.npy"})
    refused("a mapping with a mask and nothing else", {"mask": mask})
    refused("batch 0 of the iterable has a mask and nothing else", iter([{"mask": mask}]))
    refused("batch 0 of the iterable: 'mask' has 40 places", lambda: iter([{"x": x, "mask": mask[0]}]))
    refused("batch 1 of the iterable: 'mask' holds 7", [{"x": x[mask]}, {"x": x, "mask": mask.int() * 7}])
    refused(r"is empty: no batch with rows is in it \(480 rows are left out", [{"x": x, "mask": mask & False}])
    refused("gave nothing to train on in an epoch of 3 batches", lambda: iter([{"x": x, "mask": mask & False}] * 3))
    refused("mask is a list", {"x": np.zeros((2, D)), "mask": [True, False]})
