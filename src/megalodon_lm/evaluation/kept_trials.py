"""Trials kept in a folder, each in a file of its own as soon as it is finished.

So an interrupted run is gone on with, and several processes may share a folder.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..errors import InputError
from ..files import FIGURES, check_writable, make_folder, write_atomically
from ..tables import read_table


class Trial(Protocol):
    """Something to be carried out once."""

    @property
    def file_name(self) -> str:
        """Of its result: tells the trials of a folder apart."""


class Result(Protocol):
    """What came out of it."""

    def figures(self) -> dict[str, Any]:
        """For JSON."""


T = TypeVar("T", bound=Trial)
R = TypeVar("R", bound=Result)


def keep(
    trials: Sequence[T], folder: Path, read: Callable[[Path, T], R], carry_out: Callable[[int, T], R]
) -> Iterator[R]:
    """Results of trials, in their order: read from the folder, or carried out and written there.

    Args:
        trials: in order.
        folder: made if it is not there.
        read: the result in a file, of a trial.
        carry_out: the result of a trial, given its number too.

    Raises:
        InputError: a folder that cannot be written, or one that holds other trials.
    """
    make_folder(folder)
    paths = [folder / trial.file_name for trial in trials]
    known = {path: read(path, trial) for path, trial in zip(paths, trials, strict=True) if path.exists()}
    for number, (path, trial) in enumerate(zip(paths, trials, strict=True)):
        if path not in known:
            check_writable(path, FIGURES)
            known[path] = carry_out(number, trial)
            write_atomically(path, json.dumps(known[path].figures(), indent=2) + "\n")
        yield known[path]


def read_figures(
    path: Path,
    expected: dict[str, Any],
    settings: Callable[[dict[str, Any]], dict[str, Any]],
    result: Callable[[dict[str, Any]], R],
) -> R:
    """The result in a file.

    Args:
        path: of the file.
        expected: settings of the trial.
        settings: those in what the file holds, as they are written today.
        result: in what the file holds.

    Raises:
        InputError: unreadable, no such file, or of other settings.
    """
    figures = read_table(path, "JSON", "the trial")
    try:
        known, found = settings(figures), result(figures)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{path} is no trial of recall; name another folder") from None
    if known != json.loads(json.dumps(expected)):
        raise InputError(f"{path} is a trial with other settings; name another folder")
    return found
