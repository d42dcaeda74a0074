"""Megalodon in transformers: importing this registers its classes with AutoConfig and the Auto classes of models.

Needs the extra `hf`.
"""

from ..errors import InputError

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
except ImportError:
    raise InputError("transformers is not installed; pip install 'megalodon-lm[hf]'") from None

from .cache import MegalodonCache
from .configuration import MegalodonConfig
from .encoder_configuration import MegalodonEncoderConfig
from .modeling import MegalodonForCausalLM, MegalodonModel
from .sequence_classification import MegalodonForSequenceClassification

__all__ = [
    "MegalodonCache",
    "MegalodonConfig",
    "MegalodonEncoderConfig",
    "MegalodonForCausalLM",
    "MegalodonForSequenceClassification",
    "MegalodonModel",
]

AutoConfig.register(MegalodonConfig.model_type, MegalodonConfig, exist_ok=True)
AutoModel.register(MegalodonConfig, MegalodonModel, exist_ok=True)
AutoModelForCausalLM.register(MegalodonConfig, MegalodonForCausalLM, exist_ok=True)
AutoConfig.register(MegalodonEncoderConfig.model_type, MegalodonEncoderConfig, exist_ok=True)
AutoModelForSequenceClassification.register(MegalodonEncoderConfig, MegalodonForSequenceClassification, exist_ok=True)
