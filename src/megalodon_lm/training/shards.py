"""Tensors in files of many ranks, as torch.distributed.checkpoint writes them, read by one process."""

import pickle
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from ..model.stored_tensors import StoredTensors

WEIGHTS, TRAINING = "weights", "training"
"""What names begin with."""


@contextmanager
def one_process_is_fine() -> Iterator[None]:
    """PyTorch warns where there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def read_shards(folder: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The weights and the training tensors of a sharded checkpoint, whole, each read when it is asked for.

    Args:
        folder: with the shards, whose checksums were checked.

    Raises:
        ValueError: written by another version.
    """
    try:
        about: Any = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    except (pickle.UnpicklingError, AttributeError, EOFError, ImportError) as error:
        raise ValueError(f"{folder / '.metadata'}: {error}") from None
    layout = {n: torch.empty(a.size, dtype=a.properties.dtype, device="meta") for n, a in about.items()}

    def read(name: str) -> Tensor:
        tensor = torch.empty_like(layout[name], device="cpu")
        with one_process_is_fine():
            dcp.load({name: tensor}, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
        return tensor

    stored = StoredTensors(layout, read)
    return stored.under(f"{WEIGHTS}."), stored.under(f"{TRAINING}.")
