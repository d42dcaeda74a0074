"""Checkpoints: everything a run needs to go on exactly where it was.

A checkpoint is the folder `checkpoints/step-N` of a run:

    model.safetensors, config.json   a model folder like any other
    training.safetensors             the optimiser's moments, the carried State, the random numbers
    progress.json                    step, tokens, seconds, the place in the text, fingerprints
    manifest.json                    the run's id, size and SHA-256 of each file, and a checksum of itself

Where many ranks train, each writes what it holds, and both files of tensors are one folder:

    shards/                          see shards.py
    config.json, progress.json, manifest.json

Either is written under another name, flushed to disk and renamed: it is there whole, or not at all. Either is read by
any number of ranks.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..architectures import load_config
from ..errors import InputError
from ..files import digest, flush, give_mode
from ..model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, metadata, write_model
from ..model.language_model import Config
from ..model.stored_tensors import StoredTensors, read_tensors
from ..parallel.ranks import Ranks
from .manifest import (
    MANIFEST_FILE,
    PROGRESS_FILE,
    SHARDS,
    TRAINING_FILE,
    check_files,
    name_of,
    read_manifest,
    step_of,
    write_manifest,
)

CHECKPOINTS = "checkpoints"
WEIGHTS, TRAINING = "weights", "training"
"""What names in shards begin with."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run is at one step.

    Attributes:
        step: steps done.
        config: of the model.
        weights: its parameters by name; of many ranks, what each holds.
        training: tensors of the optimiser, the carried State and the random numbers, by name.
        progress: plain values for JSON.
    """

    step: int
    config: Config
    weights: Mapping[str, Tensor]
    training: Mapping[str, Tensor]
    progress: Mapping[str, Any]

    def write(self, run: Path, run_id: str, ranks: Ranks | None = None) -> Path:
        """Write into the folder of the run.

        Args:
            run: folder, which all ranks see.
            run_id: of the run; that of the first rank counts.
            ranks: that hold it and write it together.

        Raises:
            InputError: the disk is full or the folder not writable, for all ranks if for one; older checkpoints stay as
                they are.
        """
        ranks = ranks or Ranks()
        first, target = ranks.is_first, run / CHECKPOINTS / name_of(self.step)
        folder = target.with_name(f".{target.name}")
        try:
            ranks.agreeing(lambda: _prepare(folder) if first else None)
            if ranks.ranks > 1:
                from .shards import write_shards

                held = dict([*prefixed(WEIGHTS, self.weights), *prefixed(TRAINING, self.training)])
                names = write_shards(folder / SHARDS, held, ranks)
            else:
                save_file(dict(self.weights), folder / WEIGHTS_FILE, metadata(self.config, self.weights))
                save_file(dict(self.training), folder / TRAINING_FILE)
                names = [WEIGHTS_FILE, TRAINING_FILE]
                for name in names:
                    give_mode(folder / name)
            parts = ranks.each(
                lambda: {n: digest(folder / n) for n in (*names, *(self._describe(folder) if first else ()))}
            )
            files = {name: found for part in parts for name, found in part.items()}
            ranks.agreeing(lambda: _finish(folder, target, run_id, self.step, files) if first else None)
        except (OSError, SafetensorError, InputError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot write the checkpoint {target}: {reason}") from None
        finally:
            if first:
                shutil.rmtree(folder, ignore_errors=True)
        return target

    def _describe(self, folder: Path) -> tuple[str, ...]:
        """Write the files without tensors; gives their names."""
        (folder / CONFIG_FILE).write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
        progress = {**self.progress, "step": self.step}
        (folder / PROGRESS_FILE).write_text(json.dumps(progress, indent=2) + "\n")
        return CONFIG_FILE, PROGRESS_FILE

    @classmethod
    def read(cls, path: Path, run_id: str | None, ranks: Ranks | None = None) -> "Checkpoint":
        """Read and check a checkpoint; its tensors stay in their files until they are asked for.

        Args:
            path: its folder.
            run_id: of its run; None for any.
            ranks: that read it, each of which looks at some of the files.

        Raises:
            InputError: naming the file that is missing, truncated, altered, or of another run; on all ranks if on one.
        """
        ranks = ranks or Ranks()
        return ranks.agreeing(lambda: cls._read(path, run_id, ranks))

    @classmethod
    def _read(cls, path: Path, run_id: str | None, ranks: Ranks) -> "Checkpoint":
        check_files(path, read_manifest(path, run_id), ranks.rank, ranks.ranks)
        try:
            progress = json.loads((path / PROGRESS_FILE).read_bytes())
            _check_progress(progress)
            weights, training = stored_tensors(path)
            return cls(progress["step"], load_config(path / CONFIG_FILE), weights, training, progress)
        except (OSError, ValueError, RecursionError) as error:  # written so by another version
            raise InputError(f"the checkpoint {path} cannot be understood: {error}") from None


def _prepare(folder: Path) -> None:
    """Make an unfinished checkpoint's folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(folder: Path, target: Path, run_id: str, step: int, files: Mapping[str, dict[str, Any]]) -> None:
    """Give an unfinished checkpoint its manifest, and once all of it is on disk its name."""
    if unseen := [name for name in files if not (folder / name).exists()]:
        raise InputError(f"{unseen[0]}, which another rank has written, is not there; all must reach the same disk")
    if (folder / SHARDS).is_dir():
        flush(folder / SHARDS)
    write_manifest(folder, run_id, step, files)
    if target.exists():  # a run that went back and came here again
        _remove(target)
    os.replace(folder, target)
    flush(target.parent)


