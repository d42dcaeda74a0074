"""How many processes were started together; it imports next to nothing, since every command asks."""

import os


def started_ranks() -> int:
    """How many ranks torchrun, or whatever sets its variables, started together with this process; 1 for none."""
    return int(os.environ.get("WORLD_SIZE", "1"))
