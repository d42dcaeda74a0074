"""One process at a time in a run folder."""

import os
import sys
import weakref
from pathlib import Path

from ..errors import InputError

LOCK_FILE = ".lock"


class InUse(InputError):
    """Another process is at work in the folder."""


class RunLock:
    """A lock on an existing folder, held until it is released, or the process ends however it ends.

    Args:
        folder: of the run.

    Attributes:
        note: why there is none, on a disk that has no locks; otherwise empty.

    Raises:
        InUse: another process holds it.
        InputError: the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self.note = ""
        try:
            descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(f"cannot write into {folder}: {error.strerror}") from None
        self.release = weakref.finalize(self, os.close, descriptor)
        try:
            _lock(descriptor)
        except (BlockingIOError, PermissionError):
            self.release()
            raise InUse(
                f"another process is training in {folder}; wait for its end, or train in another folder by --out"
            ) from None
        except OSError as error:
            self.note = f"{folder} cannot be locked ({error.strerror}); start no second training in it"


class NoLock:
    """Of a process that writes nothing into the folder: another one holds the lock for all of them."""

    note = ""

    def release(self) -> None:
        """Nothing is held."""


def _lock(descriptor: int) -> None:
    """Lock an open file without waiting; BlockingIOError or PermissionError if another one has."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
