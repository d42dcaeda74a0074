"""Ctrl-C and SIGTERM while something runs that must not be cut in half."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

AGAIN = 2.0
"""Seconds within which a second signal is the first one on another way: of a batch system, and of torchrun."""


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C or SIGTERM into a flag, so that no step is cut in half; the second one is immediate.

    A SIGTERM soon after another signal says no more than that one: whoever ends a whole job tells every process of it,
    and then the agent of these tells them too.
    """
    seen: list[float] = []

    def note(number: int, frame: object) -> None:
        if seen and not (number == signal.SIGTERM and time.monotonic() < seen[0] + AGAIN):
            raise KeyboardInterrupt
        seen.append(time.monotonic())

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread
        before = {}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def spared() -> Iterator[None]:
    """Let a Ctrl-C wait, which processes that are started meanwhile never get: whoever started them ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
