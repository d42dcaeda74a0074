"""The registry of architectures: the only place that knows them by name.

Everything else is written for any `LanguageModel`. An architecture is a configuration, a `Configuration` of that name,
and a model, a `Decoder` of it; both are imported when they are asked for.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import GECKO
from .configuration import Configuration, read_config
from .errors import InputError, nearest
from .model.checkpoint import check_hash, config_values, open_model
from .model.decoder import Decoder
from .model.language_model import Config, LanguageModel
from .sizing import TOLERANCE


class Architecture(NamedTuple):
    """Where an architecture lives, as module:name; a module of this package begins with a dot."""

    config: str
    model: str
    choices: Mapping[str, Any] = {}
    """What differs from the defaults of the configuration."""


ARCHITECTURES: dict[str, Architecture] = {
    "megalodon": Architecture(".config:ModelConfig", ".model.megalodon:Megalodon"),
    "gecko": Architecture(".config:ModelConfig", ".model.megalodon:Megalodon", GECKO),
    "llama": Architecture(".baselines.llama:LlamaConfig", ".baselines.llama:Llama"),
    "mega": Architecture(".baselines.mega:MegaConfig", ".baselines.mega:Mega"),
    "mamba": Architecture(".baselines.mamba:MambaConfig", ".baselines.mamba:Mamba"),
    "gated_deltanet": Architecture(
        ".baselines.gated_deltanet:GatedDeltaNetConfig", ".baselines.gated_deltanet:GatedDeltaNet"
    ),
    "mamba2": Architecture(".baselines.mamba2:Mamba2Config", ".baselines.mamba2:Mamba2"),
    "rwkv7": Architecture(".baselines.rwkv7:Rwkv7Config", ".baselines.rwkv7:Rwkv7"),
}
ENCODERS: dict[str, Architecture] = {
    "encoder": Architecture(".model.encoder_config:EncoderConfig", ".model.encoder:Encoder"),
}
"""What classifies: trained, kept and loaded as the others are, but no language model."""
_OLDEST = "megalodon"  # that of files without a name


def config_class(name: str) -> type[Configuration]:
    """The configuration of an architecture.

    Raises:
        InputError: unknown name; the message lists the known ones.
    """
    return _imported(_architecture(name).config)


def model_class(name: str) -> type[Decoder]:
    """The model of an architecture; raises as config_class."""
    return _imported(_architecture(name).model)


def config_of(values: Mapping[str, Any]) -> Config:
    """The configuration in plain values, as in the table [model] of a recipe or in a config.json.

    Args:
        values: with the name under `architecture`; a Megalodon without it. `parameters` asks for the size that comes
            nearest to such a number, which must be within 1 %; `vocab_size` is needed then.

    Raises:
        InputError: unknown architecture or key, a wrong value, or no such size.
    """
    given = dict(values)
    name = given.pop("architecture", _OLDEST)
    kind, given = config_class(name), {**_architecture(name).choices, **given}
    if (wanted := given.pop("parameters", None)) is None:
        return kind.from_dict(given)
    if type(wanted) is not int or wanted < 1:
        raise InputError(f"parameters = {wanted!r} must be a whole number of at least 1")
    if type(size := given.pop("vocab_size", None)) is not int:
        raise InputError("parameters needs vocab_size beside it: 259 for bytes, or that of the tokenizer")
    config: Config = kind.sized(wanted, size, **given)
    if abs(config.num_parameters / wanted - 1) > TOLERANCE:
        raise InputError(f"parameters = {wanted:,} cannot be had; the nearest is {config.num_parameters:,}")
    return config


def is_complete(values: Mapping[str, Any]) -> bool:
    """Whether plain values, as for config_of, leave nothing to the defaults of their architecture."""
    kind: Any = config_class(values.get("architecture", _OLDEST))
    return kind().to_dict().keys() <= values.keys()


def load_config(path: str | Path) -> Config:
    """The configuration in a .json or .toml file, or in a model folder.

    Raises:
        InputError: missing or malformed file, unknown architecture or key, wrong value.
    """
    path = Path(path)
    values = config_values(path) if path.is_dir() else read_config(path)
    try:
        return config_of(values)
    except InputError as error:
        raise InputError(f"{path / 'config.json' if path.is_dir() else path}: {error}") from None


def build(config: Config, activation_checkpointing: bool = False) -> LanguageModel:
    """A model of a configuration, with new weights; on the meta device without.

    Args:
        config: of any architecture.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """
    model: Any = model_class(config.architecture)
    return model(config, activation_checkpointing)


def load(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> LanguageModel:
    """The language model in a folder, whatever its architecture; see Backbone.load.

    Raises:
        InputError: it is none, or damaged.
    """
    name = config_values(folder).get("architecture", _OLDEST)
    check_reads_text(name, folder)
    return model_class(name).load(folder, device, dtype)


def check_reads_text(name: str, folder: str | Path) -> None:
    """Refuse an architecture that is no language model.

    Raises:
        InputError: what a folder holds instead.
    """
    if name in ENCODERS:
        raise InputError(f"{folder} holds an {name}, which classifies: megalodon classify takes it")


def open_checked(folder: str | Path) -> tuple[Config, Mapping[str, Tensor]]:
    """The configuration of the model in a folder, and its weights, which are read one by one when they are asked for.

    Raises:
        InputError: as Decoder.load.
    """
    model, tensors, known = open_model(model_class(config_values(folder).get("architecture", _OLDEST)), folder)
    check_hash(model.config, tensors, known, folder)
    return model.config, tensors


def _architecture(name: Any) -> Architecture:
    if not isinstance(name, str) or name not in ARCHITECTURES.keys() | ENCODERS.keys():
        raise InputError(
            f"unknown architecture {name!r}{nearest(name, ARCHITECTURES)}; known: {', '.join(ARCHITECTURES)}"
        )
    return (ARCHITECTURES | ENCODERS)[name]


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(module, __package__), name)
