"""saefast plan: bytes that the run's own tensors have, times that add up, and sizes that are known to fit or not."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hanging import HANG

from saefast.cli.main import main
from saefast.cli.plan import describe
from saefast.devices import DEVICES
from saefast.engines.config import TrainConfig
from saefast.engines.recipe import choose
from saefast.errors import InputError
from saefast.models.config import SAEConfig
from saefast.training import plan as plan_module
from saefast.training.machine import Watch
from saefast.training.plan import Plan, Sizes, find_device, largest, make_plan, memory_of

H200 = DEVICES["h200"]


def planned(d_in=768, n_latents=32768, k=32, batch_size=4096, optimizer="adam", device="h200") -> Plan:
    sae = SAEConfig(d_in=d_in, n_latents=n_latents, k=k)
    return make_plan(sae, TrainConfig(batch_size=batch_size, optimizer=optimizer), device)


# What training needs beyond what stood in memory before the SAE was made: the most that ever was, from the kernel.
# (Not ru_maxrss, which a process inherits from the one that started it.)
MEASURE = """
import sys, torch
from saefast.engines.config import TrainConfig
from saefast.models.sae import SAE, SAEConfig
from saefast.training.api import make_engine
L, D, B, k, optimizer = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
dtype = "bfloat16" if optimizer == "adam-lean" else "float32"
config = TrainConfig(optimizer=optimizer, batch_size=B, auxk_coef=0.0)
x = torch.randn(B, D)
make_engine(SAE(SAEConfig(d_in=D, n_latents=64, k=k)), TrainConfig(batch_size=B), 10).step(x)  # libraries' own memory
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
before = status("VmRSS")
sae = SAE(SAEConfig(d_in=D, n_latents=L, k=k, dtype=dtype))
engine = make_engine(sae, config, 10)
engine.initialise(x)
for _ in range(3):
    engine.step(x)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n_latents", "d_in", "batch_size", "k", "optimizer"),
    [(65536, 768, 256, 32, "adam"), (131072, 384, 512, 32, "adam"), (131072, 768, 256, 32, "adam-lean")],
)
def test_memory_is_what_a_run_takes(n_latents, d_in, batch_size, k, optimizer):
    arguments = [str(n_latents), str(d_in), str(batch_size), str(k), optimizer]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent.parent), "OMP_NUM_THREADS": "2"}
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], env=environment, capture_output=True, text=True, timeout=HANG
    )
    assert child.returncode == 0, child.stderr
    expected = sum(memory_of(Sizes(d_in, n_latents, k, batch_size, optimizer), "cpu").values())
    measured = int(child.stdout)
    # An allocator's slack and the libraries' thread buffers come on top of what is planned, nothing else may.
    assert 0.95 * expected < measured < 1.10 * expected + 60e6, (
        f"{measured / 1e6:.0f} MB, planned {expected / 1e6:.0f} MB"
    )


def test_the_sizes_that_have_to_fit_do():
    lean = planned(768, 16 * 2**20, 32, 8192, "adam-lean")
    assert 77e9 < lean.total_bytes < 90e9
    assert lean.fits
    assert not planned(768, 16 * 2**20, 32, 8192).fits
    million = planned(4096, 2**20, 64, 8192)
    assert 103e9 < million.total_bytes < 141e9
    assert million.fits
    assert planned(4096, 2**20, 64, 8192, "adam-lean").total_bytes < 32e9


def test_scratch_is_that_of_the_chunks_which_come_up():
    """The encoder's chunks, of 4096, 8192, 16384 and 4096 latents here, share the memory of the widest."""
    found = memory_of(Sizes(768, 32768, 32, 8192), "h200")["encoder scratch"]
    values, groups = 8192 * 16384 * 4, 8192 * 16384 // 32 * 8
    # 36 candidates for 32: keys of a row, 64 sorted and 128 collected, and its threshold. An H100 took 583,041,024.
    assert found == values + groups + 8192 * ((64 + 128) * 8 + 4) == 583_041_024
    assert planned(768, 32768, 32, 8192).total_bytes < 2e9
    for k in (32, 5000):
        assert memory_of(Sizes(768, 2**24, k, 8192), "h200")["encoder scratch"] <= 1 << 30


def test_lean_counts_three_bytes_a_parameter():
    weights, state, copies = plan_module.matrices_of(Sizes(768, 1 << 16, 32, optimizer="adam-lean"))
    assert (weights + state + copies) / (2 * 768 * (1 << 16)) == pytest.approx(3.02, abs=0.005)


