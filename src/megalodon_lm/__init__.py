"""Megalodon: language models without a context limit.

from megalodon_lm import Megalodon, ModelConfig, State

model = Megalodon(ModelConfig.named("small"))
logits, state = model(tokens)         # tokens (B, L) int64, logits (B, L, vocabulary)
logits, state = model(more, state)    # cut anywhere, the result is the same
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ModelConfig
    from .data.tokenizer import ByteTokenizer
    from .generation.context import Context
    from .generation.generator import Generator
    from .generation.sampling import Sampling
    from .model.encoder import Encoder
    from .model.encoder_config import EncoderConfig
    from .model.megalodon import Megalodon
    from .state import State

__version__ = "0.1.0"
__all__ = [
    "ByteTokenizer", "Context", "Encoder", "EncoderConfig", "Generator", "Megalodon", "ModelConfig", "Sampling",
    "State",
]  # fmt: skip

_HOME = {
    "ByteTokenizer": "data.tokenizer",
    "Context": "generation.context",
    "Encoder": "model.encoder",
    "EncoderConfig": "model.encoder_config",
    "Generator": "generation.generator",
    "Megalodon": "model.megalodon",
    "ModelConfig": "config",
    "Sampling": "generation.sampling",
    "State": "state",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
