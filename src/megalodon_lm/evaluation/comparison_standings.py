"""What came out of a comparison: each contender at its best rate, over its seeds, beside the base."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from ..errors import InputError
from ..pairs import Ratio
from .comparison import Comparison, best_rate
from .comparison_runs import Result, find, settled, tuned
from .comparison_speeds import Speeds


@dataclass(frozen=True)
class Standing:
    """One contender."""

    name: str
    grid: list[float]
    """Rates that were to be tried."""
    rate: float | None
    """Factor that was chosen; None where it is not known yet."""
    tried: dict[float, float]
    """Bits per byte that each rate led to, those beyond the grid too; inf where it diverged."""
    results: list[Result]
    """Of the seeds that are finished."""
    missing: list[str]
    """Titles of runs that are not."""
    pace: Ratio | None = None
    """Speed over the base's, in the same rounds; None where not measured."""
    full: dict[float, float] = field(default_factory=dict)
    """As `tried`, of the rates that were tried with all steps."""
    folders: list[Path] = field(default_factory=list)
    """Of all the runs that this was read from."""

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or highest that was tried, so that a better one may lie beyond."""
        if len(self.full) > 1:
            return self.rate == min(self.full)
        return len(self.tried) > 1 and self.rate in (min(self.tried), max(self.tried))

    @property
    def extended(self) -> list[float]:
        """Rates that were tried because the best one lay at the edge of the grid."""
        return sorted(set(self.tried) - set(self.grid))

    def mean(self, value: Callable[[Result], float]) -> float:
        """Over the seeds; NaN of none."""
        return mean(map(value, self.results)) if self.results else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Of the documents with the longest context, over the seeds."""
        return self.mean(lambda r: r.bits_per_byte)

    def difference(self, base: "Standing") -> tuple[float, float, int]:
        """From the base, paired by seed: the mean, its standard error (NaN of one seed), and in how many seeds."""
        theirs = {r.seed: r.bits_per_byte for r in base.results}
        pairs = [r.bits_per_byte - theirs[r.seed] for r in self.results if r.seed in theirs]
        error = stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 and all(map(math.isfinite, pairs)) else math.nan
        return (mean(pairs) if pairs else math.nan), error, len(pairs)

    def curve(
        self, unit: Callable[[Result], float], seeds: Collection[int] | None = None
    ) -> tuple[list[float], list[float]]:
        """Bits per byte of the validation text while training, over the seeds.

        Args:
            unit: of the abscissa, so much a token.
            seeds: those that count; None for all.
        """
        whole = [r for r in self.results if r.curve and not r.diverged and (seeds is None or r.seed in seeds)]
        points = list(zip(*(r.curve for r in whole), strict=True))
        x = [mean(tokens * unit(r) for r, (tokens, _) in zip(whole, at, strict=True)) for at in points]
        return x, [mean(value for _, value in at) for at in points]

    def readings(self) -> list[str]:
        """With which the weights were measured: "" for the model as it is."""
        return list(dict.fromkeys(name for r in self.results for name in r.documents))

    def by_context(self, reading: str = "") -> dict[int, float]:
        """Bits per byte by context in tokens, over the seeds."""
        found = [curve for r in self.results if (curve := r.by_context(reading))]
        contexts = sorted(set.intersection(*map(set, found))) if found else []
        return {context: mean(curve[context] for curve in found) for context in contexts}


UNITS: dict[str, Callable[[Result], float]] = {
    "tokens": lambda r: 1.0,
    "operations": lambda r: r.flops_per_token,
    "seconds": lambda r: 1 / r.speed,
}
"""What a model may be given as much of as another, by the token."""


def gather(comparison: Comparison, out: Path) -> list[Standing]:
    """What there is in the folder of a comparison, the base first.

    Args:
        comparison: what was run.
        out: its folder.

    Raises:
        InputError: it holds other runs, or runs that did not learn from the same tokens.
    """
    found, speeds = [], Speeds.read(out, list(comparison.contenders))
    for name, contender in comparison.contenders.items():
        tried, open_rate = tuned(comparison, name, out)
        folders = [comparison.tuning(name, tried_rate).folder for tried_rate in tried]
        if open_rate is not None:
            missing = [comparison.tuning(name, open_rate).title]
            found.append(Standing(name, contender.rates, None, tried, [], missing, folders=folders))
            continue
        full, open_rate = settled(comparison, name, out)
        rate = best_rate([best_rate(contender.rates, tried)], full)
        runs = [comparison.full(name, rate, seed) for seed in range(contender.seeds)]
        results = [find(comparison, run, out) for run in runs]
        missing = [run.title for run, result in zip(runs, results, strict=True) if result is None]
        folders += [comparison.full(name, tried_rate, 0).folder for tried_rate in full]
        folders += [run.folder for run, result in zip(runs, results, strict=True) if result is not None]
        if open_rate not in (None, rate):
            missing.append(comparison.full(name, open_rate, 0).title)
        made = [r if speeds is None else replace(r, speed=speeds.of(name)) for r in results if r is not None]
        pace = None if speeds is None else speeds.ratio(name, comparison.settings.base)
        found.append(Standing(name, contender.rates, rate, tried, made, missing, pace, full, folders))
    read: dict[int, set[Any]] = {}
    for r in (r for s in found for r in s.results if not r.diverged):
        read.setdefault(r.seed, set()).add((r.tokens, r.data))
    if any(len(kinds) > 1 for kinds in read.values()):
        raise InputError(f"the runs in {out} did not learn from the same tokens; begin in another folder")
    return found


def at_equal(standings: Sequence[Standing], unit: Callable[[Result], float]) -> dict[str, float]:
    """Bits per byte of the validation text when each has had as much as the one that needs least for all its tokens.

    Args:
        standings: those without a curve are left out.
        unit: see Standing.curve.
    """
    curves = {s.name: s.curve(unit) for s in standings}
    curves = {name: (x, y) for name, (x, y) in curves.items() if x}
    least = min((x[-1] for x, _ in curves.values()), default=0.0)
    return {name: float(np.interp(least, x, y, left=math.nan)) for name, (x, y) in curves.items()}
