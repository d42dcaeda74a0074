"""ModelConfig: every choice of the architecture, the published sizes by name, and what a model of that size costs."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .errors import InputError, nearest
from .files import write_atomically
from .tables import read_table

_LARGEST = 2**31 - 1  # of every size; whether a machine can hold it is checked where it is allocated
_MOST_LAYERS = 10_000
InitMode = Literal["he", "bert", "xavier"]
CemaKind = Literal["complex", "real", "none"]


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one decoder. Symbols in brackets are those of docs/model.md.

    Its defaults make a Megalodon (Ma et al. 2024, arXiv 2404.08801). The choices from `timestep_norm` on make a Gecko
    of it (Ma et al. 2026, arXiv 2601.06463) or take parts away, each by itself.

    Raises:
        InputError: naming the value, the rule it breaks and the remedy.
    """

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
    """Queries and keys from z divided by its root mean square (Megalodon, Gecko), or from z itself (ablation)."""

    def __post_init__(self) -> None:
        for field, kind in get_type_hints(type(self)).items():
            _check_type(field, getattr(self, field), kind)
            if kind is float:  # 10000 and 10000.0 are one configuration, with one fingerprint
                object.__setattr__(self, field, float(getattr(self, field)))
        for field in ("vocab_size", "num_layers", "model_dim", "num_heads", "z_dim", "value_dim", "ffn_hidden_dim",
                      "cema_ndim", "chunk_size", "norm_num_groups"):  # fmt: skip
            value, largest = getattr(self, field), _MOST_LAYERS if field == "num_layers" else _LARGEST
            _require(value >= 1, field, value, "must be at least 1")
            _require(value <= largest, field, value, f"must be at most {largest:,}")
        for field, whole in (("norm_num_groups", "model_dim"), ("num_heads", "z_dim"), ("num_heads", "value_dim")):
            part, total = getattr(self, field), getattr(self, whole)
            rule = f"must divide {whole} = {total}; {_largest_divisor(total, part)} does"
            _require(total % part == 0, field, part, rule)
        head = self.z_dim // self.num_heads
        even = self.z_dim + self.num_heads
        rule = f"gives heads of width {head}, but rotary positions need an even width; use {even}"
        _require(head % 2 == 0, "z_dim", self.z_dim, rule)
        heads, rule = self.heads_without_rope, f"must be from 0 to num_heads = {self.num_heads}"
        _require(0 <= heads <= self.num_heads, "heads_without_rope", heads, rule)
        for field in ("dropout", "hidden_dropout", "attention_dropout"):
            value = getattr(self, field)
            _require(0 <= value < 1, field, value, "is a probability and must be at least 0 and below 1")
        for field in ("norm_eps", "rope_base"):
            value = getattr(self, field)
            _require(value > 0 and math.isfinite(value), field, value, "must be positive and finite")

    @classmethod
    def named(cls, name: str, **changes: Any) -> "ModelConfig":
        """The configuration of a named size, with single choices changed.

        Raises:
            InputError: unknown name; the message lists the known ones.
        """
        if not isinstance(name, str) or name not in SIZES:
            raise InputError(f"unknown size {name!r}{nearest(name, SIZES)}; known sizes: {', '.join(SIZES)}")
        return cls.from_dict({**SIZES[name], **changes})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """From plain values, as read from TOML or JSON; an unknown key is refused with the nearest known one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise InputError(f"unknown key {key!r} in the model configuration{nearest(key, known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, every key."""
        return dataclasses.asdict(self)

    def save(self, path: str | Path) -> None:
        """Write as TOML or JSON, by the ending of the path, atomically."""
        path = Path(path)
        if path.suffix == ".toml":
            lines = [f"{k} = {json.dumps(v)}" for k, v in self.to_dict().items()]
            text = "\n".join(lines)
        else:
            text = json.dumps(self.to_dict(), indent=2)
        write_atomically(path, text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "ModelConfig":
        """Read from TOML or JSON, by the ending of the path.

        Raises:
            InputError: missing or malformed file, unknown key, wrong value.
        """
        path = Path(path)
        values = read_table(path, "TOML" if path.suffix == ".toml" else "JSON", "the model configuration")
        try:
            return cls.from_dict(values)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @property
    def num_parameters(self) -> int:
        """Trainable scalars, tied weights counted once."""
        d, n, z, v = self.model_dim, self.cema_ndim, self.z_dim, self.value_dim
        cema = {"complex": 4 * d * n + d, "real": 3 * d * n, "none": 0}[self.cema]
        cema += d if self.cema != "none" and self.cema_omega else 0
        attention = (d * z + z) + 2 * (d * v + v) + (d * d + d) + v * d + (4 if self.memory == "none" else 8) * z
        norms = 2 * d + d + 2 * d
        ffn = (3 if self.swiglu else 2) * d * self.ffn_hidden_dim + (d if self.rescale_nffn else 0)
        embeddings = (1 if self.share_emb else 2) * self.vocab_size * d
        return self.num_layers * (cema + attention + norms + ffn) + 2 * d + embeddings

    def flops_per_token(self, backward: bool = False) -> int:
        """Floating point operations per token, a multiply and an add as two, at the mean attention span of full chunks.

        Linear maps; scores over Z and sums over V; the states of CEMA; and of the memory per head reading M, what a
        token adds to the two sums of its chunk, and one product with M a chunk. Norms and gates are left out.

        Args:
            backward: count forward and backward (three times the forward) instead of forward alone.
        """
        d, z, v, c = self.model_dim, self.z_dim, self.value_dim, self.chunk_size
        linear = d * z + 2 * d * v + d * d + v * d + (3 if self.swiglu else 2) * d * self.ffn_hidden_dim
        span = (c + 1) / 2 + (c if self.attention == "sliding" else 0)
        per_state = {"complex": 8, "real": 3, "none": 0}  # multiply-adds: decay, input and output
        cema = per_state[self.cema] * d * self.cema_ndim
        dk, dv, memory = z // self.num_heads, v // self.num_heads, 0.0
        if self.memory == "adaptive":
            memory = self.num_heads * (2 * dk * dv + dk * dk + dk * dk * dv / c)
        forward = 2 * (self.num_layers * (linear + span * (z + v) + cema + memory) + self.vocab_size * d)
        return round(forward * (3 if backward else 1))


def _require(holds: bool, field: str, value: Any, rule: str) -> None:
    if not holds:
        raise InputError(f"{field} = {value!r} {rule}")


def _largest_divisor(whole: int, limit: int) -> int:
    """The largest number up to a limit that divides a number."""
    small = [n for n in range(1, math.isqrt(whole) + 1) if whole % n == 0]
    return max(n for n in (*small, *(whole // n for n in small)) if n <= limit)


def _check_type(field: str, value: Any, kind: Any) -> None:
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        _require(value in choices, field, value, f"must be one of {', '.join(map(repr, choices))}")
    else:
        fits = isinstance(value, kind) and not (kind is not bool and isinstance(value, bool))
        fits = fits or (kind is float and type(value) is int)
        _require(fits, field, value, f"must be of type {kind.__name__}, not {type(value).__name__}")


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
