"""A small thread pool for compiled kernels that release the interpreter lock.

Not Numba's own parallel mode: that brings a second OpenMP pool, and kills forked children.
"""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

_pool: ThreadPoolExecutor | None = None
_size = 0
_lock = threading.Lock()


def run_on_pool(work: Callable[[], None], threads: int) -> None:
    """Call a function on several threads at once, the calling one among them, and wait for all.

    Each call takes of a common supply what it can, so that one call would do: threads that are busy elsewhere are not
    waited for. Calls from several Python threads share the pool.

    Args:
        work: releases the interpreter lock, or nothing runs at the same time.
        threads: at least 1, which costs one plain call.
    """
    helpers = [_pool_of(threads - 1).submit(work) for _ in range(threads - 1)]
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
