"""The metrics of a run: one JSON object a line."""

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import flush, write_atomically

METRICS_FILE = "metrics.jsonl"


@dataclass
class StepMetrics:
    """What one step did.

    Loss in bits per token, validation loss in bits per byte where it was measured, time in seconds of all steps so far,
    memory in resident bytes; utilisation is the model's operations per second over those of the machine's matrix
    products.
    """

    step: int
    tokens: int
    bits_per_token: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    seconds: float
    progress: float
    utilisation: float
    memory: int | None
    validation: float | None = None
    event: str = ""


@dataclass(frozen=True)
class Units:
    """What the numbers of a run are of.

    Attributes:
        learnt: what has a loss: `bits_per_token` are bits of one.
        read: what comes in: `tokens` are so many.
        of_classes: validation is the part of the examples that is wrong, instead of bits per byte.
    """

    learnt: str = "token"
    read: str = "tokens"
    of_classes: bool = False

    def validated(self, value: float) -> str:
        """What a validation found, in words."""
        return f"{1 - value:.2%} right" if self.of_classes else f"{value:.4f} bits per byte"


TEXT, EXAMPLES = Units(), Units("example", "inputs", True)


class MetricsFile:
    """One JSON object a line, flushed as it is written.

    Args:
        folder: of the run.

    Raises:
        InputError: the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self.path = folder / METRICS_FILE
        self._open()

    def _open(self) -> None:
        try:
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from None

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; numbers that are not finite become null.

        Raises:
            InputError: the disk is full.
        """
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            with suppress(OSError):
                self._file.close()  # tries once more, and would again
            raise InputError(f"cannot write {self.path}: {error.strerror}") from None

    def flush(self) -> None:
        """Wait until all is on disk: no checkpoint may know a step that the metrics could still lose.

        Raises:
            InputError: the disk is full.
        """
        try:
            flush(self.path)
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror}") from None

    def cut(self, step: int) -> list[str]:
        """Take back what was written after a step, and what is no record; gives the events that stood there."""
        self._file.close()
        records = read_metrics(self.path.parent)
        kept = [record for record in records if record["step"] <= step]
        write_atomically(self.path, "".join(f"{json.dumps(record)}\n" for record in kept))
        self._open()
        return [record["event"] for record in records if record["step"] > step and record.get("event")]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, without lines that are none, such as the half one that a killed process leaves.

    Raises:
        InputError: the file is missing or unreadable.
    """
    try:
        lines = (folder / METRICS_FILE).read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"cannot read {folder / METRICS_FILE}: {error.strerror}") from None
    records = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
    return records
