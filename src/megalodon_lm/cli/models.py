"""Loading a trained model for the commands that use one."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..model.decoder import Megalodon


def load_trained(folder: Path, device: str) -> "Megalodon":
    """A model in evaluation mode.

    Raises:
        ValueError: not a model folder, or not a model of bytes.
    """
    from ..data.tokenizer import ByteTokenizer
    from ..model.decoder import Megalodon

    model = Megalodon.load(folder, device).eval()
    if model.config.vocab_size < ByteTokenizer.vocab_size:
        raise ValueError(
            f"{folder} has a vocabulary of {model.config.vocab_size}; "
            f"reading bytes needs at least {ByteTokenizer.vocab_size}"
        )
    return model
