"""MegalodonEncoderConfig: an EncoderConfig as transformers knows configurations."""

import dataclasses
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..model.encoder_config import EncoderConfig

_CHOICES = tuple(field.name for field in dataclasses.fields(EncoderConfig))


class MegalodonEncoderConfig(PreTrainedConfig):
    """Every choice of an EncoderConfig, under its own name and, where transformers has one, under that one too.

    Sizes by name: `MegalodonEncoderConfig.of(EncoderConfig.named("listops"))`.

    Args:
        values: fields of EncoderConfig, names of transformers such as `hidden_size`, and what every configuration of
            transformers takes, such as `id2label`, or `num_labels` for `num_classes`.

    Raises:
        InputError: a value that EncoderConfig refuses.
    """

    model_type = EncoderConfig.model_type
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "model_dim",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "ffn_hidden_dim",
    }

    def __init__(self, **values: Any) -> None:
        given = {self.attribute_map.get(key, key): value for key, value in values.items()}
        number = given.pop("num_labels", None)
        if given.get("id2label"):
            number = len(given["id2label"])
        if number is not None:
            given["num_classes"] = number
        choices = EncoderConfig.from_dict({key: given.pop(key) for key in _CHOICES if key in given})
        if not given.get("id2label"):
            given["num_labels"] = choices.num_classes
        elif not given.get("label2id"):
            given["label2id"] = {name: int(number) for number, name in given["id2label"].items()}
        for key, value in choices.to_dict().items():
            setattr(self, key, value)
        super().__init__(**given)

    @classmethod
    def of(cls, config: EncoderConfig, **values: Any) -> "MegalodonEncoderConfig":
        """That of a native configuration, with what transformers adds, such as `id2label`."""
        return cls(**config.to_dict(), **values)

    @property
    def choices(self) -> EncoderConfig:
        """The native configuration as it is now: resizing changes it."""
        return EncoderConfig.from_dict({key: getattr(self, key) for key in _CHOICES})
