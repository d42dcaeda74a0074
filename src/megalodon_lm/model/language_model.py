"""What the trainer, the evaluators, contexts and the generator need of a language model, whatever its architecture."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from ..ops.linear_cross_entropy import Reduction
from ..state import State, StatefulModel
from ..state_spec import Tree


class Config(Protocol):
    """The configuration of a model: plain values, and what a model of them costs."""

    architecture: ClassVar[str]
    """Its name in the registry."""

    @property
    def vocab_size(self) -> int:
        """Tokens in the vocabulary."""

    @property
    def num_parameters(self) -> int:
        """Trainable scalars, tied weights counted once."""

    @property
    def reading_unit(self) -> int:
        """Tokens after which a piece of reading ends, so that the state there may be kept."""

    def flops_per_token(self, backward: bool = False) -> int:
        """Floating point operations per token, a multiply and an add as two; with `backward` those of training."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every key, with the name of the architecture."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """What to_dict gave.

        Raises:
            InputError: an unknown key, or a wrong value.
        """

    @classmethod
    def sized(cls, parameters: int, vocab_size: int, **choices: Any) -> Self:
        """The configuration nearest to a number of parameters: within 1 % from 100,000 of them on.

        Raises:
            InputError: a choice that the number of parameters decides.
        """


class LanguageModel(StatefulModel, Protocol):
    """A decoder of tokens that carries a State: a torch module, of which only what is used here is named.

    A sequence may be cut anywhere: `model(tokens, state)` goes on where the state ends, and gives what the whole would.
    Documents packed into a row, and rows in a batch, know nothing of each other.
    """

    config: Any
    """A Config."""
    layers: nn.ModuleList
    """The blocks: they are compiled each by itself, and their linear layers are what Muon moves."""
    training: bool

    def __call__(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        targets: Tensor | None = None,
        learnt: Tensor | None = None,
        reduction: Reduction = "mean",
        logits_to_keep: int | None = None,
        document_starts: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Logits or losses, and the State after the tokens; see Decoder.forward."""

    @property
    def width(self) -> int:
        """Of the residual stream."""

    @property
    def device(self) -> torch.device:
        """Of the weights."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""

    def declare_state(self) -> Tree:
        """What it carries, whole; `state_spec` is that of this process, which may hold a part of the model."""

    def empty_state(
        self, batch: int = 1, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first token."""

    def state_bytes(self, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """Size in memory of a State."""

    def check_tokens(self, tokens: Tensor) -> None:
        """Refuse what is not a batch of tokens of this model."""

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""

    def modules(self) -> Iterator[nn.Module]:
        """As in torch, like all that follow."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...

    def train(self) -> Any: ...

    def eval(self) -> Any: ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...
