"""Pictures of a comparison."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..plots import amount_axis, finite, legend, legend_height, length_axis, log_axis, picture
from .comparison_standings import UNITS, Standing

CURVES, CONTEXTS, DIFFERENCES, RATES = "curves.png", "contexts.png", "differences.png", "rates.png"
PICTURES = (DIFFERENCES, CURVES, CONTEXTS, RATES)
HIGHEST_CURVE = 1.4
"""Of what is drawn while training, over the lowest: the first steps of all are far above."""
HIGHEST_READING = 1.25
"""Of what is drawn by context, over the lowest: positions scaled without training can be far above."""
TITLES = {
    "tokens": "tokens",
    "operations": "operations, forward and backward",
    "seconds": "seconds of steps that nothing disturbs",
}


def draw(folder: Path, standings: Sequence[Standing]) -> list[str]:
    """Draw what there is to be drawn.

    Returns:
        Names of the files written.

    Raises:
        InputError: the folder cannot be written.
    """
    drawn = []
    styles = {s.name: _style(number, len(standings)) for number, s in enumerate(standings)}
    measured = [s for s in standings if s.by_context()]
    if measured and standings[0] in measured:
        _differences(folder / DIFFERENCES, measured, styles)
        drawn.append(DIFFERENCES)
    if trained := [s for s in standings if s.curve(UNITS["tokens"])[0]]:
        _curves(folder / CURVES, trained, styles)
        drawn.append(CURVES)
    if measured:
        _contexts(folder / CONTEXTS, measured, styles)
        drawn.append(CONTEXTS)
    if tuned := [s for s in standings if len(s.tried) > 1]:
        _rates(folder / RATES, tuned, styles)
        drawn.append(RATES)
    return drawn


def _style(number: int, count: int) -> dict[str, Any]:
    """Colour and line of a contender, alike in all pictures."""
    from matplotlib import colormaps

    colours = colormaps["tab10" if count <= 10 else "tab20"].colors  # type: ignore[attr-defined]
    lines = ("-", "--", ":")
    return {"color": colours[number % len(colours)], "linestyle": lines[number // len(colours) % len(lines)]}


def _show_the_lower(axis: Any, most: float) -> None:
    """What is more than `most` times the least lies above the picture, so that the others can be told apart."""
    heights = [y for line in axis.get_lines() for y in line.get_ydata()]
    if heights:
        top = min(axis.get_ylim()[1], most * min(heights))
        axis.set_ylim(min(heights) - 0.05 * (top - min(heights)), top)


def _curves(path: Path, standings: Sequence[Standing], styles: dict[str, Any]) -> None:
    """Validation by tokens, operations and time; and how far each is from the base, by tokens."""
    panels = [["tokens", "difference"], ["operations", "seconds"]]
    with picture(path, panels, 6.6 + legend_height([s.name for s in standings])) as axes:
        for unit, of in UNITS.items():
            axis = axes[unit]
            for s in standings:
                x, y = finite(zip(*s.curve(of), strict=True))
                axis.plot(x, y, label=s.name, marker="." if len(x) < 4 else "", **styles[s.name])
            _show_the_lower(axis, HIGHEST_CURVE)
            axis.set(xlabel=TITLES[unit], ylabel="bits per byte")
            axis.set_title(f"Validation by {unit}")
            amount_axis(axis.xaxis)
        axis, base = axes["difference"], standings[0]
        for s in standings:
            seeds = {r.seed for r in s.results} & {r.seed for r in base.results}
            known = dict(zip(*base.curve(UNITS["tokens"], seeds), strict=True))
            own = zip(*s.curve(UNITS["tokens"], seeds), strict=True)
            x, y = finite((at, value - known[at]) for at, value in own if at in known)
            axis.plot(x, y, marker="." if len(x) < 4 else "", **styles[s.name])
        axis.set(xlabel="tokens", ylabel="bits per byte")
        axis.set_title(f"Above {base.name}, at equal tokens")
        amount_axis(axis.xaxis)
        legend(axes["tokens"])


def _readings(standing: Standing) -> dict[str, str]:
    """What each is called in the picture."""
    return {reading: f"{standing.name}, {reading}" if reading else standing.name for reading in standing.readings()}


def _contexts(path: Path, standings: Sequence[Standing], styles: dict[str, Any]) -> None:
    with picture(
        path, [["context"]], 4.2 + legend_height([name for s in standings for name in _readings(s).values()])
    ) as axes:
        axis, contexts = axes["context"], set[int]()
        for s in standings:
            for number, (reading, name) in enumerate(_readings(s).items()):
                x, y = finite(s.by_context(reading).items())
                contexts |= set(map(int, x))
                look = styles[s.name] | ({"linestyle": ("--", ":", "-.")[(number - 1) % 3]} if reading else {})
                axis.plot(x, y, marker="o", markersize=3, label=name, **look)
        _show_the_lower(axis, HIGHEST_READING)
        length_axis(axis, contexts)
        axis.set(xlabel="state emptied every so many tokens; the last is never", ylabel="bits per byte")
        axis.set_title("Held-out documents by context; what lies far above is in the table alone")
        legend(axis)


def _differences(path: Path, standings: Sequence[Standing], styles: dict[str, Any]) -> None:
    """From the base at the end, the best at the top."""
    base = standings[0]
    shown = sorted((s for s in standings if math.isfinite(s.difference(base)[0])), key=lambda s: s.difference(base)[0])
    with picture(path, [["difference"]], 1.4 + 0.3 * len(shown)) as axes:
        axis = axes["difference"]
        theirs = {r.seed: r.bits_per_byte for r in base.results}
        for place, s in enumerate(reversed(shown)):
            value, error, _ = s.difference(base)
            colour = styles[s.name]["color"]
            axis.errorbar(value, place, xerr=None if math.isnan(error) else error, fmt="o", color=colour, capsize=3)
            seeds = [r.bits_per_byte - theirs[r.seed] for r in s.results if r.seed in theirs]
            axis.plot(seeds, [place] * len(seeds), "|", color=colour, alpha=0.6)
        axis.set_yticks(range(len(shown)), [s.name for s in reversed(shown)])
        axis.set_ylim(-0.7, len(shown) - 0.3)
        axis.axvline(0, color="0.5", linewidth=0.8)
        axis.set_xlabel(f"bits per byte above {base.name}; bars: standard error over seeds, strokes: each seed")
        axis.set_title("Held-out documents, longest context")


def _rates(path: Path, standings: Sequence[Standing], styles: dict[str, Any]) -> None:
    with picture(path, [["rates"]], 3.8 + legend_height([s.name for s in standings])) as axes:
        axis = axes["rates"]
        for s in standings:
            x, y = finite(sorted(s.tried.items()))
            axis.plot(x, y, marker="o", markersize=3, label=s.name, **styles[s.name])
            if len(s.full) > 1:
                x, y = finite(sorted(s.full.items()))
                axis.plot(x, y, marker="s", markersize=4, **styles[s.name] | {"linestyle": ":"})
        log_axis(axis.xaxis, [rate for s in standings for rate in (*s.tried, *s.full)])
        axis.set(xlabel="factor on the learning rates", ylabel="bits per byte")
        axis.set_title("Validation of the runs that chose the rate; dotted: with all steps")
        legend(axis)
