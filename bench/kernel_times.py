"""Where the time of a call goes, without waiting for the device inside it.

`by_kernel` asks torch's profiler for the kernels of a call. `Stages` stamps the device's own clock at the borders of
named functions while a whole step runs: events are queued like kernels are, so nothing waits for anything.
"""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# What the host does that costs time or waits, by the names the profiler gives it.
HOST_CALLS = (
    "cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaMemcpyAsync",
    "cudaMemsetAsync", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMalloc",
    "aten::_local_scalar_dense", "aten::nonzero",
)  # fmt: skip


def by_kernel(call: Callable[[], object], device: str, repeats: int) -> dict[str, Any]:
    """Per call: the device's kernels, longest first (on a CPU torch's operations), and how often the host did what."""
    call()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    with profile(activities=activities) as profiler:
        for _ in range(repeats):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    host: dict[str, int] = defaultdict(int)
    wanted = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    for event in profiler.events():
        if event.device_type == wanted:
            # On a CPU an operation's time includes that of those it calls, so their own time is meant.
            times[event.name[:80]].append(
                event.time_range.elapsed_us() if device == "cuda" else event.self_cpu_time_total
            )
        if event.name in HOST_CALLS:
            host[event.name] += 1
    table = [
        {"kernel": name, "calls": len(us) / repeats, "us a call": sum(us) / repeats, "median us": median(us)}
        for name, us in times.items()
    ]
    table.sort(key=lambda row: -float(row["us a call"]))
    return {"kernels": table[:40], "host calls": {name: count / repeats for name, count in host.items()}}


class Stages:
    """Milliseconds by named function, of functions of modules replaced for as long as it is open.

    A function's time is its own: that of watched functions it calls is theirs. On a GPU it is the time the stream took
    from the function's first entry to its last, waiting for the host included.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._undo: list[Callable[[], None]] = []
        self._open: list[tuple[str, Any, list[tuple[Any, Any]]]] = []
        self._closed: list[tuple[str, Any, Any, list[tuple[Any, Any]]]] = []

    def watch(self, owner: ModuleType | Any, names: Iterable[str], label: Callable[..., str] | None = None) -> None:
        """Times owner's functions of these names; `label` gives another name from a call's arguments."""
        for name in names:
            original = getattr(owner, name)
            setattr(owner, name, self._timed(original, name, label))
            self._undo.append(functools.partial(setattr, owner, name, original))

    def _timed(self, function: Callable[..., Any], name: str, label: Callable[..., str] | None) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.stage(label(name, *args, **kwargs) if label else name):
                return function(*args, **kwargs)

        return timed

    def stage(self, name: str) -> "Stage":
        return Stage(self, name)

    def enter(self, name: str) -> None:
        self._open.append((name, self._stamp(), []))

    def leave(self) -> None:
        name, begin, inner = self._open.pop()
        end = self._stamp()
        if self._open:
            self._open[-1][2].append((begin, end))
        self._closed.append((name, begin, end, inner))

    def _stamp(self) -> Any:
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) if self.device == "cuda" else (end - begin) * 1e3

    def take(self) -> dict[str, float]:
        """Milliseconds of each stage since the last call; waits for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        table: dict[str, float] = defaultdict(float)
        for name, begin, end, inner in self._closed:
            table[name] += self._between(begin, end) - sum(self._between(*pair) for pair in inner)
        self._closed.clear()
        return dict(table)

    def close(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()


class Stage:
    def __init__(self, stages: Stages, name: str) -> None:
        self.stages, self.name = stages, name

    def __enter__(self) -> None:
        self.stages.enter(self.name)

    def __exit__(self, *_: object) -> None:
        self.stages.leave()
