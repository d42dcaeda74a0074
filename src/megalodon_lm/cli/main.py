"""Entry point of the command `megalodon`: whatever goes wrong ends in one line and an exit code.

It imports next to nothing by itself, so that an interrupt is caught while the rest is imported.
"""

import errno
import os
import sys
import warnings
from contextlib import suppress
from typing import TextIO

from ..errors import InputError, InputNote, RankLost
from ..parallel.started import started_ranks

DEBUG = "MEGALODON_DEBUG"
LONGEST = 1000  # characters of a message
OF_THE_MACHINE = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.EMFILE,
    errno.ENFILE, errno.ENOMEM, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip
"""Errors of the operating system that no program can rule out before it meets them."""

NO_MEMORY = (
    "out of memory", "can't allocate memory", "not enough memory", "bad_alloc",
    "could not create a primitive", "can't start new thread", "Storage size calculation overflowed", "array is too big",
)  # fmt: skip
"""What PyTorch's allocators, oneDNN, Python and NumPy say then."""

KEPT_PRODUCTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256", "LRU_CACHE_CAPACITY": "256"}
"""Shapes for which oneDNN and PyTorch keep a prepared product, some megabytes each. Their own 1,024 fill gigabytes
where each batch has another number of rows."""


def main(arguments: list[str] | None = None) -> None:
    """Parse and run.

    Args:
        arguments: of the command line; None for those of the process.

    Raises:
        SystemExit: 2 for input that cannot be used, a full disk or too little memory; 3 when another rank was lost; 130
            interrupted; 141 when nobody reads the output any more; 1 for a fault of this package. With MEGALODON_DEBUG
            set, what was raised instead.
    """
    warnings.showwarning = _show
    for name, number in KEPT_PRODUCTS.items():  # before torch is imported
        os.environ.setdefault(name, number)
    code = 0
    try:
        _open_streams()
        try:
            from .commands import parse

            parse(arguments).run()
        finally:
            _flush(sys.stdout)
    except (Exception, KeyboardInterrupt) as error:
        code = _said(error)
    except SystemExit as ended:
        if started_ranks() == 1:
            raise
        code = ended.code if isinstance(ended.code, int) else 0
    if started_ranks() > 1:
        os._exit(code)  # threads that talk to other ranks, which may be gone, hold up the interpreter's own end
    if code:
        sys.exit(code)


def _open_streams() -> None:
    """Closed streams become empty ones, and a character that an output cannot show becomes a question mark."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _flush(stream: TextIO) -> None:
    """Write out what waits. Where that fails, it is dropped, or Python would try and fail again at its end."""
    try:
        stream.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise


def _said(error: BaseException) -> int:
    """Say what went wrong, in a line; the exit code."""
    if os.environ.get(DEBUG):
        raise error
    code, message = _verdict(error)
    if started_ranks() > 1:
        from ..parallel.launch import to_say

        message = message if to_say(error, message) else ""
    with suppress(OSError):
        if message:
            line = " ".join(message.split())
            if len(line) > LONGEST:
                line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
            print("megalodon:", line, file=sys.stderr)
        _flush(sys.stderr)
    return code


def _verdict(error: BaseException) -> tuple[int, str]:
    """The exit code, and what to say."""
    if isinstance(error, InputError):
        return 3 if isinstance(error, RankLost) else 2, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, BrokenPipeError):
        return 141, ""
    if _is_out_of_memory(error):
        return 2, (
            "error: not enough memory; lower training.batch_size, training.length or the sizes of the model, write "
            f"fewer --samples, or close other programs ({error})"
        )
    if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
        place = f"{error.filename}: " if error.filename else ""
        return 2, f"error: {place}{error.strerror}"
    return 1, (
        f"{type(error).__name__}: {error}; this is a fault of megalodon and not of what it was given; "
        f"run it with {DEBUG}=1 to see where it happened"
    )


def _is_out_of_memory(error: BaseException) -> bool:
    said = isinstance(error, RuntimeError | ValueError) and any(words in str(error) for words in NO_MEMORY)
    return said or isinstance(error, MemoryError)


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A note in one line; other warnings as Python shows them. What all ranks are warned of, the first one shows."""
    if started_ranks() > 1 and os.environ.get("RANK", "0") != "0":
        return
    if issubclass(category, InputNote):
        print(f"megalodon: {message}", file=sys.stderr)
    else:
        (file or sys.stderr).write(warnings.formatwarning(message, category, filename, lineno, line))


if __name__ == "__main__":
    main()
