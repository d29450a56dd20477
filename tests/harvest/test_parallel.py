"""A harvest shared by processes: the rows of one process's, each part once, and no kill and no stall spoils it."""

import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import tiny_models
import torch
from hanging import HANG, wait_until

from saefast.analysis.evaluation import evaluate_run
from saefast.cli import main as cli
from saefast.data.shards import ShardFolder
from saefast.errors import InputError
from saefast.files import write_sealed_json
from saefast.harvest import claims, parts
from saefast.harvest import sequences as sequences_module
from saefast.harvest.claims import Claim, Holder, take
from saefast.harvest.parts import harvest_parts, parts_of
from saefast.harvest.text import open_text
from saefast.harvest.to_disk import HarvestConfig, harvest

HOOKS = ("layers.0", "layers.1")
CONFIG = HarvestConfig(
    hooks=HOOKS, ctx_len=16, dtype="float32", batch_tokens=100, rows_per_shard=150, heldout=0.2, device="cpu"
)
DOCUMENTS = tiny_models.documents(60)
# Other processes than this one start as copies of it: the model is made once.
FORK = multiprocessing.get_context("fork")


def changed(**changes):
    return HarvestConfig(**{**CONFIG.__dict__, **changes})


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.tokenizer()


@pytest.fixture(scope="module")
def model():
    return tiny_models.model("llama")


@pytest.fixture(autouse=True)
def small_and_still(monkeypatch):
    """Windows of some ten documents instead of a megabyte; no thread pool that a fork would inherit; no long naps."""
    monkeypatch.setattr(sequences_module, "WINDOW_CHARS", 800)
    monkeypatch.setattr(parts, "_POLL", 0.01)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shared(model, tokenizer):
    def run(folder, config=CONFIG, text=DOCUMENTS, model=model, **options):
        return harvest_parts(folder, config, model=model, tokenizer=tokenizer, text=text, progress=False, **options)

    return run


@pytest.fixture(scope="module")
def alone(model, tokenizer, tmp_path_factory):
    """What one process harvests, by max_tokens."""
    made = {}

    def run(max_tokens=None):
        if max_tokens not in made:
            folder = tmp_path_factory.mktemp("alone") / "acts"
            config = changed(max_tokens=max_tokens)
            harvest(folder, config, model=model, tokenizer=tokenizer, text=DOCUMENTS, progress=False)
            made[max_tokens] = folder
        return made[max_tokens]

    return run


def rows(path, split, hook):
    """(seq, pos) -> row."""
    folder, found = ShardFolder(path, verify=True), {}
    for info in folder.shards(split, hook):
        shard = folder.open(info, hook)
        for seq, pos, row in zip(shard.seq.tolist(), shard.pos.tolist(), shard.acts, strict=True):
            assert (seq, pos) not in found
            found[seq, pos] = row.tolist()
    return found


def assert_same_harvest(path, other):
    """Rows to the bit, their numbers, shares, tokens, documents and statistics."""
    one, two = ShardFolder(path), ShardFolder(other)
    assert not one.verify()
    for hook in HOOKS:
        for split in ("train", "heldout"):
            assert rows(path, split, hook) == rows(other, split, hook)
        mine, its = one.stats(hook), two.stats(hook)
        assert mine.count == its.count
        for name in ("sum", "sum_sq_norm", "sum_norm", "products"):
            # Both add the same numbers in float64, of float32 products over other pieces.
            torch.testing.assert_close(getattr(mine, name), getattr(its, name), rtol=1e-6, atol=1e-6)
    assert one.n_sequences == two.n_sequences
    for seq in range(one.n_sequences):
        assert one.tokens(seq).tolist() == two.tokens(seq).tolist()
        assert one.document(seq) == two.document(seq)
    for fact in ("settings", "splits", "n_rows", "dropped", "complete", "end", "model", "ctx_len", "hooks"):
        assert one.index[fact] == two.index[fact], fact
    for fact in ("docs", "seqs", "done", "tokens", "fingerprint"):
        assert one.index["cursor"][fact] == two.index["cursor"][fact], fact


def files(path):
    return {file.relative_to(path): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}


@contextlib.contextmanager
def watched(model, seen):
    """Within it, `seen(n)` is called before the model's n-th forward pass."""
    numbers = itertools.count(1)

    def before(*_):
        # What a hook returns would take the place of the inputs.
        seen(next(numbers))

    hook = model.register_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()


