"""What is planned: a model, how much it reads in a step, and over which ranks it is spread."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..config import ModelConfig
from ..errors import InputError


@dataclass(frozen=True)
class Layout:
    """A training over devices.

    Attributes:
        config: of the model.
        context: tokens of a row in a step, through which gradients flow.
        rows: that a device reads at once, the same on all ranks of `chunk` and `tensor`.
        accumulate: such batches for a step.
        replicate, shard, chunk, tensor: ranks with the same weights, with shares of them, of each sequence, of layers.
        exchange: of states along a sequence.
        precision: of matrix products.
        checkpointing: blocks are recomputed in the backward pass.
        segment: tokens of a row in memory at a time, on all ranks of `chunk` together; 0 for all.
    """

    config: Any
    context: int
    rows: int = 1
    accumulate: int = 1
    replicate: int = 1
    shard: int = 1
    chunk: int = 1
    tensor: int = 1
    exchange: Literal["chain", "parallel"] = "chain"
    precision: Literal["bf16", "float32"] = "bf16"
    checkpointing: bool = False
    segment: int = 0

    def check(self) -> None:
        """Refuse what does not divide.

        Raises:
            InputError: naming the value and the rule.
        """
        for name in ("context", "rows", "accumulate", "replicate", "shard", "chunk", "tensor"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)} must be at least 1")
        if self.segment < 0:
            raise InputError(f"segment = {self.segment} must not be negative")
        if self.at_once % self.chunk:
            raise InputError(f"chunk = {self.chunk} ranks cannot share {self.at_once} tokens evenly")
        if self.tensor == 1:
            return
        if not isinstance(self.config, ModelConfig):
            raise InputError(
                f"tensor = {self.tensor} ranks cannot share a {self.config.architecture}: Megalodon and Gecko can be "
                "cut; give the ranks to replicas, shards or chunks"
            )
        for name in ("num_heads", "norm_num_groups", "model_dim", "ffn_hidden_dim"):  # as parallel.tensor asks for
            if (count := getattr(self.config, name)) % self.tensor:
                raise InputError(f"tensor = {self.tensor} must divide {name} = {count}")

    @property
    def devices(self) -> int:
        """In all."""
        return self.replicate * self.shard * self.chunk * self.tensor

    @property
    def at_once(self) -> int:
        """Tokens of a row in memory at a time."""
        return min(self.context, self.segment or self.context)

    @property
    def local(self) -> int:
        """Of these, one rank's."""
        return self.at_once // self.chunk

    @property
    def segments(self) -> int:
        """Of a row in a step."""
        return math.ceil(self.context / self.at_once)

    @property
    def tokens(self) -> int:
        """That a step learns from."""
        return self.replicate * self.shard * self.accumulate * self.rows * self.context

    @property
    def owners(self) -> int:
        """Ranks that share one copy of a layer's weights out: chunk ranks too, once weights are shared at all."""
        return self.shard * self.chunk if self.shard > 1 else 1

    @property
    def copies(self) -> int:
        """Ranks that hold the same share, and add up its gradients."""
        return self.replicate * (1 if self.shard > 1 else self.chunk)

    @property
    def local_config(self) -> Any:
        """The model as one rank of `tensor` sees it, what is as wide as the residual stream taken whole."""
        if self.tensor == 1:
            return self.config
        widths = ("z_dim", "value_dim", "ffn_hidden_dim", "num_heads", "vocab_size")
        most = {name: -(-getattr(self.config, name) // self.tensor) for name in widths}  # rows of the vocabulary
        unrotated = min(self.config.heads_without_rope, most["num_heads"])
        return replace(self.config, **most, heads_without_rope=unrotated)

    def spans(self) -> dict[str, int]:
        """Devices in a row that a group of each dimension spans, neighbours first in tensor, then chunk."""
        chunk, shard = self.tensor * self.chunk, self.tensor * self.chunk * self.shard
        return {"tensor": self.tensor, "chunk": chunk, "shard": shard, "replicate": shard * self.replicate}
