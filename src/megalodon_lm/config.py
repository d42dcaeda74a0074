"""ModelConfig: every choice of the architecture, the published sizes by name, and what a model of that size costs."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from .configuration import (
    Configuration,
    check_positive,
    check_probabilities,
    check_sizes,
    check_type,
    find_size,
    require,
)
from .sizing import nearest_size, usual_depth

_MOST_LAYERS = 10_000
_WIDTHS = ("model_dim", "z_dim", "value_dim", "ffn_hidden_dim", "norm_num_groups")
InitMode = Literal["he", "bert", "xavier"]
NUM_TAPS = 4  # of the short convolutions: tokens that a mean is taken of
CemaKind = Literal["complex", "real", "none"]


@dataclass(frozen=True)
class ModelConfig(Configuration):
    """The architecture of one decoder. Symbols in brackets are those of docs/model.md.

    Its defaults make a Megalodon (Ma et al. 2024, arXiv 2404.08801). The choices from `timestep_norm` on make a Gecko
    of it (Ma et al. 2026, arXiv 2601.06463) or take parts away, each by itself.

    Raises:
        InputError: naming the value, the rule it breaks and the remedy.
    """

    architecture: ClassVar[str] = "megalodon"

    vocab_size: int = 32_000
    """Tokens in the vocabulary."""
    num_layers: int = 12
    """Blocks."""
    model_dim: int = 1024
    """Width of the residual stream [D]."""
    num_heads: int = 1
    """Attention heads [H]."""
    z_dim: int = 256
    """Width of the shared query and key representation, all heads together [Z]."""
    value_dim: int = 2048
    """Width of the values and the gate, all heads together [V]."""
    ffn_hidden_dim: int = 2560
    """Width inside the feed-forward network [F]."""
    cema_ndim: int = 16
    """Complex states per channel of CEMA [N]."""
    chunk_size: int = 2048
    """Tokens in an attention chunk [c]."""
    norm_num_groups: int = 32
    """Groups of the norm over time [G]."""
    norm_eps: float = 1e-5
    """Added to variances and mean squares by every norm."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    swiglu: bool = False
    """Feed-forward with a gate (SwiGLU) instead of plain silu."""
    rescale_nffn: bool = False
    """Trainable per-feature scale on the feed-forward output, 0.1 * 0.5^layer at the start."""
    scale_emb: bool = False
    """Multiply embeddings by sqrt(D)."""
    share_emb: bool = False
    """Tie the output head to the embedding."""
    init_mode: InitMode = "he"
    """Initialisation of the linear weights."""
    dropout: float = 0.0
    """On the embedding and on both branches before they join the residual stream."""
    hidden_dropout: float = 0.0
    """On the CEMA branch, the gated attention output and inside the feed-forward network."""
    attention_dropout: float = 0.0
    """On the attention weights."""
    drop_keys: bool = False
    """Apply attention_dropout to the scores before the softmax (DropKey), as the authors' fused kernel does."""
    timestep_norm: Literal["cumulative", "decay"] = "cumulative"
    """Norm over time: statistics of all tokens so far (Megalodon), or ones that forget (Gecko)."""
    attention: Literal["chunk", "sliding"] = "chunk"
    """A token sees its own chunk (Megalodon), or also the whole chunk before it (Gecko)."""
    heads_without_rope: int = 0
    """As many heads, the last ones, are not rotated (an option of Gecko's code)."""
    memory: Literal["none", "adaptive"] = "none"
    """Adaptive working memory: one matrix a head of all chunks that attention has left behind (Gecko)."""
    residual: Literal["two_hop", "plain"] = "two_hop"
    """The feed-forward network adds to the input of the block (Megalodon), or to its own (Gecko, and most others)."""
    cema: CemaKind = "complex"
    """Moving average: with turning states (Megalodon, Gecko), without (the EMA of MEGA), or no average (ablation)."""
    cema_omega: bool = True
    """Trained weights on the average's own input (Megalodon's code). False: the input itself is added, and gamma is
    small from the start instead of scaled (Gecko)."""
    attention_norm: Literal["timestep", "layer"] = "timestep"
    """At the entry of a block: the norm over time, or LayerNorm (ablation). The final norm stays over time."""
    normalize_attention: bool = True
    """Queries and keys divided by their root mean square (Megalodon, Gecko), or as they are (ablation)."""
    mixer: Literal["cema", "convolution"] = "cema"
    """What comes before attention: a moving average and one z (Megalodon, Gecko), or a short convolution over queries,
    keys and values each, with a gate on the memory too (Gecko's later code); the choices of `cema` then mean nothing.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        rule = f"must be at most {_MOST_LAYERS:,}"
        require(self.num_layers <= _MOST_LAYERS, "num_layers", self.num_layers, rule)
        check_sizes(self, "vocab_size", "num_layers", *_WIDTHS, "num_heads", "cema_ndim", "chunk_size")
        for field, whole in (("norm_num_groups", "model_dim"), ("num_heads", "z_dim"), ("num_heads", "value_dim")):
            part, total = getattr(self, field), getattr(self, whole)
            rule = f"must divide {whole} = {total}; {_largest_divisor(total, part)} does"
            require(total % part == 0, field, part, rule)
        head = self.z_dim // self.num_heads
        even = self.z_dim + self.num_heads
        rule = f"gives heads of width {head}, but rotary positions need an even width; use {even}"
        require(head % 2 == 0, "z_dim", self.z_dim, rule)
        heads, rule = self.heads_without_rope, f"must be from 0 to num_heads = {self.num_heads}"
        require(0 <= heads <= self.num_heads, "heads_without_rope", heads, rule)
        check_probabilities(self, "dropout", "hidden_dropout", "attention_dropout")
        check_positive(self, "norm_eps", "rope_base")

    @classmethod
    def named(cls, name: str, **changes: Any) -> "ModelConfig":
        """The configuration of a named size, with single choices changed.

        Raises:
            InputError: unknown name; the message lists the known ones.
        """
        return cls.from_dict({**find_size(name, SIZES), **changes})

    @classmethod
    def sized(cls, parameters: int, vocab_size: int, **choices: Any) -> Self:
        """The configuration nearest to a number of parameters, in the proportions of the small named sizes.

        The usual depth and a chunk of 512 unless chosen otherwise; Z is half the width, V twice, F about twice: it
        makes up for the width being a multiple of 32, and for what else is chosen.

        Args:
            parameters: wanted; from 100,000 on, with the vocabulary of bytes, within 1 %.
            vocab_size: tokens.
            choices: any but the widths.

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
            return cls.from_dict({**_byte_model(width), **given, "ffn_hidden_dim": hidden})

        return nearest_size(of, parameters, 2, math.lcm(32, 4 * heads))  # whole groups of norms, heads of even width

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every key; without the name, which files of a Megalodon never had."""
        return dataclasses.asdict(self)

    @property
    def reading_unit(self) -> int:
        """A chunk, after which no keys and values need to be kept, or with sliding attention those of one chunk."""
        return self.chunk_size

    @property
    def num_parameters(self) -> int:
        """Trainable scalars, tied weights counted once."""
        d, n, z, v = self.model_dim, self.cema_ndim, self.z_dim, self.value_dim
        if self.mixer == "cema":
            mixer = {"complex": 4 * d * n + d, "real": 3 * d * n, "none": 0}[self.cema]
            mixer += d if self.cema != "none" and self.cema_omega else 0
            mixer += (d * z + z) + 2 * (d * v + v) + (d * d + d) + v * d + (4 if self.memory == "none" else 8) * z + d
        else:
            mixer = 2 * d * z + 3 * d * v + v + NUM_TAPS * (2 * z + v) + z
        norms = 2 * d + 2 * d
        ffn = (3 if self.swiglu else 2) * d * self.ffn_hidden_dim + (d if self.rescale_nffn else 0)
        embeddings = (1 if self.share_emb else 2) * self.vocab_size * d
        return self.num_layers * (mixer + norms + ffn) + 2 * d + embeddings

    def flops_per_token(self, backward: bool = False) -> int:
        """Floating point operations per token, a multiply and an add as two, at the mean attention span of full chunks.

        Linear maps; scores over Z and sums over V; the states of CEMA, or the taps of convolutions; and of the memory
        per head reading M, what a token adds to the two sums of its chunk, and one product with M a chunk. Norms and
        gates are left out.

        Args:
            backward: count forward and backward (three times the forward) instead of forward alone.
        """
        d, z, v, c = self.model_dim, self.z_dim, self.value_dim, self.chunk_size
        span = (c + 1) / 2 + (c if self.attention == "sliding" else 0)
        if self.mixer == "cema":
            per_state = {"complex": 8, "real": 3, "none": 0}  # multiply-adds: decay, input and output
            mixer = d * z + 3 * d * v + d * d + per_state[self.cema] * d * self.cema_ndim
        else:
            mixer = 2 * d * z + 3 * d * v + NUM_TAPS * (2 * z + v)
        ffn = (3 if self.swiglu else 2) * d * self.ffn_hidden_dim
        dk, dv, memory = z // self.num_heads, v // self.num_heads, 0.0
        if self.memory == "adaptive":
            memory = self.num_heads * (2 * dk * dv + dk * dk + dk * dk * dv / c)
        forward = 2 * (self.num_layers * (mixer + ffn + span * (z + v) + memory) + self.vocab_size * d)
        return round(forward * (3 if backward else 1))


def _largest_divisor(whole: int, limit: int) -> int:
    """The largest number up to a limit that divides a number."""
    small = [n for n in range(1, math.isqrt(whole) + 1) if whole % n == 0]
    return max(n for n in (*small, *(whole // n for n in small)) if n <= limit)


def _byte_model(dim: int) -> dict[str, Any]:
    return dict(
        vocab_size=259, num_layers=6, model_dim=dim, z_dim=dim // 2, value_dim=2 * dim, ffn_hidden_dim=2 * dim,
        chunk_size=512, norm_num_groups=dim // 32, swiglu=True,
    )  # fmt: skip


_PG19 = dict(num_layers=24, model_dim=2048, num_heads=2, z_dim=512, value_dim=4096, norm_num_groups=64)
_7B = dict(num_layers=32, model_dim=4096, num_heads=4, z_dim=1024, value_dim=8192, norm_num_groups=64)

GECKO: dict[str, Any] = dict(
    timestep_norm="decay", attention="sliding", memory="adaptive", residual="plain", cema_omega=False,
    rope_base=500_000.0,
)  # fmt: skip
"""The choices that make a Gecko of a Megalodon."""
LATER_GECKO: dict[str, Any] = {**GECKO, "mixer": "convolution"}
"""Those of its authors' later code."""
_TINY = dict(vocab_size=259, num_layers=2, model_dim=64, z_dim=32, value_dim=128, ffn_hidden_dim=128, cema_ndim=8,
             chunk_size=64, norm_num_groups=4, swiglu=True)  # fmt: skip
