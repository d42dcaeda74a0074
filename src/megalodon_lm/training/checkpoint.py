"""Checkpoints: everything a run needs to go on exactly where it was.

A checkpoint is the folder `checkpoints/step-N` of a run:

    model.safetensors, config.json   a model folder like any other
    training.safetensors             the optimiser's moments, the carried State, the random numbers
    progress.json                    step, tokens, seconds, the place in the text, fingerprints
    manifest.json                    the run's id, size and SHA-256 of each file, and a checksum of itself

or, of several ranks that write each their part, what sharded_checkpoint.py says.

It is written under another name, flushed to disk and renamed: it is there whole, or not at all.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..architectures import load_config
from ..errors import InputError
from ..files import check, digest, flush
from ..model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, metadata, write_model
from ..model.language_model import Config
from ..model.stored_tensors import StoredTensors

CHECKPOINTS = "checkpoints"
TRAINING_FILE, PROGRESS_FILE, MANIFEST_FILE = "training.safetensors", "progress.json", "manifest.json"
CONTENTS = (WEIGHTS_FILE, CONFIG_FILE, TRAINING_FILE, PROGRESS_FILE)
SHARDS = "shards"
SHARDED_CONTENTS = (f"{SHARDS}/.metadata", CONFIG_FILE, PROGRESS_FILE)
"""Of a checkpoint that many ranks have written; their own files come to it."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run is at one step.

    Attributes:
        step: steps done.
        config: of the model.
        weights: its parameters by name.
        training: tensors of the optimiser, the carried State and the random numbers, by name.
        progress: plain values for JSON.
    """

    step: int
    config: Config
    weights: Mapping[str, Tensor]
    training: Mapping[str, Tensor]
    progress: Mapping[str, Any]

    def write(self, run: Path, run_id: str) -> Path:
        """Write into the folder of the run.

        Raises:
            InputError: the disk is full or the folder not writable; older checkpoints stay as they are.
        """
        folder = unfinished(run, self.step)
        try:
            prepare(folder)
            save_file(dict(self.weights), folder / WEIGHTS_FILE, metadata(self.config, self.weights))
            save_file(dict(self.training), folder / TRAINING_FILE)
            files = {name: digest(folder / name) for name in (WEIGHTS_FILE, TRAINING_FILE, *describe(folder, self))}
            return finish(folder, run_id, self.step, files)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot write the checkpoint {run / CHECKPOINTS / _name(self.step)}: {reason}") from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @classmethod
    def read(cls, path: Path, run_id: str | None) -> "Checkpoint":
        """Read and check a checkpoint.

        Args:
            path: its folder.
            run_id: of its run; None for any.

        Raises:
            InputError: naming the file that is missing, truncated, altered, or of another run.
        """
        manifest = _manifest(path, run_id)
        for name in manifest["files"]:
            check(path / name, manifest["files"][name])
        try:
            progress = json.loads((path / PROGRESS_FILE).read_bytes())
            _check_progress(progress)
            config = load_config(path / CONFIG_FILE)
            weights, training = _tensors(path, manifest["files"])
        except (OSError, ValueError, RecursionError, SafetensorError) as error:  # written so by another version
            raise InputError(f"the checkpoint {path} cannot be understood: {error}") from None
        return cls(progress["step"], config, weights, training, progress)


def unfinished(run: Path, step: int) -> Path:
    """The folder in which the checkpoint of a step is written, before it gets its name."""
    return run / CHECKPOINTS / f".{_name(step)}"


def prepare(folder: Path) -> None:
    """Make an unfinished checkpoint's folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def describe(folder: Path, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Write the files without tensors; gives their names."""
    (folder / CONFIG_FILE).write_text(json.dumps(checkpoint.config.to_dict(), indent=2) + "\n")
    progress = {**checkpoint.progress, "step": checkpoint.step}
    (folder / PROGRESS_FILE).write_text(json.dumps(progress, indent=2) + "\n")
    return CONFIG_FILE, PROGRESS_FILE


def finish(folder: Path, run_id: str, step: int, files: Mapping[str, dict[str, Any]]) -> Path:
    """Give an unfinished checkpoint its manifest, and once all of it is on disk its name.

    Args:
        folder: of the unfinished one.
        run_id: of the run.
        step: of the run.
        files: size and checksum of each, by its name in the folder.

    Returns:
        The folder under its name.
    """
    manifest = {"run": run_id, "step": step, "files": files}
    (folder / MANIFEST_FILE).write_text(json.dumps({**manifest, "checksum": _checksum(manifest)}))
    for name in (*files, MANIFEST_FILE, ""):
        flush(folder / name)
    target = folder.with_name(_name(step))
    if target.exists():  # a run that went back and came here again
        _remove(target)
    os.replace(folder, target)
    flush(target.parent)
    return target


