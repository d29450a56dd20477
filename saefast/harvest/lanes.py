"""Forward passes side by side: on a CPU several batches with a thread or two each beat one batch with all threads."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")

# More lanes read a large model's weights more often than they save in waiting for one another.
MOST_LANES = 4


def lanes_for(device: torch.device) -> int:
    """How many batches to run at a time: 1 on an accelerator, else up to MOST_LANES of torch's threads."""
    return min(torch.get_num_threads(), MOST_LANES) if device.type == "cpu" else 1


def in_order(function: Callable[[Job], Result], jobs: Iterator[Job], lanes: int) -> Iterator[Result]:
    """Results of `function` over `jobs`, in their order, at most lanes + 1 of them ahead of the caller.

    torch's threads are shared out among the lanes. An exception in a lane is raised here, at its job's turn; when the
    caller stops or is interrupted, jobs that have begun are waited for and the others dropped.
    """
    if lanes <= 1:
        yield from map(function, jobs)
        return
    pool = _pool(lanes)
    waiting: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(function, job))
            if len(waiting) > lanes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(lanes: int) -> ThreadPoolExecutor:
    threads = torch.get_num_threads()
    started = threading.Barrier(lanes + 1)

    def start() -> None:
        torch.set_num_threads(max(threads // lanes, 1))
        started.wait()

    pool = ThreadPoolExecutor(lanes, thread_name_prefix="saefast-harvest", initializer=start)
    try:
        for _ in range(lanes):
            pool.submit(int)
    except RuntimeError:
        # The interpreter is ending: lanes that wait for others must not wait for ever.
        started.abort()
        raise
    started.wait()
    # Threads started later would begin with a lane's setting: they get this thread's instead.
    torch.set_num_threads(threads)
    return pool
