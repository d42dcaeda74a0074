"""What a comparison says, as tables, a page, pictures and JSON."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ..files import ARCHIVE, COMPARISON, FIGURES, PICTURE, check_writable, make_folder, write_atomically
from ..tables import finite_values
from .comparison import Comparison
from .comparison_archive import ARCHIVE_FILE, pack
from .comparison_plots import PICTURES, draw
from .comparison_runs import RECIPE_FILE
from .comparison_standings import UNITS, Standing, at_equal

FIGURES_FILE, PAGE_FILE = "comparison.json", "comparison.md"
MARK = "<!-- megalodon compare -->"


class Table(NamedTuple):
    """To be shown, on a terminal or a page: texts by row."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    note: str

    def markdown(self) -> str:
        """With the first column to the left, all others to the right."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = "\n".join(f"| {' | '.join(cells)} |" for cells in (self.columns, rule, *self.rows))
        return f"## {self.title}\n\n{lines}\n\n{self.note}\n"


def tables(standings: Sequence[Standing]) -> list[Table]:
    """All that the figures say in numbers."""
    return [_results(standings), _contexts(standings), _costs(standings), _rates(standings)]


def _results(standings: Sequence[Standing]) -> Table:
    base = standings[0]
    operations, seconds = (at_equal(standings, UNITS[unit]) for unit in ("operations", "seconds"))
    rows = []
    for s in standings:
        difference, error, _ = s.difference(base)
        compared = ((difference, "+.4f"), (error, ".4f"), (difference / base.bits_per_byte, "+.1%"))
        others = ["", "", ""] if s is base else [_number(*value) for value in compared]
        rows.append([
            s.name, str(len(s.results)), _number(s.bits_per_byte, ".4f"), *others,
            _number(s.mean(lambda r: r.validation), ".4f"), _number(operations.get(s.name), ".4f"),
            _number(seconds.get(s.name), ".4f"),
        ])  # fmt: skip
    columns = ("", "seeds", "bits per byte", f"minus {base.name}", "error", "relative", "validation",
               "at equal operations", "at equal time")  # fmt: skip
    note = (
        "Bits per byte: of the held-out documents with the longest context, mean over the seeds. The difference is "
        "paired by seed; its error is the standard error over the seeds that both have, of two at least. Validation: "
        "of the beginning of the validation text, after all tokens; and when each has had as many operations, or as "
        "much time, as the one that needs least of it for all its tokens, its rate not yet lowered then."
    )
    return Table("Result", columns, rows, note)


def _contexts(standings: Sequence[Standing]) -> Table:
    found = {
        f"{s.name}, {reading}" if reading else s.name: s.by_context(reading)
        for s in standings
        for reading in s.readings()
    }
    contexts = sorted({context for values in found.values() for context in values})
    rows = [[name, *(_number(values.get(c), ".4f") for c in contexts)] for name, values in found.items()]
    note = "Bits per byte of the held-out documents with the state emptied every so many tokens; the last is never."
    return Table("By context", ("", *(f"{c:,}" for c in contexts)), rows, note)


def _costs(standings: Sequence[Standing]) -> Table:
    rows = [
        [
            s.name, f"{s.results[0].parameters:,}", f"{s.results[0].flops_per_token / 1e6:.1f}M",
            f"{s.results[0].state_bytes:,}", f"{s.mean(lambda r: r.speed):,.0f}",
            "" if s.pace is None else f"{s.pace.median:.2f} ({s.pace.low:.2f} to {s.pace.high:.2f})",
            f"{s.mean(lambda r: r.tokens / r.speed if r.speed else math.nan):,.0f}",
            f"{s.mean(lambda r: r.seconds):,.0f}", _megabytes(s),
        ]
        for s in standings if s.results
    ]  # fmt: skip
    columns = ("", "parameters", "operations a token", "state bytes", "tokens a second",
               f"times {standings[0].name}", "seconds", "by the clock", "MB")  # fmt: skip
    note = (
        "Operations: forward and backward. Tokens a second: of steps that all contenders took in turns, the median of "
        "the rounds, and the rounds' ratios; where these are not measured yet, of the fastest tenth of a run's own "
        "steps at least. Seconds: all tokens at that speed, and by the clock. MB: what a step takes beyond weights and "
        "moments."
    )
    return Table("Cost", columns, rows, note)


def _rates(standings: Sequence[Standing]) -> Table:
    rates = sorted({rate for s in standings for rate in (*s.tried, *s.full)})
    rows = []
    for s in standings:
        edge = ", ".join([*(["at the edge"] if s.at_edge else []), *(["extended"] if s.extended else [])])
        peak = s.results[0].learning_rate if s.results else None
        ends = [_number(s.rate, "g"), _number(peak, "g"), edge]
        rows.append([s.name, *(_number(s.tried.get(rate), ".4f") for rate in rates), *ends])
        if len(s.full) > 1:
            rows.append([f"{s.name}, all steps", *(_number(s.full.get(rate), ".4f") for rate in rates), "", "", ""])
    note = (
        "Validation bits per byte of the shorter runs that chose the rate, a factor on the learning rates of the "
        "contender's recipe; and of those with all steps, which have the last word. Extended: the best of the grid lay "
        "at its edge, and rates beyond were tried; at the edge: it still does, or the best with all steps is the "
        "lowest of them."
    )
    return Table("Learning rates", ("", *(f"{rate:g}" for rate in rates), "chosen", "peak", ""), rows, note)


def _number(value: float | None, form: str) -> str:
    if value is None or math.isnan(value):
        return ""
    return format(value, form) if math.isfinite(value) else "diverged"


def _megabytes(s: Standing) -> str:
    known = [r.memory for r in s.results if r.memory is not None]
    return f"{max(known) / 1e6:,.0f}" if known else ""


def figures(comparison: Comparison, standings: Sequence[Standing]) -> dict[str, Any]:
    """Everything, for JSON; what is not finite is null."""
    base, equal = standings[0], {unit: at_equal(standings, of) for unit, of in UNITS.items()}
    found = {"compared": [s.name for s in standings], "base": base.name, "recipe": dict(comparison.values)}
    found["contenders"] = {
        s.name: {
            "bits_per_byte": s.bits_per_byte,
            "difference": dict(zip(("mean", "error", "seeds"), s.difference(base), strict=True)),
            "at_equal": {unit: values.get(s.name) for unit, values in equal.items()},
            "by_context": {reading or "as trained": s.by_context(reading) for reading in s.readings()},
            "rate": s.rate, "rates": s.tried, "rates_with_all_steps": s.full, "extended": s.extended,
            "at_edge": s.at_edge, "runs": [asdict(r) for r in s.results], "missing": s.missing,
        }
        for s in standings
    }  # fmt: skip
    return finite_values(found)


def page(comparison: Comparison, standings: Sequence[Standing], pictures: Iterable[str]) -> str:
    """All tables and pictures, in Markdown."""
    recipe = comparison.full(comparison.settings.base, 1.0, 0).recipe
    d, results = recipe.data, [r for s in standings for r in s.results]
    tokens = results[0].tokens if results else 0
    machines = dict.fromkeys(json.dumps(r.machine | {"gflops": ""}, sort_keys=True) for r in results)
    made = "\n".join(
        f"- {m['processor']}, {m['cores']} cores, {m['threads']} threads, {m['precision']}, torch {m['torch']}"
        for m in map(json.loads, machines)
    )
    missing = "".join(f"- not finished: {title}\n" for s in standings for title in s.missing)
    missing += "".join(f"- {r.contender}, seed {r.seed}, diverged: {r.diverged}\n" for r in results if r.diverged)
    shown = "\n".join(f"![{name.partition('.')[0]}]({name})\n" for name in pictures)
    parts = "\n".join(table.markdown() for table in tables(standings))
    return f"""{MARK}
