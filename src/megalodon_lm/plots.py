"""Pictures: matplotlib without a display."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError

HEIGHT = 4.2  # inches


@contextmanager
def picture(path: Path, columns: int, width: float = 5.5) -> Iterator[Any]:
    """Panels side by side, to be drawn on; written to the file afterwards.

    Args:
        path: ends in .png, .svg or .pdf.
        columns: panels.
        width: of each, in inches.

    Yields:
        The panels, as matplotlib axes.

    Raises:
        InputError: the path cannot be written, or its ending names no kind of picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width * columns, HEIGHT), squeeze=False, layout="constrained")
    try:
        yield axes[0]
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    finally:
        pyplot.close(figure)
