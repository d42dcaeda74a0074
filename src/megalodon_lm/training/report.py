"""What a run did, as a page and a picture, from its metrics."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..data.batches import Batches
from ..data.tokenizer import Tokenizer
from ..errors import InputError
from ..files import write_atomically
from ..plots import amount_axis, finite, log_axis, picture
from .metrics import TEXT, Units, read_metrics

REPORT_MARKDOWN, PICTURE = "training.md", "training.png"
SMOOTHED = 50  # steps
SAMPLED = 1 << 16  # tokens that bytes per token are counted on


def bytes_per_token(batches: Batches, tokenizer: Tokenizer) -> float:
    """Bytes of text that a learnt token stands for, on average over the first batches; 0 if none stands for any."""
    cursor, tokens, size = batches.begin(), 0, 0
    while tokens < SAMPLED:
        batch = batches.read(cursor)
        cursor = batch.cursor
        learnt = batch.targets if batch.learnt is None else batch.targets[batch.learnt]
        size += len(tokenizer.decode_bytes(learnt.flatten().tolist()))
        tokens += max(1, learnt.numel())
    return size / tokens


def write_report(folder: Path, bytes_per_token: float, units: Units = TEXT) -> None:
    """Write training.md and training.png into a run folder with at least one step.

    Args:
        folder: of the run.
        bytes_per_token: of what it learns from; 0 where that is not known.
        units: of its numbers.

    Raises:
        InputError: the folder cannot be written.
    """
    records = read_metrics(folder)
    if not records:
        return
    write_atomically(folder / REPORT_MARKDOWN, _markdown(records, bytes_per_token, units))
    _draw(folder / PICTURE, records, bytes_per_token, units)


@contextmanager
def reported(folder: Path, bytes_per_token: float, units: Units = TEXT) -> Iterator[None]:
    """Write the report after what is done within, also after what ends it early, whose error is the one to tell."""
    try:
        yield
    except BaseException:
        with suppress(InputError):
            write_report(folder, bytes_per_token, units)
        raise
    write_report(folder, bytes_per_token, units)


def _markdown(records: list[dict[str, Any]], bytes_per_token: float, units: Units) -> str:
    last = records[-1]
    best = _best(records)
    events = [f"- step {r['step']}: {r['event']}" for r in records if r["event"]]
    loss = _smooth(records)[-1]
    per_byte = f", {loss / bytes_per_token:.4f} bits per byte" if bytes_per_token else ""
    rows = {
        "steps": f"{last['step']:,}",
        units.read: f"{last['tokens']:,}",
        "time in steps": f"{last['seconds']:,.0f} s",
        "loss at the end, smoothed": f"{loss:.4f} bits per {units.learnt}{per_byte}" if loss == loss else "not finite",
        f"{units.read} per second, median": f"{_median(records, 'tokens_per_second'):,.0f}",
        "operations, of the machine's matrix product rate": f"{_median(records, 'utilisation'):.0%}",
        "memory": f"{max(r['memory'] or 0 for r in records) / 1e6:,.0f} MB",
    }
    if best is not None:
        rows["best validation"] = f"{units.validated(best['validation'])}, at step {best['step']:,}"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    happened = "\n".join(["\n## What happened\n", *events, ""]) if events else ""
    return f"# Training\n\n| | |\n|---|---|\n{table}\n\n![loss, rate and gradient]({PICTURE})\n{happened}"


def _best(records: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The step with the lowest validation."""
    validated = [r for r in records if r["validation"] is not None]
    return min(validated, key=lambda r: r["validation"], default=None)


def _median(records: Sequence[dict[str, Any]], key: str) -> float:
    return median([r[key] for r in records if r[key] is not None] or [0.0])


