"""Pictures: matplotlib without a display, in one style, legible at the width of a page."""

import io
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from .files import PICTURE, check_writable, write_atomically

WIDTH = 9.0  # inches; a page shows them at some 90 pixels each, so that letters of 10 points stay legible
TICKS = 8  # that have room beside each other in half that width
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


@contextmanager
def picture(path: Path, panels: Sequence[Sequence[str]], height: float = 3.6, **grid: Any) -> Iterator[dict[str, Any]]:
    """Panels to be drawn on; written to the file afterwards, atomically.

    Args:
        path: ends in .png, .svg or .pdf.
        panels: rows of names; one that is repeated takes several places.
        height: in inches.
        grid: for matplotlib's subplot_mosaic, such as width_ratios.

    Yields:
        The panels by name, as matplotlib axes.

    Raises:
        InputError: the path cannot be written, holds something else, or its ending names no kind of picture.
    """
    check_writable(path, PICTURE)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplot_mosaic(
            [list(row) for row in panels], figsize=(WIDTH, height), layout="constrained", **grid
        )
        try:
            yield axes
            drawn = io.BytesIO()
            figure.savefig(drawn, format=path.suffix[1:].lower())
        finally:
            pyplot.close(figure)
    write_atomically(path, drawn.getvalue())


def legend(axis: Any, drawn: Mapping[str, Any] | None = None) -> None:
    """Say above all panels what is drawn; legend_height is what the picture needs for it.

    Args:
        axis: of the picture.
        drawn: lines by name; None for those with a label in the axis.
    """
    if drawn is None:
        lines, names = axis.get_legend_handles_labels()
        drawn = dict(zip(names, lines, strict=True))
    columns = _legend_columns(drawn)
    axis.figure.legend(list(drawn.values()), list(drawn), loc="outside upper center", ncols=columns)


def legend_height(names: Collection[str]) -> float:
    """In inches."""
    return 0.25 * -(-len(names) // _legend_columns(names))


def _legend_columns(names: Collection[str]) -> int:
    """As many as have room beside each other: inches for a line and its margins, and for each letter."""
    return max(1, int(WIDTH / (0.6 + 0.09 * max(map(len, names), default=0))))


def finite(points: Iterable[tuple[float, float | None]]) -> tuple[list[float], list[float]]:
    """The points that can be drawn, as coordinates x and y; those without a finite y are left out."""
    kept = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
    return [x for x, _ in kept], [y for _, y in kept]


def short(number: float) -> str:
    """1024 is 1K, 1048576 is 1M; what is no multiple stays as it is."""
    for size, letter in ((1 << 20, "M"), (1 << 10, "K")):
        if number >= size and number % size == 0:
            return f"{number / size:.0f}{letter}"
    return f"{number:,.0f}"


def length_axis(axis: Any, lengths: Iterable[float]) -> None:
    """Make x a logarithmic axis of lengths, with ticks at powers of two or, where they would collide, of four."""
    lengths = list(lengths)
    low, high = 0.99 * min(lengths, default=1), 1.01 * max(lengths, default=1)
    powers = [2**k for k in range(64) if low <= 2**k <= high]
    ticks = (powers if len(powers) <= TICKS else [p for p in powers if p.bit_length() % 2]) or lengths[:1]
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [short(tick) for tick in ticks])
    axis.minorticks_off()


def amount_axis(which: Any) -> None:
    """Label a linear axis (axis.xaxis, axis.yaxis) of counts: 500K, 2M, of thousands and millions."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    which.set_major_locator(MaxNLocator(5))
    which.set_major_formatter(EngFormatter(sep=""))


def log_axis(which: Any, values: Iterable[float]) -> None:
    """Make axis.xaxis or axis.yaxis logarithmic, with plain numbers at the powers of ten, or at 1, 2 and 5 of each.

    Within a factor of two it stays linear.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    positive = [value for value in values if value > 0] or [1.0]
    ratio = max(positive) / min(positive)
    if ratio < 2:
        which.set_major_locator(MaxNLocator(4))
        return
    (which.axes.set_xscale if which.axis_name == "x" else which.axes.set_yscale)("log")
    which.set_major_locator(LogLocator(subs=(1, 2, 5) if ratio < 50 else (1,)))
    which.set_major_formatter("{x:,.10g}")
    which.set_minor_formatter(NullFormatter())


class HeatMap(NamedTuple):
    """Numbers from 0 to 100 on a grid."""

    title: str
    values: Any
    """(rows, columns); NaN where there is none."""
    columns: Sequence[str]
    """Their labels."""
    rows: Sequence[str]
    """Their labels, the first lowest."""


def draw_heat_maps(path: Path, maps: Sequence[HeatMap], xlabel: str, ylabel: str) -> None:
    """Heat maps, two beside each other, with the numbers in the cells.

    Raises:
        InputError: the path cannot be written, or its ending names no kind of picture.
    """
    names = [str(number) for number in range(len(maps))]
    panels = [[*names[i : i + 2], *["."] * (i + 2 - len(names))] for i in range(0, len(names), 2)]
    most = max(len(m.rows) for m in maps)
    with picture(path, panels, (0.45 * most + 1.4) * len(panels)) as axes:
        for name, (title, values, columns, rows) in zip(names, maps, strict=True):
            axis = axes[name]
            axis.imshow(values, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=100)
            axis.grid(visible=False)
            axis.set_xticks(range(len(columns)), columns)
            axis.set_yticks(range(len(rows)), rows)
            axis.set(xlabel=xlabel, ylabel=ylabel)
            axis.set_title(title)
            for row, of_row in enumerate(values):
                for column, value in enumerate(of_row):
                    if math.isfinite(value):
                        dark = "w" if value < 60 else "k"
                        axis.text(column, row, f"{value:.0f}", ha="center", va="center", color=dark)