def _tensors(path: Path, files: Mapping[str, Any]) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Weights and training tensors of a checkpoint whose files were checked."""
    if WEIGHTS_FILE in files:
        return load_file(path / WEIGHTS_FILE), load_file(path / TRAINING_FILE)
    from .shards import read_shards

    return read_shards(path / SHARDS)


def is_sharded(path: Path) -> bool:
    """Whether a folder is a checkpoint that many ranks have written."""
    return (path / SHARDS).is_dir() and (path / MANIFEST_FILE).is_file()


def open_sharded(path: Path) -> tuple[Config, Mapping[str, Tensor]]:
    """The configuration and the weights of such a checkpoint, of whatever run, put together when they are asked for.

    Raises:
        InputError: naming the file that is missing, truncated or altered.
    """
    checkpoint = Checkpoint.read(path, None)
    return checkpoint.config, checkpoint.weights


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    found = [path for path in (run / CHECKPOINTS).glob("step-*") if path.name == _name(step_of(path))]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint; -1 if it has none."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() and number.isascii() else -1


def is_whole(path: Path, run_id: str) -> bool:
    """Whether a checkpoint is what was written by this run."""
    try:
        manifest = _manifest(path, run_id)
        for name in manifest["files"]:
            check(path / name, manifest["files"][name])
    except InputError:
        return False
    return True


def discard(run: Path) -> None:
    """Delete the checkpoints of a run that is over; the model that was exported stays."""
    prune(run, (), 1 << 62)
    with suppress(OSError):
        (run / CHECKPOINTS).rmdir()


def prune(run: Path, kept: Collection[int], current: int) -> None:
    """Delete the checkpoints before a step that are not to be kept, and what killed processes left unfinished.

    Args:
        run: folder.
        kept: steps.
        current: step; later ones, of which this process knows nothing, stay as they are.
    """
    for path in checkpoints(run):
        if step_of(path) < current and step_of(path) not in kept:
            _remove(path)
    for path in (run / CHECKPOINTS).glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def _remove(path: Path) -> None:
    """Delete a checkpoint under another name, so that half of one is never taken for one."""
    doomed = path.with_name(f".{path.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def newest(run: Path, run_id: str, accept_older: bool) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run, or None if there is none.

    Args:
        run: folder.
        run_id: of the run.
        accept_older: take the newest one that is whole; otherwise the newest must be.

    Returns:
        It, and a line for each broken one that was passed over.

    Raises:
        InputError: naming what is broken, or if none is whole; nothing was changed.
    """
    passed: list[str] = []
    for path in checkpoints(run):
        try:
            return Checkpoint.read(path, run_id), passed
        except InputError as error:
            if not accept_older:
                raise InputError(f"{error}; --resume auto takes the newest checkpoint that is whole") from None
            passed.append(f"passed over: {error}")
    if passed:
        raise InputError(
            f"none of the checkpoints in {run / CHECKPOINTS} can be used ({passed[0]}); nothing was changed; put a "
            "whole one back, or begin anew in another folder"
        )
    if (run / WEIGHTS_FILE).exists():
        raise InputError(
            f"{run} holds a trained model but no checkpoint to go on from; nothing was changed; begin another run with "
            f"training.begin_from = {run}"
        )
    return None, passed


def export(checkpoint: Path, folder: Path) -> None:
    """Put the model of a checkpoint into a folder, as hard links where the file system has them.

    Of one that many ranks have written, the shards are put together, one tensor at a time.

    Raises:
        InputError: the folder cannot be written.
    """
    if (checkpoint / SHARDS).is_dir():
        from .shards import read_shards

        write_model(load_config(checkpoint / CONFIG_FILE), read_shards(checkpoint / SHARDS)[0], folder)
        return
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        link = folder / f".{name}.new"
        try:
            link.unlink(missing_ok=True)
            try:
                os.link(checkpoint / name, link)
            except OSError:
                shutil.copyfile(checkpoint / name, link)
            os.replace(link, folder / name)
            link.unlink(missing_ok=True)  # of a file that was there already, replacing does nothing
        except OSError as error:
            raise InputError(f"cannot write {folder / name}: {error.strerror}") from None


def _manifest(path: Path, run_id: str | None) -> dict[str, Any]:
    file = path / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{file} is missing") from None
    except (OSError, ValueError, RecursionError):
        raise InputError(f"{file} cannot be read; it was truncated or altered") from None
    checksum = manifest.pop("checksum", None) if isinstance(manifest, dict) else None
    if checksum is None or checksum != _checksum(manifest):
        raise InputError(f"{file} was altered: its checksum does not match")
    files = manifest.get("files")
    kinds = (CONTENTS, SHARDED_CONTENTS)
    if not isinstance(files, dict) or not any(all(isinstance(files.get(name), dict) for name in k) for k in kinds):
        raise InputError(f"{file} does not list {', '.join(CONTENTS)}; it is of another version")
    if run_id is not None and manifest.get("run") != run_id:
        raise InputError(f"{file} belongs to another run, {manifest.get('run')}")
    if path.name != _name(manifest.get("step")):
        raise InputError(f"{file} belongs to step {manifest.get('step')}")
    return manifest


def _name(step: Any) -> str:
    return f"step-{step:08d}" if type(step) is int else ""


def _check_progress(progress: Any) -> None:
    """Refuse what a Trainer could not have written.

    Raises:
        ValueError: naming the key.
    """
    holds = {
        "step": lambda v: type(v) is int,
        "tokens": lambda v: type(v) is int,
        "seconds": lambda v: isinstance(v, int | float) and v >= 0,
        "usual_loss": lambda v: v is None or isinstance(v, int | float),
        "place": lambda v: isinstance(v, list),
        "data": lambda v: isinstance(v, str),
        "best": lambda v: v is None or (isinstance(v, list) and [type(x) for x in v] in ([float, int], [int, int])),
    }
    wrong = [key for key, rule in holds.items() if not isinstance(progress, dict) or not rule(progress.get(key, ...))]
    if wrong:
        raise ValueError(f"{PROGRESS_FILE} has no proper {', '.join(wrong)}")


def _checksum(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors with a prefix to their names."""
    yield from ((f"{prefix}.{name}", t) for name, t in tensors.items())


def under(prefix: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors whose names have the prefix, without it; those that are in files stay there."""
    if isinstance(tensors, StoredTensors):
        return tensors.under(f"{prefix}.")
    return {name.removeprefix(f"{prefix}."): tensors[name] for name in tensors if name.startswith(f"{prefix}.")}
