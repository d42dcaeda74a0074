"""The model that a training left: exported into a folder, or still in a checkpoint of a run that was cut off.

What many ranks train is exported when the run ends; until then its newest whole checkpoint holds the model.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .. import architectures
from ..model.checkpoint import CONFIG_FILE, WEIGHTS_FILE, fill
from ..model.language_model import Config, LanguageModel
from ..ops.device import choose_device
from .checkpoint import Checkpoint, checkpoints, is_sharded, newest
from .run_record import RUN_FILE, identity


def load(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> LanguageModel:
    """As architectures.load, also from a run that has not exported its model, or from a sharded checkpoint.

    Raises:
        InputError: there is none, or it is damaged.
    """
    checkpoint = _unexported(Path(folder))
    if checkpoint is None:
        return architectures.load(folder, device, dtype)
    architectures.check_reads_text(checkpoint.config.architecture, folder)
    with torch.device("meta"):
        model = architectures.build(checkpoint.config)
    fill(model, checkpoint.weights, choose_device(device), dtype)
    return model


def open_trained(folder: str | Path) -> tuple[Config, Mapping[str, Tensor]]:
    """As architectures.open_checked, from what load takes."""
    checkpoint = _unexported(Path(folder))
    return architectures.open_checked(folder) if checkpoint is None else (checkpoint.config, checkpoint.weights)


def load_config(folder: str | Path) -> Config:
    """The configuration of what load takes; no weights are read."""
    folder = Path(folder)
    begun = _is_unexported_run(folder) and not (folder / CONFIG_FILE).is_file()
    return architectures.load_config(next(iter(checkpoints(folder)), folder) if begun else folder)


def _is_unexported_run(folder: Path) -> bool:
    return (folder / RUN_FILE).is_file() and not (folder / WEIGHTS_FILE).is_file()


def _unexported(folder: Path) -> Checkpoint | None:
    """The checkpoint that holds the model of a folder; None where an exported one does, if any."""
    if is_sharded(folder):
        return Checkpoint.read(folder, None)
    if not _is_unexported_run(folder):
        return None
    return newest(folder, identity(folder), accept_older=True)[0]
