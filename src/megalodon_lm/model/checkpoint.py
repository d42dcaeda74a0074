"""A model as a folder: config.json and model.safetensors, under the parameter names of the authors' code."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ..config import ModelConfig
from ..errors import InputError
from ..files import write_atomically
from ..ops.device import choose_device

if TYPE_CHECKING:
    from .decoder import Megalodon

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_SAMPLE = 512  # values of each weight that enter the fingerprint


def fingerprint(model: "Megalodon") -> str:
    """Hash of the configuration and of evenly spaced values of every weight: any training step changes it."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        step = max(1, len(flat) // _SAMPLE)
        digest.update(name.encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def weights(model: "Megalodon") -> dict[str, Tensor]:
    """The state dict with a tied head left out."""
    tied = {"output.output.weight"} if model.config.share_emb else set()
    return {n: t.detach().cpu().contiguous() for n, t in model.state_dict().items() if n not in tied}


def save_model(model: "Megalodon", folder: str | Path) -> None:
    """Write the configuration and the weights."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the folder {folder}: {error.strerror}") from None
    write_atomically(folder / WEIGHTS_FILE, save(weights(model), {"format": "pt", "fingerprint": fingerprint(model)}))
    write_atomically(folder / CONFIG_FILE, json.dumps(model.config.to_dict(), indent=2) + "\n")


def load_model(
    cls: "type[Megalodon]", folder: str | Path, device: torch.device | str, dtype: torch.dtype | None
) -> "Megalodon":
    """Read a model; see Megalodon.load."""
    folder, device = Path(folder), choose_device(device)
    for path in (folder / CONFIG_FILE, folder / WEIGHTS_FILE):
        if not path.is_file():
            raise InputError(f"no model in {folder}: {path.name} is missing")
    config = ModelConfig.load(folder / CONFIG_FILE)
    path = folder / WEIGHTS_FILE
    if config.num_parameters > path.stat().st_size:
        raise InputError(
            f"{path} does not fit {folder / CONFIG_FILE}: it has {path.stat().st_size:,} bytes, and the configuration "
            f"{config.num_parameters:,} parameters"
        )
    try:
        stored = load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}); it may be truncated: copy it again") from None
    with torch.device("meta"):
        model = cls(config)
    if config.share_emb and "embed.weight" in stored:
        head = stored.setdefault("output.output.weight", stored["embed.weight"])
        if not torch.equal(head, stored["embed.weight"]):
            raise InputError(
                f"{path} does not fit {folder / CONFIG_FILE}: it holds a head of its own, and share_emb ties the head "
                "to the embedding"
            )
    expected = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    found = {n: tuple(t.shape) for n, t in stored.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise InputError(
                f"{path} does not fit {folder / CONFIG_FILE}: {name} has shape {found.get(name)} in the file and "
                f"{expected.get(name)} by the configuration"
            )
    model.load_state_dict({n: t.to(device, dtype) for n, t in stored.items()}, assign=True)
    if config.share_emb:
        model.output.output.weight = model.embed.weight
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model
