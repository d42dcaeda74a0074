"""Finding the model that a command line names."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from ..config import ModelConfig
    from ..data.tokenizer import Tokenizer
    from ..model.decoder import Megalodon


def find_config(name: str) -> "ModelConfig":
    """The configuration of a named size, in a .toml or .json file, or in a model folder.

    Raises:
        InputError: none of these, or a file that holds no configuration.
    """
    from ..config import ModelConfig

    path = Path(name)
    if path.is_dir():
        return ModelConfig.load(path / "config.json")
    if path.suffix in (".toml", ".json"):
        return ModelConfig.load(path)
    return ModelConfig.named(name)


def load_trained(folder: Path, device: str) -> "tuple[Megalodon, Tokenizer]":
    """A model in evaluation mode, and its tokenizer.

    Raises:
        InputError: not a model folder, one without its tokenizer or with another one, or no such device.
    """
    from ..data.tokenizer import load_tokenizer
    from ..model.decoder import Megalodon
    from ..ops.device import choose_device

    model, tokenizer = Megalodon.load(folder, choose_device(device)).eval(), load_tokenizer(folder)
    if model.config.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"{folder} has a vocabulary of {model.config.vocab_size}, its tokenizer one of {tokenizer.vocab_size}; "
            "put the tokenizer.json or tokenizer.model of the model into the folder"
        )
    return model, tokenizer
