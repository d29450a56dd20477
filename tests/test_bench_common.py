"""The timing core of the benchmarks: what it measures is checked against what is known."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def common():
    # bench is no package of the distribution: it is found from the root of a checkout.
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        from bench import common

        yield common


def test_the_tests_that_benchmarks_run_first_are_there():
    named = {
        (file.name, match)
        for file in (ROOT / "bench").glob("*.py")
        for match in re.findall(r'"([a-z_/]*test_\w+\.py)"', file.read_text(encoding="utf-8"))
    }
    assert {name for name, _ in named} >= {"step.py", "memory.py", "buffer.py", "encode_topk.py"}
    assert [one for one in sorted(named) if not (ROOT / "tests" / one[1]).is_file()] == []


def test_contenders_take_turns(common):
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    spreads = common.interleaved(calls, rounds=2)
    assert "".join(order) == "abcabcabc"
    assert list(spreads) == ["a", "b", "c"]


def test_a_call_takes_the_time_it_takes(common, monkeypatch):
    """By a clock that only the calls move, the first ones of a kind being slower."""
    clock, calls = [0.0], []

    def slow():
        calls.append(1)
        clock[0] += 0.02 if len(calls) > 2 else 1.0

    monkeypatch.setattr(common, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    taken = common.measure({"slow": slow, "nothing": lambda: None}, "cpu", budget=5.0)
    assert taken["slow"] == pytest.approx((0.02, 0.02, 0.02))
    assert taken["nothing"] == (0.0, 0.0, 0.0)
    assert len(calls) == 2 + 1 + 5  # twice to see how long a round takes (1 s), once to warm up, and a budget's rounds


def test_spread_is_median_and_fifths(common):
    assert common.spread([float(i) for i in range(11)]) == (5.0, 2.0, 8.0)
    assert common.spread([3.0]) == (3.0, 3.0, 3.0)


def test_share_of_a_roofline(common, monkeypatch):
    monkeypatch.setattr(common, "device_name", lambda device: "NVIDIA H200")
    assert common.share("cuda", "half", flops=790e12, moved=1.0, seconds=2.0) == pytest.approx(0.5)
    assert common.share("cuda", "half", flops=0.0, moved=4.3e12, seconds=4.0) == pytest.approx(0.25)
    assert common.share("cuda", "half", flops=79e12, moved=4.3e12, seconds=1.0) == pytest.approx(1.0)
    assert common.share("cuda", "ieee", flops=50e12, moved=0.0, seconds=2.0) == pytest.approx(0.5)
    assert common.share("cuda", "tf32", flops=1.0, moved=1.0, seconds=1.0) is None
    monkeypatch.setattr(common, "device_name", lambda device: "an unknown device")
    assert common.share("cuda", "half", flops=1.0, moved=1.0, seconds=1.0) is None


def test_peak_memory_of_a_first_call():
    """100 MB that are gone again when the call returns, and 10 MB that stay."""
    text = (
        "import torch; from bench import common\n"
        "def call():\n"
        "    torch.ones(25_000_000).sum()\n"
        "    return torch.ones(2_500_000)\n"
        "torch.ones(1000).sum()\n"
        "print(common.peak_bytes(call, 'cpu'))"
    )
    found = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 95e6 < int(found.stdout) < 125e6


def test_results_name_their_machine(common, tmp_path, capsys):
    path = common.write_results(tmp_path / "new", "cpu", "some_op", [{"ms": 1.5}])
    written = json.loads(path.read_text())
    assert path.name.endswith("-some_op.json")
    assert written["device"] == common.device_name("cpu")
    assert written["versions"]["torch"] == torch.__version__
    assert written["results"] == [{"ms": 1.5}]


def test_a_quick_run_leaves_committed_results_alone(common):
    def out(*argv):
        return common.arguments("bench.op", "An op.", ["--device", "cpu", *argv]).out

    assert out() == common.RESULTS
    assert out("--quick") == common.ROOT / "build" / "bench"
    assert out("--quick", "--out", "here") == out("--out", "here") == Path("here")


WITHOUT_KERNEL = {"encode_topk", "threshold_encode", "encode_group_max"}
OPS = sorted({path.stem for path in (ROOT / "kernels").glob("*.py")} - {"tuning"} | WITHOUT_KERNEL)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here: a rehearsal interprets them")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("how", ["--quick", "--rehearse"])
def test_a_quick_run_writes_to_the_folder_of_quick_runs(common, how, name, tmp_path, monkeypatch, capsys):
    bench, op = importlib.import_module(f"bench.{name}"), importlib.import_module("bench.op")
    for module in (m for m in (bench, op) if hasattr(m, "CPU_SHAPES")):
        monkeypatch.setattr(module, "CPU_SHAPES", [op.Shape(8, 16, 64, 4)])
    monkeypatch.setattr(common, "QUICK_RESULTS", tmp_path / "quick")
    monkeypatch.setattr(common, "RESULTS", tmp_path / "committed")
    if how == "--quick" and name in ("encode_tiles", "merge_topk", "fill_csr"):
        with pytest.raises(SystemExit, match=f"{name} is a kernel of GPUs alone"):
            bench.main([how, "--no-check", "--device", "cpu"])
        return
    assert bench.main([how, "--no-check", "--device", "cpu"]) == 0
    assert [path.name.endswith(f"-{name}.json") for path in (tmp_path / "quick").iterdir()] == [True]
    assert not (tmp_path / "committed").exists()


def test_a_table_leaves_out_what_nobody_has(common, capsys):
    row = common.timed_row("op", common.Spread(0.002, 0.001, 0.004), "cpu", operands="half", flops=4e9)
    common.print_timed([row, {"what": "a number", "count": 123456}])
    header, first, second = capsys.readouterr().out.splitlines()
    assert header.split() == ["what", "ms", "[p20,", "p80]", "TFLOP/s", "count"]
    assert first.split() == ["op", "2.000", "[1.000,", "4.000]", "2", "-"]
    assert second.split() == ["a", "number", "-", "-", "123,456"]


def test_failing_tests_stop_a_benchmark(common, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(common, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_good.py").write_text("def test_it(): pass")
    (tmp_path / "tests" / "test_bad.py").write_text("def test_it(): assert False")
    common.check("cpu", "test_good.py")
    with pytest.raises(SystemExit, match="tests fail"):
        common.check("cpu", "test_bad.py")
