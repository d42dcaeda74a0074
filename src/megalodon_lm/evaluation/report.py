"""The report of a training run: report.json, report.md and a picture."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomically
from ..plots import finite, length_axis, log_axis, picture
from ..tables import finite_values

REPORT_JSON, REPORT_MARKDOWN, PICTURE = "report.json", "report.md", "report.png"
FIRST_DRAWN = 8  # position in the picture of context, in bytes
HIGHEST = 5.0  # bits per byte in the picture of training
NOTABLE = 0.002  # bits per byte; what a context changes less is called no change


@dataclass
class Report:
    """What a run reached. Times in seconds, losses in bits per byte of the validation text."""

    parameters: int
    train_bytes: int
    train_seconds: float
    total_seconds: float
    bits_per_byte: float
    """Of the whole validation text, read from its first byte to its last without a reset."""
    bits_per_byte_by_position: dict[int, float]
    """Behind so many bytes of context, up to each power of two; the last is the whole text."""
    error_by_position: dict[int, float]
    """Standard errors of the differences from the whole text."""
    baselines: dict[str, float]
    """General compressors on the whole validation text."""
    training_length: int
    precision: str = ""
    implementation: str = ""
    sample: str = ""

    @property
    def bits_per_byte_by_context(self) -> dict[int, float]:
        """With the state emptied every so many bytes: the mean over the positions up to there; the last is never."""
        *positions, whole = self.bits_per_byte_by_position
        values = np.array(list(self.bits_per_byte_by_position.values())[:-1])
        means = np.cumsum(np.diff(positions, prepend=0) * values) / positions
        shown = [(p, float(mean)) for p, mean in zip(positions, means, strict=True) if 16 * p >= self.training_length]
        return dict([*shown[::2], (whole, self.bits_per_byte)])

    @property
    def change(self) -> tuple[float, float]:
        """From the training length to the longest context, in bits per byte; and its standard error."""
        positions = list(self.bits_per_byte_by_position)
        trained = max((p for p in positions if p <= self.training_length), default=positions[0])
        change = self.bits_per_byte_by_position[positions[-1]] - self.bits_per_byte_by_position[trained]
        return change, self.error_by_position[trained]

    def save(self, folder: Path, training_curve: Sequence[tuple[int, float]]) -> None:
        """Write the three files, the picture last.

        Args:
            folder: of the run.
            training_curve: (bytes read, bits per byte) of the training steps.
        """
        figures = asdict(self) | {"bits_per_byte_by_context": self.bits_per_byte_by_context}
        write_atomically(folder / REPORT_JSON, json.dumps(finite_values(figures), indent=2) + "\n")
        write_atomically(folder / REPORT_MARKDOWN, self.markdown())
        self._draw(folder / PICTURE, training_curve)

    def markdown(self) -> str:
        """The report as a short page."""
        rows = "\n".join(f"| {c:,} | {v:.3f} |" for c, v in self.bits_per_byte_by_context.items())
        others = ", ".join(f"{name} {value:.3f}" for name, value in self.baselines.items())
        quoted = "\n".join(f"    {line}" for line in self.sample.splitlines())
        speed = self.train_bytes / self.train_seconds if self.train_seconds else 0.0
        change, error = self.change
        return f"""# Training report

{self.parameters:,} parameters, trained on {self.train_bytes:,} bytes in {self.train_seconds:.0f} s
({speed:,.0f} bytes/s; {self.precision} matrix products; {self.implementation}).
{self.total_seconds:.0f} s with evaluation.

**{self.bits_per_byte:.3f} bits per byte** on the whole validation text, read without a reset. Compressors on the same
text: {others}.

![bits per byte against context, and training]({PICTURE})

| context (bytes) | bits per byte |
|---|---|
{rows}

With the state emptied every so many bytes; the last row is the whole text.

{self._verdict()} of {self.training_length:,} bytes: behind the whole text, bits per byte differ by {change:+.4f}
(standard error {error:.4f}) from those behind as many bytes as it was trained on.

## A sample

{quoted}
"""

    def _verdict(self) -> str:
        change, error = self.change
        if not math.isfinite(change):
            return "The losses are not finite"
        if abs(change) <= max(NOTABLE, 2 * error):
            return "It holds beyond its training length"
        return "It uses context beyond its training length" if change < 0 else "It is worse beyond its training length"

    def _draw(self, path: Path, training_curve: Sequence[tuple[int, float]]) -> None:
        with picture(path, [["context", "training"]]) as axes:
            self._draw_context(axes["context"])
            self._draw_training(axes["training"], training_curve)

    def _draw_context(self, axis: Any) -> None:
        """From a few bytes of context on, so that what the long ones give can be seen."""
        shown = {p: v for p, v in self.bits_per_byte_by_position.items() if p >= FIRST_DRAWN}
        x, y = finite((shown or self.bits_per_byte_by_position).items())
        errors = [2 * self.error_by_position[int(p)] for p in x]
        low, high = ([v + sign * e for v, e in zip(y, errors, strict=True)] for sign in (-1, 1))
        axis.fill_between(x, low, high, color="tab:blue", alpha=0.25, linewidth=0, label="two standard errors")
        axis.plot(x, y, "o-", color="tab:blue", markersize=4, label="validation text")
        length_axis(axis, x)
        axis.axvline(self.training_length, color="tab:red", linewidth=1, label="training length")
        if y:
            self._draw_compressors(axis, 1.5 * min(y) - 0.5 * max(y), max(y), "right")
        axis.legend(loc="upper right")
        axis.set(title=self._verdict(), xlabel="bytes of context", ylabel="bits per byte")

    def _draw_training(self, axis: Any, training_curve: Sequence[tuple[int, float]]) -> None:
        reached = finite([(self.train_bytes, self.bits_per_byte)])
        worst = max([HIGHEST, *self.baselines.values()])
        x, y = finite((x, y) for x, y in training_curve if not y > worst)
        axis.plot(x, y, color="tab:blue", marker="" if len(x) > 1 else "o", label="training, smoothed")
        axis.plot(*reached, "o", color="tab:orange", label="validation text")
        log_axis(axis.xaxis, [*x, *reached[0]])
        self._draw_compressors(axis, 0.0, math.inf, "left")
        beaten = [name for name, value in self.baselines.items() if self.bits_per_byte < value]
        title = f"{self.bits_per_byte:.3f} bits per byte" + (f": below {', '.join(beaten)}" if beaten else "")
        axis.set(title=title, xlabel="bytes read in training", ylabel="bits per byte")
        axis.legend(loc="upper right")

    def _draw_compressors(self, axis: Any, low: float, high: float, side: str) -> None:
        """Those between the limits, as lines with their names at one side."""
        for name, value in self.baselines.items():
            if low <= value <= high:
                axis.axhline(value, color="0.5", linewidth=1, linestyle=":")
                place = (float(side == "right"), value)
                axis.annotate(name, place, xycoords=("axes fraction", "data"), color="0.4", ha=side, va="bottom")
