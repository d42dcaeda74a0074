"""The folder of one run: its identity, its lock and its recipe."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import InputError
from ..files import is_unfinished
from .recipe import Recipe
from .run_lock import LOCK_FILE, NoLock, RunLock
from .run_record import RUN_FILE, identity, write_record

RECIPE_FILE = "recipe.toml"
Resume = Literal["no", "last", "auto"]
FIXED = ("length", "batch_size", "carry_state", "seed", "average", "optimizer")
"""Keys of [training] that a run keeps when it goes on, besides all of [model] and [data]."""


@dataclass(frozen=True)
class Run:
    """The folder of a run that this process holds."""

    folder: Path
    id: str
    lock: RunLock | NoLock


def find_run(path: Path, recipe: Recipe, resume: Resume, writes: bool = True) -> Run | None:
    """The run to go on with.

    Args:
        path: folder.
        recipe: of the run; one that goes on may change what FIXED does not name.
        resume: "no" begins in an empty folder, "last" goes on, "auto" does either.
        writes: whether this process is the one that will write into it, and locks it.

    Returns:
        It, or None where a new one is to begin; nothing is written then.

    Raises:
        InputError: unusable folder, no run in it, another recipe, or another process at work.
    """
    if resume not in get_args(Resume):
        raise InputError(f"resume = {resume!r} must be one of {', '.join(get_args(Resume))}")
    goes_on = resume != "no" and (path / RUN_FILE).exists()
    if not goes_on:
        if resume == "last":
            raise InputError(f"there is no run to go on with in {path}: it has no {RUN_FILE}")
        _check_free(path)
        return None
    lock = RunLock(path) if writes else NoLock()
    try:
        run = Run(path, identity(path), lock)
        before = recorded_recipe(path, type(recipe))
        if before is not None:
            _compare(before, recipe)
    except BaseException:
        lock.release()
        raise
    return run


def begin_run(path: Path, of_chats: bool) -> Run:
    """Make the folder of a new run, or take an empty one.

    Args:
        path: folder.
        of_chats: whether it learns the answers of chats; kept in the record for who talks with the model.

    Raises:
        InputError: the folder holds files already, cannot be made, or another process is at work in it.
    """
    _check_free(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the run folder {path}: {error.strerror}") from None
    lock = RunLock(path)
    try:
        _check_free(path)  # now that nobody else can begin in it
        run_id = write_record(path, of_chats)
    except BaseException:
        lock.release()
        raise
    return Run(path, run_id, lock)


def recorded_recipe(path: Path, kind: type[Recipe] = Recipe) -> Recipe | None:
    """The recipe of the run in a folder; None where no run has begun, or one was killed while it did.

    Args:
        path: folder.
        kind: of recipe.

    Raises:
        InputError: it is damaged.
    """
    return kind.load(path / RECIPE_FILE) if (path / RUN_FILE).exists() and (path / RECIPE_FILE).exists() else None


def free_run_folder(path: str | Path) -> Path:
    """The path itself, or the path with the first free number behind it."""
    path = Path(path)
    candidate, number = path, 2
    while candidate.exists() and not (candidate.is_dir() and next(candidate.iterdir(), None) is None):
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate


def _check_free(path: Path) -> None:
    """Refuse a folder that holds anything but what a run leaves that was killed before it began."""
    try:
        used = path.exists() and any(p.name != LOCK_FILE and not is_unfinished(p, RUN_FILE) for p in path.iterdir())
    except OSError as error:
        raise InputError(f"cannot create the run folder {path}: {error.strerror}") from None
    if used:
        raise InputError(
            f"the run folder {path} is not empty; choose another one with --out, or go on with it by --resume auto; "
            "nothing was overwritten"
        )


def _compare(before: Recipe, now: Recipe) -> None:
    changed = [f"{part}.{key}" for part, key, old, new in _differences(before, now)
               if part != "training" or key in FIXED]  # fmt: skip
    if changed:
        raise InputError(
            f"the recipe differs from that of the run in {', '.join(changed)}; a run goes on with the same model, data "
            f"and {', '.join(FIXED)}, or begins anew in another folder"
        )


def _differences(before: Recipe, now: Recipe) -> Iterator[tuple[str, str, Any, Any]]:
    for part in (name for name in now.tables if name != "mesh"):
        old, new = (r.model.to_dict() if part == "model" else vars(getattr(r, part)) for r in (before, now))
        yield from ((part, key, old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key))