_BENCH = dict(vocab_size=256, num_layers=6, model_dim=512, num_heads=2, z_dim=256, value_dim=1024, ffn_hidden_dim=1024,
              chunk_size=1024, norm_num_groups=16, swiglu=True)  # fmt: skip

SIZES: dict[str, dict[str, Any]] = {
    # Published: the presets of the authors' code, and the 7B of each paper.
    "mega200M": {},
    "mega1.3B": dict(_PG19, ffn_hidden_dim=4864),
    "mega1.3B_pg19": dict(_PG19, ffn_hidden_dim=3584, swiglu=True, scale_emb=True, share_emb=True),
    "mega7.1B": dict(_7B, ffn_hidden_dim=11264),
    "mega7.3B": dict(_7B, ffn_hidden_dim=8192, swiglu=True),
    "paper7B": dict(_7B, ffn_hidden_dim=8192, swiglu=True, chunk_size=4096, rope_base=100_000.0),
    "gecko7B": {**_7B, **GECKO, "ffn_hidden_dim": 8192, "swiglu": True},
    "gecko7.1B": {**_7B, **LATER_GECKO, "ffn_hidden_dim": 8192, "swiglu": True, "chunk_size": 4096},
    # Small ones, for a CPU and bytes: that of the tests, those of the quickstart, that of the speed comparison.
    "tiny": _TINY,
    "gecko_tiny": {**_TINY, **GECKO},
    "nano": _byte_model(96),
    "micro": _byte_model(128),
    "mini": _byte_model(192),
    "small": _byte_model(256),
    "gecko_small": {**_byte_model(256), **GECKO},
    "bench22M": _BENCH,
    "gecko22M": {**_BENCH, **GECKO},
}  # fmt: skip
