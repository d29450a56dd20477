"""Forward passes side by side: on a CPU several batches with a thread or two each beat one batch with all threads."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")

# More workers read a large model's weights more often than they save in waiting for one another.
MOST_WORKERS = 4


def workers_for(device: torch.device) -> int:
    """How many batches to run at a time: 1 on an accelerator, else up to MOST_WORKERS of torch's threads."""
    return min(torch.get_num_threads(), MOST_WORKERS) if device.type == "cpu" else 1


def in_order(function: Callable[[Job], Result], jobs: Iterator[Job], workers: int) -> Iterator[Result]:
    """Results of `function` over `jobs`, in their order, at most workers + 1 of them ahead of the caller.

    torch's threads are shared out among the workers. An exception in a worker is raised here, at its job's turn; when
    the caller stops or is interrupted, jobs that have begun are waited for and the others dropped.
    """
    if workers <= 1:
        yield from map(function, jobs)
        return
    pool = _pool(workers)
    waiting: deque[Future[Result]] = deque()
    try:
        for job in jobs:
            waiting.append(pool.submit(function, job))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(workers: int) -> ThreadPoolExecutor:
    threads = torch.get_num_threads()
    started = threading.Barrier(workers + 1)

    def start() -> None:
        torch.set_num_threads(max(threads // workers, 1))
        started.wait()

    pool = ThreadPoolExecutor(workers, thread_name_prefix="saefast-harvest", initializer=start)
    try:
        for _ in range(workers):
            pool.submit(int)
    except RuntimeError:
        # The interpreter is ending: workers that wait for others must not wait for ever.
        started.abort()
        raise
    started.wait()
    # Threads started later would begin with a worker's setting: they get this thread's instead.
    torch.set_num_threads(threads)
    return pool
