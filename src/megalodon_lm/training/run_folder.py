"""The folder of one run: its identity, recipe, metrics, checkpoints and reports."""

import json
import math
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from .. import __version__
from ..errors import InputError
from ..files import flush, is_unfinished, write_atomically
from .recipe import Recipe

METRICS_FILE, RECIPE_FILE, RUN_FILE = "metrics.jsonl", "recipe.toml", "run.json"
Resume = Literal["no", "last", "auto"]
FIXED = ("length", "batch_size", "carry_state", "seed", "average")
"""Keys of [training] that a run keeps when it goes on, besides all of [model] and [data]."""


def create_run_folder(path: str | Path) -> Path:
    """Make the folder, or take an empty one.

    Raises:
        InputError: the folder holds files already, or cannot be made; nothing is overwritten.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        used = any(not is_unfinished(p, RUN_FILE) for p in path.iterdir())
    except OSError as error:
        raise InputError(f"cannot create the run folder {path}: {error.strerror}") from None
    if used:
        raise InputError(
            f"the run folder {path} is not empty; choose another one with --out, or go on with it by --resume auto; "
            "nothing was overwritten"
        )
    return path


def free_run_folder(path: str | Path) -> Path:
    """The path itself, or the path with the first free number behind it."""
    path = Path(path)
    candidate, number = path, 2
    while candidate.exists() and any(candidate.iterdir()):
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


def open_run(path: str | Path, recipe: Recipe, resume: Resume) -> tuple[Path, str, bool]:
    """The folder of a new run, or that of one to go on with.

    Args:
        path: folder.
        recipe: of the run; one that goes on may change what FIXED does not name.
        resume: "no" begins in an empty folder, "last" goes on, "auto" does either.

    Returns:
        The folder, the run's id, and whether it goes on.

    Raises:
        InputError: unusable folder, no run in it, or another recipe.
    """
    if resume not in get_args(Resume):
        raise InputError(f"resume = {resume!r} must be one of {', '.join(get_args(Resume))}")
    path = Path(path)
    goes_on = resume != "no" and (path / RUN_FILE).exists()
    if resume == "last" and not goes_on:
        raise InputError(f"there is no run to go on with in {path}: it has no {RUN_FILE}")
    if goes_on:
        run_id = _identity(path / RUN_FILE)
        if (path / RECIPE_FILE).exists():  # unless killed right here
            _compare(Recipe.load(path / RECIPE_FILE), recipe)
    else:
        path = create_run_folder(path)
        run_id = uuid.uuid4().hex
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_atomically(path / RUN_FILE, json.dumps({"id": run_id, "created": created, "version": __version__}) + "\n")
    write_atomically(path / RECIPE_FILE, recipe.to_toml())
    return path, run_id, goes_on


def _identity(path: Path) -> str:
    try:
        return str(json.loads(path.read_text())["id"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} cannot be read; it was truncated or altered") from None


def _compare(before: Recipe, now: Recipe) -> None:
    changed = [f"{part}.{key}" for part, key, old, new in _differences(before, now)
               if part != "training" or key in FIXED]  # fmt: skip
    if changed:
        raise InputError(
            f"the recipe differs from that of the run in {', '.join(changed)}; a run goes on with the same model, data "
            f"and {', '.join(FIXED)}, or begins anew in another folder"
        )


def _differences(before: Recipe, now: Recipe) -> Iterator[tuple[str, str, Any, Any]]:
    for part in ("model", "data", "training"):
        old, new = vars(getattr(before, part)), vars(getattr(now, part))
        yield from ((part, key, old[key], new[key]) for key in old if old[key] != new[key])


class MetricsFile:
    """One JSON object a line, flushed as it is written.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path):
        self.path = folder / METRICS_FILE
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

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
            raise InputError(f"cannot write {self.path}: {error.strerror}") from None

    def flush(self) -> None:
        """Wait until all is on disk: no checkpoint may know a step that the metrics could still lose."""
        flush(self.path)

    def cut(self, step: int) -> None:
        """Take back what was written after a step, and a half-written line."""
        self._file.close()
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue
        write_atomically(self.path, "".join(f"{line}\n" for line in kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def close(self) -> None:
        """Close the file."""
        self._file.close()