def start(target, *arguments):
    process = FORK.Process(target=target, args=arguments)
    process.start()
    return process


@pytest.mark.parametrize("max_tokens", [None, 1, 300, 500])
def test_the_rows_are_those_of_one_process(tmp_path, shared, alone, max_tokens):
    report = shared(tmp_path / "acts", changed(max_tokens=max_tokens))
    assert report.complete
    assert len(ShardFolder(tmp_path / "acts").index["shards"]) >= (2 if max_tokens is None else 1)
    assert_same_harvest(tmp_path / "acts", alone(max_tokens))


def test_the_text_alone_says_what_the_parts_are(monkeypatch):
    monkeypatch.setattr(parts, "_SMALL_PARTS", 2)
    text = open_text(DOCUMENTS)
    found = list(parts_of(text))
    assert [document for part in found for document in part.documents] == list(text)
    sizes = [sum(map(len, part.documents)) for part in found]
    assert all(800 <= size < 1200 for size in sizes[:2])
    assert all(3200 <= size < 4000 for size in sizes[2:-1])
    assert [part.before.value for part in found[1:]] == [part.after for part in found[:-1]]


def test_two_processes_leave_the_bytes_that_one_does(tmp_path, shared, model):
    """Each waits in its first pass until the other has begun too, so that both do take part."""
    both = FORK.Barrier(2)

    def take_part(number):
        with watched(model, lambda n: both.wait() if n == 1 else None):
            report = shared(tmp_path / "two")
        (tmp_path / f"tokens-{number}").write_text(str(report.tokens))

    workers = [start(take_part, number) for number in range(2)]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    shared(tmp_path / "one")
    assert files(tmp_path / "one") == files(tmp_path / "two")
    # Both took part, and nothing was harvested twice.
    folder = ShardFolder(tmp_path / "one")
    each = [int((tmp_path / f"tokens-{number}").read_text()) for number in range(2)]
    assert min(each) > 0
    assert sum(each) == sum(len(folder.tokens(seq)) for seq in range(folder.n_sequences))


def test_a_killed_process_leaves_its_part_to_the_next_at_once(tmp_path, shared, alone, model):
    folder = tmp_path / "acts" / "parts"

    def stand_still(n):
        if n == 12:
            (tmp_path / "reached").touch()
            time.sleep(HANG)

    def harvest_until_killed():
        with watched(model, stand_still):
            shared(tmp_path / "acts")

    victim = start(harvest_until_killed)
    wait_until((tmp_path / "reached").exists, "the twelfth pass")
    done = {path.name: path.read_bytes() for path in folder.glob("0*.json")}
    number = len(done)
    held = take(folder, number, patience=0.0)
    assert isinstance(held, Holder)
    assert not held.dead
    assert f"process {victim.pid} on " in held.name
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    before = [path.stat() for path in folder.glob("*-0/*/*.safetensors")]
    # Far beyond any test: the claim is taken over because its lock is free, not because it is old.
    shared(tmp_path / "acts", take_over_after=1e9)
    assert_same_harvest(tmp_path / "acts", alone())
    assert done
    assert before
    assert all((folder / name).read_bytes() == data for name, data in done.items())
    assert json.loads((folder / f"{number:05d}.json").read_text())["folder"] == f"{number:05d}-1"
    names = {path.name for path in folder.iterdir()}
    assert f"{number:05d}-0" not in names
    assert not any(name.endswith(".claim") for name in names)


