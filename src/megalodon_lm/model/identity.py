"""The identity of a model: a hash of its configuration and of every bit of its weights.

A state, a bookmark and a weights file carry it. It takes a second for some 1.5 GB of weights, so it is kept, until a
weight changes: PyTorch counts changes in place, and a sample of the values shows those it does not count.
"""

import hashlib
import json
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .language_model import Config

if TYPE_CHECKING:
    from .backbone import Backbone

_SAMPLE = 512  # values of each weight
_FIRST_CHOICES = frozenset((
    "vocab_size", "num_layers", "model_dim", "num_heads", "z_dim", "value_dim", "ffn_hidden_dim", "cema_ndim",
    "chunk_size", "norm_num_groups", "norm_eps", "rope_base", "swiglu", "rescale_nffn", "scale_emb", "share_emb",
    "init_mode", "dropout", "hidden_dropout", "attention_dropout", "drop_keys",
))  # fmt: skip
"""Those there were when files held a sampled fingerprint: they enter it at their defaults too."""
_known: "weakref.WeakKeyDictionary[Backbone, tuple[Any, str]]" = weakref.WeakKeyDictionary()


def weights(model: "Backbone") -> dict[str, Tensor]:
    """The state dict without the weights that are another's."""
    return {n: t.detach() for n, t in model.state_dict().items() if n not in model.tied}


def digest(config: Config, tensors: Mapping[str, Tensor]) -> str:
    """Hash of a configuration and of weights by name, wherever they are.

    Choices at their defaults do not enter, so that one that is added later leaves old hashes as they are.
    """
    found = hashlib.sha256(_chosen(config))
    for name in sorted(tensors):
        t = tensors[name].detach()
        found.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        if t.numel():
            found.update(t.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _chosen(config: Config, always: frozenset[str] = frozenset()) -> bytes:
    """What a configuration says that is not a default, and the values of some fields even so."""
    default = {key: value for key, value in type(config)().to_dict().items() if key != "architecture"}
    chosen = {
        key: value
        for key, value in config.to_dict().items()
        if key in always or key not in default or value != default[key]
    }
    return json.dumps(chosen, sort_keys=True).encode()


def fingerprint(model: "Backbone") -> str:
    """See Backbone.fingerprint."""
    seen = _seen(model)
    kept = _known.get(model)
    if kept is None or kept[0] != seen:
        kept = seen, digest(model.config, weights(model))
        _known[model] = kept
    return kept[1]


def remember(model: "Backbone", known: str) -> None:
    """Note the fingerprint of a model where it was computed otherwise."""
    _known[model] = _seen(model), known


def _seen(model: "Backbone") -> Any:
    """Changes when a weight does."""
    places = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in model.parameters()]
    return places, sampled_fingerprint(model)


def sampled_fingerprint(model: "Backbone") -> str:
    """Hash of the configuration and of evenly spaced values of every weight: any training step changes it."""
    found = hashlib.sha256(_chosen(model.config, _FIRST_CHOICES))
    for name, weight in model.named_parameters():
        flat = weight.detach().reshape(-1)
        step = max(1, len(flat) // _SAMPLE)
        found.update(name.encode())
        found.update(flat[::step].float().cpu().numpy().tobytes())
    return found.hexdigest()
