"""Records as a table and as a picture."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from ..plots import picture
from .records import Record
from .suite import MEASURES, short

COLOURS = {
    "megalodon": "tab:blue",
    "llama": "tab:orange",
    "mamba": "tab:green",
    "rwkv": "tab:red",
    "megalodon-jax": "tab:purple",
    "portable": "tab:brown",
}
"""Of the lines in the picture; floors are grey."""


def table(records: Sequence[Record]) -> Table:
    """One row a record."""
    shown = Table(
        caption="ours, its: tokens per second; ratio: median (smallest - largest) of the rounds; floor: ours over what "
        "the machine could do at most; MB: most memory beyond the weights"
    )
    for column in ("measure", "length", "peer"):
        shown.add_column(column, no_wrap=True)
    for column in ("ours", "its", "ratio", "floor", "our MB", "its MB", "rounds"):
        shown.add_column(column, justify="right", no_wrap=True)
    for r in sorted(records, key=lambda r: (MEASURES.index(r.measure), r.peer_name, r.length)):
        shown.add_row(
            r.measure,
            short(r.length),
            r.peer_name,
            f"{r.ours:,.0f}",
            f"{r.peer:,.0f}",
            f"{r.ratio_median:.2f} ({r.ratio_low:.2f} - {r.ratio_high:.2f})",
            f"{r.floor_fraction:.0%}",
            _megabytes(r.ours_memory),
            _megabytes(r.peer_memory),
            str(r.rounds),
        )
    return shown


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.1f}"


def draw(path: Path, records: Sequence[Record]) -> None:
    """Tokens per second against length, one panel a measure and one line a model.

    Raises:
        InputError: the path cannot be written, or its ending names no kind of picture.
    """
    measures = [m for m in MEASURES if any(r.measure == m for r in records)]
    with picture(path, len(measures), 4.4) as axes:
        for axis, measure in zip(axes, measures, strict=True):
            for name, points in sorted(_lines(records, measure).items()):
                style = "--" if "floor" in name else "-"
                colour = COLOURS.get(name, "0.5")
                axis.plot(*zip(*sorted(points.items()), strict=True), "o", linestyle=style, color=colour, label=name)
            lengths = sorted({r.length for r in records if r.measure == measure})
            axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="tokens per second", title=measure)
            axis.set_xticks(lengths, [short(length) for length in lengths])
            axis.minorticks_off()
            axis.legend(fontsize=8)


def _lines(records: Sequence[Record], measure: str) -> dict[str, dict[int, float]]:
    """Rates by model and length; ours are the mean over the peers measured at that length."""
    ours: dict[int, list[float]] = {}
    lines: dict[str, dict[int, float]] = {}
    for r in (r for r in records if r.measure == measure):
        ours.setdefault(r.length, []).append(r.ours)
        if not r.peer_name.startswith("megalodon at"):
            lines.setdefault(r.peer_name, {})[r.length] = r.peer
    lines["megalodon"] = {length: sum(rates) / len(rates) for length, rates in ours.items()}
    return lines
