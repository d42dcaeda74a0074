"""How many processors there are for this process."""

import os


def num_processors() -> int:
    """Those that it may run on: batch systems hold a job to some of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
