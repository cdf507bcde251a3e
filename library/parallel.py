"""Work on many items in threads: results in the order of the items, few items ahead, one core for each thread.

Tools that go through a model tensor by tensor use one thread for each core, and not several threads within each
operation: these wait for each other in every operation, and beside another program each wait lasts until that program
gives its core back. Operations of torch, reading and writing do not hold Python's global lock.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

BYTES_OF_A_WORKER = 2**27  # of items that are worked on or wait to be used; a larger one is worked on alone
MOST_WORKERS = 16
WRITERS = 4  # workers that make as much as one thread writes
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds, or "max", and of how many

Item = TypeVar("Item")
Result = TypeVar("Result")


def num_cores() -> int:
    """Return the number of cores that this process may use, at least 1: of the machine, the process, its container."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no container, or no limit
        share, period = QUOTA.read_text(encoding="utf-8").split()
        affinity = min(affinity, math.ceil(int(share) / int(period)))
    return max(1, affinity)


def num_workers() -> int:
    """Return the number of threads for items of torch: one for each core, at most OMP_NUM_THREADS."""
    with contextlib.suppress(KeyError, ValueError):
        return max(1, min(num_cores(), int(os.environ["OMP_NUM_THREADS"].split(",")[0])))
    return num_cores()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let each operation of torch use one thread, in this thread and in those that begin within the block."""
    import torch

    former = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def by_module(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    device: str = "cpu",
    most: int = MOST_WORKERS,
    size: Callable[[Item], int] | None = None,
) -> Generator[Result]:
    """Yield function(item) in order, as `in_order` does, each computed by one thread of torch.

    There are at most `most` workers, and one on another device than the CPU; their number changes no result. Until the
    last item or `close`, operations outside of them use one thread, too.
    """
    workers = min(num_workers(), most)
    with one_thread():
        if device == "cpu" and workers == 1:  # a thread that works ahead would take the core from this one
            yield from map(function, items)
        else:
            yield from in_order(function, items, workers if device == "cpu" else 1, size=size)


def in_order(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    *,
    size: Callable[[Item], int] | None = None,
) -> Generator[Result]:
    """Yield function(item) for all items in their order; a number of threads work ahead.

    At most two items for each worker are begun and not used, and of at most BYTES_OF_A_WORKER for each worker if size
    tells the bytes that an item needs until its result is used. An error of the function is raised in the place of its
    result. After it, and after Ctrl-C, the items that are not begun are left.
    """
    most = workers * BYTES_OF_A_WORKER
    ahead: deque[tuple[Future[Result], int]] = deque()
    held = 0
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            needed = 0 if size is None else size(item)
            while len(ahead) == 2 * workers or (ahead and held + needed > most):
                released = ahead[0][1]
                yield ahead.popleft()[0].result()  # no name here keeps the result in memory
                held -= released
            ahead.append((pool.submit(function, item), needed))
            held += needed
        while ahead:
            yield ahead.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)
