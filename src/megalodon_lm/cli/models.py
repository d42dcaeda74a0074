"""Finding the model that a command line names."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from ..data.tokenizer import Tokenizer
    from ..model.language_model import Config, LanguageModel


def find_config(name: str) -> "Config":
    """The configuration of a named size, in a .toml or .json file, or in a model folder.

    Raises:
        InputError: none of these, or a file that holds no configuration.
    """
    from ..architectures import load_config
    from ..config import ModelConfig
    from ..training import trained

    path = Path(name)
    if path.is_dir():
        return trained.load_config(path)
    if path.suffix in (".toml", ".json"):
        return load_config(path)
    return ModelConfig.named(name)


def load_trained(folder: Path, device: str) -> "tuple[LanguageModel, Tokenizer]":
    """A model in evaluation mode, and its tokenizer; of a run that goes on or was cut off, its newest checkpoint's.

    Raises:
        InputError: not a model folder, one without its tokenizer or with another one, or no such device.
    """
    from ..data.tokenizer import load_tokenizer
    from ..ops.device import choose_device
    from ..training.trained import load

    model, tokenizer = load(folder, choose_device(device)), load_tokenizer(folder)
    model.eval()
    if model.config.vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"{folder} has a vocabulary of {model.config.vocab_size}, its tokenizer one of {tokenizer.vocab_size}; "
            "put the tokenizer.json or tokenizer.model of the model into the folder"
        )
    return model, tokenizer


@contextmanager
def loaded_by_ranks(folder: Path, device: str) -> "Iterator[tuple[LanguageModel, LanguageModel, Tokenizer]]":
    """As load_trained, on each rank; then the first one goes on alone, and all compute what it reads.

    Gives:
        The model of this process; the same as several ranks read with it, or again the model; its tokenizer.
    """
    from ..ops.device import choose_device
    from ..parallel.leading import led
    from ..parallel.mesh import MeshSizes
    from ..parallel.ranks import join

    ranks = join(MeshSizes(replicate=1, chunk=0), choose_device(device))
    model, tokenizer = load_trained(folder, device)
    with led(model, ranks) as reader:
        yield model, reader, tokenizer


def load_readable(name: Path, device: str) -> "tuple[LanguageModel, Tokenizer]":
    """As load_trained, also from a folder of transformers or a GGUF file.

    Raises:
        InputError: as load_trained, or what transformers cannot load, or it is not installed.
    """
    from ..model.checkpoint import config_values
    from ..ops.device import choose_device

    if name.suffix != ".gguf" and not (name / "config.json").is_file():
        return load_trained(name, device)
    if name.suffix != ".gguf" and "model_type" not in config_values(name):
        return load_trained(name, device)
    try:
        from ..hub.transformers_model import load_transformers
    except ImportError:
        raise InputError(f"{name} is a model of transformers; pip install 'megalodon-lm[hf]'") from None
    import torch

    return load_transformers(name, choose_device(device), torch.float32 if device == "cpu" else "auto")
