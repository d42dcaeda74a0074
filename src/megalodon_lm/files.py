"""Writing files so that a reader finds the old one or the new one, never half of either."""

import errno
import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import InputError

_BEGINNING = 4096  # bytes in which a kind of file is known
_UMASK = threading.Lock()  # it can be read only by setting another one


@dataclass(frozen=True)
class Kind:
    """A kind of file that commands write where they are told to."""

    name: str
    marks: tuple[bytes, ...] = ()
    """One of these stands in the first bytes of such a file; without any, no file is ever taken for one."""
    endings: tuple[str, ...] = ()
    """Of its name; none for any."""


ANSWERS = Kind("a file of answers", (b'"said"',))
ARCHIVE = Kind("an archive of runs", (b"\xfd7zXZ\x00",), (".xz",))
BOOKMARK = Kind("a bookmark", (b'"format":"megalodon-state',))
COMPARISON = Kind("a page of a comparison", (b"<!-- megalodon compare -->",))
FIGURES = Kind(
    "a file of figures",
    (
        b'"bits_per_byte_by_context"',
        b'"ratio_median"',
        b'"accuracy_by_distance"',
        b'"compared"',
        b'"margin"',
        b'{\n  "accuracy":',
    ),
)
PICTURE = Kind("a picture", (b"\x89PNG", b"%PDF", b"<svg"), (".png", ".pdf", ".svg"))
RESULTS = Kind("a file of results", (b'"megalodon_results"',))
TOKENIZER = Kind("a tokenizer")  # models depend on one that is there


@contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A file beside the target, at the end flushed to disk and renamed over it.

    A pipe or a device is written to as it is.

    Raises:
        InputError: the folder is missing or not writable, or the disk is full; the old file is untouched.
    """
    path = Path(path)
    temporary = None
    try:
        if _is_device(path):
            with path.open("wb") as file:
                yield file
            return
        path = Path(os.path.realpath(path))  # the file behind a link, not the link
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        give_mode(Path(temporary))
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; nothing there was changed") from None
    finally:  # also when interrupted
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write a whole file, or nothing; raises as `replacing`."""
    with replacing(path) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


def make_folder(path: Path) -> None:
    """Make a folder that may be there already, and those around it.

    Raises:
        InputError: it cannot be made, or a file has its name.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {path}: {error.strerror}") from None


def is_unfinished(path: Path, name: str) -> bool:
    """Whether a file is what a killed write_atomically to `name` leaves behind."""
    return path.name.startswith(f".{name}.")


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk.

    Some systems cannot say so of a folder: Windows does not open one, some network disks refuse. Then nothing.
    """
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def check_writable(path: str | Path, kind: Kind) -> None:
    """Refuse a path that could not be written, or that holds something else, before work is done for it.

    Args:
        path: of the file to write.
        kind: of the file: only an empty file, or one of the same kind, is replaced.

    Raises:
        InputError: the folder is missing or not writable, or the path is a folder, a file of another kind, or one whose
            name does not end as such files do.
    """
    path = Path(path)
    if kind.endings and path.suffix.lower() not in kind.endings:
        raise InputError(f"cannot write {path}: the name of {kind.name} ends in {', '.join(kind.endings)}")
    try:
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder; name a file in it")
        if _is_device(path):
            return
        if path.exists():
            with path.open("rb") as file:
                beginning = file.read(_BEGINNING)
            if beginning and not any(mark in beginning for mark in kind.marks):
                known = f"is not {kind.name}" if kind.marks else "is there already"
                raise InputError(f"cannot write {path}: it {known}, and is not replaced; name another file")
        with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(path))):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def _is_device(path: Path) -> bool:
    """Whether something is there that is neither a file nor a folder."""
    return path.exists() and not path.is_file() and not path.is_dir()


def digest(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as content:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def check(path: Path, expected: dict[str, Any], verify: bool = True) -> None:
    """Refuse a file that is not what was written.

    Raises:
        InputError: missing, of another size or altered.
    """
    try:
        size = path.stat().st_size
        found = digest(path) if verify and size == expected["bytes"] else expected
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    if size != expected["bytes"]:
        raise InputError(f"{path} has {size} bytes, not {expected['bytes']}; it was truncated or replaced")
    if found["sha256"] != expected["sha256"]:
        raise InputError(f"{path} was altered or replaced: its checksum does not match")


def give_mode(path: Path) -> None:
    """Let a file that was made for this user alone be what the umask says of new ones."""
    with _UMASK:
        mask = os.umask(0)
        os.umask(mask)
    os.chmod(path, 0o666 & ~mask)
