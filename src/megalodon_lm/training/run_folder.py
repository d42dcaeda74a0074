"""The folder of one run: recipe, weights, metrics and reports."""

import json
from pathlib import Path
from typing import Any

METRICS_FILE, RECIPE_FILE = "metrics.jsonl", "recipe.toml"


def create_run_folder(path: str | Path) -> Path:
    """Make the folder, or take an empty one.

    Raises:
        ValueError: the folder holds files already, or cannot be made; nothing is overwritten.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        used = any(path.iterdir())
    except OSError as error:
        raise ValueError(f"cannot create the run folder {path}: {error.strerror}") from None
    if used:
        raise ValueError(f"the run folder {path} is not empty; choose another one with --out, nothing was overwritten")
    return path


def free_run_folder(path: str | Path) -> Path:
    """The path itself, or the path with the first free number behind it."""
    path = Path(path)
    candidate, number = path, 2
    while candidate.exists() and any(candidate.iterdir()):
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


class MetricsFile:
    """One JSON object a line, flushed as it is written."""

    def __init__(self, folder: Path):
        self._file = open(folder / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
