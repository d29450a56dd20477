"""Training while harvesting: hooks of one pass, shuffled, row for row the same tokens."""

from itertools import islice

import pytest
import tiny_models
import torch
from batches import xs

from saefast.data.opening import open_source
from saefast.data.provenance import recorded_data
from saefast.data.shards import ShardFolder
from saefast.engines.config import TrainConfig
from saefast.errors import InputError
from saefast.harvest import live, reharvest, sequences
from saefast.harvest.live import live_source, live_sources
from saefast.harvest.reharvest import describe_live
from saefast.harvest.text import open_texts
from saefast.harvest.to_disk import HarvestConfig, harvest
from saefast.harvest.workers import workers_for
from saefast.models.config import SAEConfig
from saefast.training.api import train
from saefast.training.progress import read_metrics
from saefast.training.several import Member, train_many

CONFIG = HarvestConfig(
    hooks=("layers.0", "layers.1"), ctx_len=16, dtype="float32", batch_tokens=100, heldout=0.2, device="cpu"
)
GIVEN = {"tokenizer": tiny_models.tokenizer(), "text": tiny_models.documents()}


def places(folder, hook, split):
    """(seq, pos) of each row of a split, by its bytes."""
    found = {}
    for info in folder.shards(split, hook):
        shard = folder.open(info, hook)
        for seq, pos, row in zip(shard.seq.tolist(), shard.pos.tolist(), shard.acts, strict=True):
            found[row.numpy().tobytes()] = (seq, pos)
    return found


