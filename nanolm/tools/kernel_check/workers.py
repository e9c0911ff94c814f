"""Checks of kernels by several processes at once: on a GPU most of a check's time goes into
compiling the kernel, which one core does.

The findings are those of one process, in the same order. Each process holds a context of the device
(on CUDA about half a gigabyte) and takes one check after another from the common queue.
"""

from __future__ import annotations

import concurrent.futures
import queue
from collections.abc import Generator, Sequence

from nanolm.tools.kernel_check.apart import Elsewhere, Here, Worker
from nanolm.tools.kernel_check.conformance import Finding
from nanolm.tools.kernel_check.examination import Errand, done_by


def findings(
    todo: Sequence[Errand], jobs: int, plugins: Sequence[str] = ()
) -> Generator[Finding, None, None]:
    """The errands' findings, in their order, by as many processes, which import the plug-ins: with
    one job and no plug-in by this process.

    An errand that ends its process fails, and another process takes the next.
    """
    workers: list[Worker] = [Here()]
    if jobs > 1 or plugins:
        threads = None if jobs == 1 else 1  # its siblings take the other cores
        device = todo[0].device if todo else "cpu"
        workers = [
            Elsewhere(device, plugins, threads=threads) for _ in range(min(jobs, max(1, len(todo))))
        ]
    if len(workers) == 1:
        try:
            for errand in todo:
                yield done_by(workers[0], errand)[0]
        finally:
            workers[0].close()
        return
    free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)

    def done(errand: Errand) -> Finding:
        worker = free.get()
        try:
            return done_by(worker, errand)[0]
        finally:
            free.put(worker)

    pool = concurrent.futures.ThreadPoolExecutor(len(workers))
    try:
        yield from pool.map(done, todo)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.close()
