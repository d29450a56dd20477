"""A process that trains live ends as it should, however it ends: the thread that draws from the iterable is never alive
when the interpreter goes away, which would abort the process ("terminate called without an active exception")."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from hanging import HANG

import saefast
from saefast import SAEConfig, TrainConfig
from saefast.data import live_buffer
from saefast.data.iterable_source import IterableSource
from saefast.data.live_buffer import LiveBuffer
from saefast.data.source import Source

ROOT = Path(__file__).resolve().parent.parent.parent

# An iterable that is inside torch nearly all the time, as a running model is, and endless.
PRELUDE = """
import gc, os, signal, sys, threading, time, warnings
import torch
import saefast
from saefast import SAEConfig, TrainConfig
from saefast.data import live_buffer
from saefast.data.live_buffer import LiveBuffer
from saefast.data.iterable_source import IterableSource

torch.set_num_threads(1)
def rows():
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(300, 300, generator=g), torch.randn(300, 300, generator=g)
    while True:
        for _ in range(3):
            x = torch.tanh(x @ w)
        yield x[:2, :8].contiguous()

def live(iterable=rows):
    return LiveBuffer(IterableSource(iterable, heldout=0), reservoir_rows=1)

def producers():
    return [thread for thread in threading.enumerate() if thread.name == "saefast-live"]

source = live()
# Few steps are enough here, and a run says that it has few.
warnings.filterwarnings("ignore", "the run has|dead_after is")
"""
DRAW = "batches = source.batches(16)\nnext(batches)\n"
TRAIN = """
settings = TrainConfig(n_tokens=64, batch_size=16, device="cpu")
saefast.train(source, SAEConfig(d_in=8, n_latents=16, k=2), settings)
assert producers()
"""
ENDINGS = {
    "not closed": (DRAW, 0),
    "closed, twice": (DRAW + "source.close(); assert not producers(); source.close()", 0),
    "drawn anew, closed before and not": (
        DRAW
        + """
source.close()
for _ in range(2):
    again = source.batches(16)
    next(again)
    assert len(producers()) == 1
""",
        0,
    ),
    "dropped": (DRAW + "del batches, source; gc.collect(); assert not producers()", 0),
    "sys.exit": (DRAW + "sys.exit(3)", 3),
    "an exception": (DRAW + "raise ValueError('the caller broke')", 1),
    "Ctrl-C": (DRAW + "os.kill(os.getpid(), signal.SIGINT); time.sleep(1000)", -signal.SIGINT),
    "trained from a source that stays open": (TRAIN, 0),
    "the iterable raises": (
        """
def breaks():
    yield torch.zeros(64, 8)
    raise ZeroDivisionError("the model broke")
source = live(breaks)
batches = source.batches(16)
while producers():
    time.sleep(0.01)
""",
        0,
    ),
    "left behind in a full queue": (
        # Nobody waits for the thread, which is told to stop while the interpreter goes. It has to be in the queue by
        # then, and not inside torch, making the batch that the draw left room for.
        """
from saefast.data.reservoir import Reservoir
live_buffer.LINGER = 0.0
full, push = threading.Event(), Reservoir.push
def noted(self, rows):
    found_room = push(self, rows)
    if not found_room:
        full.set()
    return found_room
Reservoir.push = noted
one = torch.zeros(64, 8)
def same():
    while True:
        yield one
source = live(same)
"""
        + DRAW
        + "full.clear(); full.wait(); assert producers()",
        0,
    ),
    "forked": (
        DRAW
        + """
pid = os.fork()
if pid == 0:
    sys.exit(0)  # the interpreter's own ending, finalizers included
assert os.waitpid(pid, 0)[1] == 0
next(batches)
""",
        0,
    ),
    "forked and dropped": (
        DRAW
        + """
pid = os.fork()
if pid == 0:
    source.close()
    del batches, source
    gc.collect()
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
next(batches)
""",
        0,
    ),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_process_ends_as_it_should(ending: str) -> None:
    code, expected = ENDINGS[ending]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PRELUDE + textwrap.dedent(code)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG)
    assert ran.returncode == expected, ran.stderr
    assert "terminate" not in ran.stderr
    assert expected or not ran.stderr


def endless():
    while True:
        yield torch.randn(64, 8)


class Watched(Source):
    """A source that notes whether it was closed."""

    n_rows, source_name = None, "watched"
    widths = {"x": 8}  # noqa: RUF012

    def __init__(self) -> None:
        self.inner, self.closed = IterableSource(endless, heldout=0), 0

    def batches(self, *args, **named):
        return self.inner.batches(*args, **named)

    def heldout(self, *args, **named):
        return self.inner.heldout(*args, **named)

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)

    def describe_row(self, i, name="x"):
        return self.inner.describe_row(i)

    def close(self) -> None:
        self.closed += 1


CONFIGS = SAEConfig(d_in=8, n_latents=16, k=2), TrainConfig(n_tokens=64, batch_size=16, device="cpu")


def test_train_closes_what_it_opened_and_leaves_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given, opened = Watched(), Watched()
    saefast.train(given, *CONFIGS)
    assert given.closed == 0
    module = sys.modules["saefast.training.api"]  # the name is also the function's
    monkeypatch.setattr(module, "open_source", lambda *_, **__: opened)
    saefast.train("a path", *CONFIGS)
    assert opened.closed == 1
    monkeypatch.setattr(module, "make_engine", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saefast.train("a path", *CONFIGS)
    assert opened.closed == 2


def test_an_iterable_that_hangs_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_buffer, "LINGER", 0.01)
    released = threading.Event()

    def stuck():
        yield torch.zeros(400, 8)
        released.wait()

    source = LiveBuffer(IterableSource(stuck, heldout=0), reservoir_rows=1)
    next(source.batches(16))
    producer = source._producer
    source.close()  # comes back
    released.set()
    producer._thread.join(HANG)
    assert not producer._thread.is_alive()
