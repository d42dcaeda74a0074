"""Language models of Hugging Face transformers, at the parameters of a given Megalodon: contenders in speed alone.

Each module has the functions of `Peer`. transformers comes with the extra `bench`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ...errors import InputError

NAMES = ("llama", "mamba", "rwkv4")
"""Peers by name."""

_NEEDS = {"llama": ("transformers",), "mamba": ("transformers", "mambapy"), "rwkv4": ("transformers",)}


class Peer(Protocol):
    """What every module of a peer offers."""

    CACHES: tuple[str, ...]
    """Kinds of decoding cache to choose from; which is the fastest depends on machine and context."""

    def build(self, parameters: int, vocab_size: int) -> nn.Module:
        """A model with random weights of as nearly that many parameters as round widths allow: within 1 % from 10M."""

    def loss(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Mean cross-entropy in nats of each token of (B, L) after the first."""

    def prefill(self, model: nn.Module, tokens: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """Read a prompt (B, L): logits of the next token (B, vocabulary), and a cache, or the given empty one."""

    def step(self, model: nn.Module, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Read one token a row (B, 1): logits of the next (B, vocabulary), and the cache, changed in place."""

    def empty_cache(self, model: nn.Module, kind: str, room: int) -> Any:
        """A cache of that kind, one of CACHES, for up to `room` tokens; None if reading the prompt makes it."""

    def made_up_cache(self, model: nn.Module, kind: str, context: int, room: int, dtype: torch.dtype) -> Any:
        """A cache as after `context` tokens, with room for so many more, to measure steps without reading a prompt.

        What it holds is random: that does not matter for speed. dtype is that of keys and values.
        """

    def rewind(self, cache: Any, tokens: int) -> None:
        """Take a cache back to the length it had so many tokens ago, so that steps can be measured again."""


def library_name(peer: str) -> str:
    """That of a peer which is the form of transformers alone, and not the faster one of two; itself for the others."""
    return peer.removeprefix("transformers_")


def missing(name: str) -> list[str]:
    """Packages that a peer needs and this environment lacks."""
    return [package for package in _NEEDS[name] if find_spec(package) is None]


def peer(name: str) -> Peer:
    """A peer by name.

    Raises:
        InputError: unknown name, or the extra is not installed.
    """
    if name not in NAMES:
        raise InputError(f"unknown peer {name!r}; known: {', '.join(NAMES)}")
    if lacking := missing(name):
        raise InputError(f"the peer {name} needs {' and '.join(lacking)}; pip install 'megalodon-lm[bench]'")
    return cast(Peer, import_module(f".{name}", __name__))
