"""Starting the ranks of one machine with torchrun's own agent, from within a command, and saying once how they end."""

import hashlib
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import RankLost
from ..processors import num_processors

LAUNCHED = "MEGALODON_LAUNCHED"
"""Set for ranks that a command started: it says itself how they were lost."""
LOST, INTERRUPTED = 3, 130
"""Exit codes: another rank was lost; a signal ended the command."""
STUCK = 20
"""Seconds after the first of them at which a rank that then ends was killed by the agent, after 30 of asking."""
PATIENCE = 600
"""Seconds that ranks have to save what they did when the command is told to end."""


def launch(arguments: Sequence[str], ranks: int, restarts: int = 0) -> int:
    """Run a command of this package as so many processes that find each other, and wait for their end.

    They share the processor's cores. The port of their meeting place is one that is free. A signal that ends the
    command is passed on to them.

    Args:
        arguments: of the command.
        ranks: processes.
        restarts: how often all are started again when one is lost.

    Returns:
        The exit code; a rank that failed has said why.

    Raises:
        RankLost: one of them was killed or did not answer, and may not be started again.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):  # each with a level of its own; what went wrong is said below
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ |= {LAUNCHED: "1"}
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, num_processors() // ranks)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(PATIENCE))
    with tempfile.TemporaryDirectory(prefix="megalodon-ranks-") as logs:
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", max_restarts=restarts, monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )  # fmt: skip
        try:
            elastic_launch(config, sys.executable)("-m", "megalodon_lm", *arguments)
        except ChildFailedError as error:
            return _judged(error.failures, ranks)
        except SignalException:
            return INTERRUPTED
    return 0


def _judged(failures: Mapping[int, Any], ranks: int) -> int:
    """The exit code of the rank that the others fell with."""
    goes_on = "--resume last, of a training, goes on from the last checkpoint with as many ranks as you like"
    ended = sorted(failures.items(), key=lambda item: item[1].timestamp)
    for rank, failure in ended:
        code: int = failure.exitcode
        if code in (LOST, -signal.SIGTERM):  # these fell with another one
            continue
        if code > 0:
            return code
        stuck = failure.timestamp - ended[0][1].timestamp > STUCK
        how = "did not answer in time" if stuck else f"was ended by signal {-code}"
        raise RankLost(f"rank {rank} of {ranks} {how}; {goes_on}")
    raise RankLost(f"one of {ranks} ranks was lost or did not answer in time; {goes_on}")


def restarted() -> bool:
    """Whether torchrun started this process again after one was lost."""
    return _attempt() > 0


def _attempt() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def to_say(error: BaseException, message: str) -> bool:
    """Whether this rank is to say why it ends: what all would say is said by one of each machine.

    Args:
        error: that ends it.
        message: what it would say.
    """
    if isinstance(error, KeyboardInterrupt):
        return os.environ.get("RANK", "0") == "0"
    if isinstance(error, RankLost):
        message = "lost"
        last = _attempt() == int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
        if last and LAUNCHED in os.environ:
            return False
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return True
    attempt = Path(file).parent.parent  # of this machine's ranks
    try:
        os.close(os.open(attempt / f"said-{hashlib.sha256(message.encode()).hexdigest()}", os.O_CREAT | os.O_EXCL))
    except OSError as failed:
        return not isinstance(failed, FileExistsError)
    return True
