"""Training while harvesting: hooks of one pass, shuffled, row for row the same tokens."""

import tiny_models
import torch

from saefast.data import live
from saefast.data.harvest import HarvestConfig, harvest
from saefast.data.lanes import lanes_for
from saefast.data.live import live_sources
from saefast.data.shards import ShardFolder

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
    drawn = {hook: torch.cat([next(batches[hook]) for _ in range(n // 8)]) for hook in sources}
    at = {}
    for hook, source in sources.items():
        known = places(folder, hook, "train")
        at[hook] = [known[row.numpy().tobytes()] for row in drawn[hook]]
        held = places(folder, hook, "heldout")
        seen = torch.cat(list(source.heldout(5)))
        assert len(seen)
        assert all(row.numpy().tobytes() in held for row in seen)
        source.close()
    assert at["layers.0"] == at["layers.1"]
    assert at["layers.0"] != sorted(at["layers.0"])


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
        # Some batches are under way beside those taken (lanes.in_order); twice as many would be a model run per hook.
        assert 4 < taken <= len(runs) <= taken + lanes_for(torch.device("cpu")) + 1
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
    held = list(sources[0].heldout(5))
    assert held
    assert all(rows.isfinite().all() for rows in held)


def hooks_of(model):
    return sum(len(module._forward_hooks) for module in model.modules())
