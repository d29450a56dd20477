"""What the compiler makes of every kernel and every checked-in setting, for GPUs that are not here.

Compiled in a child process, because this one interprets. Compilations are cached where Triton keeps its own, so a
second run takes a second.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hanging import HANG

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = (80, 90, 100, 120)
# Shared memory a block may have, and registers of an SM.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
REGISTER_FILE = 65536
# Registers a thread may hold; one above it costs occupancy that the settings count on. A tile of 128 x 256 holds 128
# sums a thread, the other tiles 64; in fp32 without tensor cores, the operands of 64 fused multiply-adds as well.
REGISTERS = {
    "tiles_descriptor": 255,
    "tiles_pointer": 168,
    "tiles_pointer ieee": 255,
    "tiles_library": 128,
    "merge_topk": 168,
    "fill_csr": 96,
    "spmm": 64,
    "sddmm": 80,
    "count_from": 128,
    "decode_loss": 128,
    "decode_loss_csr": 128,
    "row_update": 128,
    "settle_rows": 112,
    "piece_sums": 80,
    "gradient_rows": 112,
    "batch_sums": 128,
    "fill_entries": 80,
    "sum_groups": 32,
    "mark_rows": 48,
    "lean_row_update": 128,
    "lean_settle_rows": 128,
}
# Triton 3.7 gives these more, at a cost of one block of four to six on an SM (tiles_pointer: none, one fits as before),
# and keeps two words of one setting of the encoder's tile in memory.
IS_NEWER = tuple(map(int, version("triton").split(".")[:2])) >= (3, 7)
if IS_NEWER:
    REGISTERS |= {"tiles_pointer": 192, "tiles_library": 160, "fill_csr": 112, "sddmm": 88}
    # Scales cost one block of three on an SM, rows of another dtype than x none.
    REGISTERS |= {"tiles_library scale": 176, "sddmm bf16 fp32": 96}
SPILLS = {(100, "tiles_descriptor half (128, 128, 64, 8, 3, 1) group=32 scale"): 2} if IS_NEWER else {}
TENSOR_CORES = {80: {"HMMA"}, 90: {"HGMMA"}, 100: {"UTCHMMA", "UTCMMA"}, 120: {"HMMA"}}
ROWS = ("row_update", "gradient_rows", "piece_sums", "lean_row_update")
SETTLE = ("settle_rows", "lean_settle_rows")
GATHERS = ("spmm", "sddmm", "merge_topk", "fill_csr", "tiles_library", "decode_loss", "batch_sums", *SETTLE, *ROWS)


@pytest.fixture(scope="session")
def compiled() -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(ROOT / "tests" / "aot.py"), *map(str, ARCHITECTURES)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG)
    assert child.returncode == 0, child.stderr[-3000:]
    return json.loads(child.stdout)


def reports(compiled: dict[str, Any], arch: int, *names: str) -> list[dict[str, Any]]:
    found = [r for r in compiled["reports"] if r["arch"] == arch and r["name"].startswith(names or "")]
    assert found, f"nothing named {names} was compiled for sm_{arch}"
    return found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_nothing_spills(compiled, arch):
    spilled = {(arch, r["name"]): r["spills"] or 1 for r in reports(compiled, arch) if r["spills"] or r["stack"]}
    assert all(words <= SPILLS.get(case, 0) for case, words in spilled.items()), spilled


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_registers_stay_under_their_bound(compiled, arch):
    for name, bound in REGISTERS.items():
        held = {r["name"]: r["registers"] for r in reports(compiled, arch, "") if kernel_of(r) == name}
        assert not {case: n for case, n in held.items() if n > bound}, f"sm_{arch}: {name} may hold {bound}"
    assert {kernel_of(r) for r in reports(compiled, arch)} <= set(REGISTERS)


def kernel_of(report: dict[str, Any]) -> str:
    """What bounds a report's registers: its kernel, or as many words of its form as have a bound of their own."""
    words = report["name"].split()
    return next((" ".join(words[:n]) for n in (3, 2) if " ".join(words[:n]) in REGISTERS), words[0])


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_blocks_fit_their_multiprocessor(compiled, arch):
    """A persistent grid counts on per_sm blocks at a time, in registers (given out in eights) and shared memory."""
    for report in reports(compiled, arch):
        blocks = max(1, report["per_sm"])
        registers = -(-report["registers"] // 8) * 8 * 32 * report["warps"]
        assert blocks * registers <= REGISTER_FILE, report["name"]
        assert report["shared"] <= SHARED[arch], report["name"]
        assert blocks * (report["shared"] + 1024) <= SHARED[arch] + 1024, report["name"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_products_run_on_tensor_cores_and_are_pipelined(compiled, arch):
    for report in reports(compiled, arch, "tiles_pointer", "tiles_descriptor"):
        opcodes, ieee = report["opcodes"], "ieee" in report["name"]
        assert bool(opcodes.keys() & TENSOR_CORES[arch]) != ieee, report["name"]
        assert not ieee or opcodes.get("FFMA", 0) + opcodes.get("FFMA2", 0) > 500
        copies = "UTMALDG" if report["name"].startswith("tiles_descriptor") else "LDGSTS"
        # More copies than one step of the loop needs: those of the steps ahead stand before the loop.
        assert opcodes.get(copies, 0) >= 2 * 2, report["name"]
    assert any(r["name"].startswith("tiles_descriptor") for r in reports(compiled, arch)) == (arch in (90, 100))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_group_maxima_keep_a_nan(compiled, arch):
    """The interpreter's maximum always does; the hardware's only when asked."""
    for report in reports(compiled, arch, "tiles_"):
        opcodes = report["opcodes"]
        assert opcodes["FMNMX without NAN"] == 0, report["name"]
        ranks = "count" not in report["name"] or "count=False" in report["name"]
        assert bool(opcodes.get("FMNMX", 0) + opcodes.get("FMNMX3", 0)) == ranks, report["name"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gathers_load_16_bytes_at_a_time(compiled, arch):
    for report in reports(compiled, arch, *GATHERS):
        # A column of width 1 has nothing to load 16 bytes of: sums by latent.
        assert report["wide_loads"] > 0 or " D=1 " in report["name"], report["name"]
        # All of a thread's loads of the rows in flight.
        assert report["wide_loads"] >= report["least"], report["name"]
    whole = [r for r in reports(compiled, arch, *GATHERS) if " D=768 " in r["name"] or " D=4096 " in r["name"]]
    assert {kernel_of(r) for r in whole} >= {"spmm", "sddmm", "decode_loss", "settle_rows", "row_update"}
    # The counts are not small because the forms are.
    for kernel, least in (("spmm", 8), ("sddmm", 4), ("decode_loss", 4), ("row_update", 8), ("lean_row_update", 8)):
        assert max(r["least"] for r in whole if r["name"].startswith(kernel)) >= least, kernel


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_lean_rows_are_read_by_all_warps_before_they_are_written(compiled, arch):
    """Every warp loads the row's v and scales, one of them overwrites both: a barrier has to stand between."""
    for report in reports(compiled, arch, "lean_settle_rows"):
        assert report["warps"] > 1
        assert report["opcodes"].get("BAR", 0) > 0, report["name"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_decode_loss_fuses_no_product_into_a_sum_across_lanes(compiled, arch):
    for report in reports(compiled, arch, "decode_loss"):
        assert not report["opcodes"].keys() & {"FFMA", "FFMA2"}, report["name"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_is_compiled_in_every_form_that_is_launched(compiled, arch):
    """The forms are noted from training steps and encodes; here, that the notes miss no kernel, dtype or None."""
    names = [r["name"] for r in reports(compiled, arch)]
    assert {name.split()[0] for name in names} == compiled["specialised"].keys() - (
        set() if arch in (90, 100) else {"tiles_descriptor"}
    )
    assert any(name.startswith("row_update") and "pieces" in name.partition("without")[2] for name in names)
    assert any(name.startswith("row_update") and "pieces" not in name for name in names)
    assert any(name.startswith("lean_settle_rows") and "NORM=0" in name and "norms" in name for name in names)
    assert any(name.startswith("decode_loss bf16") for name in names)
    assert any(name.startswith("spmm bf16") for name in names)


def test_the_inspection_sees_scalar_loads_and_spills(compiled):
    """The same kernels, compiled badly on purpose: what the tests above look for is there to be found."""
    broken = {r["name"]: r for r in compiled["broken"]}
    assert broken["spmm unaligned"]["wide_loads"] == 0
    assert broken["merge_topk with 32 registers"]["spills"] > 0


def test_a_new_batch_or_chunk_compiles_nothing_new(compiled):
    assert compiled["specialised"] == {
        "tiles_pointer": ["D", "stride", "threshold_step"],
        "tiles_descriptor": ["D", "stride", "threshold_step"],
        "tiles_library": ["stride", "threshold_step"],
        "merge_topk": ["stride"],
        "fill_csr": ["stride", "threshold_step"],
        "spmm": ["D"],
        "sddmm": ["D"],
        "count_from": [],
        "decode_loss": ["D"],
        "decode_loss_csr": ["D"],
        "batch_sums": ["D"],
        "fill_entries": [],
        "sum_groups": [],
        "mark_rows": [],
        "piece_sums": ["D"],
        "gradient_rows": ["D"],
        "settle_rows": ["D"],
        "row_update": ["D"],
        "lean_settle_rows": ["D"],
        "lean_row_update": ["D"],
    }