# Comparison

{len(standings)} contenders, {tokens:,} tokens of {", ".join(d.train)} each, the same in the same order for each seed;
measured on {", ".join(comparison.settings.documents)}. The recipe is in [{RECIPE_FILE}]({RECIPE_FILE}), all figures in
[{FIGURES_FILE}]({FIGURES_FILE}), and the finished runs that this page is made from in [{ARCHIVE_FILE}]({ARCHIVE_FILE}).

{made}

{missing}
{shown}
{parts}"""


def write(comparison: Comparison, out: Path, standings: Sequence[Standing], folder: Path) -> None:
    """Write the report: the page, the figures, the pictures, the recipe, and the runs that all of it is made from.

    Args:
        comparison: what was run.
        out: its folder.
        standings: what there is in it.
        folder: of the report, made if it is not there.

    Raises:
        InputError: the folder cannot be written, or holds other files of these names.
    """
    make_folder(folder)
    kinds = {PAGE_FILE: COMPARISON, FIGURES_FILE: FIGURES, ARCHIVE_FILE: ARCHIVE} | dict.fromkeys(PICTURES, PICTURE)
    for name, kind in kinds.items():
        check_writable(folder / name, kind)
    write_atomically(folder / RECIPE_FILE, comparison.to_toml())
    write_atomically(folder / FIGURES_FILE, json.dumps(figures(comparison, standings), indent=1) + "\n")
    drawn = draw(folder, standings)
    write_atomically(folder / ARCHIVE_FILE, pack(out, standings))
    write_atomically(folder / PAGE_FILE, page(comparison, standings, drawn))
