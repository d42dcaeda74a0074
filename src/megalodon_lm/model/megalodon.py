"""Megalodon, the language model: a decoder of the parts that a ModelConfig asks for."""

from collections.abc import Mapping

from ..config import GECKO, ModelConfig
from ..layers.initialization import init_embedding
from ..layers.linear import Linear
from .assembly import build_block, build_embedding, build_timestep_norm
from .decoder import Decoder, Head


class Megalodon(Decoder):
    """A decoder without a context limit, of a state that does not grow; see Decoder.

    Args:
        config: the architecture; see ModelConfig.named.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    config: ModelConfig
    config_class = ModelConfig

    def __init__(self, config: ModelConfig, activation_checkpointing: bool = False):
        output = Linear(config.model_dim, config.vocab_size, False, None if config.share_emb else init_embedding)
        super().__init__(
            config,
            build_embedding(config),
            (build_block(config, i) for i in range(config.num_layers)),
            Head(build_timestep_norm(config), output),
            activation_checkpointing,
        )

    @property
    def tied(self) -> Mapping[str, str]:
        """The head's weight to the embedding's, where they share it."""
        return {"output.output.weight": "embed.weight"} if self.config.share_emb else {}

    @property
    def summary(self) -> str:
        """The sizes in a few words."""
        c = self.config
        name = "Gecko" if all(getattr(c, key) == value for key, value in GECKO.items()) else "Megalodon"
        return f"a {name} of {c.num_layers} layers, width {c.model_dim} and chunks of {c.chunk_size}"

    @property
    def state_remedy(self) -> str:
        """What to change where a state is too large."""
        return f"chunk_size = {self.config.chunk_size} decides its size"