def stored_tensors(path: Path) -> tuple[StoredTensors, StoredTensors]:
    """Weights and training tensors of a checkpoint whose files were checked, read when they are asked for."""
    if not is_sharded(path):
        return read_tensors(path / WEIGHTS_FILE), read_tensors(path / TRAINING_FILE)
    from .shards import read_shards

    stored = read_shards(path / SHARDS)
    return stored.under(f"{WEIGHTS}."), stored.under(f"{TRAINING}.")


def is_sharded(path: Path) -> bool:
    """Whether a folder is a checkpoint that many ranks have written."""
    return (path / SHARDS).is_dir() and (path / MANIFEST_FILE).is_file()


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    found = [path for path in (run / CHECKPOINTS).glob("step-*") if path.name == name_of(step_of(path))]
    return sorted(found, key=step_of, reverse=True)


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


def newest(
    run: Path, run_id: str, accept_older: bool, ranks: Ranks | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run, or None if there is none.

    Args:
        run: folder.
        run_id: of the run.
        accept_older: take the newest one that is whole; otherwise the newest must be.
        ranks: that go on with it; all take the one that the first one finds.

    Returns:
        It, and a line for each broken one that was passed over.

    Raises:
        InputError: naming what is broken, or if none is whole; nothing was changed.
    """
    ranks = ranks or Ranks()
    passed: list[str] = []
    for path in ranks.each(lambda: checkpoints(run))[0]:
        try:
            return Checkpoint.read(path, run_id, ranks), passed
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
    if is_sharded(checkpoint):
        write_model(load_config(checkpoint / CONFIG_FILE), stored_tensors(checkpoint)[0], folder)
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


def withdraw(folder: Path) -> None:
    """Take an exported model away which is older than the newest checkpoint.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        for name in (WEIGHTS_FILE, CONFIG_FILE):  # the first vouches for both
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot remove the older model in {folder}: {error.strerror}") from None


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


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors with a prefix to their names."""
    yield from ((f"{prefix}.{name}", t) for name, t in tensors.items())


def under(prefix: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors whose names have the prefix, without it; those that are in files stay there."""
    if isinstance(tensors, StoredTensors):
        return tensors.under(f"{prefix}.")
    return {name.removeprefix(f"{prefix}."): tensors[name] for name in tensors if name.startswith(f"{prefix}.")}
