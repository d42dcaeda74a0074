"""The report of a training run: report.json, report.md and a picture."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..files import write_atomically
from ..plots import picture

REPORT_JSON, REPORT_MARKDOWN, PICTURE = "report.json", "report.md", "report.png"


@dataclass
class Report:
    """What a run reached. Times in seconds, losses in bits per byte of the validation text."""

    parameters: int
    train_bytes: int
    train_seconds: float
    total_seconds: float
    bits_per_byte: float
    """Of the whole validation text, read from its first byte to its last without a reset."""
    bits_per_byte_by_context: dict[int, float]
    """Of one stretch of it, with the state emptied every so many bytes."""
    baselines: dict[str, float]
    """General compressors on the whole validation text."""
    training_length: int
    bits_per_byte_by_position: dict[int, float] = field(default_factory=dict)
    """At positions up to each power of two in windows of the longest context."""
    precision: str = ""
    implementation: str = ""
    sample: str = ""

    def save(self, folder: Path, training_curve: list[tuple[int, float]]) -> None:
        """Write the three files.

        Args:
            folder: of the run.
            training_curve: (bytes read, bits per byte) of the training steps.
        """
        write_atomically(folder / REPORT_JSON, json.dumps(asdict(self), indent=2) + "\n")
        self._draw(folder / PICTURE, training_curve)
        write_atomically(folder / REPORT_MARKDOWN, self.markdown())

    def markdown(self) -> str:
        """The report as a short page."""
        longest, shortest = max(self.bits_per_byte_by_context), self.training_length
        rows = "\n".join(f"| {c:,} | {v:.3f} |" for c, v in self.bits_per_byte_by_context.items())
        others = ", ".join(f"{name} {value:.3f}" for name, value in self.baselines.items())
        quoted = "\n".join(f"    {line}" for line in self.sample.splitlines())
        change = self.bits_per_byte_by_context[longest] - self.bits_per_byte_by_context[shortest]
        return f"""# Training report

{self.parameters:,} parameters, trained on {self.train_bytes:,} bytes in {self.train_seconds:.0f} s
({self.train_bytes / self.train_seconds:,.0f} bytes/s; {self.precision} matrix products; {self.implementation}).
{self.total_seconds:.0f} s with evaluation.

**{self.bits_per_byte:.3f} bits per byte** on the whole validation text, read without a reset. Compressors on the same
text: {others}.

![bits per byte against context](report.png)

| context (bytes) | bits per byte |
|---|---|
{rows}

The same stretch of the validation text, with the state emptied every so many bytes. From the training length
{shortest:,} to {longest:,}, {longest // shortest} times as long, bits per byte change by {change:+.3f}.

## A sample

{quoted}
"""

    def _draw(self, path: Path, training_curve: list[tuple[int, float]]) -> None:
        with picture(path, 2) as (left, right):
            left.plot(*zip(*self.bits_per_byte_by_position.items(), strict=True), "o-", label="at this position")
            left.plot(*zip(*self.bits_per_byte_by_context.items(), strict=True), "s--", label="mean up to this context")
            for (name, value), shade in zip(self.baselines.items(), ("0.7", "0.5", "0.3"), strict=False):
                left.axhline(value, color=shade, linewidth=1, linestyle=":")
                left.annotate(name, (1, value), color=shade, va="bottom", fontsize=8)
            left.axvline(self.training_length, color="tab:red", linewidth=0.8, label="training length")
            left.set(xscale="log", xlabel="position in the context (bytes)", ylabel="bits per byte")
            left.set_title("Validation text")
            left.legend(fontsize=8)
            right.plot(*zip(*training_curve, strict=True), linewidth=0.8)
            right.set(xlabel="bytes read", ylabel="bits per byte", title="Training")
            right.set_ylim(top=min(6.0, max(v for _, v in training_curve) + 0.1))
