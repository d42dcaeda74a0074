"""Metrics for TensorBoard."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from .metrics import StepMetrics


def summary_writer() -> "type[SummaryWriter]":
    """What writes event files.

    Raises:
        InputError: tensorboard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("tensorboard is not installed; pip install tensorboard, or leave out --tensorboard") from None
    return SummaryWriter


class TensorBoard:
    """Writes the metrics of each step as event files into a run folder.

    Args:
        folder: of the run.
        step: steps done before; later ones, of a run that was cut off or went back, are hidden.

    Raises:
        InputError: tensorboard is not installed, or the folder cannot be written.
    """

    def __init__(self, folder: Path, step: int = 0):
        self._folder = folder
        self._open(step)

    def _open(self, step: int) -> None:
        with self._told():
            self._writer, self._step = summary_writer()(str(self._folder), purge_step=step + 1), step

    def write(self, metrics: "StepMetrics") -> None:
        """The numbers of one step."""
        if metrics.step <= self._step:  # the run went back
            self.close()
            self._open(metrics.step - 1)
        self._step = metrics.step
        with self._told():
            for name, value in asdict(metrics).items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(name, value, metrics.step)

    def close(self) -> None:
        """Write what waits."""
        with self._told():
            self._writer.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """A full disk in one line."""
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot write events for TensorBoard into {self._folder}: {error.strerror}") from None
