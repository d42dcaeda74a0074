"""Megalodon in transformers: importing this registers its classes with AutoConfig, AutoModel and AutoModelForCausalLM.

Needs the extra `hf`.
"""

from ..errors import InputError

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
except ImportError:
    raise InputError("transformers is not installed; pip install 'megalodon-lm[hf]'") from None

from .cache import MegalodonCache
from .configuration import MegalodonConfig
from .modeling import MegalodonForCausalLM, MegalodonModel

__all__ = ["MegalodonCache", "MegalodonConfig", "MegalodonForCausalLM", "MegalodonModel"]

AutoConfig.register(MegalodonConfig.model_type, MegalodonConfig, exist_ok=True)
AutoModel.register(MegalodonConfig, MegalodonModel, exist_ok=True)
AutoModelForCausalLM.register(MegalodonConfig, MegalodonForCausalLM, exist_ok=True)