def test_hooks_of_one_pass_give_the_same_tokens_shuffled(tmp_path, monkeypatch):
    model = tiny_models.model("gpt2")
    harvest(tmp_path, CONFIG, model=model, **GIVEN, progress=False)
    folder = ShardFolder(tmp_path)
    monkeypatch.setattr(live, "HELDOUT_ROWS", 1 << 10)
    sources = live_sources(CONFIG, model=model, **GIVEN, reservoir_rows=1)
    batches = {hook: source.batches(8, seed=3) for hook, source in sources.items()}
    n = folder.n_rows("train", "layers.0")
    drawn = {hook: torch.cat(xs(batches[hook], n // 8)) for hook in sources}
    at = {}
    for hook, source in sources.items():
        known = places(folder, hook, "train")
        at[hook] = [known[row.numpy().tobytes()] for row in drawn[hook]]
        held = places(folder, hook, "heldout")
        seen = torch.cat(xs(source.heldout(5)))
        assert len(seen)
        assert all(row.numpy().tobytes() in held for row in seen)
        source.close()
    assert at["layers.0"] == at["layers.1"]
    assert at["layers.0"] != sorted(at["layers.0"])


def test_one_source_of_two_hooks_gives_rows_of_the_same_tokens():
    model = tiny_models.model("gpt2")
    sources = live_sources(CONFIG, model=model, **GIVEN, reservoir_rows=1)
    alone = {hook: torch.cat(xs(source.batches(8, seed=3), 40)) for hook, source in sources.items()}
    for source in sources.values():
        source.close()
    both = live_source(CONFIG, {"target": "layers.1", "x": "layers.0"}, model=model, **GIVEN, reservoir_rows=1)
    drawn = list(islice(both.batches(8, seed=3), 40))
    for tensor, hook in (("x", "layers.0"), ("target", "layers.1")):
        assert torch.equal(torch.cat([batch[tensor] for batch in drawn]), alone[hook])
    held = list(both.heldout(5))
    assert held
    assert all(len(batch["x"]) == len(batch["target"]) for batch in held)
    both.close()
    with pytest.raises(InputError, match=r"names 'layers\.9': expected hooks of the config, layers\.0, layers\.1"):
        live_source(CONFIG, ["layers.9"], model=model, **GIVEN)


def test_the_model_runs_once_for_all_hooks(monkeypatch):
    model, runs = tiny_models.model("gpt2"), []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    sources = live_sources(CONFIG, model=model, **GIVEN, reservoir_rows=1)
    batches = [source.batches(8) for source in sources.values()]
    for _ in range(5):
        for drawn in batches:
            next(drawn)
    shared = sources["layers.0"]._data._shared
    assert sources["layers.1"]._data._shared is shared
    with shared._lock:
        taken = shared._first + len(shared._kept)
        # Some batches are under way beside those taken (workers.in_order); twice as many would be a model run per hook.
        assert 4 < taken <= len(runs) <= taken + workers_for(torch.device("cpu")) + 1
    for source in sources.values():
        source.close()


def test_closing_all_hooks_lets_go_of_the_model_and_one_alone_of_what_was_kept_for_it():
    model = tiny_models.model("gpt2")
    sources = list(live_sources(CONFIG, model=model, **GIVEN, reservoir_rows=1).values())
    batches = [source.batches(8) for source in sources]
    shared = sources[0]._data._shared
    next(batches[0])
    sources[1].close()
    n = len(shared._kept)
    for _ in range(20):
        next(batches[0])
    assert len(shared._kept) <= max(n, 1), "batches are kept for a reader that has left"
    assert hooks_of(model) == 2
    sources[0].close()
    assert hooks_of(model) == 0
    assert not shared._kept
    held = xs(sources[0].heldout(5))
    assert held
    assert all(rows.isfinite().all() for rows in held)


def hooks_of(model):
    return sum(len(module._forward_hooks) for module in model.modules())


def test_rows_harvested_again_are_those_that_live_training_held_out(tmp_path, monkeypatch):
    """Held out before, held out again; and no row that was trained on is among them."""
    monkeypatch.setattr(sequences, "WINDOW_CHARS", 4000)
    model, tokenizer = tiny_models.model("gpt2"), tiny_models.tokenizer()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for path, seed in zip(texts, (1, 2), strict=True):
        # A file is cut into documents of a few thousand characters.
        path.write_text("\n\n".join(tiny_models.documents(2500, seed=seed)), encoding="utf-8")
    config = HarvestConfig(
        model=str(tmp_path / "model"),
        hooks=("layers.1",),
        ctx_len=32,
        dtype="float32",
        forward="float32",
        heldout=0.3,
        max_norm_multiple=50.0,
        seed=5,
        device="cpu",
    )
    names = tuple(map(str, texts))
    source = live_sources(config, text=open_texts(names))["layers.1"]
    batches = source.batches(64)
    trained = {row.numpy().tobytes() for part in xs(batches, 400) for row in part}
    source.close()
    live_held = {row.numpy().tobytes() for part in xs(source.heldout(100)) for row in part}

    kept = recorded_data(describe_live(config, names, "layers.1"), tmp_path)
    monkeypatch.setattr(reharvest, "TOKENS", 20_000)
    assert reharvest.what_is_missing(tmp_path, kept) is not None
    reharvest.harvest_again(tmp_path, kept)
    assert reharvest.what_is_missing(tmp_path, kept) is None
    folder = open_source(tmp_path / kept["path"])
    harvested = {row.numpy().tobytes() for part in xs(folder.heldout(100)) for row in part}
    # The first words of a sequence may be those of another; with other documents held out it would be most rows.
    assert len(harvested & trained) < 0.05 * len(harvested)
    # Live training met all of these 20,000 tokens. The last window is cut short and run in other batches, which round
    # otherwise.
    assert len(harvested) > 4000
    assert len(harvested & live_held) > 0.9 * len(harvested)


def test_settings_of_another_version_are_named(tmp_path):
    described = describe_live(HarvestConfig(), (), "layers.4")
    described["data"]["live"]["later_setting"] = 1
    with pytest.raises(InputError, match="harvested with later_setting, which this version"):
        reharvest.harvest_again(tmp_path, recorded_data(described, tmp_path))


def test_held_out_rows_do_not_hang_on_how_far_reading_is_ahead():
    """With a large reservoir the thread reads much, with a small one little, before the first rows are drawn."""
    model, seen = tiny_models.model("gpt2"), []
    for reservoir_rows in (1, 300):
        source = live_sources(CONFIG, model=model, **GIVEN, reservoir_rows=reservoir_rows)["layers.0"]
        batches = source.batches(8)
        for drawn in (1, 30, 200):
            while source.rows_drawn < 8 * drawn:
                next(batches)
            held = torch.cat([torch.zeros(0, source.d_in), *xs(source.heldout(5))])
            seen.append(held)
        source.close()
        assert torch.equal(torch.cat(xs(source.heldout(7))), held)
    assert [len(held) for held in seen[:3]] == sorted(len(held) for held in seen[:3])
    assert len(seen[2]) > len(seen[0])
    for one, other in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(one, other)


def test_a_resumed_source_holds_out_the_same_before_it_draws():
    model, found = tiny_models.model("gpt2"), []
    first = live_sources(CONFIG, model=model, **GIVEN, reservoir_rows=1)["layers.0"]
    batches = first.batches(8)
    for _ in range(200):
        next(batches)
    state = first.state_dict()
    found.append(torch.cat(xs(first.heldout(5))))
    after = next(batches)["x"]
    first.close()
    again = live_sources(CONFIG, model=model, **GIVEN, reservoir_rows=1)["layers.0"]
    again.load_state_dict(state)
    more = again.batches(8)
    found.append(torch.cat(xs(again.heldout(5))))
    assert torch.equal(*found)
    assert again.state_dict() == state
    assert torch.equal(next(more)["x"], after)
    again.close()


def test_a_text_that_is_all_held_out_is_refused():
    """A pass without rows to train on would be followed by another, for ever."""
    given = GIVEN | {"text": ["w1 w2 w3"] * 9}
    config = HarvestConfig(hooks=("layers.0",), ctx_len=16, dtype="float32", heldout=0.999999, device="cpu")
    source = live_sources(config, model=tiny_models.model("gpt2"), **given, reservoir_rows=1)["layers.0"]
    with pytest.raises(InputError, match="no row to train on: all its documents are held out"):
        next(source.batches(8))
    source.close()


REPORTS = dict(eval_every=0, save_every=5)


@pytest.mark.parametrize("resume", [False, True])
def test_a_member_that_is_done_first_costs_no_memory_and_ends_as_if_alone(tmp_path, resume):
    """Of SAEs trained from one pass: nothing is kept for the one that draws no more, before or after a resume."""
    model, folder = tiny_models.model("gpt2"), tmp_path / "run"

    def members(long):
        sources = live_sources(CONFIG, model=model, **GIVEN, reservoir_rows=1)
        lengths = {"layers.0": 80, "layers.1": long}
        return {
            hook: Member(
                source,
                SAEConfig(d_in=source.d_in, n_latents=32, k=4),
                TrainConfig(
                    n_tokens=lengths[hook], batch_size=8, init_rows=8, device="cpu", eval_every=0, save_every=5
                ),
            )
            for hook, source in sources.items()
        }

    if resume:
        train_many(members(long=80), folder)
    kept, asked = [], members(long=800)
    shared = asked["layers.0"].batches._data._shared
    make = shared._make
    shared._make = lambda: (kept.append((bool(shared._left), len(shared._kept))), make())[1]
    saes = train_many(asked, folder, resume=resume)
    for member in asked.values():
        member.batches.close()
    since = [n for left, n in kept if left]
    # The pass that was under way when it left may still have been for both.
    assert len(since) > 1
    assert max(since[1:]) <= 2, "batches are kept for a member that is done"
    for hook, member in members(long=800).items():
        alone = train(*member, tmp_path / "alone" / hook)
        member.batches.close()
        if hook == "layers.0" or not resume:
            assert all(torch.equal(a, b) for a, b in zip(saes[hook].parameters(), alone.parameters(), strict=True))
        if hook == "layers.0":
            found = [read_metrics(place / hook)[-1] for place in (folder, tmp_path / "alone")]
            assert found[0]["heldout/rows"] == found[1]["heldout/rows"] > 0
            assert found[0]["heldout/fvu"] == found[1]["heldout/fvu"]
