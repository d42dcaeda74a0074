"""Backbone: blocks between an input and a head, and what every model of them has: weights, states, files."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..configuration import Configuration
from ..layers.initialization import whole_parameters
from ..ops.boundaries import Boundaries
from ..ops.derived import forget
from ..ops.device import check_memory
from ..state import State
from ..state_spec import Sealed, Tree, declare, named, tree_map
from .language_model import Config


class Backbone(nn.Module):
    """What a decoder and an encoder have in common. Its parts can be run apart: `embed`, `body` and `output`.

    Its weights are drawn at once, but for a model built on the meta device: give that one memory (`to_empty`) and call
    `init_weights`.

    Args:
        config: the architecture.
        embedding: what comes in to the input of the first block; its `weight` is the first of the model's, its
            `embedding_dim` the width.
        blocks: each with a `state_spec`, {} or None where nothing is carried, and a forward (x (B, L, D), entry state
            in Sealed or None, Boundaries or None) to x (B, L, D) and the exit state; see layers.block.
        head: the last block's output to what is asked for; its `state_spec` is part of the State as "norm".
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    config_class: ClassVar[type[Configuration]]
    """Of `config`."""

    def __init__(
        self,
        config: Config,
        embedding: Any,
        blocks: Iterable[nn.Module],
        head: Any,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.config: Any = config
        self.activation_checkpointing = activation_checkpointing
        self.embed, self.layers, self.output = embedding, nn.ModuleList(blocks), head
        self.state_spec = self.declare_state()
        self.tie_weights()
        if not self.embed.weight.is_meta:  # drawing there imports PyTorch's compiler, which takes a second
            self.init_weights()

    def declare_state(self) -> Tree:
        """What the layers carry, by the sizes of their weights as they are now."""
        specs: tuple[Tree, ...] = tuple(block.state_spec for block in self.layers)
        layers = tuple({} if spec is None else spec for spec in specs)
        position = declare(dtype=torch.int64, on_cpu=True)  # in the document
        return {"layers": layers, "norm": self.output.state_spec, "position": position}

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return self.embed.embedding_dim

    @property
    def device(self) -> torch.device:
        """Of the weights."""
        return self.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.embed.weight.dtype

    @property
    def tied(self) -> Mapping[str, str]:
        """Weights that are another's, by the names of both: they are stored once."""
        return {}

    def tie_weights(self) -> None:
        """Make shared weights one again, where loading or `to_empty` has parted them."""
        for name, source in self.tied.items():
            module, _, attribute = name.rpartition(".")
            setattr(self.get_submodule(module), attribute, self.get_parameter(source))

    def init_weights(self) -> None:
        """Draw all weights anew, layer by layer from the embedding to the head, so that a seed means one model."""
        self.tie_weights()
        for part in self.modules():
            draw: Callable[[], None] | None = None if part is self else getattr(part, "init_weights", None)
            if draw is not None:
                with whole_parameters(part):
                    draw()

    def body(self, x: Tensor, state: Tree = None, boundaries: Boundaries | None = None) -> tuple[Tensor, Tree]:
        """All blocks: embedded tokens (B, L, D) to the input of the head, and each block's exit state.

        Without tokens it needs an entry state.
        """
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            forget(self.parameters())  # an optimiser may follow
        if x.shape[1] == 0:
            assert state is not None
            return x, state
        return self.through(x, state, boundaries)

    def through(self, x: Tensor, state: Tree, boundaries: Boundaries | None) -> tuple[Tensor, Tree]:
        """As body, of at least one token."""
        layers = []
        for i, block in enumerate(self.layers):
            entry = None if state is None else Sealed(state[i])
            if self.activation_checkpointing and torch.is_grad_enabled():
                x, leaving = checkpoint(block, x, entry, boundaries, use_reentrant=False)
            else:
                x, leaving = block(x, entry, boundaries)
            layers.append({} if leaving is None else leaving)
        return x, tuple(layers)

    def exit_state(
        self, entry: State | None, layers: Tree, norm: Tree, shape: Sequence[int], boundaries: Boundaries | None
    ) -> State:
        """The State after a piece of which the parts were run apart.

        Args:
            entry: what came before, or None for nothing.
            layers: what `body` left.
            norm: what the head left.
            shape: (B, L) of the piece, its padding removed.
            boundaries: of the piece.
        """
        position = torch.zeros(shape[0], dtype=torch.int64) if entry is None else entry.position
        position = (boundaries or Boundaries()).exit_position(position, shape[1])
        parts = {"layers": layers, "norm": norm, "position": position}
        return State(parts, self.state_spec, weakref.ref(self))

    def empty_state(
        self, batch: int = 1, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """The state before the first token.

        Args:
            batch: rows.
            device: of what is not always on the CPU; that of the weights by default.
            dtype: of the cached keys and values, that of the weights by default; CEMA states are float32 or better.

        Raises:
            InputError: more than the memory of the device.
        """
        device = self.device if device is None else device
        check_memory(self.state_bytes(batch, dtype), device, f"a state of {batch} rows", self.state_remedy)
        parts = tree_map(lambda leaf: leaf.empty(batch, device, dtype or self.dtype), self.state_spec)
        return State(parts, self.state_spec, weakref.ref(self))

    def state_bytes(self, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """Size in memory of a State of this model, as empty_state makes it."""
        return batch * sum(leaf.nbytes(dtype or self.dtype) for _, leaf in named(self.state_spec))

    @property
    def summary(self) -> str:
        """The sizes in a few words."""
        return f"a {type(self).__name__} of {len(self.layers)} layers and width {self.width}"

    @property
    def state_remedy(self) -> str:
        """What to change where a state is too large."""
        return "its configuration decides its size"

    def fingerprint(self) -> str:
        """Identifies the configuration and the weights: a hash of all of both, kept until a weight changes."""
        from .identity import fingerprint

        return fingerprint(self)

    def sampled_fingerprint(self) -> str:
        """That of the older format of bookmarks and states, which saw 512 values of each weight."""
        from .identity import sampled_fingerprint

        return sampled_fingerprint(self)

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into a folder, each atomically."""
        from .checkpoint import save_model

        save_model(self, folder)

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """Read what `save` wrote.

        Args:
            folder: with config.json and model.safetensors.
            device: where the weights go.
            dtype: of the weights; None for the stored one.

        Raises:
            InputError: missing, truncated or mismatched files, by name.
        """
        from .checkpoint import load_model

        return load_model(cls, folder, device, dtype)
