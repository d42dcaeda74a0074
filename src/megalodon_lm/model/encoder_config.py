"""EncoderConfig: every choice of an encoder, the published sizes by name, and what one of that size costs."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from ..config import CemaKind, InitMode
from ..configuration import (
    Configuration,
    check_positive,
    check_probabilities,
    check_sizes,
    check_type,
    find_size,
    require,
)
from ..ops.bidirectional_attention import AttentionKind
from ..sizing import nearest_size, usual_depth

_WIDTHS = ("model_dim", "z_dim", "value_dim", "ffn_hidden_dim")
_ALL_STEPS = 1024  # of a sequence, where attention spans all of one and its length is not said


@dataclass(frozen=True)
class EncoderConfig(Configuration):
    """The architecture of one encoder that classifies sequences. Symbols in brackets are those of docs/model.md.

    Raises:
        InputError: naming the value, the rule it breaks and the remedy.
    """

    architecture: ClassVar[str] = "encoder"
    model_type: ClassVar[str] = "megalodon_encoder"

    num_classes: int = 10
    """Classes."""
    input: Literal["tokens", "numbers", "patches"] = "tokens"
    """What a step of a sequence is: a token, a number (a sample of sound, a pixel), or a vector of numbers."""
    vocab_size: int = 256
    """Tokens in the vocabulary; where input is tokens."""
    patch_dim: int = 1
    """Numbers of a step; where input is patches."""
    pairs: bool = False
    """An example is two sequences, and its class that of the pair."""
    direction: Literal["both", "forward"] = "both"
    """Each step sees the whole sequence, or only what came before it: then a sequence may come in pieces."""
    num_layers: int = 6
    """Blocks."""
    model_dim: int = 128
    """Width of the residual stream [D]."""
    num_heads: int = 1
    """Attention heads [H]."""
    z_dim: int = 64
    """Width of the shared query and key representation, all heads together [Z]."""
    value_dim: int = 256
    """Width of the values and the gate, all heads together [V]."""
    ffn_hidden_dim: int = 320
    """Width inside the feed-forward network [F]."""
    cema_ndim: int = 16
    """States per channel and direction of the moving average [N]."""
    cema: CemaKind = "complex"
    """Moving average: with turning states (Megalodon), without (the EMA of MEGA), or no average."""
    after_cema: Literal["rmsnorm", "silu"] = "rmsnorm"
    """What the average goes through."""
    attention: AttentionKind = "softmax"
    """Weights of attention: a softmax, or the Laplace function of each score by itself (both directions alone)."""
    chunk_size: int = 0
    """Steps in an attention chunk [c]; 0 for one of all steps."""
    norm_num_groups: int = 0
    """Groups of the norm over the sequence [G]; 0 for each feature by itself."""
    norm_eps: float = 1e-5
    """Added to variances and mean squares by every norm."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    swiglu: bool = False
    """Feed-forward with a gate (SwiGLU) instead of plain silu."""
    rescale_nffn: bool = False
    """Trainable per-feature scale on the feed-forward output, 0.1 * 0.5^layer at the start."""
    residual: Literal["two_hop", "plain"] = "plain"
    """The feed-forward network adds to the input of the block, or to its own (as for Long Range Arena)."""
    init_mode: InitMode = "he"
    """Initialisation of the linear weights."""
    dropout: float = 0.0
    """On the input and on both branches before they join the residual stream."""
    hidden_dropout: float = 0.0
    """On the moving average's branch, the gated attention output and inside the feed-forward network."""
    attention_dropout: float = 0.0
    """On the attention weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes(self, "num_classes", "vocab_size", "patch_dim", "num_layers", *_WIDTHS, "num_heads", "cema_ndim")
        for field in ("z_dim", "value_dim"):
            rule = f"must be whole heads, a multiple of num_heads = {self.num_heads}"
            require(getattr(self, field) % self.num_heads == 0, field, getattr(self, field), rule)
        rule = "gives heads of an odd width, but rotary positions need an even one"
        require(self.z_dim // self.num_heads % 2 == 0, "z_dim", self.z_dim, rule)
        for field in ("chunk_size", "norm_num_groups"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "must be at least 0")
        rule = f"must divide model_dim = {self.model_dim}, or be 0 for each feature by itself"
        require(self.model_dim % self.groups == 0, "norm_num_groups", self.norm_num_groups, rule)
        if self.direction == "forward":
            require(self.attention == "softmax", "attention", self.attention, 'needs direction = "both"')
            rule = 'needs at least 1 with direction = "forward": what is carried is a chunk'
            require(self.chunk_size >= 1, "chunk_size", self.chunk_size, rule)
        check_probabilities(self, "dropout", "hidden_dropout", "attention_dropout")
        check_positive(self, "norm_eps", "rope_base")

    @property
    def groups(self) -> int:
        """Groups of the norm over the sequence."""
        return self.norm_num_groups or self.model_dim

    @classmethod
    def named(cls, name: str, **changes: Any) -> "EncoderConfig":
        """The configuration of a named size, with single choices changed.

        Raises:
            InputError: unknown name; the message lists the known ones.
        """
        return cls.from_dict({**find_size(name, ENCODER_SIZES), **changes})

    @classmethod
    def sized(cls, parameters: int, vocab_size: int, **choices: Any) -> Self:
        """The configuration nearest to a number of parameters, in the proportions of the published sizes.

        The usual depth unless chosen otherwise; Z is half the width, V twice, F about two and a half times: it makes up
        for the width being a multiple of 8.

        Raises:
            InputError: a choice that the number of parameters decides.
        """
        for field in _WIDTHS:
            require(field not in choices, field, choices.get(field), "follows from parameters; leave one of them out")
        heads = choices.get("num_heads", 1)
        check_type("num_heads", heads, int)
        require(heads >= 1, "num_heads", heads, "must be at least 1")
        given = {"vocab_size": vocab_size, "num_layers": usual_depth(parameters), **choices}

        def of(width: int, hidden: int) -> Any:  # mypy knows no Self here
            sizes = {"model_dim": width, "z_dim": width // 2, "value_dim": 2 * width, "ffn_hidden_dim": hidden}
            return cls.from_dict({**given, **sizes})

        return nearest_size(of, parameters, 2.5, math.lcm(8, 4 * heads))

    @property
    def num_parameters(self) -> int:
        """Trainable scalars."""
        d, n, z, v = self.model_dim, self.cema_ndim, self.z_dim, self.value_dim
        directions = 2 if self.direction == "both" else 1
        average = {"complex": directions * (4 * d * n + d) + d, "real": directions * 3 * d * n + d, "none": 0}
        mixer = average[self.cema] + (d if self.after_cema == "rmsnorm" else 0)
        mixer += (d * z + z) + 2 * (d * v + v) + (d * d + d) + v * d + 4 * z
        ffn = (3 if self.swiglu else 2) * d * self.ffn_hidden_dim + (d if self.rescale_nffn else 0)
        start = {"tokens": self.vocab_size * d, "numbers": 2 * d, "patches": (self.patch_dim + 1) * d}
        head = 2 * d + (d * d + d) + (4 if self.pairs else 1) * d * self.num_classes
        return start[self.input] + self.num_layers * (mixer + ffn + 4 * d) + head

    def flops_per_token(self, backward: bool = False) -> int:
        """Floating point operations per step, a multiply and an add as two; attention to 1,024 where it sees all steps.

        Linear maps; scores over Z and sums over V; the states of the averages. Norms and gates are left out.

        Args:
            backward: count forward and backward (three times the forward) instead of forward alone.
        """
        d, z, v = self.model_dim, self.z_dim, self.value_dim
        span: float = self.chunk_size or _ALL_STEPS
        directions = 2
        if self.direction == "forward":
            span, directions = (span + 1) / 2, 1
        states = {"complex": 8, "real": 3, "none": 0}[self.cema] * directions * d * self.cema_ndim
        ffn = (3 if self.swiglu else 2) * d * self.ffn_hidden_dim
        layer = d * z + 3 * d * v + d * d + states + ffn + span * (z + v)
        start = {"tokens": 0, "numbers": d, "patches": d * self.patch_dim}[self.input]
        return round(2 * (start + self.num_layers * layer + d * d) * (3 if backward else 1))


def _size(layers: int, d: int, z: int, v: int, f: int, **choices: Any) -> dict[str, Any]:
    return dict(num_layers=layers, model_dim=d, z_dim=z, value_dim=v, ffn_hidden_dim=f, **choices)


ENCODER_SIZES: dict[str, dict[str, Any]] = {
    # Published (Ma et al. 2024): those of Long Range Arena, and of raw speech commands.
    "listops": _size(6, 80, 64, 160, 200, vocab_size=15),
    "text": _size(4, 128, 64, 256, 320, num_classes=2),
    "retrieval": _size(6, 128, 64, 256, 320, num_classes=2, pairs=True),
    "image": _size(8, 160, 96, 320, 320, input="numbers", attention="laplace"),
    "pathfinder": _size(6, 128, 64, 256, 320, num_classes=2, input="numbers", attention="laplace", after_cema="silu"),
    "pathx": _size(4, 64, 32, 128, 160, num_classes=2, input="numbers", attention="laplace", after_cema="silu"),
    "sc_raw": _size(6, 60, 30, 120, 120, num_classes=12, input="numbers", attention="laplace", chunk_size=1000),
    # Of the published number of parameters for ImageNet, in the proportions of the others.
    "imagenet": _size(12, 768, 256, 1536, 1920, num_classes=1000, input="patches", patch_dim=768, attention="laplace"),
    # Small ones, for a CPU: that of the tests, and that of the recipes here.
    "encoder_tiny": _size(2, 16, 8, 32, 32, cema_ndim=4),
    "encoder_small": _size(4, 64, 32, 128, 128, cema_ndim=8, attention="laplace", chunk_size=128),
}
