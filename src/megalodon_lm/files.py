"""Writing files so that a reader finds the old one or the new one, never half of either."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

from .errors import InputError


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write beside the target, flush to disk, then rename over it.

    Raises:
        InputError: the folder is missing or not writable, or the disk is full; the old file is untouched.
    """
    path = Path(path)
    raw = data.encode("utf-8") if isinstance(data, str) else data
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(descriptor, "wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}; nothing there was changed") from None
    finally:  # also when interrupted
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def is_unfinished(path: Path, name: str) -> bool:
    """Whether a file is what a killed write_atomically to `name` leaves behind."""
    return path.name.startswith(f".{name}.")


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk. Folders cannot be opened on Windows; then nothing."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(path: str | Path) -> None:
    """Refuse a place that could not be written, before work is done for it.

    Raises:
        InputError: the folder is missing or not writable, or the path is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder; name a file in it")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
