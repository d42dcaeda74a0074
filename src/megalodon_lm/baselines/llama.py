"""Llama: a transformer with rotary positions, RMSNorm before each branch and SwiGLU networks.

Source: Touvron et al. 2023 (arXiv 2302.13971 and 2307.09288); initial values of transformers. Scaled positions: Chen et
al. 2023 (arXiv 2306.15595) and Peng et al. 2023 (YaRN, arXiv 2309.00071). docs/baselines.md has the formulas.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from ..config import InitMode
from ..configuration import Configuration, check_positive, check_sizes, require
from ..layers.embedding import Embedding
from ..layers.feed_forward import FeedForward
from ..layers.initialization import INITIALISERS
from ..layers.linear import Linear
from ..layers.norms import RMSNorm
from ..layers.prenorm_block import PrenormBlock
from ..model.decoder import Decoder, Head
from ..ops.boundaries import Boundaries
from ..ops.local_attention import LocalCache, local_attention
from ..sizing import nearest_size, usual_depth
from ..state_spec import declare
from .rope_scaling import RopeScaling, attention_factor, scaled_base

HEAD_DIM = 64  # of models of a wanted size, where it divides their width
FFN_RATIO = 8 / 3


@dataclass(frozen=True)
class LlamaConfig(Configuration):
    """The architecture of one Llama; its defaults are those of Llama 2 with 7B parameters.

    Raises:
        InputError: naming the value, the rule it breaks and the remedy.
    """

    architecture: ClassVar[str] = "llama"

    vocab_size: int = 32_000
    """Tokens in the vocabulary."""
    num_layers: int = 32
    """Blocks."""
    model_dim: int = 4096
    """Width of the residual stream [D]."""
    num_heads: int = 32
    """Attention heads [H]."""
    ffn_hidden_dim: int = 11_008
    """Width inside the feed-forward network [F]."""
    window: int = 4096
    """Most tokens that one attends to, itself counted [W]; the state holds one fewer."""
    norm_eps: float = 1e-5
    """Added to mean squares by every norm."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    rope_scaling: Literal["none", "linear", "ntk", "yarn"] = "none"
    """How a window longer than the trained one is positioned: see rope_scaling.py."""
    rope_factor: float = 1.0
    """The window over the one that the model was trained with."""
    init_mode: InitMode = "bert"
    """Initialisation of the matrices, the embedding among them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "vocab_size", "num_layers", "model_dim", "num_heads", "ffn_hidden_dim")
        require(self.window >= 2, "window", self.window, "must be at least 2")
        heads, dim = self.num_heads, self.model_dim
        require(dim % (2 * heads) == 0, "num_heads", heads, f"must cut model_dim = {dim} into heads of even width")
        check_positive(self, "norm_eps")
        require(1 < self.rope_base < math.inf, "rope_base", self.rope_base, "must be above 1, and finite")
        require(1 <= self.rope_factor < math.inf, "rope_factor", self.rope_factor, "must be at least 1, and finite")
        rule = 'must be 1 without rope_scaling; take "linear", "ntk" or "yarn"'
        require(self.rope_scaling != "none" or self.rope_factor == 1, "rope_factor", self.rope_factor, rule)

    @classmethod
    def sized(cls, parameters: int, vocab_size: int, **choices: Any) -> Self:
        """The configuration nearest to a number of parameters, in the proportions of Llama 2.

        The usual depth, F about 8/3 D, heads of 64 or of what is nearest to it and divides D.

        Args:
            parameters: wanted; from 100,000 on, with the vocabulary of bytes, within 1 %.
            vocab_size: tokens.
            choices: any but the widths.

        Raises:
            InputError: a choice that the number of parameters decides.
        """
        for field in ("model_dim", "ffn_hidden_dim"):
            require(field not in choices, field, choices.get(field), "follows from parameters; leave one of them out")
        given = {"vocab_size": vocab_size, "num_layers": usual_depth(parameters), **choices}
        cls.from_dict({"num_heads": 1, **given, "model_dim": 2 * _whole(choices.get("num_heads"))})  # their types

        def make(width: int, hidden: int) -> Any:  # mypy knows no Self here
            sizes = {"num_heads": _heads(width), "model_dim": width, "ffn_hidden_dim": hidden}
            return cls.from_dict({**sizes, **given})

        found: Self = nearest_size(make, parameters, FFN_RATIO, 2 * _whole(choices.get("num_heads")))
        return found

    @property
    def num_parameters(self) -> int:
        """Trainable scalars."""
        d = self.model_dim
        return self.num_layers * (4 * d * d + 3 * d * self.ffn_hidden_dim + 2 * d) + d + 2 * self.vocab_size * d

    def flops_per_token(self, backward: bool = False) -> int:
        """Floating point operations per token, a multiply and an add as two, where a whole window is seen.

        That is the case with a carried state. A piece of one window from nothing sees half of it on average.

        Args:
            backward: count forward and backward (three times the forward) instead of forward alone.
        """
        d = self.model_dim
        block = 4 * d * d + 3 * d * self.ffn_hidden_dim + 2 * self.window * d
        return 2 * (self.num_layers * block + self.vocab_size * d) * (3 if backward else 1)


def _whole(heads: Any) -> int:
    """A number of heads that was asked for, or 1 where that is none."""
    return heads if type(heads) is int and heads > 0 else 1


def _heads(width: int) -> int:
    """As many heads as make them most nearly HEAD_DIM wide, and even."""
    whole = [n for n in range(1, width // 2 + 1) if width % (2 * n) == 0]
    return min(whole, key=lambda n: abs(math.log(width / n / HEAD_DIM)))


class LlamaAttention(nn.Module):
    """Softmax attention with rotary positions to the last tokens of the document.

    Args:
        config: the sizes.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        dim, init = config.model_dim, INITIALISERS[config.init_mode]
        self.num_heads, self.window = config.num_heads, config.window
        head_dim, trained = dim // config.num_heads, config.window / config.rope_factor
        scaling = RopeScaling(config.rope_scaling, config.rope_factor, trained)
        self.rope_base = scaled_base(scaling, head_dim, config.rope_base)
        self.scale = attention_factor(scaling) / math.sqrt(head_dim)
        self.wq, self.wk, self.wv, self.wo = (Linear(dim, dim, False, init) for _ in range(4))

    @property
    def state_spec(self) -> dict[str, LocalCache]:
        """The last tokens: a cache."""
        shape = self.window, self.num_heads, len(self.wk.weight) // self.num_heads
        keys, values = (declare(*shape, fill="fill", kept=self.window - 1) for _ in range(2))
        fill, position = (declare(dtype=torch.int64, on_cpu=True) for _ in range(2))
        return {"attention": LocalCache(keys, values, fill, position)}

    def forward(
        self, x: Tensor, state: dict[str, LocalCache] | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, dict[str, LocalCache]]:
        """Normalised x (B, L, D) to the branch (B, L, D), and the cache at the exit."""
        q, k, v = (w(x).unflatten(-1, (self.num_heads, -1)) for w in (self.wq, self.wk, self.wv))
        cache = None if state is None else state["attention"]
        out, leaving = local_attention(q * self.scale, k, v, self.window, self.rope_base, cache, boundaries)
        return self.wo(out.flatten(-2)), {"attention": leaving}


