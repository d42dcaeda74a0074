"""One of several ranks carries out a command, and all of them compute its model: each sequence is shared out.

So a text is read, unpacked and cut into tokens once, wherever it comes from, and what is shown or written is so once.
The others wait for calls of the model, and read their part of each.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import RankLost
from ..interrupts import interruptible
from ..model.language_model import LanguageModel
from ..state import State
from .ranks import Ranks

FOREVER = timedelta(days=365)
"""How long ranks wait for a call: a text may come through a pipe, as slowly as it likes."""
_CPU = torch.device("cpu")


class Leading:
    """A model on the first of several ranks: a call of it is a call on all. Everything else is the model's own.

    Args:
        reader: the same on every rank; each call of it needs all.
        calls: the group that calls are told to.
    """

    def __init__(self, reader: Any, calls: dist.ProcessGroup):
        self._reader, self._calls, self._busy = reader, calls, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_reader"], name)

    def __call__(self, tokens: Tensor, state: State | None = None, **choices: Any) -> tuple[Tensor, State]:
        """See Decoder.forward; an interrupt waits until the others have done their part."""
        device = tokens.device.type
        kept = None if state is None else state.compacted().to("cpu")
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with interruptible() as interrupted:
            self._busy = True
            self._tell((tokens.cpu(), kept, precision, {name: _moved(value, _CPU) for name, value in choices.items()}))
            made = self._reader(tokens, state, **choices)
            self._busy = False
        if interrupted():
            raise KeyboardInterrupt
        return made

    def dismiss(self) -> None:
        """Let the others end, unless they are in the middle of a call that failed here."""
        if not self._busy:
            self._tell(None)

    def _tell(self, call: Any) -> None:
        dist.broadcast_object_list([call], 0, self._calls, _CPU)


def follow(reader: Any, calls: dist.ProcessGroup) -> None:
    """Take part in the calls of the first rank until there are no more; see Leading."""
    device = reader.device
    while True:
        told: list[Any] = [None]
        dist.broadcast_object_list(told, 0, calls, _CPU)
        if told[0] is None:
            return
        tokens, kept, precision, choices = told[0]
        state = None if kept is None else kept.filled_up().to(device)
        autocast = torch.autocast(device.type, precision, enabled=precision is not None)
        with torch.no_grad(), autocast:
            reader(tokens.to(device), state, **{name: _moved(value, device) for name, value in choices.items()})


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def led(model: LanguageModel, ranks: Ranks) -> Iterator[LanguageModel]:
    """A model to be called by the first rank, which all compute; the others stay here until it is done, and end.

    One process alone has its own model.

    Args:
        model: the same on every rank, in evaluation mode.
        ranks: with a mesh of `chunk` alone.

    Raises:
        RankLost: one of them is gone, or did not answer in time.
    """
    if ranks.ranks == 1:
        yield model
        return
    with ranks.together():
        reader = ranks.apply(model, None)
        calls = dist.new_group(backend="gloo", timeout=FOREVER)
        assert isinstance(calls, dist.ProcessGroup)
        for number in (signal.SIGINT, signal.SIGTERM):  # the first rank decides when all end
            signal.signal(number, signal.default_int_handler if ranks.is_first else signal.SIG_IGN)
        if not ranks.is_first:
            follow(reader, calls)
            sys.stderr.flush()
            os._exit(0)
        leading: Any = Leading(reader, calls)
        try:
            yield leading
        except BaseException as error:
            if not isinstance(error, RankLost):
                leading.dismiss()
            raise
        leading.dismiss()
