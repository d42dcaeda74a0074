"""The manifest of a checkpoint: which files belong to it, of which run and step, and that they are what was written."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import check, flush
from ..model.checkpoint import CONFIG_FILE, WEIGHTS_FILE

TRAINING_FILE, PROGRESS_FILE, MANIFEST_FILE = "training.safetensors", "progress.json", "manifest.json"
SHARDS = "shards"
CONTENTS = (WEIGHTS_FILE, CONFIG_FILE, TRAINING_FILE, PROGRESS_FILE)
SHARDED_CONTENTS = (f"{SHARDS}/.metadata", CONFIG_FILE, PROGRESS_FILE)
"""Of a checkpoint that many ranks have written; their own files come to it."""


def write_manifest(folder: Path, run_id: str, step: int, files: Mapping[str, dict[str, Any]]) -> None:
    """Give a checkpoint its manifest, and wait until all of it is on disk.

    Args:
        folder: with the files.
        run_id: of the run.
        step: of the run.
        files: size and checksum of each, by its name in the folder.
    """
    manifest = {"run": run_id, "step": step, "files": files}
    (folder / MANIFEST_FILE).write_text(json.dumps({**manifest, "checksum": checksum(manifest)}))
    for name in (*files, MANIFEST_FILE, ""):
        flush(folder / name)


def read_manifest(path: Path, run_id: str | None) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Args:
        path: folder of the checkpoint.
        run_id: of its run; None for any.

    Raises:
        InputError: missing, altered, or of another run, step or version.
    """
    file = path / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{file} is missing") from None
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{file} cannot be read; it was truncated or altered") from None
    said = manifest.pop("checksum", None) if isinstance(manifest, dict) else None
    if said is None or said != checksum(manifest):
        raise InputError(f"{file} was altered: its checksum does not match")
    files = manifest.get("files")
    kinds = (CONTENTS, SHARDED_CONTENTS)
    if not isinstance(files, dict) or not any(all(isinstance(files.get(name), dict) for name in k) for k in kinds):
        raise InputError(f"{file} does not list {', '.join(CONTENTS)}; it is of another version")
    if run_id is not None and manifest.get("run") != run_id:
        raise InputError(f"{file} belongs to another run, {manifest.get('run')}")
    if path.name != name_of(manifest.get("step")):
        raise InputError(f"{file} belongs to step {manifest.get('step')}")
    return manifest


def check_files(path: Path, manifest: Mapping[str, Any], share: int = 0, shares: int = 1) -> None:
    """Refuse a checkpoint of which a file is not what was written.

    Args:
        path: folder of the checkpoint.
        manifest: of it.
        share: which of the files to look at, of so many shares.
        shares: in which readers have divided them.

    Raises:
        InputError: naming the file that is missing, truncated or altered.
    """
    for name in sorted(manifest["files"])[share::shares]:
        check(path / name, manifest["files"][name])


def is_whole(path: Path, run_id: str) -> bool:
    """Whether a checkpoint is what was written by this run."""
    try:
        check_files(path, read_manifest(path, run_id))
    except InputError:
        return False
    return True


def name_of(step: Any) -> str:
    """The name of the checkpoint of a step; empty for what is no step."""
    return f"step-{step:08d}" if type(step) is int else ""


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint; -1 if it has none."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() and number.isascii() else -1


def checksum(manifest: Mapping[str, Any]) -> str:
    """What a manifest says of itself."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