class Llama(Decoder):
    """A transformer whose attention slides: within the window it is Llama's, and beyond it forgets; see Decoder.

    Args:
        config: the architecture.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    config: LlamaConfig
    config_class = LlamaConfig

    def __init__(self, config: LlamaConfig, activation_checkpointing: bool = False):
        c, init = config, INITIALISERS[config.init_mode]
        super().__init__(
            c,
            Embedding(c.vocab_size, c.model_dim, False, 0.0, init),
            (_block(c) for _ in range(c.num_layers)),
            Head(RMSNorm(c.model_dim, c.norm_eps), Linear(c.model_dim, c.vocab_size, False, init)),
            activation_checkpointing,
        )

    @property
    def summary(self) -> str:
        """The sizes in a few words."""
        c = self.config
        return f"a Llama of {c.num_layers} layers, width {c.model_dim} and a window of {c.window}"

    @property
    def state_remedy(self) -> str:
        """What to change where a state is too large."""
        return f"window = {self.config.window} decides its size"


def _block(config: LlamaConfig) -> PrenormBlock:
    c = config
    feed_forward = FeedForward(
        RMSNorm(c.model_dim, c.norm_eps), c.model_dim, c.ffn_hidden_dim, True, None, INITIALISERS[c.init_mode], 0.0, 0.0
    )
    return PrenormBlock(RMSNorm(c.model_dim, c.norm_eps), LlamaAttention(c), feed_forward)
