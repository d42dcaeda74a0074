"""Checkpoints of which every rank writes its part, and that any number of ranks reads: torch.distributed.checkpoint.

Such a checkpoint is the folder `checkpoints/step-N` of a run, as one of a single process is:

    shards/                      weights, moments, carried State and random numbers: each rank's shares in its files
    config.json, progress.json   as in any checkpoint
    manifest.json                the run's id, size and SHA-256 of each file, and a checksum of itself

All ranks write into a folder of another name; when all are done, the first one renames it. So a rank that dies, or a
disk that is full, leaves the checkpoint before as it was.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ..errors import InputError
from ..files import digest, flush
from .checkpoint import SHARDS, Checkpoint, describe, finish, prefixed, prepare, unfinished
from .shards import TRAINING, WEIGHTS, one_process_is_fine

T = TypeVar("T")


@dataclass(frozen=True)
class ShardedCheckpoint(Checkpoint):
    """What a run is at one step; tensors are DTensors where a rank holds a part, all others are alike on all ranks.

    Attributes:
        group: of all ranks of the run, for objects; None for the default one, or for one process alone.
    """

    group: Any = None

    def write(self, run: Path, run_id: str) -> Path:
        """Write into the folder of the run; every rank must call it.

        Args:
            run: folder, which all ranks see.
            run_id: of the run; that of the first rank counts.

        Raises:
            InputError: on every rank, what went wrong on one of them; older checkpoints stay as they are.
        """
        first = not dist.is_initialized() or dist.get_rank(self.group) == 0
        folder = unfinished(run, self.step)
        tensors = dict([*prefixed(WEIGHTS, self.weights), *prefixed(TRAINING, self.training)])
        with self._refusing(folder, first):
            self._each(lambda: prepare(folder) if first else None)
            self._save(folder / SHARDS, tensors)
            written = self._each(lambda: self._digests(folder, first))
            files = {name: found for part in written for name, found in part.items()}
            (target, *_) = self._each(lambda: finish(folder, run_id, self.step, files) if first else None)
        assert target is not None
        return target

    def _save(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        writer = dcp.FileSystemWriter(folder, sync_files=True)
        with one_process_is_fine():
            dcp.save(tensors, storage_writer=writer, process_group=self.group, no_dist=not dist.is_initialized())

    def _digests(self, folder: Path, first: bool) -> dict[str, dict[str, Any]]:
        """Of the files that this rank has written, by their names in the checkpoint; the first writes the rest."""
        rank = dist.get_rank(self.group) if dist.is_initialized() else 0
        names = [f"{SHARDS}/{path.name}" for path in sorted((folder / SHARDS).glob(f"__{rank}_*"))]
        if first:
            names += [f"{SHARDS}/.metadata", *describe(folder, self)]
            flush(folder / SHARDS)
        return {name: digest(folder / name) for name in names}

    def _each(self, act: Callable[[], T]) -> list[T]:
        """What every rank makes of something, once all have.

        Raises:
            InputError: on every rank, the first that one of them met.
        """
        made: T | None = None
        error = ""
        try:
            made = act()
        except (OSError, InputError) as raised:
            error = str(getattr(raised, "strerror", None) or raised)
        told: list[Any] = [(made, error)]
        if dist.is_initialized():
            told *= dist.get_world_size(self.group)
            dist.all_gather_object(told, (made, error), group=self.group)
        for _, said in told:
            if said:
                raise InputError(said)
        return [found for found, _ in told]

    @contextmanager
    def _refusing(self, folder: Path, first: bool) -> Iterator[None]:
        try:
            yield
        except CheckpointException as error:
            said = "; ".join(f"rank {rank}: {_reason(raised[0])}" for rank, raised in sorted(error.failures.items()))
            raise InputError(f"cannot write the checkpoint {folder.name.removeprefix('.')}: {said}") from None
        finally:
            if first:
                shutil.rmtree(folder, ignore_errors=True)


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)
