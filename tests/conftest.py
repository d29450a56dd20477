"""Every test: the Triton interpreter where there is no GPU, a fixed seed, and poisoned uninitialised memory."""

import importlib.util
import os
import random
import signal
import sys
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from browsing import Faults, insisted, launched, missing

if not torch.cuda.is_available():
    # Triton reads this when a kernel's module is imported, so it is set before any test can do that.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell's background job ignores Ctrl-C and hands that down: processes under test would never get theirs.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Files that take minutes begin first, so that no process works at one alone in the end.
LONGEST = ("test_aot.py", "compiled_", "test_gpu_run.py", "test_host_waits.py")
NO_BROWSER = "needs a browser"
PEERS = (
    "sae_lens", "sparsify", "dictionary_learning", "circuit_tracer", "llamascopium", "delphi", "sae_dashboard",
    "neuronpedia",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before -m picks among the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.partition("::")[0].rpartition("/")[2].startswith(LONGEST))
    if torch.cuda.is_available():
        # Those that take the device run compiled kernels where there is a GPU, so `-m gpu` has to find them.
        for item in items:
            if "device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    no_peers = pytest.mark.skip(reason="needs the peers' environment: make peers")
    has_peers = any(importlib.util.find_spec(name) for name in PEERS)
    no_browser = None if insisted() else missing()
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
        if item.get_closest_marker("peers") and not has_peers:
            item.add_marker(no_peers)
        if item.get_closest_marker("browser") and no_browser:
            item.add_marker(pytest.mark.skip(reason=f"{NO_BROWSER}: {no_browser}"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tests that a machine without a browser leaves out are said to be, in one line."""
    reasons = [str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", ()) if report.longrepr]
    left_out = [reason.partition(f"{NO_BROWSER}: ")[2] for reason in reasons if NO_BROWSER in reason]
    if left_out:
        terminalreporter.write_line(f"LEFT OUT: {len(left_out)} tests in a browser, because {left_out[0]}", yellow=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    seed_everything(seed_of(item))


def seed_of(item: pytest.Item) -> int:
    """The same number for the same test, whichever others run and wherever its file is: failures come back alone."""
    return zlib.crc32(item.nodeid.partition("::")[2].encode())


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 -- the legacy global generator is what code under test could reach for
    torch.manual_seed(seed)


# For a file and no longer: while playwright is open, no other test in its process may run an event loop.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as found:
        yield found


@pytest.fixture
def faults() -> Iterator[Faults]:
    """What goes wrong on pages that are opened with it fails the test in the end."""
    found = Faults()
    yield found
    assert not found, "\n".join(found)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """This test's own seed, which the global generators have been given already."""
    return seed_of(request.node)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def each_device(request: pytest.FixtureRequest) -> torch.device:
    """For what runs on either: a test once on the CPU, and once more on a GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture
def on_each_device(request: pytest.FixtureRequest, each_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets the test file's DEVICE, which its helpers make tensors on."""
    monkeypatch.setattr(request.module, "DEVICE", each_device)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fills with what no right answer contains: NaN, the smallest integer, True."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    if tensor.dtype == torch.bool:
        return tensor.fill_(True)
    return tensor.fill_(torch.iinfo(tensor.dtype).min)


@pytest.fixture(autouse=True, scope="session")
def poisoned_empty() -> Iterator[None]:
    """torch.empty and the like hand NaN to saefast's own code, so that an element nobody wrote shows."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            patch.setattr(owner, name, _poisoning(getattr(owner, name)))
        yield


def _poisoning(original: Any) -> Any:
    def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = original(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == "saefast" and tensor.device.type != "meta":
            with torch.no_grad():
                poison(tensor)
        return tensor

    return allocate
