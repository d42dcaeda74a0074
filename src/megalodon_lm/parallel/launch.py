"""Starting the ranks of one machine: torchrun's own agent, from within a command."""

import os
import sys
import uuid
from collections.abc import Sequence

from ..errors import InputError


def launch(arguments: Sequence[str], ranks: int, restarts: int = 0) -> None:
    """Run a command of this package as so many processes that find each other, and wait for their end.

    They share the processor's cores. The port of their meeting place is one that is free.

    Args:
        arguments: of the command.
        ranks: processes.
        restarts: how often all are started again when one is lost.

    Raises:
        InputError: one of them failed, and may not be started again.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=restarts, monitor_interval=0.1,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "megalodon_lm", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"was ended by signal {-failure.exitcode}" if failure.exitcode < 0 else f"failed ({failure.exitcode})"
        raise InputError(
            f"rank {rank} of {ranks} {how}; --resume last goes on from the last checkpoint, with as many ranks as "
            "you like"
        ) from None


def restarted() -> bool:
    """Whether torchrun started this process again after one was lost."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
