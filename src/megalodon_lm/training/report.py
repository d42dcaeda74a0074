"""What a run did, as a page and a picture, from its metrics."""

from pathlib import Path
from statistics import median
from typing import Any

from ..files import write_atomically
from ..plots import picture
from .metrics import read_metrics

REPORT_MARKDOWN, PICTURE = "training.md", "training.png"
SMOOTHED = 50  # steps


def write_report(folder: Path) -> None:
    """Write training.md and training.png into a run folder with at least one step.

    Raises:
        InputError: the folder cannot be written.
    """
    records = read_metrics(folder)
    if not records:
        return
    _draw(folder / PICTURE, records)
    write_atomically(folder / REPORT_MARKDOWN, _markdown(records))


def _markdown(records: list[dict[str, Any]]) -> str:
    last = records[-1]
    validated = [(r["step"], r["validation"]) for r in records if r.get("validation") is not None]
    best = min(validated, key=lambda pair: pair[1], default=None)
    events = [f"- step {r['step']}: {r['event']}" for r in records if r["event"]]
    rows = {
        "steps": f"{last['step']:,}",
        "tokens": f"{last['tokens']:,}",
        "time in steps": f"{last['seconds']:,.0f} s",
        f"loss of the last {SMOOTHED} steps": f"{_mean(records[-SMOOTHED:]):.4f} bits per token",
        "tokens per second, median": f"{median(r['tokens_per_second'] for r in records):,.0f}",
        "operations, of the machine's matrix product rate": f"{median(r['utilisation'] or 0 for r in records):.0%}",
        "memory": f"{max(r['memory'] or 0 for r in records) / 1e6:,.0f} MB",
    }
    if best is not None:
        rows["best validation"] = f"{best[1]:.4f} bits per byte, at step {best[0]:,}"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    happened = "\n".join(["\n## What happened\n", *events, ""]) if events else ""
    return f"# Training\n\n| | |\n|---|---|\n{table}\n\n![loss, rate and gradient]({PICTURE})\n{happened}"


def _mean(records: list[dict[str, Any]]) -> float:
    losses = [r["bits_per_token"] for r in records if r["bits_per_token"] is not None]
    return sum(losses) / len(losses) if losses else float("nan")


def _draw(path: Path, records: list[dict[str, Any]]) -> None:
    tokens = [r["tokens"] for r in records]
    with picture(path, 3) as (loss, gradient, speed):
        smooth = [_mean(records[max(0, i + 1 - SMOOTHED) : i + 1]) for i in range(len(records))]
        loss.plot(tokens, [r["bits_per_token"] for r in records], color="0.8", linewidth=0.5)
        loss.plot(tokens, smooth)
        validated = [(r["tokens"], r["validation"]) for r in records if r.get("validation") is not None]
        loss.set(xlabel="tokens", title="Loss", ylabel="training, bits per token")
        loss.set_ylim(0.9 * min(smooth), min(smooth[0], 3 * min(smooth)) * 1.05)
        if validated:
            other = loss.twinx()
            other.plot(*zip(*validated, strict=True), "o-", color="tab:orange")
            other.set_ylabel("validation, bits per byte", color="tab:orange")
        gradient.plot(tokens, [r["gradient_norm"] for r in records], linewidth=0.5)
        gradient.set(xlabel="tokens", title="Norm of the gradient", yscale="log")
        speed.plot(tokens, [r["tokens_per_second"] for r in records], linewidth=0.5)
        speed.set(xlabel="tokens", title="Tokens per second", ylim=(0, None))
