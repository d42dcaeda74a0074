"""A small thread pool for compiled kernels that release the interpreter lock.

Not Numba's own parallel mode: that brings a second OpenMP pool, and kills forked children.
"""

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

PIECES_PER_THREAD = 4

_pool: ThreadPoolExecutor | None = None
_size = 0
_lock = threading.Lock()


def parallel_for(kernel: Callable[..., None], num_tasks: int, *args: Any) -> None:
    """Run the tasks 0..num_tasks - 1 of a kernel on torch.get_num_threads() threads, the calling thread among them.

    Threads take ranges of tasks as they become free. Tasks must therefore not share what they write: then the result
    is bitwise the same for every number of threads. Sums over tasks belong after the call, in fixed order. Calls from
    several Python threads share the pool; a call whose helpers are busy elsewhere does the work itself.

    Args:
        kernel: called as kernel(first, last, *args) for the tasks first..last - 1, several times; compiled with
            nogil=True, or nothing runs at the same time.
        num_tasks: 0 is allowed. One task, or one thread, costs one plain call.
        args: passed on unchanged; arrays are shared.
    """
    threads = min(torch.get_num_threads(), num_tasks)
    if threads <= 1:
        if num_tasks:
            kernel(0, num_tasks, *args)
        return
    pieces = min(num_tasks, threads * PIECES_PER_THREAD)
    edges = [num_tasks * i // pieces for i in range(pieces + 1)]
    ranges = iter(list(itertools.pairwise(edges)))  # next() of a list's iterator is atomic

    def work() -> None:
        for first, last in ranges:
            kernel(first, last, *args)

    pool = _pool_of(threads - 1)
    helpers = [pool.submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


def _pool_of(size: int) -> ThreadPoolExecutor:
    """The pool, of at least that many threads; a smaller one finishes what it has and goes."""
    global _pool, _size
    with _lock:
        if _pool is None or _size < size:
            _pool, _size = ThreadPoolExecutor(size, thread_name_prefix="megalodon"), size
        return _pool


def _forget_pool() -> None:
    """A forked child has none of its parent's threads, and perhaps a lock that one of them held."""
    global _pool, _size, _lock
    _pool, _size, _lock = None, 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)
