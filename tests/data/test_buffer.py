"""The shuffle buffer: every row once an epoch, the same bits for any number of threads, exact resume, clean ends."""

import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from batches import xs
from folders import D, N, rows_of, write_folder
from hanging import HANG, wait_until

from saefast import extension
from saefast.data.copy_ahead import copied_ahead
from saefast.data.iterable_source import IterableSource
from saefast.data.live_buffer import LiveBuffer
from saefast.data.opening import open_source
from saefast.data.reservoir import LAG, PREFETCH, Reservoir
from saefast.data.shard_buffer import ShardBuffer
from saefast.errors import InputError

pytestmark = pytest.mark.skipif(not extension.available(), reason="needs the C++ extension")

B = 16
R = (LAG + 2) * B


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "acts")


def source(folder, **options):
    return ShardBuffer(open_source(folder, shuffle="mapped"), **({"reservoir_rows": R} | options))


def draw(buffer, n, seed=0, batch_size=B):
    batches = buffer.batches(batch_size, seed)
    return torch.cat(xs(batches, n))


def first_batch(folder):
    return draw(source(folder), 1).tolist()


def test_each_row_appears_once_an_epoch(folder):
    for seed in range(5):
        drawn = draw(source(folder), 3 * N // B + 1, seed)
        numbers = drawn[:, 0].long()
        assert torch.equal(drawn, rows_of(N)[numbers])
        for epoch in range(3):
            assert sorted(numbers[epoch * N : (epoch + 1) * N].tolist()) == list(range(N))


def test_bits_do_not_depend_on_threads_and_do_depend_on_the_seed(folder):
    first = draw(source(folder, threads=1), 100)
    for threads in (2, 7):
        assert torch.equal(draw(source(folder, threads=threads), 100), first)
    assert not torch.equal(draw(source(folder), 100, seed=1), first)


@pytest.mark.parametrize("at", [1, 5, LAG, 62, 63, 100])
def test_resume_is_exact_at_any_place(folder, at):
    whole = draw(source(folder), 130)
    before = source(folder)
    draw(before, at)
    after = source(folder)
    after.load_state_dict(before.state_dict())
    assert torch.equal(draw(after, 130 - at), whole[at * B :])


def test_resume_names_what_differs(folder):
    buffer = source(folder)
    draw(buffer, 3)
    other = source(folder, reservoir_rows=2 * R)
    with pytest.raises(InputError, match="reservoir_rows"):
        other.load_state_dict(buffer.state_dict())
    same = source(folder)
    same.load_state_dict(buffer.state_dict())
    with pytest.raises(InputError, match="batch_size 8"):
        same.batches(8, 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_stored_dtypes_come_back_as_the_mapped_rows_do(tmp_path, dtype):
    folder = write_folder(tmp_path / "acts", dtype)
    mapped = torch.cat([part.x for part in open_source(folder, shuffle="mapped").located("train", 100)])
    drawn = draw(source(folder), N // B + 1)[:N]
    assert torch.equal(
        drawn[drawn.sum(1).argsort(stable=True)].sum(0), mapped[mapped.sum(1).argsort(stable=True)].sum(0)
    )
    assert {tuple(row) for row in drawn.tolist()} == {tuple(row) for row in mapped.tolist()}


def test_several_readers_see_the_same_batches(folder):
    readers = source(folder).readers(3, B)
    seen = [[] for _ in readers]

    def consume(reader):
        for _ in range(150):
            seen[reader].append(next(readers[reader])["x"])

    threads = [threading.Thread(target=consume, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=HANG)
        assert not thread.is_alive()
    assert torch.equal(torch.cat(seen[0]), torch.cat(seen[1]))
    assert torch.equal(torch.cat(seen[0]), torch.cat(seen[2]))


def test_a_reader_that_runs_away_in_one_thread_is_told(folder):
    readers = source(folder).readers(2, B)
    next(readers[1])
    with pytest.raises(InputError, match="draw from the readers in turn"):
        list(zip(range(PREFETCH + 1), readers[0], strict=False))


def test_neighbours_are_mixed_as_far_as_the_reservoir_reaches(folder):
    # Rows stream in file order, so how far a row travels is bounded by the reservoir; within it, the order is random:
    # over seeds the mean distance between neighbours in a batch is that of random rows of a window of R.
    distances = []
    for seed in range(20):
        numbers = draw(source(folder), 30, seed)[: 15 * B, 0]
        distances.append((numbers[1:] - numbers[:-1]).abs().mean().item())
    mean = sum(distances) / len(distances)
    assert mean > R / 6, f"neighbours are {mean:.0f} rows apart on average, expected about a third of {R} or more"


@pytest.mark.parametrize("rows", [300, 400, 600])
def test_neighbours_meet_in_a_batch_as_rarely_as_the_reservoir_allows(folder, rows):
    """A row leaves with chance p = B / (rows that stand ready) a batch, so two that entered together do so in one batch
    with chance p² + (1 - p)² p² + ... = p / (2 - p)."""
    met = pairs = 0
    for seed in range(40):
        numbers = draw(source(folder, reservoir_rows=rows), N // B, seed)[:, 0].long()
        batch = torch.full((N,), -1)
        batch[numbers] = torch.arange(len(numbers)) // B
        both = (batch[1:] >= 0) & (batch[:-1] >= 0)
        met += int(((batch[1:] == batch[:-1]) & both).sum())
        pairs += int(both.sum())
    p = B / (rows - LAG * B)
    assert met / pairs == pytest.approx(p / (2 - p), rel=0.2)


def test_errors_name_the_file_and_reach_the_next_draw(folder):
    shard = sorted((folder / "h").glob("*.safetensors"))[0]
    buffer = source(folder)
    batches = buffer.batches(B)
    next(batches)
    with shard.open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(InputError, match=rf"{shard.name}: ends at byte \d+"):
        list(zip(range(200), batches, strict=False))
    shutil.rmtree(folder / "h")
    with pytest.raises(InputError):
        source(folder)


@pytest.mark.parametrize("start", [0, 5, 70])
def test_a_reservoir_on_the_device_draws_the_same_batches(folder, start):
    host = source(folder)
    draw(host, max(start, 1))
    state = host.state_dict() | {"batches": start}
    expected = draw_from(source(folder), state, 130)
    on_device = source(folder, on_device=True)
    assert torch.equal(draw_from(on_device, state, 130), expected)
    assert on_device.state_dict()["batches"] == start + 130
    number = int(expected[-B + 3, 0])
    assert f"row {number % 300} " in on_device.describe_row(3)


def draw_from(buffer, state, n):
    buffer.load_state_dict(state)
    return draw(buffer, n)


def test_a_reservoir_on_the_device_names_a_short_file(folder):
    batches = source(folder, on_device=True).batches(B)
    next(batches)
    shard = sorted((folder / "h").glob("*.safetensors"))[0]
    with shard.open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(InputError, match=rf"{shard.name}: ends at byte \d+"):
        list(zip(range(200), batches, strict=False))


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_host(folder):
    expected = draw(source(folder), 130)
    for on_device in (False, True):
        batches = source(folder, on_device=on_device).batches(B, 0, "cuda")
        assert torch.equal(torch.cat(xs(batches, 130)).cpu(), expected)


def test_describe_row_names_file_and_row(folder):
    buffer = source(folder)
    batch = next(buffer.batches(B, 3))["x"]
    number = int(batch[5, 0])
    text = buffer.describe_row(5)
    assert f"row {number % 300} " in text
    assert f"{number // 300:05d}.safetensors" in text


def test_small_reservoirs_are_refused_or_raised(folder):
    # A reservoir under (LAG + 2) batches cannot work; the size asked for is a wish, not a trap.
    assert draw(source(folder, reservoir_rows=1), 5).shape == (5 * B, D)


def live(batches, **options):
    return LiveBuffer(IterableSource(batches, heldout=0), **({"reservoir_rows": R} | options))


class Endless:
    """Numbered batches without end, some of another size."""

    def __iter__(self):
        row = 0
        while True:
            n = 7 + row % 5
            yield rows_of(row + n)[row:]
            row += n


@pytest.mark.parametrize("n", [1, 15, R - 1, R, R + 1, N])
def test_live_rows_all_come_once(n):
    batches = xs(live(part for part in rows_of(n).split(33)).batches(B))
    assert [len(batch) for batch in batches[:-1]] == [B] * (len(batches) - 1)
    drawn = torch.cat(batches)
    assert torch.equal(drawn[drawn[:, 0].argsort()], rows_of(n))


def test_live_order_depends_on_the_seed_alone_and_resumes():
    whole = draw(live(Endless()), 60)
    assert torch.equal(draw(live(Endless()), 60), whole)
    assert not torch.equal(draw(live(Endless()), 60, seed=1), whole)
    before = live(Endless())
    draw(before, 23)
    after = live(Endless())
    after.load_state_dict(before.state_dict())
    assert torch.equal(draw(after, 37), whole[23 * B :])


def test_a_slow_reader_holds_the_producer_back(monkeypatch):
    given, refused = [], []
    push = Reservoir.push
    monkeypatch.setattr(Reservoir, "push", lambda self, rows: push(self, rows) or bool(refused.append(rows)))

    class Counted:
        def __iter__(self):
            for i in range(10_000):
                given.append(i)
                yield rows_of(B) + i * B

    batches = live(Counted()).batches(B)
    next(batches)
    wait_until(lambda: len(refused) > 2, "a full reservoir")
    most = R // B + PREFETCH + LAG + 2 + 4
    assert len(given) <= most, f"{len(given)} batches were produced ahead, expected at most {most}"


def test_an_exception_in_the_iterable_reaches_the_next_draw():
    class Breaks:
        def __iter__(self):
            yield rows_of(B)
            raise ZeroDivisionError("the model broke")

    with pytest.raises(ZeroDivisionError, match="the model broke"):
        list(live(Breaks()).batches(B))


def child(code, folder, **options):
    text = textwrap.dedent(code).replace("FOLDER", repr(str(folder)))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + text],
        cwd=Path(__file__).parent.parent.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


PRELUDE = """
import os, sys, time
from saefast.data.shard_buffer import ShardBuffer
from saefast.data.opening import open_source
from saefast.errors import InputError
"""
OPEN = """
batches = ShardBuffer(open_source(FOLDER, shuffle="mapped"), reservoir_rows=1).batches(16)
next(batches)
"""


@pytest.mark.parametrize(
    "code",
    [
        OPEN + "sys.exit(0)",  # interpreter exit with threads running
        OPEN + "del batches; print('gone', flush=True)",
        OPEN
        + """
pid = os.fork()
if pid == 0:
    try:
        next(batches)
    except InputError as error:
        assert "fork" in str(error), error
        sys.exit(0)  # the interpreter's own ending, finalizers included
    os._exit(3)
assert os.waitpid(pid, 0)[1] == 0
next(batches)
""",
        """
import multiprocessing
sys.path[:0] = ["tests", "tests/data"]
from test_buffer import first_batch
multiprocessing.set_start_method("spawn")
with multiprocessing.Pool(1) as pool:
    assert pool.apply(first_batch, (FOLDER,)) == first_batch(FOLDER)
""",
    ],
    ids=["exit", "dropped", "fork", "spawn"],
)
def test_ends_cleanly(folder, code):
    process = child(code, folder)
    _, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0, errors.decode()
    assert not errors


def test_ctrl_c_ends_a_waiting_draw(folder):
    """The iterable hangs for good: neither the draw, nor close(), nor the interpreter's exit waits for it."""
    process = child(
        f"""
        import os, signal, threading
        from saefast.data.live_buffer import LiveBuffer
        from saefast.data.iterable_source import IterableSource
        import torch
        class Stuck:
            def __iter__(self):
                yield torch.zeros(4, 8)
                time.sleep({10 * HANG})
        buffer = LiveBuffer(IterableSource(Stuck(), heldout=0), reservoir_rows=1)
        batches = buffer.batches(16)
        main = threading.main_thread().ident
        def press():
            while sys._current_frames()[main].f_code.co_name != "next":  # Reservoir.next, which waits in C++
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=press).start()
        try:
            next(batches)
        except KeyboardInterrupt:
            buffer.close()
            print("closed", flush=True)
        """,
        folder,
    )
    out, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0, errors.decode()
    assert out == b"closed\n"


def test_copies_ahead_are_of_memory_that_is_used_again(folder):
    whole = draw(source(folder), 40)
    raw = source(folder, reuse_memory=True).batches(B, 0)
    ahead = copied_ahead((next(raw)["x"] for _ in range(40)), torch.device("cpu"))
    first = next(ahead)
    assert torch.equal(torch.cat([first, *ahead]), whole)
    assert list(copied_ahead(iter([]), torch.device("cpu"))) == []