def _smooth(records: Sequence[dict[str, Any]]) -> np.ndarray:
    """Bits per token of each step, averaged with those before it: SMOOTHED, or a fifth of the run so far.

    NaN where none of them is finite.
    """
    losses = np.array([math.nan if r["bits_per_token"] is None else r["bits_per_token"] for r in records])
    known = np.isfinite(losses)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(known, losses, 0.0), known))
    done = np.arange(1, len(losses) + 1)
    first = done - np.minimum(SMOOTHED, (done + 4) // 5)
    sums, counts = sums[1:] - sums[first], counts[1:] - counts[first]
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)


def _draw(path: Path, records: list[dict[str, Any]], bytes_per_token: float, units: Units) -> None:
    tokens = [r["tokens"] for r in records]
    marker = "." if len(records) < SMOOTHED else ""
    below = "right" if units.of_classes and _best(records) else "loss"
    panels = [["loss", "learning_rate"], ["loss", "gradient_norm"], [below, "tokens_per_second"]]
    with picture(path, panels, 4.6, width_ratios=[2, 1]) as axes:
        _draw_loss(axes["loss"], records, bytes_per_token, marker, units)
        if below == "right":
            _draw_accuracy(axes["right"], records, units)
        for name, title in (
            ("learning_rate", "Learning rate"),
            ("gradient_norm", "Norm of the gradient"),
            ("tokens_per_second", f"{units.read.capitalize()} per second"),
        ):
            axis = axes[name]
            x, y = finite(zip(tokens, (r[name] for r in records), strict=True))
            axis.plot(x, y, marker=marker, linewidth=0.8)
            axis.set_title(title)
            amount_axis(axis.xaxis)
            if name == "gradient_norm":
                log_axis(axis.yaxis, y)
                continue
            axis.set_ylim(bottom=0)
            if name == "tokens_per_second":
                amount_axis(axis.yaxis)
            else:
                axis.yaxis.set_major_formatter("{x:g}")
        axes["tokens_per_second"].set_xlabel(units.read)


def _draw_loss(axis: Any, records: list[dict[str, Any]], bytes_per_token: float, marker: str, units: Units) -> None:
    """Training and validation on one axis: in bits per byte, or training alone in bits of what has a loss."""
    scale, unit = (1 / bytes_per_token, "byte") if bytes_per_token else (1.0, units.learnt)
    tokens, losses = finite((r["tokens"], r["bits_per_token"]) for r in records)
    axis.plot(tokens, [scale * loss for loss in losses], color="0.8", linewidth=0.6, marker=marker)
    tokens, smooth = finite(zip((r["tokens"] for r in records), (scale * _smooth(records)).tolist(), strict=True))
    axis.plot(tokens, smooth, color="tab:blue", label="training, smoothed", marker=marker)
    best, shown = _best(records), smooth
    if best and bytes_per_token:
        x, y = finite((r["tokens"], r["validation"]) for r in records)
        axis.plot(x, y, "o-", color="tab:orange", markersize=4, label="validation")
        axis.set_title(f"{best['validation']:.3f} bits per byte on the validation text")
        shown = smooth + y
    elif smooth:
        axis.set_title(f"{smooth[-1]:.3f} bits per {unit} in training")
    if shown and units.of_classes:  # which a run may learn all but whole
        axis.set_ylim(0, 1.1 * max(shown))
    elif shown:
        low = min(shown)
        high = min(max(shown), 3 * low)
        room = 0.1 * (high - low) or 0.1
        axis.set_ylim(low - room, high + room)
    axis.set(xlabel=units.read, ylabel=f"bits per {unit}")
    amount_axis(axis.xaxis)
    axis.legend()


def _draw_accuracy(axis: Any, records: list[dict[str, Any]], units: Units) -> None:
    """The part of the validation examples that is right."""
    x, y = finite((r["tokens"], r["validation"]) for r in records)
    axis.plot(x, [1 - wrong for wrong in y], "o-", color="tab:orange", markersize=4)
    best = _best(records)
    assert best is not None
    last = f"{units.validated(y[-1])} at the end" if y else "no finite number"
    axis.set(xlabel=units.read, title=f"{last}, {units.validated(best['validation'])} at best")
    axis.yaxis.set_major_formatter("{x:.0%}")
    amount_axis(axis.xaxis)