def test_another_machines_claim_is_taken_over_when_it_is_old(tmp_path, monkeypatch):
    """Its lock says nothing here, so only the time does."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(claims, "_machine", lambda: "another")
        mine = take(tmp_path, 0, patience=100.0)
    assert isinstance(mine, Claim)
    path = tmp_path / "00000.0.claim"
    young = take(tmp_path, 0, patience=1e9)
    assert isinstance(young, Holder)
    assert not young.dead
    os.utime(path, (time.time() - 200, time.time() - 200))
    assert isinstance(take(tmp_path, 0, patience=1e9), Holder)
    assert not mine.lost
    other = take(tmp_path, 0, patience=100.0)
    assert isinstance(other, Claim)
    assert mine.lost
    assert other.generation == 1
    # The first one finds out and goes without taking the other's claim away.
    mine.release()
    assert isinstance(take(tmp_path, 0, patience=1e9), Holder)
    other.release()


def test_a_claim_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.01)
    claim = take(tmp_path, 3, patience=1.0)
    path = tmp_path / "00003.0.claim"
    os.utime(path, (0, 0))
    wait_until(lambda: path.stat().st_mtime > 0, "a sign of life")
    claim.release()
    assert not path.exists()
    again = take(tmp_path, 3, patience=1.0)
    assert isinstance(again, Claim)
    assert again.generation == 0
    again.release()


def test_one_of_many_gets_a_claim(tmp_path):
    """Eight processes at once, over and over: each part has one maker."""
    begin = FORK.Barrier(8)

    def race(number):
        got = []
        for part in range(30):
            begin.wait()
            claim = take(tmp_path, part, patience=1e9)
            if isinstance(claim, Claim):
                got.append(part)
        (tmp_path / f"got-{number}").write_text(json.dumps(got))
        # What is claimed is held until all are through.
        begin.wait()

    racers = [start(race, number) for number in range(8)]
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    got = [part for number in range(8) for part in json.loads((tmp_path / f"got-{number}").read_text())]
    assert sorted(got) == list(range(30))


def test_who_was_taken_for_gone_and_goes_on_spoils_nothing(tmp_path, shared, alone, model):
    """While this process is at its first part, another takes it over, and is killed in turn."""
    taken = tmp_path / "acts" / "parts" / "00000.1.claim"

    def taken_over(n):
        if n == 2:
            taken.write_text(json.dumps({"host": "h", "machine": claims._machine(), "pid": 1, "locked": True}))

    with watched(model, taken_over):
        shared(tmp_path / "acts")
    assert_same_harvest(tmp_path / "acts", alone())
    assert json.loads((tmp_path / "acts/parts/00000.json").read_text())["folder"] == "00000-2"
    assert sorted(path.name for path in (tmp_path / "acts/parts").glob("00000-*")) == ["00000-2"]


def test_done_is_done_and_more_tokens_go_on(tmp_path, shared, alone, model):
    folder = tmp_path / "acts"
    shared(folder, changed(max_tokens=300))
    before = files(folder)
    with watched(model, lambda n: pytest.fail("the model ran")):
        assert shared(folder, changed(max_tokens=300)).tokens == 0
        assert shared(folder, changed(max_tokens=200)).tokens == 0
    assert files(folder) == before
    shared(folder, changed(max_tokens=500))
    assert_same_harvest(folder, alone(500))
    shared(folder)
    assert_same_harvest(folder, alone())


def test_a_part_that_was_deleted_is_harvested_again(tmp_path, shared, alone):
    shared(tmp_path / "acts", changed(max_tokens=500))
    shutil.rmtree(tmp_path / "acts/parts/00001-0")
    shared(tmp_path / "acts")
    assert_same_harvest(tmp_path / "acts", alone())


def test_ctrl_c_keeps_what_is_done_and_frees_the_rest(tmp_path, shared, alone, model):
    def interrupt(n):
        if n == 12:
            raise KeyboardInterrupt

    folder = tmp_path / "acts"
    with pytest.raises(KeyboardInterrupt), watched(model, interrupt):
        shared(folder)
    names = sorted(path.name for path in (folder / "parts").iterdir())
    done = [name for name in names if name.endswith(".json") and name != "settings.json"]
    assert done
    assert names == sorted([*done, *(f"{name[:5]}-0" for name in done), "settings.json"])
    assert not (folder / "index.json").exists()
    shared(folder)
    assert_same_harvest(folder, alone())


def test_one_usual_norm_and_one_model_for_all(tmp_path, shared, model, tokenizer):
    """Who comes later takes over the norms that it finds, here ones that no process could have measured."""
    config = changed(max_norm_multiple=1.1)

    def interrupt(n):
        if (tmp_path / "acts/parts/00001.json").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watched(model, interrupt):
        shared(tmp_path / "acts", config)
    path = tmp_path / "acts/parts/settings.json"
    settings = json.loads(path.read_text())
    harvest(tmp_path / "one", config, model=model, tokenizer=tokenizer, text=DOCUMENTS, progress=False)
    assert settings["median_norms"] == ShardFolder(tmp_path / "one").index["median_norms"]
    other = tiny_models.model("llama")
    with torch.no_grad():
        next(other.parameters()).mul_(1.01)
    with pytest.raises(InputError, match="was harvested from another model than this one"):
        shared(tmp_path / "acts", config, model=other)
    shared(tmp_path / "acts", config)
    assert_same_harvest(tmp_path / "acts", tmp_path / "one")
    shutil.rmtree(tmp_path / "acts")
    path.parent.mkdir(parents=True)
    write_sealed_json(path, settings | {"median_norms": dict.fromkeys(HOOKS, 1e9)})
    assert shared(tmp_path / "acts", config).dropped["outlier_norm"] == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ctx_len": 12}, "ctx_len = 16, now 12"),
        ({"hooks": ("layers.1",)}, "hooks = "),
        ({"dtype": "bfloat16"}, "dtype = 'float32', now 'bfloat16'"),
        ({"batch_tokens": 64}, "batch_tokens = 100, now 64"),
        ({"seed": 1}, "seed = 0, now 1"),
    ],
)
def test_others_must_ask_for_the_same(tmp_path, shared, model, changes, said):
    def interrupt(n):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watched(model, interrupt):
        shared(tmp_path / "acts")
    with pytest.raises(InputError, match=f"is being harvested with {said}"):
        shared(tmp_path / "acts", changed(**changes))


def test_another_text_is_refused(tmp_path, shared):
    shared(tmp_path / "acts", changed(max_tokens=300))
    with pytest.raises(InputError, match=r"not what the harvest began with \(part 0 differs\)"):
        shared(tmp_path / "acts", changed(max_tokens=500), text=tiny_models.documents(60, seed=1))


def test_one_process_alone_and_parts_do_not_mix(tmp_path, shared, model, tokenizer):
    def alone(folder, config):
        return harvest(folder, config, model=model, tokenizer=tokenizer, text=DOCUMENTS, progress=False)

    shared(tmp_path / "parts", changed(max_tokens=300))
    assert alone(tmp_path / "parts", changed(max_tokens=300)).tokens == 0
    with pytest.raises(InputError, match="harvested in parts: go on with --data-parallel"):
        alone(tmp_path / "parts", CONFIG)
    alone(tmp_path / "one", changed(max_tokens=300))
    with pytest.raises(InputError, match="begun by one process alone: go on without --data-parallel"):
        shared(tmp_path / "one")


def test_no_row_at_all(tmp_path, shared):
    with pytest.raises(InputError, match="no row was kept, 6 tokens dropped"):
        shared(tmp_path / "acts", changed(max_norm_multiple=1e-9), text=["w1 w2 w3 w4"])


@pytest.fixture
def both_ways(tmp_path):
    """A language model and a text of files, harvested in parts and by one process: both folders."""
    tiny_models.model("llama", head=True).save_pretrained(tmp_path / "lm")
    tiny_models.tokenizer(special=False).save_pretrained(tmp_path / "lm")
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    config = changed(model=str(tmp_path / "lm"), text=str(tmp_path / "text.jsonl"), hooks=("layers.1",))
    harvest_parts(tmp_path / "parts", config, progress=False)
    harvest(tmp_path / "one", config, progress=False)
    return tmp_path / "parts", tmp_path / "one"


@pytest.mark.parametrize("shuffle", ["mapped", "buffer"])
def test_it_is_trained_on_evaluated_and_looked_into_like_any_other(tmp_path, both_ways, shuffle):
    in_parts, whole = both_ways
    run = tmp_path / "run"
    options = ["--n-latents", "64", "--k", "4", "--batch-size", "128", "--n-tokens", "1024", "--shuffle", shuffle]
    assert cli.main(["train", str(in_parts), "--out", str(run), "--device", "cpu", *options]) == 0
    mine, its = evaluate_run(run, write=False), evaluate_run(run, data=whole, write=False)
    assert mine.lm["ce_clean"] == its.lm["ce_clean"]
    assert mine.metrics == pytest.approx(its.metrics, rel=1e-6, nan_ok=True)
    assert cli.main(["features", str(run)]) == 0


def test_a_shards_sequences_are_checked(tmp_path, shared):
    shared(tmp_path / "acts")
    path = tmp_path / "acts" / "index.json"
    index = json.loads(path.read_text())
    for wrong, said in (
        ({"part": "../x"}, "outside the folder"),
        ({"first_seq": 10**6}, "begins at sequence 1000000 of"),
    ):
        write_sealed_json(path, index | {"shards": [index["shards"][0] | wrong, *index["shards"][1:]]})
        with pytest.raises(InputError, match=said):
            ShardFolder(tmp_path / "acts")
