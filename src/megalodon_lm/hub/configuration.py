"""MegalodonConfig: a ModelConfig as transformers knows configurations."""

import dataclasses
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..config import ModelConfig

_CHOICES = tuple(field.name for field in dataclasses.fields(ModelConfig))
_UNLIMITED = 2**31 - 1


class MegalodonConfig(PreTrainedConfig):
    """Every choice of a ModelConfig, under its own name and, where transformers has one, under that one too.

    A Gecko is one as well. Sizes by name: `MegalodonConfig.of(ModelConfig.named("small"))`.

    Args:
        values: fields of ModelConfig, names of transformers such as `hidden_size`, and what every configuration of
            transformers takes, such as `eos_token_id`.

    Raises:
        InputError: a value that ModelConfig refuses.
    """

    model_type = "megalodon"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "ffn_hidden_dim",
        "tie_word_embeddings": "share_emb",
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]

    def __init__(self, **values: Any) -> None:
        given = {self.attribute_map.get(key, key): value for key, value in values.items()}
        choices = ModelConfig.from_dict({key: given.pop(key) for key in _CHOICES if key in given})
        for key, value in choices.to_dict().items():
            setattr(self, key, value)
        self.use_cache = given.pop("use_cache", True)
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(self, key, given.pop(key, None))
        super().__init__(**given)

    @classmethod
    def of(cls, config: ModelConfig, **values: Any) -> "MegalodonConfig":
        """That of a native configuration, with what transformers adds, such as `eos_token_id`."""
        return cls(**config.to_dict(), **values)

    @property
    def choices(self) -> ModelConfig:
        """The native configuration as it is now: resizing and tying change it."""
        return ModelConfig.from_dict({key: getattr(self, key) for key in _CHOICES})

    @property
    def max_position_embeddings(self) -> int:
        """More than any text has. There is no limit; programs that look for one find this, and cut nothing."""
        return _UNLIMITED
