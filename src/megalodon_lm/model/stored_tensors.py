"""Tensors by name that stay in their files until they are asked for, and files of them written one tensor at a time."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError
from ..files import replacing

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = tuple(_NAMES)
"""What tensors in files may have."""
_TYPES = {name: dtype for dtype, name in _NAMES.items()}


class StoredTensors(Mapping[str, Tensor]):
    """Tensors that are read, or put together, when they are asked for, and are not kept.

    Args:
        layout: the shape and the type of each, as a tensor on the meta device.
        read: the tensor of a name.
    """

    def __init__(self, layout: Mapping[str, Tensor], read: Callable[[str], Tensor]):
        self.layout, self._read = dict(layout), read

    def under(self, prefix: str) -> "StoredTensors":
        """Those whose names begin with something, without it."""
        layout = {name.removeprefix(prefix): t for name, t in self.layout.items() if name.startswith(prefix)}
        return StoredTensors(layout, lambda name: self._read(prefix + name))

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.layout  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)


def shape_of(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    """That of a tensor, without reading it; None where there is none of the name."""
    found = (tensors.layout if isinstance(tensors, StoredTensors) else tensors).get(name)
    return None if found is None else tuple(found.shape)


def read_tensors(path: Path) -> StoredTensors:
    """The tensors of a safetensors file.

    Raises:
        InputError: truncated, or not of that kind.
    """
    try:
        file = safe_open(path, framework="pt")
        layout = {}
        for name in file.keys():  # noqa: SIM118  # not a dict
            part = file.get_slice(name)
            layout[name] = torch.empty(part.get_shape(), dtype=_TYPES[part.get_dtype()], device="meta")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); it may be truncated: copy it again") from None
    return StoredTensors(layout, file.get_tensor)


def read_indexed(index: Path) -> StoredTensors:
    """The tensors of several safetensors files, which transformers makes of a large model.

    Args:
        index: the file beside them that says which holds what.

    Raises:
        InputError: damaged, or one of the files is missing or damaged.
    """
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        files = {name: read_tensors(index.parent / Path(name).name) for name in set(places.values())}
        layout = {name: files[place].layout[name] for name, place in places.items()}
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{index} cannot be read, or does not fit the files beside it ({error}); copy them again"
        ) from None
    return StoredTensors(layout, lambda name: files[places[name]][name])


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, with no more than one tensor of it in memory beside what the mapping holds.

    Args:
        path: of the file, which is replaced at once.
        tensors: on any device.
        metadata: of the header.

    Raises:
        InputError: it cannot be written.
    """
    layout = tensors.layout if isinstance(tensors, StoredTensors) else tensors
    names = sorted(layout, key=lambda name: (-layout[name].element_size(), name))  # so that each is aligned
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        start, end = end, end + layout[name].nbytes
        header[name] = {
            "dtype": _NAMES[layout[name].dtype],
            "shape": list(layout[name].shape),
            "data_offsets": [start, end],
        }
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    with replacing(path) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in names:
            flat = tensors[name].detach().cpu().contiguous().view(-1)
            file.write(flat.view(torch.uint8).numpy().data if len(flat) else b"")
