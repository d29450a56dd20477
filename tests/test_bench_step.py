"""The benchmarks of a step: how its time is split by stage without disturbing it, and who shares a GPU's memory."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import common, kernel_times, lines, step, step_child
from bench.kernel_times import Stages


class Device:
    """A GPU's clock and queue: work moves the clock, and waiting for it is counted."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.clock, self.waits = 0.0, 0
        patch.setattr(kernel_times.torch.cuda, "Event", lambda enable_timing: Event(self))
        patch.setattr(kernel_times.torch.cuda, "synchronize", self.wait)

    def wait(self) -> None:
        self.waits += 1


class Event:
    def __init__(self, device: Device) -> None:
        self.device, self.at = device, -1.0

    def record(self) -> None:
        self.at = self.device.clock

    def elapsed_time(self, end: "Event") -> float:
        return end.at - self.at


def test_a_stages_time_is_its_own_and_nothing_waits_inside_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    module = SimpleNamespace()

    def work(ms: float) -> None:
        device.clock += ms

    module.inner = lambda: work(2)
    module.outer = lambda latents=None: (work(1), module.inner(), work(4))
    before = module.outer
    stages = Stages("cuda")
    stages.watch(module, ["inner"])
    stages.watch(module, ["outer"], lambda name, **options: f"{name} of few" if "latents" in options else name)
    with stages.stage("rest"):
        work(8)
        module.outer()
        module.outer(latents=1)
        module.inner()
    assert device.waits == 0
    assert stages.take() == {"outer": 5, "outer of few": 5, "inner": 6, "rest": 8}
    assert device.waits == 1
    assert stages.take() == {}
    stages.close()
    assert module.outer is before


def test_what_a_call_spends_by_operation() -> None:
    x = torch.ones(20, 20)
    found = kernel_times.by_kernel(lambda: (x @ x, x @ x, int(x[0, 0])), "cpu", repeats=3)
    calls = {row["kernel"]: row["calls"] for row in found["kernels"]}
    assert calls["aten::mm"] == 2
    assert found["host calls"]["aten::_local_scalar_dense"] == 1
    assert all(row["us a call"] > 0 for row in found["kernels"][:1])


def test_on_a_gpu_each_contender_shares_memory_with_ours_alone() -> None:
    names = ["saefast", "saefast lean", "torch fp32"]
    assert step.groups(names, "cpu") == [names]
    assert step.groups(names, "cuda") == [["saefast", "saefast lean"], ["saefast", "torch fp32"]]
    assert step.groups(["saefast"], "cuda") == [["saefast"]]


BATCH = step.Kind("batchtopk", (64, 256))


def test_who_trains_what_kind_of_sae(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "PEERS_PYTHON", Path(__file__))
    others = ["saefast", "saefast lean", "torch fp32", "torch bf16 autocast"]
    assert step.who("cpu", step.Kind(), True) == [*others, "sparsify", "dictionary_learning", "SAELens"]
    assert step.who("cpu", step.Kind("batchtopk"), True) == [*others, "dictionary_learning", "SAELens"]
    assert step.who("cpu", BATCH, False) == step.who("cpu", step.Kind("topk", (64, 256)), True) == others
    assert [kind.label("step") for kind in (step.Kind(), BATCH)] == ["step", "step-batchtopk-matryoshka"]


@pytest.mark.parametrize("kind", [step.Kind(), step.Kind("batchtopk"), step.Kind("topk", (64, 256)), BATCH])
def test_the_dense_step_is_that_of_its_kind(kind: step.Kind) -> None:
    """Its loss is that of codes chosen by a sort and prefixes decoded one by one."""
    torch.manual_seed(0)
    dense = step_child.Dense(24, 256, 4, "cpu", False, False, *kind)
    x = step.batches(16, 24, "cpu")[0]
    W_dec = dense.W_dec.detach().clone()
    pre = x @ dense.W_enc.detach().T
    if kind.activation == "topk":
        lowest = pre.sort(1, descending=True).values[:, 3:4]
    else:
        lowest = pre.flatten().sort(descending=True).values[4 * 16 - 1]
    code = torch.where(pre >= lowest, pre, 0).relu()
    prefixes = kind.matryoshka or (256,)
    squares = [((x - code[:, :n] @ W_dec[:n]) ** 2).sum() for n in prefixes]
    expected = sum(squares) / ((x - x.mean(0)) ** 2).sum()
    assert float(dense.step(x)) == pytest.approx(float(expected), rel=1e-5)
    if kind.activation == "batchtopk":
        assert float(dense.threshold) == pytest.approx(0.01 * float(lowest), rel=1e-5)


def test_batches_do_not_count_as_a_steps_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = step_child.torch.cuda
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(cuda, name, lambda: None)
    monkeypatch.setattr(cuda, "memory_allocated", lambda: 700)
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda: 1000)
    assert step_child.Memory("cuda").peak() == 300


def test_a_failing_case_stops_no_other_and_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(lines.FILE, str(tmp_path / "lines"))
    monkeypatch.setenv(lines.STAGE, "an op")

    def bad() -> Any:
        raise RuntimeError("out of something")

    assert common.attempt("first", bad) is None
    assert common.attempt("second", lambda: {"ms": 1.5}) == {"ms": 1.5}
    first, second = lines.read(tmp_path / "lines")
    assert (first["case"], first["outcome"], first["error"]) == ("first", "failed", "RuntimeError")
    assert (second["case"], second["outcome"], second["result"]) == ("second", "ok", {"ms": 1.5})
    assert "out of something" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [step.Kind(), BATCH])
def test_the_step_by_stage_adds_up(kind: step.Kind) -> None:
    shape = step.Shape(16, 24, 256, 4)
    table = step.by_stage(step.new_engine(shape, "cpu", kind), step.batches(shape.B, shape.D, "cpu"), "cpu", 1)
    whole = table.pop("whole step")
    assert sum(table.values()) == pytest.approx(whole)
    assert {"update_rows", "decode_loss", "rest"} <= table.keys()
    assert any(name.startswith("encode_topk") for name in table)
    assert ("encode_batch_topk" in table) == (kind == BATCH)
