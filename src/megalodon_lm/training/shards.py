"""Tensors in files of many ranks: torch.distributed.checkpoint, as checkpoints use it.

Each rank writes what it holds of a DTensor into a file of its own; what several hold alike is written once. Whoever
reads, one process or the ranks of any mesh, reads what it needs of each tensor from wherever it lies.
"""

import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as forms
from torch.distributed.checkpoint.api import CheckpointException

from ..errors import InputError
from ..model.stored_tensors import DTYPES, StoredTensors
from ..parallel.ranks import Ranks

METADATA = ".metadata"


def write_shards(folder: Path, tensors: dict[str, Tensor], ranks: Ranks) -> list[str]:
    """Write what every rank holds, flushed to disk.

    Args:
        folder: of the shards.
        tensors: of this rank, by names in which all ranks agree.
        ranks: which all call this.

    Returns:
        The files of this rank, by their names in the folder around.

    Raises:
        InputError: on all ranks, what one of them could not write.
    """
    writer = dcp.FileSystemWriter(folder, sync_files=True)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=ranks.group)
    except CheckpointException as error:
        raise InputError(_reasons(error)) from None
    own = [path.name for path in sorted(folder.glob(f"__{ranks.rank}_*"))]
    return [f"{folder.name}/{name}" for name in (*own, *([METADATA] if ranks.is_first else []))]


class Shards(StoredTensors):
    """Tensors that lie in files of many ranks, read when they are asked for: whole, or what a rank is to hold.

    Args:
        layout: as of StoredTensors.
        fill: reads the tensor of a name into one that is given, a DTensor for a share.
    """

    def __init__(self, layout: Mapping[str, Tensor], fill: Callable[[str, Tensor], None]):
        def read(name: str) -> Tensor:
            return self._filled(name, torch.empty_like(self.layout[name], device="cpu"))

        super().__init__(layout, read)
        self._fill = fill

    def _filled(self, name: str, tensor: Tensor) -> Tensor:
        self._fill(name, tensor)
        return tensor

    def under(self, prefix: str) -> "Shards":
        layout = {name.removeprefix(prefix): t for name, t in self.layout.items() if name.startswith(prefix)}
        return Shards(layout, lambda name, tensor: self._fill(prefix + name, tensor))

    def held_as(self, name: str, like: Tensor) -> Tensor:
        """Of a tensor, what is held here of another one of its shape."""
        return self._filled(name, torch.empty_like(like, dtype=self.layout[name].dtype, requires_grad=False))


def read_shards(folder: Path) -> Shards:
    """The tensors in shards.

    Args:
        folder: of the shards, whose checksums were checked.

    Raises:
        ValueError: written by another version.
    """
    description = _described(folder / METADATA)
    reader = _Reader(folder, description)
    about: Any = description.state_dict_metadata
    layout = {name: torch.empty(a.size, dtype=a.properties.dtype, device="meta") for name, a in about.items()}

    def fill(name: str, tensor: Tensor) -> None:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each process reads for itself
                dcp.load({name: tensor}, storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            raise InputError(f"{folder} was altered or removed while it was read: {_reasons(error)}") from None

    return Shards(layout, fill)


class _Reader(dcp.FileSystemReader):
    """PyTorch's, of which every call would read the description of all tensors anew."""

    def __init__(self, folder: Path, description: forms.Metadata):
        super().__init__(folder)
        self.description = description

    def read_metadata(self, *args: Any, **kwargs: Any) -> forms.Metadata:
        """See StorageReader."""
        return self.description


def _described(path: Path) -> forms.Metadata:
    """What lies where.

    Raises:
        ValueError: written by another version, or something else.
    """
    try:
        with path.open("rb") as file:
            found = _Description(file).load()
        if not isinstance(found, forms.Metadata) or not all(
            isinstance(kind, forms.TensorStorageMetadata) for kind in found.state_dict_metadata.values()
        ):
            raise pickle.UnpicklingError("it does not describe tensors alone")
    except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None
    found.storage_meta = forms.StorageMeta()
    return found


_KNOWN = {
    **{(kind.__module__, kind.__qualname__): kind for kind in (
        forms.Metadata, forms.MetadataIndex, forms.StorageMeta, forms.TensorStorageMetadata,
        forms.ChunkStorageMetadata, forms.TensorProperties, forms._MEM_FORMAT_ENCODING, filesystem._StorageInfo,
    )},
    ("torch", "Size"): torch.Size,
    **{("torch", str(kind).removeprefix("torch.")): kind for kind in DTYPES},
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    **{(module, name): PurePath for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")},
}  # fmt: skip


class _Description(pickle.Unpickler):
    """Knows the few types that describe tensors in files: a file from elsewhere is no program that runs here."""

    def find_class(self, module: str, name: str) -> Any:
        """As in Unpickler."""
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in it")
        return _KNOWN[module, name]


def _reasons(error: CheckpointException) -> str:
    failures = sorted(error.failures.items())
    return "; ".join(f"rank {rank}: {getattr(e, 'strerror', None) or e}" for rank, (e, _) in failures)
