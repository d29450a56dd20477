"""A test file's launches as PTX: what Triton's interpreter left, for both architectures, and nothing else goes through.

`make ptx` does this with every test file that launches a kernel.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from ptx.build import compiled
from ptx.call import Argument, specialised
from ptx.capture import Launch
from ptx.compare import gap
from ptx.everything import captured, launching_files, load, replayed, table
from ptx.replay import replay
from saefast.kernels import fill_csr, merge_topk, spmm

SM = (80, 90)


@pytest.fixture(scope="session")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launches")
    child = captured(["tests/test_sddmm.py", "tests/test_merge_topk.py"], folder)
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-3000:]
    return folder


def test_captured_launches_are_what_the_interpreter_says(launches: Path) -> None:
    rows = {(row.kernel, row.sm): row for row in table(replayed(launches, SM, 1))}
    assert rows.keys() == {(kernel, sm) for kernel in ("sddmm", "merge_topk") for sm in SM}
    for row in rows.values():
        assert not row.failed, row
        assert row.launches >= 10
    # Only moved and compared: bit by bit.
    assert all(rows["merge_topk", sm].equal == rows["merge_topk", sm].launches for sm in SM)


def one(launches: Path, kernel: str) -> Launch:
    """The one with the most warps."""
    found = [load(file) for file in sorted(launches.glob(f"{kernel}-*.pickle"))]
    return max(found, key=lambda launch: launch.call.options["num_warps"])


def test_a_wrong_result_is_far(launches: Path) -> None:
    launch = one(launches, "sddmm")
    out = launch.after[launch.held["out_ptr"].storage]
    assert not replay(launch, 90).problem
    out.view(np.float32)[0] *= 1.01
    assert "out_ptr differs" in replay(launch, 90).problem


def test_missing_barriers_are_noticed(launches: Path) -> None:
    launch = one(launches, "merge_topk")
    binary = compiled(launch.call, 90)
    assert binary.warps > 1
    barriers = [i.number for i in binary.program.body if i.op[:2] == ("bar", "sync")]
    mutants = [binary._replace(program=binary.program.without(barrier)) for barrier in barriers]
    outcomes = [replay(launch, 90, mutant) for mutant in mutants]
    noticed = sum(bool(outcome.formal or outcome.faults) for outcome in outcomes)
    assert noticed > len(outcomes) / 2, outcomes


def test_files_that_launch_kernels_are_found() -> None:
    names = {file.name for file in launching_files()}
    assert names >= {"test_row_update.py", "test_decode_loss.py", "test_encode_topk_triton.py", "test_merge_topk.py"}


@pytest.mark.parametrize(
    ("dtype", "got", "want", "passes"),
    [
        (torch.float32, [1.0, 2.0], [1.0, 2.0], True),
        (torch.float32, [1.0, 2.0], [1.0, 2.0 + 2e-6], True),
        (torch.float32, [1.0, 2.0], [1.0, 2.0 + 1e-4], False),
        (torch.float32, [float("nan"), 2.0], [float("nan"), 2.0], True),
        (torch.float32, [float("nan"), 2.0], [1.0, 2.0], False),
        (torch.float32, [float("inf"), 2.0], [1.0, 2.0], False),
        (torch.bfloat16, [1.0, 256.0], [1.0078125, 254.0], True),
        (torch.bfloat16, [1.0, 256.0], [1.0, 252.0], False),
        (torch.int32, [1, 2], [1, 3], False),
        (torch.int8, [1, 2], [1, 3], True),
        (torch.int8, [1, 2], [1, 4], False),
    ],
)
def test_how_far_is_far(dtype: torch.dtype, got: list[float], want: list[float], passes: bool) -> None:
    """With 10 roundings, each side is within 10 · 2^-24 · 2 of fp32's truth."""
    a, b = (torch.tensor(x, dtype=dtype).view(torch.uint8).numpy() for x in (got, want))
    assert (gap(a, b, b, dtype, 10).share <= 1) == passes


@pytest.mark.parametrize("kernel", [spmm.spmm, merge_topk.merge_topk, fill_csr.fill_csr])
@pytest.mark.parametrize("number", [1, 16, 7, 1 << 31])
@pytest.mark.parametrize("aligned", [True, False])
def test_the_specialisation_is_the_launchers(kernel: object, number: int, aligned: bool) -> None:
    """Against Triton's own, where this version of it can be asked."""
    jit = pytest.importorskip("triton.runtime.jit")
    compiler = pytest.importorskip("triton.backends.compiler")
    make = pytest.importorskip("triton.compiler").make_backend
    backend = make(compiler.GPUTarget("cuda", 90, 32))
    binder = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    tensor = torch.zeros(40, dtype=torch.bfloat16)[0 if aligned else 1 :]
    given = {p.name: 32 if p.is_constexpr else tensor if p.name.endswith("_ptr") else number for p in kernel.params}
    given = {n: None if n in ("row_ptr", "scale_ptr") else v for n, v in given.items()}
    options = dict(num_warps=4, num_stages=3)
    bound, specialization, rest = binder(**given, **options, debug=False)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, rest)
    arguments = {
        n: Argument("constant", value=v)
        if v is None or n in {p.name for p in kernel.params if p.is_constexpr}
        else Argument("pointer", "bf16", aligned=aligned)
        if n.endswith("_ptr")
        else Argument("integer", value=v)
        for n, v in given.items()
    }
    ours = specialised(kernel, arguments)
    names = [p.name for p in kernel.params]
    assert ours[0] == signature
    assert {(names.index(n),): v for n, v in ours[1].items()} == constants
    assert ours[2] == {k: v for k, v in attributes.items() if v}
