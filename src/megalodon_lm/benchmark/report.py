"""Records as a table and as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from ..plots import legend, legend_height, length_axis, log_axis, picture, short
from .records import Record
from .suite import MEASURES


class Look(NamedTuple):
    """How a contender is shown: what it is called, in which colour and line."""

    label: str
    colour: str
    line: str = "-"


FLOOR = Look("the machine's floor", "0.45", "--")
LOOKS = {
    "megalodon": Look("Megalodon", "tab:blue"),
    "llama": Look("Llama", "tab:orange"),
    "transformers_llama": Look("Llama of transformers", "tab:gray"),
    "rwkv4": Look("RWKV-4", "lightcoral"),
    "rwkv7": Look("RWKV-7", "tab:red"),
    "mamba": Look("Mamba", "yellowgreen"),
    "mamba2": Look("Mamba-2", "tab:green"),
    "gated_deltanet": Look("Gated DeltaNet", "tab:brown"),
    "mega": Look("MEGA", "tab:pink"),
    "gecko": Look("Gecko", "tab:olive"),
    "megalodon-jax": Look("megalodon-jax", "tab:purple"),
    "portable": Look("portable code", "tab:cyan"),
}
"""In the order of every table, legend and panel; floors come behind them."""
TITLES = {"training": "Training", "prefill": "Prefill", "decode": "Decoding", "cema": "CEMA"}
LENGTHS = {"decode": "tokens read before"}
COLUMNS = 2


def _place(peer: str) -> tuple[int, str]:
    """Of a contender in the order of LOOKS."""
    return (list(LOOKS).index(peer) if peer in LOOKS else len(LOOKS)), peer


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
    for r in sorted(records, key=lambda r: (MEASURES.index(r.measure), _place(r.peer_name), r.length)):
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
    """Tokens per second, one panel a measure: lines over length, or bars where there is one length alone.

    Raises:
        InputError: the path cannot be written, or its ending names no kind of picture.
    """
    measures = [m for m in MEASURES if any(r.measure == m for r in records)]
    rows = [measures[at : at + COLUMNS] for at in range(0, len(measures), COLUMNS)]
    rows[-1] += rows[-1][-1:] * (len(rows[0]) - len(rows[-1]))
    lengths = [r.length for r in records]
    names = {LOOKS.get(peer, FLOOR).label for r in records for peer in ("megalodon", r.peer_name)}
    with picture(path, rows, 3.2 * len(rows) + 0.15 + legend_height(names)) as axes:
        drawn: dict[str, Any] = {}
        for measure in measures:
            axis, rates = axes[measure], _rates([r for r in records if r.measure == measure])
            axis.set_title(_message([r for r in records if r.measure == measure]))
            if len(set().union(*rates.values())) == 1:
                _draw_bars(axis, {peer: next(iter(points.values())) for peer, points in rates.items()})
                continue
            for peer, points in rates.items():
                look = LOOKS.get(peer, FLOOR)
                x, y = zip(*sorted(points.items()), strict=True)
                (drawn[look.label],) = axis.plot(x, y, "o", linestyle=look.line, color=look.colour, markersize=4)
            axis.set(xlabel=LENGTHS.get(measure, "tokens"), ylabel="tokens per second")
            log_axis(axis.yaxis, [rate for points in rates.values() for rate in points.values()])
            length_axis(axis, lengths)
        if drawn:
            known = [look.label for look in (*LOOKS.values(), FLOOR) if look.label in drawn]
            legend(axis, {label: drawn[label] for label in known})


def _draw_bars(axis: Any, rates: dict[str, float]) -> None:
    for place, (peer, rate) in enumerate(rates.items()):
        look = LOOKS.get(peer, FLOOR)
        axis.barh(place, rate, color=look.colour, height=0.4)
        axis.text(0, place - 0.25, f" {look.label}: {rate:,.0f}", va="bottom")
    axis.set(xlabel="tokens per second", xticks=[], yticks=[], ylim=(len(rates) - 0.5, -0.7))
    axis.grid(False)


def _message(records: Sequence[Record]) -> str:
    """What a panel says: our rate beside that of the first peer, from the lowest ratio to the highest."""
    measure, peer = records[0].measure, min((r.peer_name for r in records), key=_place)
    ratios = sorted(r.ratio_median for r in records if r.peer_name == peer)
    if peer not in LOOKS:
        return f"{TITLES[measure]}, tokens per second"
    ends = dict.fromkeys((ratios[0], ratios[-1]))
    several = " to ".join(f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}" for ratio in ends)
    return f"{TITLES[measure]}: {several} times as fast as {LOOKS[peer].label}"


def _rates(records: Sequence[Record]) -> dict[str, dict[int, float]]:
    """Rates of one measure by contender, in order, and length; ours are the mean over the peers at that length."""
    ours: dict[int, list[float]] = {}
    rates: dict[str, dict[int, float]] = {}
    for r in records:
        ours.setdefault(r.length, []).append(r.ours)
        if not r.peer_name.startswith("megalodon at"):
            rates.setdefault(r.peer_name, {})[r.length] = r.peer
    rates["megalodon"] = {length: sum(values) / len(values) for length, values in ours.items()}
    return {peer: rates[peer] for peer in sorted(rates, key=_place)}