def test_largest_is_the_edge():
    for optimizer in ("adam", "adam-lean"):
        args = Sizes(768, 1, 32, 8192, optimizer)
        most = largest(args, optimizer, "h200", H200.memory)
        at, over = (Sizes(768, n, 32, 8192, optimizer) for n in (most, most + 1))
        assert sum(memory_of(at, "h200").values()) <= H200.memory < sum(memory_of(over, "h200").values())
    assert largest(Sizes(768, 32768, 32), "adam", "h200", 1e6) == 0


def test_times_add_up_and_follow_the_roofline():
    plan = planned(4096, 131072, 64, 8192)
    assert plan.seconds == pytest.approx(sum(stage.seconds for stage in plan.stages))
    encode = plan.stages[0]
    assert encode.flops == 2 * 8192 * 131072 * 4096
    assert encode.seconds == pytest.approx(encode.flops / (0.85 * H200.flops))
    twice = planned(4096, 262144, 64, 8192)
    assert twice.stages[0].seconds == pytest.approx(2 * encode.seconds)
    assert plan.tokens_per_second == pytest.approx(8192 / plan.seconds)


def test_the_command_prints_a_table_and_the_cost(capsys):
    arguments = ["plan", "--device", "h200", "--n-tokens", "1000000000", "--price", "3.5"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    plan = planned()
    hours = 1e9 / plan.tokens_per_second / 3600
    assert f"{hours:,.2f} hours, {3.5 * hours:,.2f} at 3.5 an hour" in out
    for name in plan.memory:
        assert name in out
    assert "the largest dictionary here" in out


def test_this_machine_can_be_planned_for():
    plan = planned(64, 1024, 8, 128, device="cpu")
    assert plan.device.flops > 1e9
    assert plan.device.bandwidth > 1e8
    assert plan.memory["encoder scratch"] == 0


def test_the_batch_is_that_of_training():
    sae = SAEConfig(768, 32768)
    assert Sizes(768, 32768, 32) == Sizes.of(sae, choose(sae, TrainConfig(), plan_module.PLENTY))
    assert make_plan(sae, TrainConfig(), "h200").sizes == Sizes(768, 32768, 32)
    short = TrainConfig(n_tokens=10_000)
    assert make_plan(sae, short, "h200").sizes.batch_size == choose(sae, short).batch_size < 4096


@pytest.mark.parametrize("name", ["l4", "L40S", "a100", "H100", "h200", "B200", "rtx 4090", "RTX4090"])
def test_names_of_the_field_are_taken(name, capsys):
    assert main(["plan", "--device", name]) == 0
    assert DEVICES[name.lower().replace(" ", "")].source in capsys.readouterr().out


def test_a_device_that_is_not_known_lists_those_that_are():
    with pytest.raises(InputError, match=r"device 'tpu-v5' is not in the table: name one of .*rtx4090, or cpu"):
        find_device("tpu-v5")


SPIN = "while True: pass"


def test_a_busy_machine_is_told_apart(capsys):
    """Other processes on every core: they get about half of it, or more, whatever else runs."""
    with others(len(os.sched_getaffinity(0))):
        plan = planned(64, 1024, 8, 128, device="cpu")
    assert plan.device.busy > 0.25
    assert f"other processes had {plan.device.busy:.0%} of this machine's cores" in describe(plan)
    quiet = planned()
    assert quiet.device.busy == 0
    assert "other processes" not in describe(quiet)


def test_own_work_is_not_others():
    """What this process does on all its cores is taken off; both shares are of one machine, so they add up to 1."""
    with Watch() as watch:
        started, own = time.perf_counter(), time.process_time()
        x = torch.randn(1024, 1024)
        while time.process_time() - own < 0.5:
            x = (x @ x).tanh()
        own = (time.process_time() - own) / (time.perf_counter() - started) / len(os.sched_getaffinity(0))
    assert 0 <= watch.share <= 1.05 - own


@contextlib.contextmanager
def others(n):
    running = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(n)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--k 40000", "k is 40000 but n_latents only 32768"),
        ("--d-in 0", "d_in is 0"),
        ("--batch-size 0", "batch_size is 0"),
        ("--price -1.0", "price is -1.0"),
        ("--price nan", "price is nan"),
    ],
)
def test_bad_sizes_are_named(options, message, capsys):
    assert main(["plan", "--device", "h200", *options.split()]) == 2
    assert f"saefast: error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "changes"), [("--k 64", True), ("--settle-every 1", True), ("--lr 0.1", False)])
def test_the_settings_of_train_are_taken(options, changes, capsys):
    assert main(["plan", "--device", "h200", *options.split()]) == 0
    assert (capsys.readouterr().out != f"{describe(planned())}\n") == changes
