"""The threaded row gather against torch.index_select: a copy, so every bit is compared."""

import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from draws import given, settings, st
from torch import Tensor

from saefast import extension
from saefast.data import gather
from saefast.errors import InputError

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool]
needs_extension = pytest.mark.skipif(not extension.available(), reason="the C++ extension was not built")


def bits(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random bytes seen as dtype (NaNs and all); 0 and 1 for bool, where nothing else is valid."""
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8).view(dtype)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 33, 384, 2304])
def test_equals_index_select(dtype: torch.dtype, width: int) -> None:
    src, index = bits((57, width), dtype), torch.randint(0, 57, (701,))
    assert_same_bits(gather.gather_rows(src, index), torch.index_select(src, 0, index))


@settings(deadline=None, max_examples=40)
@given(n_rows=st.integers(1, 300), width=st.integers(0, 40), n=st.integers(0, 2000), seed=st.integers(0, 2**31))
def test_equals_index_select_on_any_size(n_rows: int, width: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    src = torch.randn(n_rows, width, generator=generator)
    index = torch.randint(0, n_rows, (n,), generator=generator)
    assert torch.equal(gather.gather_rows(src, index), src[index])


def test_rows_may_have_any_shape() -> None:
    src, index = torch.randn(11, 3, 5), torch.tensor([10, 0, 10])
    assert torch.equal(gather.gather_rows(src, index), src[index])
    vector = torch.arange(11)
    assert torch.equal(gather.gather_rows(vector, index), vector[index])


def test_out_is_filled_and_returned() -> None:
    src, index, out = torch.randn(9, 4), torch.tensor([8, 1]), torch.full((2, 4), 7.0)
    assert gather.gather_rows(src, index, out) is out
    assert torch.equal(out, src[index])


@pytest.mark.parametrize("n_threads", [1, 2, 3, 8])
def test_any_number_of_threads_gives_the_same(n_threads: int) -> None:
    # 12 MB, enough for every one of the threads to be given work.
    src, index = torch.randn(3000, 512), torch.randint(0, 3000, (6000,))
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        assert torch.equal(gather.gather_rows(src, index), src[index])
    finally:
        torch.set_num_threads(before)


def test_from_several_python_threads_at_once() -> None:
    src = torch.randn(4000, 256)
    indices = [torch.randint(0, 4000, (5000,)) for _ in range(4)]
    results: dict[int, Tensor] = {}

    def draw(i: int) -> None:
        results[i] = gather.gather_rows(src, indices[i])

    threads = [threading.Thread(target=draw, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], src[indices[i]]) for i in range(4))


@pytest.mark.parametrize("bad", [-1, 50, 2**40, -(2**63)])
@pytest.mark.parametrize("at", [0, 123, 4999])
def test_an_index_out_of_range_is_named_and_nothing_is_written(bad: int, at: int) -> None:
    src, index, out = torch.randn(50, 64), torch.zeros(5000, dtype=torch.int64), torch.full((5000, 64), 7.0)
    index[at] = bad
    with pytest.raises(InputError, match=rf"index\[{at}\] is {bad}, outside \[0, 50\)"):
        gather.gather_rows(src, index, out)
    assert bool((out == 7).all())


def test_nothing_can_be_drawn_from_nothing() -> None:
    empty = torch.empty(0, 4)
    assert gather.gather_rows(empty, torch.empty(0, dtype=torch.int64)).shape == (0, 4)
    with pytest.raises(InputError, match=r"index\[0\] is 0, outside \[0, 0\)"):
        gather.gather_rows(empty, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize(
    ("argument", "changed"),
    [
        ("src", {"src": torch.randn(8, 6)[:, ::2]}),
        ("src", {"src": torch.randn(6, 8).t()}),
        ("src", {"src": torch.tensor(1.0)}),
        ("index", {"index": torch.zeros(2, dtype=torch.int32)}),
        ("index", {"index": torch.zeros(2)}),
        ("index", {"index": torch.zeros(1, 2, dtype=torch.int64)}),
        ("index", {"index": torch.zeros(4, dtype=torch.int64)[::2]}),
        ("index", {"index": torch.zeros(2, dtype=torch.int64, device="meta")}),
        ("out", {"out": torch.zeros(3, 6)}),
        ("out", {"out": torch.zeros(2, 6, dtype=torch.float64)}),
        ("out", {"out": torch.zeros(6, 2).t()}),
    ],
)
def test_wrong_arguments_are_named(argument: str, changed: dict[str, Any]) -> None:
    right = {"src": torch.randn(8, 6), "index": torch.zeros(2, dtype=torch.int64), "out": None}
    with pytest.raises(InputError, match=f"^{argument}: ") as caught:
        gather.gather_rows(**{**right, **changed})
    assert "\n" not in str(caught.value)


def test_without_the_extension_torch_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "load", lambda: None)
    src, index = torch.randn(50, 6), torch.randint(0, 50, (20,))
    assert torch.equal(gather.gather_rows(src, index), src[index])
    index[3] = 50
    with pytest.raises(InputError, match=r"index\[3\] is 50, outside \[0, 50\)"):
        gather.gather_rows(src, index)


def gather_from(sources: list[Tensor], index: Tensor, n_threads: int = 2) -> Tensor:
    out = torch.full((len(index), sources[0].shape[1]), float("nan"))
    ext = extension.load()
    assert ext is not None
    ext.Sources(sources).gather(index, out, n_threads)
    return out


@needs_extension
@pytest.mark.parametrize("lengths", [(7,), (5, 1, 9), (0, 4, 0, 0, 3, 0), (1000, 2000, 1)])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_several_sources_count_as_one(lengths: tuple[int, ...], n_threads: int) -> None:
    sources = [torch.randn(length, 300) for length in lengths]
    whole = torch.cat(sources)
    index = torch.cat([torch.randint(0, len(whole), (3000,)), torch.arange(len(whole))])
    assert torch.equal(gather_from(sources, index, n_threads), whole[index])


@needs_extension
def test_several_sources_check_their_range() -> None:
    sources = [torch.randn(3, 2), torch.randn(4, 2)]
    with pytest.raises(IndexError, match=r"index\[1\] is 7, outside \[0, 7\)"):
        gather_from(sources, torch.tensor([0, 7]))


@needs_extension
def test_sources_with_rows_of_different_size_are_refused() -> None:
    ext = extension.load()
    assert ext is not None
    with pytest.raises(ValueError, match="sources have rows of 8 and of 12 bytes"):
        ext.Sources([torch.zeros(4, 2), torch.zeros(4, 3)])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 3, 33, 384, 2304])
def test_gpu_equals_index_select(dtype: torch.dtype, width: int) -> None:
    src, index = bits((57, width), dtype).cuda(), torch.randint(0, 57, (70001,)).cuda()
    assert_same_bits(gather.gather_rows(src, index).cpu(), torch.index_select(src, 0, index).cpu())


@pytest.mark.gpu
def test_gpu_names_the_first_index_out_of_range() -> None:
    src, index = torch.randn(50, 64).cuda(), torch.zeros(5000, dtype=torch.int64).cuda()
    index[4000], index[77] = 50, -1
    with pytest.raises(InputError, match=r"index\[77\] is -1, outside \[0, 50\)"):
        gather.gather_rows(src, index)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8])
def test_tensors_that_count_as_one(dtype):
    sources = [torch.randint(-100, 100, (n, 7)).to(dtype) for n in (5, 0, 1, 40)]
    index = torch.randint(0, 46, (100,))
    assert torch.equal(gather.RowTable(sources).gather(index), torch.cat(sources)[index])
    assert torch.equal(gather.RowTable(sources[:1]).gather(index % 5), sources[0][index % 5])
    with pytest.raises(InputError, match="the sources hold 46 rows"):
        gather.RowTable(sources).gather(torch.tensor([46]))
    with pytest.raises(InputError, match="alike but for rows"):
        gather.RowTable([sources[0], sources[1].double()])


SHARED_THREADS = """
import ctypes, os, signal, sys, torch
from saefast.data import gather
signal.alarm(60)
torch.set_num_threads(3)
src, index = torch.randn(1 << 14, 256), torch.randperm(1 << 14)
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
rows = gather.gather_rows(src, index)
after = count()
src + 1
if hasattr(ctypes.CDLL(None), "GOMP_parallel"):
    assert (after, count()) == (before + 2, before + 2), (before, after, count())
child = os.fork()
if child == 0:
    signal.alarm(30)
    os._exit(gather.gather_rows(src, index).numpy().tobytes() != rows.numpy().tobytes())
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_threads_are_torchs_own_and_a_forked_child_makes_others() -> None:
    ran = subprocess.run([sys.executable, "-c", SHARED_THREADS], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
