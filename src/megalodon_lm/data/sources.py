"""Which files are read: one rule for every command, and a list of what it leaves out.

A file that is named is read, as its name says: JSONL and Parquet as such, anything else as text; `-` is standard input.
Of a folder, all files below it whose names tell that they hold text are read, in the order of their names.
"""

import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..errors import InputError

TEXTS, LINES, TABLES = (".txt", ".text", ".md"), (".jsonl", ".ndjson"), (".parquet",)
KINDS = (*TEXTS, *LINES, *TABLES)
COMPRESSIONS = (".gz", ".zst")
STANDARD_INPUT = Path("-")
MADE = (("prepared.json",), ("run.json", "recipe.toml"))
"""What tells a folder that this package made, whose files are no text to learn from."""


CLOSED = "not readable"


class LeftOut(NamedTuple):
    """A file or folder that is not read, and why."""

    path: str
    reason: str


@dataclass
class Found:
    """Files to read, in order, and what was left out in the folders."""

    files: list[Path] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)

    def reasons(self) -> dict[str, int]:
        """How many were left out, by reason."""
        return dict(Counter(left.reason for left in self.left_out).most_common())

    def __str__(self) -> str:
        """What was left out, in one line."""
        counts = ", ".join(f"{reason} ({count:,})" for reason, count in self.reasons().items())
        return f"not read, by reason: {counts}; the first is {self.left_out[0].path}" if counts else "nothing left out"


def kind_of(path: Path) -> str:
    """The suffix, in small letters, that tells what is in a file, compressed or not; "" for unknown ones."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    kind = "".join(suffixes[-2:-1] if compressed else suffixes[-1:])
    return kind if kind in (*TEXTS, *LINES) or (kind in TABLES and not compressed) else ""


def compression_of(path: Path) -> str:
    """.gz, .zst or nothing."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def stat_of(path: Path) -> os.stat_result:
    """Of a file, or of standard input."""
    return os.fstat(sys.stdin.fileno()) if path == STANDARD_INPUT else path.stat()


def stored(path: Path) -> BinaryIO:
    """The bytes of a file as they are stored, or standard input."""
    return standard_input() if path == STANDARD_INPUT else path.open("rb")


def standard_input() -> BinaryIO:
    """Standard input, made to wait for what is to come: a program that shares it may have left it without that.

    A pause would then look like its end.
    """
    stream = sys.stdin.buffer
    with suppress(AttributeError, OSError):  # on Windows, and of what is no file
        os.set_blocking(stream.fileno(), True)
    return stream


def is_stream(path: Path) -> bool:
    """Whether a file can be read only once: a pipe, a terminal, standard input."""
    return path == STANDARD_INPUT or not stat.S_ISREG(stat_of(path).st_mode)


def is_descriptor(path: Path) -> bool:
    """Whether a path is what this process has open under a number, as /dev/fd/3 is; to others it is another file."""
    name = path.absolute()
    while not re.fullmatch(r"/dev/fd|/proc/.*/fd", os.path.realpath(name.parent)):
        if not name.is_symlink():
            return False
        name = name.parent / os.readlink(name)
    return True


def find_files(sources: Sequence[str | Path], avoid: Path | None = None) -> Found:
    """The files of the sources. None is opened that could be read only once.

    Args:
        sources: files, folders, or - for standard input.
        avoid: a folder to leave out, because it is written to.

    Raises:
        InputError: no source, a missing one, one that cannot be read, or sources without any text.
    """
    if not sources:
        raise InputError("no text given; name files or folders")
    found = Found()
    for source in sources:
        path = Path(source)
        try:
            of_source = list(_inside(path, avoid) if _is_folder(path) else [(path, _unreadable(path))])
        except (FileNotFoundError, ValueError):
            raise InputError(f"no such file: {path}") from None
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from None
        _check(path, of_source)
        found.files += [file for file, reason in of_source if not reason]
        found.left_out += [LeftOut(str(file), reason) for file, reason in of_source if reason]
    if not found.files:
        given, first = ", ".join(map(str, sources)), next(iter(found.left_out), None)
        why = f"{first.path} is {first.reason}" if first else f"what is read of a folder ends in {', '.join(KINDS)}"
        raise InputError(f"there is no text in {given}: {why}")
    return found


def _is_folder(path: Path) -> bool:
    return path != STANDARD_INPUT and path.is_dir()


def _check(path: Path, found: list[tuple[Path, str]]) -> None:
    """Refuse what was named and cannot be read."""
    if _is_folder(path) and _is_made(path):
        raise InputError(f"{path} was made by megalodon and holds no text; name the text it was made from")
    if compression_of(path) and path.with_suffix("").suffix.lower() in TABLES:
        raise InputError(f"{path}: Parquet is compressed inside; decompress the file and name the .parquet")
    if found == [(path, CLOSED)]:
        raise InputError(f"cannot read {path}: permission denied")


def _inside(folder: Path, avoid: Path | None) -> Iterator[tuple[Path, str]]:
    """All files below a folder in the order of their paths, and why one is left out."""
    closed: list[OSError] = []
    found: list[tuple[Path, str]] = []
    for where, folders, files in os.walk(folder, onerror=closed.append):
        here = Path(where)
        for name in folders[:]:
            path = here / name
            if reason := _passed_by(path, avoid):
                folders.remove(name)
                found.append((path, reason))
        found += [(here / name, _reason(here / name)) for name in files]
    yield from sorted(found + [(Path(error.filename), CLOSED) for error in closed])


def _passed_by(folder: Path, avoid: Path | None) -> str:
    """Why a folder within a folder is not entered, or nothing."""
    if os.path.islink(folder):  # False where it cannot be looked at
        return "a link to a folder"
    if folder.name.startswith("."):
        return "hidden"
    if avoid is not None and folder.resolve() == avoid.resolve():
        return "the folder to write to"
    return "made by megalodon" if _is_made(folder) else ""


def _reason(path: Path) -> str:
    """Why a file within a folder is left out, or nothing."""
    if path.name.startswith("."):
        return "hidden"
    try:
        if not path.exists():
            return "a broken link"
        if not stat.S_ISREG(path.stat().st_mode):
            return "not a file"
    except PermissionError:  # of its folder
        return CLOSED
    if not kind_of(path):
        return f"of unknown kind {''.join(path.suffixes[-1:]) or 'without a suffix'}"
    return _unreadable(path)


def _unreadable(path: Path) -> str:
    """Why there is nothing to read in a file, or nothing."""
    if is_stream(path) or path.stat().st_size:  # files of the system, in /proc, tell no size
        return "" if path == STANDARD_INPUT or os.access(path, os.R_OK) else CLOSED
    try:
        with path.open("rb") as file:
            return "" if file.read(1) else "empty"
    except PermissionError:
        return CLOSED


def _is_made(folder: Path) -> bool:
    return any(all(os.path.exists(folder / name) for name in names) for names in MADE)  # False of a closed folder
