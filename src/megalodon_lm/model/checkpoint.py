"""A model as a folder: config.json and model.safetensors, under the parameter names of the authors' code."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..configuration import read_config
from ..errors import InputError
from ..files import write_atomically
from ..ops.device import choose_device
from .identity import digest, remember, weights
from .language_model import Config
from .stored_tensors import StoredTensors, read_indexed, read_tensors, shape_of, write_tensors

if TYPE_CHECKING:
    from .backbone import Backbone

    B = TypeVar("B", bound=Backbone)

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"  # of weights in several files, as transformers writes large ones
HASH = "fingerprint-2"  # of all values; older files have one of a sample, as "fingerprint"


def metadata(config: Config, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """What a weights file says of itself: its configuration, and a hash of both.

    So the one file vouches for the folder, and is replaced in one step; see load_model.
    """
    return {"format": "pt", "config": json.dumps(config.to_dict()), HASH: digest(config, weights)}


def save_model(model: "Backbone", folder: str | Path) -> None:
    """Write the configuration and the weights, so that a kill at any moment leaves a model: the old one or the new."""
    write_model(model.config, weights(model), folder)


def write_model(config: Config, tensors: Mapping[str, Tensor], folder: str | Path) -> None:
    """Write a model folder of weights that may still lie in other files: one tensor at a time; see save_model.

    Args:
        config: of the model.
        tensors: its weights by name, tied ones once.
        folder: is made if it is not there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CONFIG_FILE).exists() and _vouched(folder / WEIGHTS_FILE)[0] not in (None, config.to_dict()):
            (folder / CONFIG_FILE).unlink()  # until both are new, the one in the weights file counts
    except OSError as error:
        raise InputError(f"cannot create the folder {folder}: {error.strerror}") from None
    write_tensors(folder / WEIGHTS_FILE, tensors, metadata(config, tensors))
    write_atomically(folder / CONFIG_FILE, json.dumps(config.to_dict(), indent=2) + "\n")


def vouch(path: Path, config: Config) -> None:
    """Give a weights file that another program wrote what it says of itself; see metadata.

    Args:
        path: of the file, with the names of the model's state dict.
        config: of the model.
    """
    stored = read_tensors(path)
    write_tensors(path, stored, metadata(config, stored))


def _vouched(path: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The configuration's values and the hash within a weights file; None if there are none."""
    try:
        with safe_open(path, framework="pt") as file:
            said = file.metadata() or {}
        values = json.loads(said["config"])
        return (values, said[HASH]) if isinstance(values, dict) else (None, None)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None, None


def config_values(folder: str | Path) -> dict[str, Any]:
    """The values of the configuration of a model folder; the one in the weights file stands in for a lost config.json.

    Raises:
        InputError: there is none, or it cannot be read.
    """
    folder = Path(folder)
    if (folder / CONFIG_FILE).is_file():
        return read_config(folder / CONFIG_FILE)
    if (within := _vouched(folder / WEIGHTS_FILE)[0]) is None:
        raise InputError(f"no model in {folder}: {CONFIG_FILE} is missing")
    return within


def open_model(cls: "type[B]", folder: str | Path) -> "tuple[B, StoredTensors, str | None]":
    """A model in a folder without its weights, which stay in their file.

    Returns:
        The model on the meta device, its weights by name, tied ones once, and the hash that the file says they have;
        None for files of other programs, which say nothing.

    Raises:
        InputError: a file is missing or damaged, or the two do not fit each other.
    """
    folder = Path(folder)
    path, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    values, known = _vouched(path)
    within = _config(cls, values)
    known = known if within else None
    if not (folder / CONFIG_FILE).is_file() and within is None:
        raise InputError(f"no model in {folder}: {CONFIG_FILE} is missing")
    if not path.is_file() and not index.is_file():
        raise InputError(f"no model in {folder}: {path.name} is missing")
    config = within if within and not (folder / CONFIG_FILE).is_file() else cls.config_class.load(folder / CONFIG_FILE)
    stored = read_tensors(path) if path.is_file() else read_indexed(index)
    size = path.stat().st_size if path.is_file() else sum(t.nbytes for t in stored.layout.values())
    if config.num_parameters > size:
        raise InputError(
            f"{path} does not fit {folder / CONFIG_FILE}: it has {size:,} bytes, and the configuration "
            f"{config.num_parameters:,} parameters"
        )
    with torch.device("meta"):
        build: Any = cls  # its subclasses take the configuration alone
        model = build(config)
    for name, source in model.tied.items():
        if name in stored and source in stored and not torch.equal(stored[name], stored[source]):
            raise InputError(
                f"{path} does not fit {folder / CONFIG_FILE}: it holds {name} of its own, which the configuration ties "
                f"to {source}"
            )
        stored.layout.pop(name, None)
    expected = weights(model)
    for name in sorted(expected.keys() | stored.keys()):
        wanted, found = shape_of(expected, name), shape_of(stored, name)
        if wanted != found:
            raise InputError(
                f"{path} does not fit {folder / CONFIG_FILE}: {name} has shape {found} in the file and {wanted} by the "
                "configuration"
            )
    if within is not None and config != within:
        raise InputError(
            f"{folder / CONFIG_FILE} was edited or is that of another model: {path.name} was written with "
            f"{_differences(config, within)}; delete {CONFIG_FILE} to load the model as it was written"
        )
    return model, stored, known


def check_hash(config: Config, tensors: Mapping[str, Tensor], known: str | None, folder: str | Path) -> None:
    """Refuse weights that are not those the folder was written with.

    Raises:
        InputError: they have another hash than `known`; None for files that say nothing.
    """
    if known is not None and digest(config, tensors) != known:
        path = Path(folder) / WEIGHTS_FILE
        raise InputError(f"{path} was altered after it was written: its checksum does not match; copy it again")


def load_model(cls: "type[B]", folder: str | Path, device: torch.device | str, dtype: torch.dtype | None) -> "B":
    """Read a model; see Backbone.load.

    A weights file that carries a hash must match it, and config.json must be the one it was written with. Files without
    one, of other programs, are taken as they are.
    """
    device = torch.device(device) if str(device) == "meta" else choose_device(device)
    model, stored, known = open_model(cls, folder)
    held = dict(stored)
    check_hash(model.config, held, known, folder)
    fill(model, held, device, dtype)
    as_stored = dtype is None or all(t.dtype == dtype for t in held.values())
    if known is not None and as_stored and device.type != "meta":
        remember(model, known)
    return model


def fill(model: Any, stored: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype | None) -> None:
    """Give a model on the meta device its weights.

    Args:
        model: of any architecture.
        stored: its weights by name, tied ones once.
        device: to put them on.
        dtype: of the weights; None for that of each.
    """
    state = {name: t.to(device, dtype) for name, t in stored.items()}
    model.load_state_dict(state | {name: state[source] for name, source in model.tied.items()}, assign=True)
    model.tie_weights()
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _config(cls: "type[B]", values: dict[str, Any] | None) -> Config | None:
    """That of an architecture from values in a weights file; None where they are not of it."""
    try:
        return None if values is None else cls.config_class.from_dict(values)
    except (InputError, TypeError):
        return None


def _differences(config: Config, within: Config) -> str:
    ours, theirs = config.to_dict(), within.to_dict()
    return ", ".join(f"{key} = {theirs[key]!r}" for key in ours if ours[key] != theirs[key])
